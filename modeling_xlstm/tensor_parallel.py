"""Tensor parallelism: each process has some heads of every mixer, and some channels of every feed-forward.

Transformers reads the plan (`parallel_plan.tp_plan`) where `from_pretrained` is given a `DistributedConfig`, and asks
the styles here how a parameter is split, and what a module is to do besides. Between blocks all processes of the group
have all of x. A mixer or feed-forward takes what it needs of x, computes with the weights that it has, and its output
projection adds up what the processes have: one all-reduce, and one of the gradient of x. Besides,

- a pre-up mLSTM computes its scalar gates from q, k and v of all heads: `2 H` numbers a token are added up;
- an sLSTM has no output projection: its heads are gathered, and in the backward pass the gradients of its slice of x.

A matrix of several (rows [q | k | v | o]) is several linear layers here, each split by heads. Files have the matrix all
the same: of that which is read each process reads its rows, and where weights are saved they are put together.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel, TensorParallelLayer

from .custom_op import differentiable_once, is_compiling
from .layers_xlstm import GateActivations, GateLinear, MLSTMLayer, SLSTMLayer
from .linear import is_hooked, is_itself, own_part
from .parallel_plan import Parts, check_divisible, parts_of


class _Copy(torch.autograd.Function):
    """What all processes have, given to each; its gradients are added up."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @differentiable_once("tensor parallelism")
    def backward(ctx, dx):
        dx = dx.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(dx, group=ctx.group)
        return dx, None


class _Sum(torch.autograd.Function):
    """What the processes have, added up for all, in place; each has all of its gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class _Own(torch.autograd.Function):
    """This process's part of the last axis; its gradients are gathered."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _own(x, -1, group)

    @staticmethod
    @differentiable_once("tensor parallelism")
    def backward(ctx, dx):
        return _gathered(dx, -1, ctx.group), None


class _Gather(torch.autograd.Function):
    """The parts of an axis that the processes have, for all; each has all of its gradient."""

    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return _gathered(x, dim, group)

    @staticmethod
    @differentiable_once("tensor parallelism")
    def backward(ctx, dy):
        return _own(dy, ctx.dim, ctx.group), None, None


def _own(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


def _gathered(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, dim)


class _Packed(torch.autograd.Function):
    """`x @ packed.T`; the gradients of its rows are those of `weights`, which are views of them."""

    @staticmethod
    def forward(ctx, x, packed, *weights):
        ctx.save_for_backward(x, packed)
        ctx.sizes = [len(weight) for weight in weights]
        return F.linear(x, packed)

    @staticmethod
    @differentiable_once("tensor parallelism")
    def backward(ctx, dy):
        x, packed = ctx.saved_tensors
        dx, _, *dweights = ctx.needs_input_grad
        weights = [None] * len(dweights)
        if any(dweights):
            weights = (dy.flatten(0, -2).t() @ x.flatten(0, -2)).split(ctx.sizes)
        return dy @ packed if dx else None, None, *weights


class SplitLinear(nn.ModuleDict):
    """A linear layer as several, of which each gives some of its outputs: in one product, where that is possible."""

    def __init__(self, module: nn.Linear, parts: Parts):
        super().__init__()
        self.in_features = module.in_features
        self.packed: Tensor | None = None
        self.packed_bias: Tensor | None = None
        for name, size in zip(parts.names, parts.sizes(module.out_features), strict=True):
            self[name] = _part(module, size, module.in_features, module.bias is not None)

    @property
    def parts(self) -> list[Any]:
        return list(self.values())

    def pack(self) -> None:
        """Puts what this process has of the weights, and of biases, into one tensor, of which they are views then."""
        self.packed, self.packed_bias = self._pack("weight"), self._pack("bias")

    @torch.no_grad()
    def _pack(self, name: str) -> Tensor | None:
        wholes = [getattr(part, name) for part in self.parts]
        if wholes[0] is None:
            return None
        local = [x.to_local() for x in wholes]
        packed = torch.cat(local)
        for part, x, rows in zip(self.parts, wholes, packed.split([len(x) for x in local]), strict=True):
            options = {"shape": x.shape, "stride": x.stride(), "run_check": False}
            whole = DTensor.from_local(rows, x.device_mesh, x.placements, **options)
            setattr(part, name, nn.Parameter(whole, x.requires_grad))
        return packed

    def as_one(self, kind: type[nn.Linear]) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the one layer of a kind that this process has, if no part does anything else."""
        for packed, name in ((self.packed, "weight"), (self.packed_bias, "bias")):
            wholes = [getattr(part, name) for part in self.parts]
            if packed is not None and not (all(map(is_split_once, wholes)) and _follow(packed, map(own_part, wholes))):
                return None
        if self.packed is None or not all(is_itself(part, kind) for part in self.parts):
            return None
        return self.packed, self.packed_bias

    def forward(self, x: Tensor) -> Tensor:
        if self._is_one(x):
            weights = [part.weight.to_local() for part in self.parts]
            if _follow(self.packed, weights):
                return _Packed.apply(x, self.packed, *weights)
            self.packed = None
        return torch.cat([part(x) for part in self.parts], -1)

    def _apply(self, *args: Any, **kwargs: Any):
        """As in PyTorch, which moves the weights each by itself."""
        super()._apply(*args, **kwargs)
        if self.packed is not None:
            self.pack()
        return self

    def _is_one(self, x: Tensor) -> bool:
        """Whether one product of plain tensors gives what the parts would."""
        return (
            self.packed is not None
            and x.dtype == self.packed.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and not is_compiling()
            and all(type(x) is nn.Linear and x.bias is None for x in self.parts)
            and not any(x._forward_hooks or x._forward_pre_hooks for x in self.parts)
        )


def is_split_once(weight: Any) -> bool:
    """Whether a weight is split over processes along one axis of a mesh."""
    return isinstance(weight, DTensor) and weight.device_mesh.ndim == 1


def _follow(packed: Tensor, weights: Iterable[Tensor]) -> bool:
    """Whether the weights are still the rows of `packed`: they may have been moved, or replaced."""
    address = packed.data_ptr()
    for weight in weights:
        if weight.data_ptr() != address or weight.dtype != packed.dtype:
            return False
        address += weight.nbytes
    return True


def pack_projections(model: nn.Module) -> None:
    """Has the parts of a matrix computed in one product, of a model whose parts are split over processes once."""
    for module in model.modules():
        if isinstance(module, SplitLinear) and all(
            type(x) in (nn.Linear, GateLinear) and is_split_once(x.weight) for x in module.parts
        ):
            module.pack()


class SplitGates(nn.ModuleDict):
    """The scalar gates of a pre-up mLSTM as three linear layers, of q, k and v, that add up, and a bias."""

    def __init__(self, module: GateLinear, parts: Parts):
        super().__init__()
        for name, size in zip(parts.names, parts.sizes(module.in_features), strict=True):
            self[name] = _part(module, module.out_features, size, bias=False)
        self.bias = module.bias

    def forward(self, x: Tensor) -> Tensor:
        """Without the bias."""
        q, k, v = (part(piece) for part, piece in zip(self.values(), x.chunk(3, -1), strict=True))
        return q + k + v


def _part(module: nn.Linear, outputs: int, inputs: int, bias: bool) -> nn.Linear:
    """A linear layer like `module`, of another size, its weights still to be loaded."""
    part = copy(module)
    nn.Module.__init__(part)  # with hooks of its own
    part.out_features, part.in_features = outputs, inputs
    weight = module.weight
    part.weight = nn.Parameter(weight.new_empty(outputs, inputs), weight.requires_grad)
    part.register_parameter("bias", nn.Parameter(weight.new_empty(outputs), weight.requires_grad) if bias else None)
    return part


def split_projections(model: Any, ranks: int) -> None:
    """Makes several linear layers of those that stand in one, for as many processes.

    Raises ValueError if the heads or channels of the model cannot be shared evenly, or its weights are quantised.
    """
    check_divisible(model.config, ranks)
    for name, parts in parts_of(model.config).items():
        owner, attribute = name.split(".")
        for block in _blocks(model):
            module = getattr(getattr(block, owner), attribute, None)
            if module is not None and type(module) not in (nn.Linear, GateLinear):
                kind = type(module).__name__
                raise ValueError(f"A model must not be quantised to be shared by heads, got a {kind} for {name}.")
            if module is not None:
                setattr(getattr(block, owner), attribute, (SplitGates if parts.dim else SplitLinear)(module, parts))
    for block in _blocks(model):
        if isinstance(block.mixer, MLSTMLayer):
            q, k, v, o = block.mixer.splits
            block.mixer.splits = q // ranks, k // ranks, v // ranks, o // ranks


class BlockWeights(NamedTuple):
    """What this process has of a block of xLSTM-7B. Linear layers are without a bias, and norms are RMS norms."""

    mixer_norm: Tensor
    qkvo: Tensor
    gate: Tensor
    gate_bias: Tensor
    head_norm: Tensor
    head_norm_bias: Tensor | None
    out: Tensor
    ffn_norm: Tensor
    up: Tensor
    down: Tensor


def block_weights(block: Any) -> BlockWeights | None:
    """Those of a block that does nothing else than what they say."""
    mixer, ffn = block.mixer, block.ffn
    if type(mixer) is not MLSTMLayer or not (mixer.config.norm_type == "rms_norm" and block.mixer_norm.bias is None):
        return None
    layers = [mixer.qkvo_proj, mixer.out_proj, ffn.up_proj, ffn.down_proj]
    found = [_weights(x, nn.Linear) for x in layers], _weights(mixer.gate_proj, GateLinear)
    if any(x is None or x[1] is not None for x in found[0]) or found[1] is None or found[1][1] is None:
        return None
    if any(is_hooked(module) for module in block.modules()):
        return None
    (qkvo, out, up, down), norm = (x[0] for x in found[0]), mixer.head_norm
    norms = own_part(norm.weight), own_part(norm.bias)
    return BlockWeights(block.mixer_norm.weight, qkvo, *found[1], *norms, out, block.ffn_norm.weight, up, down)


def _weights(module: Any, kind: type[nn.Linear]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer of a kind, whole or shared, if it is no more than that."""
    if isinstance(module, SplitLinear):
        return module.as_one(kind)
    if not is_itself(module, kind) or not (type(module.weight) is nn.Parameter or is_split_once(module.weight)):
        return None
    return own_part(module.weight), module.bias


def _blocks(model: Any) -> nn.ModuleList:
    return model.base_model.layers


@contextmanager
def _local_parameters(module: Any) -> Iterator[None]:
    """Inside, the module's own parameters are what this process has of them."""
    whole = {name: x for name, x in module._parameters.items() if isinstance(x, DTensor)}
    module._parameters.update({name: x.to_local() for name, x in whole.items()})  # with their gradients
    try:
        yield
    finally:
        module._parameters.update(whole)


class _Style(TensorParallelLayer):
    """Parameters are split along an axis, by default the first; the module computes with what a process has."""

    dim = 0

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        x = module._parameters.get(param)
        if x is not None:
            split = distribute_tensor(x, mesh, [Shard(self.dim)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(split, requires_grad=x.requires_grad)

    def install_forward(self, module: Any, mesh: DeviceMesh, **_: Any) -> nn.Module:
        module.group = mesh.get_group()
        module.forward = partial(self.forward, module, module.group, module.forward)
        return module

    def forward(self, module: Any, group: ProcessGroup, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """What the module does in place of its own `forward`."""
        with _local_parameters(module):
            return forward(*args, **kwargs)


class _Columns(_Style):
    """Each process has the columns of a weight that meet the inputs that it has. What it gives is to be added up."""

    dim = 1


class _SumStyle(_Columns):
    """The same, added up, and the bias once."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        if param != "bias":
            super().shard_param(module, param, mesh)

    def forward(self, module: Any, group: ProcessGroup, forward: Callable, *args: Any, **kwargs: Any) -> Tensor:
        with _local_parameters(module):
            y = _Sum.apply(F.linear(args[0], module.weight), group)
        return y if module.bias is None else y + module.bias.to(y.dtype)


class _GatesStyle(_Style):
    """The gates of all heads are added up; each process keeps those of its own."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        pass

    def forward(self, module: Any, group: ProcessGroup, forward: Callable, *args: Any, **kwargs: Any) -> Tensor:
        y = _Sum.apply(forward(*args, **kwargs), group)
        return _Own.apply((y + module.bias).unflatten(-1, (2, -1)), group).flatten(-2)  # rows [i | f]


class _FeedForward(_Style):
    """Every process reads all of x."""

    def forward(self, module: Any, group: ProcessGroup, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        return forward(_Copy.apply(args[0], group), *args[1:], **kwargs)


class _Mixer(_Style):
    """An mLSTM reads all of x, an sLSTM the channels of its heads, and what it gives is gathered."""

    def forward(self, module: Any, group: ProcessGroup, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        show = kwargs.get("on_gates")
        if show is not None:
            kwargs["on_gates"] = lambda gates: show(GateActivations(*(_Gather.apply(x, 2, group) for x in gates)))
        is_slstm = isinstance(module, SLSTMLayer)
        x = (_Own if is_slstm else _Copy).apply(args[0], group)
        with _local_parameters(module):
            y, state = forward(x, *args[1:], **kwargs)
        return (_Gather.apply(y, -1, group) if is_slstm else y), state


class _Head(ColwiseParallel):
    """Logits of a part of the vocabulary each, gathered. Tied to an embedding, the weight is that once it is split."""

    def __init__(self) -> None:
        super().__init__(output_layouts=Replicate())

    def install_forward(self, module: Any, mesh: DeviceMesh, **kwargs: Any) -> nn.Module:
        if (embedding := vars(module).pop("tied", None)) is not None:
            module.weight = embedding.weight
        return super().install_forward(module, mesh, **kwargs)


STYLES = {
    "xlstm_rows": _Style,
    "xlstm_columns": _Columns,
    "xlstm_sum": _SumStyle,
    "xlstm_gates": _GatesStyle,
    "xlstm_ffn": _FeedForward,
    "xlstm_mixer": _Mixer,
    "xlstm_head": _Head,
}
for name, style in STYLES.items():
    ALL_PARALLEL_STYLES.register(name, style())  # type: ignore[arg-type]  # as it registers its own
