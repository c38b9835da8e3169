"""What a model does where Transformers spreads it over processes, loads its parts, and saves them."""

import hashlib
import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from transformers import __version__
from transformers.modeling_utils import PreTrainedModel

from .backends import COMBINES_PARALLELISM
from .inputs_xlstm import BOUNDARIES
from .layers_xlstm import SLSTMLayer
from .linear import SHARED
from .split_checkpoint import FLOATS, dtypes_of, join_weights, opened, split_weights, whole_weights, without_converters
from .tensor_parallel import split_projections


class DistributionMixin:
    """Hooks of an `XLSTMPreTrainedModel`, which this is a base of, for a `DistributedConfig`."""

    config: Any
    all_tied_weights_keys: Any
    text_group: ProcessGroup | None = None  # of processes that must read the same text, as they share heads or blocks

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any):
        """As in Transformers, after the model was made ready for it, its weights still to be loaded.

        Raises:
            ValueError: Processes cannot share the heads or blocks of the model, or not in this way.
            RuntimeError: This version of Transformers would leave out a kind of parallelism that is asked for.
        """
        tp, fsdp, pp = (getattr(distributed_config, f"{kind}_size", 1) for kind in ("tp", "fsdp", "pp"))
        if sum(size > 1 for size in (tp, fsdp, pp)) > 1 and not COMBINES_PARALLELISM:
            raise RuntimeError(f"More than one kind of parallelism needs Transformers 5.23, got {__version__}.")
        if pp > 1 and tp > 1:
            raise ValueError(f"Processes of a pipeline cannot share heads too, got pp_size={pp} and tp_size={tp}.")
        if model.config.processes > 1 and getattr(model, "is_quantized", False):
            raise ValueError("A model must not be quantised to be shared by processes, got one that is.")
        if pp > 1 and model.get_output_embeddings() is None:
            raise ValueError(f"A pipeline must be of a language model, got a {type(model).__name__}.")
        if pp > model.config.num_hidden_layers:
            raise ValueError(f"pp_size must be at most num_hidden_layers = {model.config.num_hidden_layers}, got {pp}.")
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
        model = super().maybe_distribute_model(model, distributed_config, *args)  # type: ignore[misc]
        if tp > 1:
            model.text_group = model.base_model.text_group = model.base_model.layers[0].mixer.group
            for module in model.modules():
                if "forward" in vars(module):
                    setattr(module, SHARED, module.forward)
        if pp > 1:
            model.text_group = model._pp_stage.pp_group
            model.forward = _through_stages(model, model.forward)
        return model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ):  # fmt: skip
        """As in Transformers; where processes share the weights, each reads what it has of matrices, which a file may
        have in one or in parts.

        Raises ValueError if a weight is in two files, or of numbers that are no weights: Transformers would take them;
        or if one has another shape than that of the model.
        """
        load = partial(PreTrainedModel._load_pretrained_model, model)
        files = (checkpoint_files or ()) if state_dict is None else ()
        dtypes = dtypes_of(path for path in files if str(path).endswith(".safetensors"))
        if model.config.processes == 1:
            info, offloaded = load(state_dict, checkpoint_files, load_config, *args, **kwargs)
        else:
            with opened(state_dict, checkpoint_files, model.config.ranks) as weights:
                arrange = whole_weights if model.config.ranks == 1 else split_weights
                weights = arrange(weights, model.config)
                info, offloaded = load(weights, checkpoint_files, without_converters(load_config), *args, **kwargs)
        if info.mismatched_keys and not load_config.ignore_mismatched_sizes:  # before all of the model takes memory
            name, got, shape = min(info.mismatched_keys)
            raise ValueError(
                f"The weight {name} must have shape {tuple(shape)} by the configuration, got {tuple(got)}."
            )
        wrong = {name for name, dtype in dtypes.items() if dtype not in FLOATS} - info.unexpected_keys
        if wrong and not load_config.is_quantized:
            name = min(wrong)
            raise ValueError(f"The weight {name} must be of dtype {', '.join(FLOATS)}, got {dtypes[name]}.")
        return info, offloaded

    def _load_and_finalize_distributed_pretrained_model(self: Any, folder: Any, *args: Any):
        """As in Transformers, whose error names a weight only. Raises ValueError if one of the model is missing."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        missing = sorted(self.state_dict().keys() - stored.keys())
        if missing:
            raise ValueError(
                f"The distributed checkpoint {folder} must hold {missing[0]}, got none. One saved with a tp_size above "
                "1 is read with such a one, and one saved without it is read without; files that "
                "consolidate_distributed_checkpoint of transformers.distributed.checkpoint makes are read with any."
            )
        return super()._load_and_finalize_distributed_pretrained_model(folder, *args)  # type: ignore[misc]

    def settle_loaded(self: Any) -> None:
        """Makes new weights, which are random, the same in all processes that have them, once a model is loaded.

        Raises ValueError if embeddings that are tied were stored as two weights, one of which FSDP2 would not have.
        """
        ends = [getattr(x, "weight", None) for x in (self.get_output_embeddings(), self.get_input_embeddings())]
        apart = self.config.tie_word_embeddings and ends[0] is not None and ends[0] is not ends[1]
        if apart and getattr(getattr(self.config, "distributed_config", None), "dp_size", 1) > 1:
            raise ValueError(
                "Tied embeddings must be one weight in a checkpoint for FSDP2, got two that differ: load it with "
                "tie_word_embeddings=False."
            )
        for x in self.parameters() if self.config.processes > 1 else ():
            names = x.device_mesh.mesh_dim_names or ("tp",) if isinstance(x, DTensor) else ()
            local = (x.to_local() if isinstance(x, DTensor) else x).detach()
            if "dp_replicate" in names:
                dist.broadcast(local, group=x.device_mesh.get_group("dp_replicate"), group_src=0)
            if self.config.ranks > 1 and "tp" not in names:
                dist.broadcast(local, group=self.text_group, group_src=0)

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


def _through_stages(model: Any, forward: Callable) -> Callable:
    """`forward` of a pipeline of Transformers, which gives logits and a state; all else is refused."""

    signature = inspect.signature(forward)

    @wraps(forward)
    def checked(*args: Any, **kwargs: Any) -> Any:
        named = signature.bind_partial(*args, **kwargs).arguments
        named = {"output_hidden_states": model.config.output_hidden_states, **named, **named.get("kwargs", {})}
        wanted = ("labels", "shift_labels", "output_hidden_states", "output_gates", *BOUNDARIES)
        given = [name for name in wanted if named.get(name) is not None and named[name] is not False]
        if given or model.training:
            got = " and ".join(given) or "training mode"
            raise ValueError(f"A pipeline gives logits in evaluation mode, of ids, embeddings and a mask, got {got}.")
        with torch.no_grad():
            return forward(*args, **kwargs)

    return checked


def first_of_all(name: str | None, model: Any) -> str | None:
    """The first of the names that the processes have which share `model`, the same in each; that given in one alone."""
    if model.config.processes == 1 and not any(hasattr(x, "ds_tensor") for x in model.parameters()):
        return name
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, name)
    return next(filter(None, names), None)


def check_alike(group: ProcessGroup | None, what: str, *tensors: Tensor | None) -> None:
    """Raises ValueError, in each process of the group (of all), unless the tensors, `what`, are the same in each."""
    hashed = hashlib.sha256()
    for x in tensors:
        hashed.update(repr(None if x is None else (x.dtype, tuple(x.shape))).encode())
        hashed.update(b"" if x is None else x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    found: list[bytes] = [b""] * dist.get_world_size(group)
    dist.all_gather_object(found, hashed.digest(), group)
    others = [i for i, digest in enumerate(found) if digest != found[0]]
    if others:
        raise ValueError(
            f"Processes that share a model or a text must be given the same {what}, got another in process {others[0]} "
            "of them than in process 0."
        )


def random_state(device: torch.device) -> Tensor:
    """That of the random numbers of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.random.get_rng_state()


SEED = "seed, by torch.manual_seed, to draw the same random numbers"
