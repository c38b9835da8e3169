"""The code that a published checkpoint carries, for `trust_remote_code=True` where this package is not installed."""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

import modeling_xlstm


AUTO_MAP = {
    "AutoConfig": "configuration_xlstm.XLSTMConfig",
    "AutoModel": "modeling_xlstm.XLSTMModel",
    "AutoModelForCausalLM": "modeling_xlstm.XLSTMForCausalLM",
    "AutoModelForSequenceClassification": "modeling_xlstm.XLSTMForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_xlstm.XLSTMForTokenClassification",
}


def code_files() -> list[Path]:
    """The files that the classes of `AUTO_MAP` are in, and all that these import from beside them."""
    folder = Path(modeling_xlstm.__file__).parent
    entries = sorted({folder / f"{name.partition('.')[0]}.py" for name in AUTO_MAP.values()})
    imported = {Path(path) for entry in entries for path in get_relative_import_files(entry)}
    return sorted({*entries, *imported})
