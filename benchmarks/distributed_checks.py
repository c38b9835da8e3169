"""Whether several GPUs compute what one does: for `benchmarks/distributed.py`, which says what is compared.

Small models of both families are shared in every way, in float32 and bfloat16. Each tensor may be off, by its norm and
from a run in float64, by 4 times what one GPU is off in the same dtype, and a floor.
"""

import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM
from modeling_xlstm.layers_xlstm import MLSTMLayer
from modeling_xlstm.sequence_parallel import shard_sequence, split_sequence
from modeling_xlstm.split_checkpoint import join_weights


FLOOR = {torch.float32: 1e-6, torch.bfloat16: torch.finfo(torch.bfloat16).eps}  # of the error that is allowed
STEPS, WRITTEN = 3, 16

Outcome = dict[str, Tensor]


class Sizes(NamedTuple):
    """Shapes, and lengths in tokens."""

    heads: tuple[int, int]  # of what is checked: how wide one is, in each family
    vocab: int
    text: int
    long: int
    large: dict[str, Any]  # of what is timed: how the shape differs from xLSTM-7B
    middle: dict[str, Any]
    written: tuple[int, int]
    prompt: int
    rows: tuple[int, int, int]  # of a GPU, for the middle model and the large one, and how long they are
    split: int


FULL = Sizes(
    (256, 192), 5000, 300, 8192,
    {}, {"hidden_size": 2048, "num_hidden_layers": 24}, (8, 136), 16384, (8, 4, 2048), 1 << 18,
)  # fmt: skip


def tiny(world: int) -> Sizes:
    """Of models that so many processes can share."""
    shape = {"hidden_size": 32 * world, "num_heads": 2 * world, "num_hidden_layers": 2, "vocab_size": 512}
    shape["ffn_round_up_to_multiple_of"] = 8 * world
    return Sizes((16, 16), 300, 24, 130, shape, shape, (2, 6), 64, (2, 1, 32), 64 * world)


class Place(NamedTuple):
    """This process among the others."""

    rank: int
    world: int
    device: str
    alone: ProcessGroup  # of this process
    all: Any  # processes

    def say(self, *what: object) -> None:
        if self.rank == 0:
            print(*what, flush=True)

    def ids(self, rows: int, length: int, vocab: int) -> Tensor:
        """Random ones, the same in all processes."""
        random = torch.Generator().manual_seed(0)
        return torch.randint(2, vocab, (rows, length), generator=random).to(self.device)


def stop(sentence: str, status: int = 1) -> NoReturn:
    """Ends all processes, each of which calls this, once the first has said why."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(sentence, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(status)


class Error(NamedTuple):
    """How far a tensor is off, and may be."""

    name: str
    found: float
    allowed: float

    @property
    def used(self) -> float:
        """Of what is allowed."""
        used = self.found / self.allowed
        return math.inf if math.isnan(used) else used


def distance(x: Tensor, exact: Tensor) -> float:
    """By the norm, of the norm of what is exact."""
    return ((x.double() - exact).norm() / exact.double().norm().clamp(min=1e-30)).item()


def largest_error(results: Sequence[Outcome], floor: float) -> Error:
    """Of all processes, beside one and one in float64: allowed are 4 times the error of one, and a floor."""
    many, one, exact = results
    shapes, expected = ({name: x.shape for name, x in result.items()} for result in (many, exact))
    if shapes != expected:
        raise ValueError(f"Results must have the names and shapes {expected}, got {shapes}.")
    errors = [Error(name, distance(many[name], x), 4 * distance(one[name], x) + floor) for name, x in exact.items()]
    return max(errors, key=lambda error: error.used)


def require(place: Place, what: str, error: Error, also: str = "") -> None:
    """Ends all processes if in one of them a tensor is off by too much."""
    line = f"{what}: {error.name} is off by {error.found:.1e} of its norm, allowed are {error.allowed:.1e}"
    lines: list[Any] = [None] * place.world
    dist.all_gather_object(lines, line if error.used > 1 else None)
    if wrong := next(filter(None, lines), None):
        stop(f"No speed without correct results: {wrong}.")
    place.say(f"{line}{also}")


def configs(world: int, sizes: Sizes) -> dict[str, XLSTMConfig]:
    """Small models of both families, whose heads so many processes can share."""
    heads = world * math.ceil(4 / world)
    shared: dict[str, Any] = {"num_hidden_layers": 2, "num_heads": heads, "vocab_size": sizes.vocab}
    shared |= {"ffn_round_up_to_multiple_of": 8 * world, "eos_token_id": None, "pad_token_id": 1}
    ours, paper = (heads * width for width in sizes.heads)
    return {
        "xLSTM-7B": XLSTMConfig.preset("xlstm-7b", hidden_size=ours, **shared),
        "xLSTM[1:1]": XLSTMConfig.from_ratio("1:1", hidden_size=paper, **shared),
    }


@torch.no_grad()
def randomise(module: Any, config: XLSTMConfig) -> Any:
    """Moves every weight, to a number that bfloat16 has, and gates to where what enters stays for a while."""
    for name, weight in module.named_parameters():
        moved = torch.randn_like(weight)
        if name.endswith("gate_proj.bias"):  # rows [i | f] of an mLSTM
            moved[config.num_heads :] += 3
        elif name.endswith("gate_bias"):  # [H, i f z o, D] of an sLSTM
            moved[:, 1] += 3
        else:
            moved = weight + moved / math.sqrt(config.hidden_size)
        weight.copy_(moved.bfloat16())
    return module


@contextmanager
def shared_folder(place: Place, size: float = 0.0) -> Iterator[Path]:
    """A new folder for all processes, in memory if so many bytes fit there; the first removes it."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > size
    paths = [tempfile.mkdtemp(dir=memory if fits else None) if place.rank == 0 else ""]
    dist.broadcast_object_list(paths)
    try:
        yield Path(paths[0])
        dist.barrier()  # until all have read what is there
    finally:
        if place.rank == 0:
            shutil.rmtree(paths[0])


@contextmanager
def small_models(place: Place, sizes: Sizes) -> Iterator[Iterator[tuple[str, Path, torch.dtype]]]:
    """Names, checkpoints, and dtypes to compute in."""
    with shared_folder(place) as folder:
        models = configs(place.world, sizes)
        for name, config in models.items() if place.rank == 0 else ():
            torch.manual_seed(0)
            randomise(XLSTMForCausalLM(config), config).bfloat16().save_pretrained(folder / name)
        dist.barrier()
        yield ((name, folder / name, dtype) for name, dtype in product(models, FLOOR))


def load(place: Place, path: Path, dtype: torch.dtype, ranks: int = 1) -> Any:
    """A model of this process, or one that so many share by heads."""
    sharing = DistributedConfig(tp_size=ranks) if ranks > 1 else None
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, distributed_config=sharing)
    return model if ranks > 1 else model.to(place.device)


def write(model: Any, ids: Tensor, new: int) -> Tensor:
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)


def whole(tensors: dict[str, Any], config: XLSTMConfig) -> Outcome:
    """What processes may have parts of, by names of weights, under those of one process."""
    full = {name: x.detach() for name, x in tensors.items()}
    full = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in full.items()}
    return {name: x.clone() for name, x in join_weights(full, config).items()}


def steps(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, group: ProcessGroup) -> Outcome:
    """Losses, gradients of the first step, and how weights have changed. Processes of a group have other rows."""
    losses, result = [], dict[str, Tensor]()
    before = whole(dict(model.named_parameters()), model.config)
    for step in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 0:
            gradients = whole({name: x.grad for name, x in model.named_parameters()}, model.config)
            result = {f"the gradient of {name}": x for name, x in gradients.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    result["losses"] = torch.stack(losses)
    dist.all_reduce(result["losses"], group=group)
    result["losses"] /= dist.get_world_size(group)
    after = whole(dict(model.named_parameters()), model.config)
    return result | {f"the change of {name}": x.double() - before[name].double() for name, x in after.items()}


def check_heads(place: Place, sizes: Sizes) -> None:
    ids, long = place.ids(2, sizes.text, sizes.vocab), place.ids(1, sizes.long, sizes.vocab)
    with small_models(place, sizes) as cases:
        for name, path, dtype in cases:
            results, texts = list[Outcome](), list[Tensor]()
            for as_dtype, ranks in ((dtype, place.world), (dtype, 1), (torch.float64, 1)):
                model = load(place, path, as_dtype, ranks)
                with torch.no_grad():
                    logits = {"logits": model(ids).logits}
                    if name == "xLSTM-7B":  # whose blocks read long texts in another way
                        logits["a long text"] = model(long, logits_to_keep=1).logits
                texts.append(write(model, ids, WRITTEN)[:, sizes.text :])
                optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9, foreach=False)
                results.append(logits | steps(model, optimizer, ids, place.alone))
            other = (texts[0] != texts[1]).double().mean().item()
            what = f"tensor parallelism, {name}, {dtype}"
            require(place, what, largest_error(results, FLOOR[dtype]), f"; {other:.0%} of greedy tokens differ")
            if dtype == torch.float32 and other:
                stop(f"No speed without correct results: {what}: {other:.0%} of greedy tokens differ from one GPU's.")


def sharded(place: Place, model: Any, dtype: torch.dtype, keep: bool, group: ProcessGroup) -> Any:
    """By FSDP2 over a group, with products in `dtype`; weights are kept for the backward pass, or gathered again."""
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = DeviceMesh.from_group(group, place.device)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep)
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False).train()


def check_fsdp(place: Place, sizes: Sizes) -> None:
    ids = place.ids(2 * place.world, sizes.text, sizes.vocab)
    own = ids.chunk(place.world)[place.rank]
    with small_models(place, sizes) as cases:
        for name, path, dtype in cases:
            results = list[Outcome]()
            for rows, group in ((own, place.all), (ids, place.alone), (ids, None)):
                model = load(place, path, torch.float32 if group else torch.float64).train()
                if group:
                    model = sharded(place, model, dtype, name == "xLSTM-7B", group)
                # whose epsilon keeps the signs of gradients that are nothing but rounding from being steps
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
                results.append(steps(model, optimizer, rows, group or place.alone))
            require(place, f"FSDP2, {name}, {dtype}", largest_error(results, FLOOR[dtype]))


def gradients_of(module: Any, split: bool) -> Outcome:
    """Of weights, in all slices."""
    result = {f"the gradient of {name}": x.grad.double() for name, x in module.named_parameters()}
    for x in result.values() if split else ():
        dist.all_reduce(x)
    return result


def text_gradients(model: Any, ids: Tensor, split: bool) -> Outcome:
    batch = {"input_ids": ids, "labels": ids}
    if split:
        shard_sequence(model)
        batch = split_sequence(batch)
    model.train()(**batch).loss.backward()
    return gradients_of(model, split)


def layer_with_input(place: Place, config: XLSTMConfig, length: int, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor]:
    """A layer, its gates in float32 or better, x, and a gradient of what it gives."""
    torch.manual_seed(0)
    with torch.device(place.device):
        layer = randomise(MLSTMLayer(config), config).to(dtype)
        x, dy = (torch.randn(1, length, config.hidden_size, dtype=torch.bfloat16).to(dtype) for _ in range(2))
    if dtype == torch.bfloat16:
        layer.gate_proj.float()
    return layer, x.requires_grad_(), dy


def layer_pass(layer: Any, x: Tensor, dy: Tensor) -> Any:
    """The gradient of x; weights have theirs."""
    layer.zero_grad()
    x.grad = None
    layer(x)[0].backward(dy)
    return x.grad


def own_slices(place: Place, *tensors: Tensor) -> list[Tensor]:
    return [x.detach().chunk(place.world, 1)[place.rank].clone().requires_grad_(x.requires_grad) for x in tensors]


def layer_gradients(place: Place, layer: Any, x: Tensor, dy: Tensor, split: bool) -> Outcome:
    if not split:
        return {"the gradient of x": layer_pass(layer, x, dy), **gradients_of(layer, split)}
    sharding = shard_sequence(layer)
    part = layer_pass(layer, *own_slices(place, x, dy))
    sharding.remove()
    parts = [torch.empty_like(part) for _ in range(place.world)]
    dist.all_gather(parts, part)
    return {"the gradient of x": torch.cat(parts, 1), **gradients_of(layer, split)}


def check_slices(place: Place, sizes: Sizes) -> None:
    config = configs(place.world, sizes)["xLSTM-7B"]
    length = place.world * sizes.text
    ids = place.ids(2, length + 1, sizes.vocab)  # of which the first slice has one more
    with small_models(place, sizes) as cases:
        for name, path, dtype in cases:
            if name != "xLSTM-7B":
                continue  # a model with sLSTM blocks, whose texts cannot be split
            of_texts, of_layers = list[Outcome](), list[Outcome]()
            for as_dtype, split in ((dtype, True), (dtype, False), (torch.float64, False)):
                of_texts.append(text_gradients(load(place, path, as_dtype), ids, split))
                layer, x, dy = layer_with_input(place, config, length, as_dtype)
                of_layers.append(layer_gradients(place, layer, x, dy, split))
            for what, results in ((name, of_texts), (f"a layer of {name}", of_layers)):
                require(place, f"sequence parallelism, {what}, {dtype}", largest_error(results, FLOOR[dtype]))
