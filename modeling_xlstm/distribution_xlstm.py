"""What a model does where Transformers spreads it over processes, loads its parts, and saves them."""

from functools import partial
from typing import Any

from torch import Tensor
from transformers import __version__
from transformers.modeling_utils import PreTrainedModel

from .backends import COMBINES_PARALLELISM
from .layers_xlstm import SLSTMLayer
from .split_checkpoint import join_weights, opened, split_weights, without_converters
from .tensor_parallel import split_projections


class DistributionMixin:
    """Hooks of an `XLSTMPreTrainedModel`, which this is a base of, for a `DistributedConfig`."""

    config: Any
    all_tied_weights_keys: Any

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any):
        """As in Transformers, after the model was made ready for it, its weights still to be loaded.

        Raises:
            ValueError: Processes cannot share the heads of the model evenly.
            RuntimeError: This version of Transformers would leave out a kind of parallelism that is asked for.
        """
        tp, fsdp, pp = (getattr(distributed_config, f"{kind}_size", 1) for kind in ("tp", "fsdp", "pp"))
        if sum(size > 1 for size in (tp, fsdp, pp)) > 1 and not COMBINES_PARALLELISM:
            raise RuntimeError(f"More than one kind of parallelism needs Transformers 5.23, got {__version__}.")
        if tp > 1:
            split_projections(model, tp)
        if fsdp > 1 or getattr(distributed_config, "dp_replicate_size", 1) > 1:
            # FSDP2 makes parts of each weight, of one that has two names once only if it is tied by then
            if tp == 1:
                model.tie_weights()
            elif model.all_tied_weights_keys:
                vars(model.get_output_embeddings())["tied"] = model.get_input_embeddings()
            for module in model.modules():
                if isinstance(module, SLSTMLayer):  # its gates may be in float32, and FSDP2 wants one dtype in a module
                    module.to(module.gate_weight.dtype)
        return super().maybe_distribute_model(model, distributed_config, *args)  # type: ignore[misc]

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any):
        """As in Transformers; under tensor parallelism each process reads its rows of what is one matrix in a file."""
        load = partial(PreTrainedModel._load_pretrained_model, model)
        if model.config.ranks == 1:
            return load(state_dict, checkpoint_files, load_config, *args)
        with opened(state_dict, checkpoint_files) as weights:
            split = split_weights(weights, model.config)
            return load(split, checkpoint_files, without_converters(load_config), *args)

    def gather_sharded_state_dict_for_save(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As in Transformers, tied weights once, and matrices of several projections in one again."""
        weights = super().gather_sharded_state_dict_for_save(*args, **kwargs)  # type: ignore[misc]
        if self.config.processes > 1:
            weights = {name: x for name, x in weights.items() if name not in self.all_tied_weights_keys}
        return weights if self.config.ranks == 1 else join_weights(weights, self.config)

    def save_distributed_checkpoint(self, model_to_save: Any, *args: Any, **kwargs: Any) -> None:
        """As in Transformers, which cannot write a weight under two names: the second is of a copy."""

        def copy_tied(module: Any, weights: dict[str, Tensor], *_: Any) -> None:
            weights |= {name: weights[name].clone() for name in module.all_tied_weights_keys}

        hook = model_to_save.register_state_dict_post_hook(copy_tied)
        try:
            super().save_distributed_checkpoint(model_to_save, *args, **kwargs)  # type: ignore[misc]
        finally:
            hook.remove()
