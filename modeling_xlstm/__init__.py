"""xLSTM (mLSTM, sLSTM) for Hugging Face Transformers. Importing the package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cache_xlstm import LayerState, XLSTMCache
from .checkpoint_xlstm import conversions
from .configuration_xlstm import XLSTMConfig
from .export_xlstm import export_decode, export_prefill, initial_states, package_decode
from .layers_xlstm import GateActivations, MLSTMLayer, MLSTMPreUpLayer, SLSTMLayer
from .mlstm import MLSTMState, mlstm_chunkwise, mlstm_step
from .modeling_xlstm import (
    XLSTMBlock,
    XLSTMForCausalLM,
    XLSTMForSequenceClassification,
    XLSTMForTokenClassification,
    XLSTMModel,
    XLSTMPreTrainedModel,
    count_parameters,
)
from .slstm import SLSTMState, slstm_scan, slstm_step


__version__ = "0.1.0"
__all__ = [
    "GateActivations",
    "LayerState",
    "MLSTMLayer",
    "MLSTMPreUpLayer",
    "MLSTMState",
    "SLSTMLayer",
    "SLSTMState",
    "XLSTMBlock",
    "XLSTMCache",
    "XLSTMConfig",
    "XLSTMForCausalLM",
    "XLSTMForSequenceClassification",
    "XLSTMForTokenClassification",
    "XLSTMModel",
    "XLSTMPreTrainedModel",
    "count_parameters",
    "export_decode",
    "export_prefill",
    "initial_states",
    "mlstm_chunkwise",
    "mlstm_step",
    "package_decode",
    "slstm_scan",
    "slstm_step",
]

AutoConfig.register(XLSTMConfig.model_type, XLSTMConfig)
AutoModel.register(XLSTMConfig, XLSTMModel)
AutoModelForCausalLM.register(XLSTMConfig, XLSTMForCausalLM)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[XLSTMConfig.model_type] = "XLSTMForCausalLM"  # where Trainer looks to shift labels
AutoModelForSequenceClassification.register(XLSTMConfig, XLSTMForSequenceClassification)
AutoModelForTokenClassification.register(XLSTMConfig, XLSTMForTokenClassification)

# Checkpoints of Transformers' own xLSTM, such as NX-AI/xLSTM-7b, are models of this package from here on.
CONFIG_MAPPING.register("xlstm", XLSTMConfig, exist_ok=True)
register_checkpoint_conversion_mapping(XLSTMConfig.model_type, conversions(), overwrite=True)
