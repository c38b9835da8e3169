"""What the processes of `test_tensor_parallel.py` compute, with a model that they share or in one of its own."""

import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from models import VOCAB, gradients, random_ids, tiny_model, use_checkpointing
from ranks_data import peak_of, said, whole
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.distributed import DistributedConfig

from modeling_xlstm import XLSTMForSequenceClassification, modeling_xlstm
from modeling_xlstm.sequence_parallel import shard_sequence
from modeling_xlstm.split_checkpoint import join_weights
from modeling_xlstm.tensor_parallel import SplitLinear
from modeling_xlstm.tensor_parallel_rows import Rows


Case = dict[str, Any]
# 4 heads, so that 2 and 4 processes can share them
CASES: dict[str, Case] = {
    "post_up": {"kind": "post_up"},
    "post_up_biased_tied": {"kind": "post_up", "use_bias": True, "tie_word_embeddings": True},
    "sigmoid_checkpointed": {"kind": "sigmoid", "checkpointed": True},
    "pre_up_slstm": {"kind": "pre_up_slstm"},
    "pre_up_slstm_biased": {"kind": "pre_up_slstm", "use_bias": True, "norm_type": "rms_norm"},
    "bare": {"kind": "pre_up_slstm", "conv_kernel_size": 0, "slstm_conv_kernel_size": 0, "slstm_ffn_proj_factor": 0},
    "narrow_slstm": {"kind": "post_up_slstm", "num_heads": 8, "slstm_num_heads": 4, "add_out_norm": False},
}
TWO_WAYS = ("post_up_biased_tied", "sigmoid_checkpointed", "pre_up_slstm_biased")
DTYPES = (torch.float64, torch.float32)
IDS, MASK = random_ids(4, 23), torch.ones(4, 23, dtype=torch.int64)
MASK[0, :9], MASK[1, 17:] = 0, 0


def whole_model(name: str, dtype: torch.dtype) -> Any:
    """The model of a case, in this process alone."""
    case = {"num_heads": 4, **CASES[name]}
    case.pop("checkpointed", None)
    return tiny_model(case.pop("kind"), **case).to(dtype)


def save_all(folder: Path) -> None:
    """Checkpoints of all cases."""
    for name in CASES:
        whole_model(name, torch.float64).save_pretrained(folder / name)


def weights(model: Any) -> dict[str, Tensor]:
    """All of a model, under the names of one in a single process."""
    return join_weights({name: whole(x) for name, x in model.named_parameters()}, model.config)


def by_heads(name: str, x: Tensor, share: bool) -> Tensor:
    """A state of all heads, from what the processes have: along the second axis, or of a convolution the last."""
    if not share:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, -1 if name == "conv" else 1)


class Peers:
    """What `peers_triton.Peers` does with many rows, in processes without a GPU."""

    def __init__(self):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def add_norm(self, x: Tensor, terms: tuple[Tensor, Tensor] | None, norm: Tensor, eps: float) -> None:
        x.copy_(self.added(x, terms))
        self.rows = torch.rms_norm(x, norm.shape, norm, eps)

    def added(self, x: Tensor, terms: tuple[Tensor, Tensor] | None) -> Tensor:
        return x if terms is None else x + terms[0] + terms[1].sum(0)

    def gathered(self, x: Tensor) -> Tensor:
        return torch.cat(self._of_all(x))

    def multiply_gathered(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        x = self.gathered(self.rows)
        return x, x @ weight.t()

    def multiply_scattered(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        mine = [y.chunk(self.world)[self.rank] for y in self._of_all(x @ weight.t())]
        own = mine.pop(self.rank)
        return own, torch.stack(mine)

    def _of_all(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous())
        return parts


@torch.no_grad()
def scattered(model: Any, shared: bool) -> dict[str, Tensor]:
    """Logits and states of three texts, read by blocks between which each process has some rows."""
    read = mock.Mock(side_effect=Rows.block)
    with (
        mock.patch.object(modeling_xlstm, "rows_of", lambda x, *_: Rows(x, Peers())),
        mock.patch.object(Rows, "block", lambda *args: read(*args)),
    ):
        outputs = model(IDS[:3], attention_mask=MASK[:3], logits_to_keep=2)
    assert read.call_count == shared * (model.config.num_hidden_layers - 1)
    result = {"logits of rows": outputs.logits}
    for i, layer in enumerate(outputs.past_key_values.layers):
        states = layer.state.tensors().items()
        result |= {f"state {i} {field} of rows": by_heads(field, x, shared) for field, x in states}
    return result


def outcomes(model: Any, name: str, shared: bool, ids: Tensor, mask: Tensor, replicas: int = 1) -> dict[str, Tensor]:
    """Logits, gates, states, a text, and gradients, losses and weights of three steps of training.

    With `replicas`, each is of some of the rows, and the loss of all is the mean.
    """
    result: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)  # first: FSDP2 puts others in their place
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask, output_gates=True)
    result["logits"] = outputs.logits[mask.bool()]
    for i, (gates, layer) in enumerate(zip(outputs.gates, outputs.past_key_values.layers, strict=True)):
        result |= {f"gates {i} {field}": x for field, x in gates._asdict().items()}
        if replicas == 1:
            states = layer.state.tensors().items()
            result |= {f"state {i} {field}": by_heads(field, x, shared) for field, x in states}
    if name == "post_up":
        result |= scattered(model, shared)
    result["text"] = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    result["beams"] = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=2)

    model.train()
    if "checkpointed" in CASES[name]:
        use_checkpointing(model)
    labels = ids.masked_fill(mask == 0, -100)
    count = (labels[:, 1:] != -100).sum()
    if replicas > 1:
        dist.all_reduce(count)
        count = count * replicas // dist.get_world_size()
    for step in range(3):
        optimizer.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=count / replicas).loss
        loss.backward()
        if step == 0:
            grads = {key: whole(x.grad) for key, x in model.named_parameters()}
            result |= {f"gradient {key}": x for key, x in join_weights(grads, model.config).items()}
        optimizer.step()
        total = loss.detach() / (dist.get_world_size() if replicas > 1 else 1)
        if replicas > 1:
            dist.all_reduce(total)
        result[f"loss {step}"] = total
    result |= {f"weight {key}": x.detach() for key, x in weights(model).items()}
    return result


def one_process() -> dict[tuple, dict[str, Tensor]]:
    """All cases in a single process."""
    return {(name, d): outcomes(whole_model(name, d), name, False, IDS, MASK) for name in CASES for d in DTYPES}


def shared_model(folder: Path, dtype: torch.dtype, **sizes: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=DistributedConfig(**sizes))


def share_of(model: Any) -> float:
    """Of the numbers of a model, those that this process has."""
    local = sum((x.to_local() if isinstance(x, DTensor) else x).numel() for x in model.parameters())
    return local / sum(x.numel() for x in model.parameters())


def split_over_all(rank: int, folder: Path, saved: Path) -> dict[Any, Any]:
    """All cases with a model that all processes share, which is saved after its training."""
    results: dict[Any, Any] = {}
    world = dist.get_world_size()
    for name in CASES:
        for dtype in DTYPES:
            model = shared_model(folder / name, dtype, tp_size=world)
            results[name, dtype] = outcomes(model, name, True, IDS, MASK)
            results[name, dtype, "share"] = share_of(model)
            model.save_pretrained(saved / f"{name} {dtype}")
    return results


def split_two_ways(rank: int, folder: Path) -> dict[Any, Any]:
    """Two pairs of processes: a pair shares heads, and each has half of the rows; FSDP2 splits weights once more."""
    results: dict[Any, Any] = {}
    for name in TWO_WAYS:
        for dtype in DTYPES:
            model = shared_model(folder / name, dtype, tp_size=2, fsdp_size=2)
            results[name, dtype, "share"] = share_of(model)
            ids, mask = (x.chunk(2)[rank // 2] for x in (IDS, MASK))
            results[name, dtype] = outcomes(model, name, True, ids, mask, replicas=2)
    return results


def checkpoints(rank: int, folder: Path, saved: Path) -> dict[str, Any]:
    """Distributed checkpoints, of meshes that differ from those that read them, and merged ones."""
    from transformers.distributed.checkpoint import consolidate_distributed_checkpoint  # since 5.23

    results: dict[str, Any] = {}
    for name in ("post_up_biased_tied", "pre_up_slstm_biased"):
        model = shared_model(folder / name, torch.float64, tp_size=2, fsdp_size=2)
        model.save_pretrained(saved / name, distributed_checkpoint=True)
        if rank == 0:
            consolidate_distributed_checkpoint(saved / name, saved / f"{name} merged")
            model.config.save_pretrained(saved / f"{name} merged")
        dist.barrier()
        for where in (saved / name, saved / f"{name} merged"):
            wholes = [{"fsdp_size": 4}] if where.name.endswith("merged") else []
            for sizes in ({"tp_size": 4}, {"tp_size": 2, "fsdp_size": 2}, *wholes):
                results[f"{where.name} {sizes}"] = weights(shared_model(where, torch.float64, **sizes))
        results["refused"] = said(shared_model, saved / name, torch.float64, fsdp_size=4)
    return results


def stages(rank: int, folder: Path) -> dict[str, Any]:
    """A pipeline of two processes: one reads, the next goes on."""
    results: dict[str, Any] = {}
    for name in ("post_up", "pre_up_slstm"):
        model = shared_model(folder / name, torch.float32, pp_size=2)
        with torch.no_grad():
            results[f"{name} logits"] = model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
        results[f"{name} text"] = model.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)
    results["sentences"] = [
        said(model, input_ids=IDS, labels=IDS),
        said(model, input_ids=IDS[:1], cu_seq_lens_q=torch.tensor([0, 5, 23])),
        said(model, input_ids=IDS, output_gates=True),
        said(model, IDS, None, None, None, IDS),
        said(model.train(), input_ids=IDS),
        said(model.save_pretrained, folder / "pipeline"),
        said(model.eval().generate, IDS + rank, max_new_tokens=2),
    ]
    return results


DEMO = Path(__file__).parents[1] / "checkpoints" / "xlstm-demo"


def trained(dtype: torch.dtype, sharing: DistributedConfig | None = None) -> dict[str, Tensor]:
    """Logits of the demo, which has learned something, and losses of three more steps."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype, dropout=0.0, distributed_config=sharing)
    ids = torch.randint(2, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = {"logits": model(ids).logits}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    for step in range(3):
        loss = model(ids, labels=ids).loss
        result[f"loss {step}"] = loss.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return result


def formats(rank: int, folders: dict[str, Path]) -> dict[str, Any]:
    """Checkpoints of other formats, of other dtypes, and of a classifier."""
    results: dict[str, Any] = {
        name: weights(shared_model(folder, torch.float32, tp_size=2))
        for name, folder in folders.items()
        if name != "classifier"
    }
    for name in [name for name in folders if name != "classifier"]:
        results[f"{name}, parts"] = weights(shared_model(folders[name], torch.float32, fsdp_size=2))
    results["trained"] = trained(torch.float32, DistributedConfig(tp_size=2))
    results["products"] = products(shared_model(folders["native"], torch.float32, tp_size=2))
    model = shared_model(folders["native"], torch.bfloat16, tp_size=2)
    results["dtypes"] = {name: x.dtype for name, x in weights(model).items()}
    config = DistributedConfig(tp_size=2)
    model = AutoModelForSequenceClassification.from_pretrained(folders["classifier"], distributed_config=config)
    model.train()
    outputs = model(IDS, attention_mask=MASK, labels=torch.tensor([0, 1, 2, 1]))
    outputs.loss.backward()
    grads = join_weights({name: whole(x.grad) for name, x in model.named_parameters()}, model.config)
    torch.manual_seed(rank)
    new = AutoModelForSequenceClassification.from_pretrained(folders["native"], distributed_config=config)
    results["new head"] = new.score.weight.detach()
    results["again"] = dict(
        AutoModelForCausalLM.from_pretrained(folders["native"], config=new.config).named_parameters()
    )
    results["config"] = said(XLSTMForSequenceClassification, new.config)
    results["classifier"] = {"logits": outputs.logits.detach(), **grads}
    return results


def products(model: Any) -> dict[str, Any]:
    """Logits, and how many of the parts of matrices were multiplied by themselves: at first, in another dtype, and with
    one replaced."""
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, SplitLinear) and "gate_proj" not in name:
            for part in module.parts:
                part.forward = partial(_counted, calls, part.forward)
    results = {}
    for when, dtype in (("at first", torch.float32), ("moved", torch.float64), ("replaced", torch.float64)):
        if when == "replaced":
            part = model.model.layers[0].mixer.qkvo_proj["k"]
            part.weight = nn.Parameter(part.weight.detach().clone())
        calls.clear()
        with torch.no_grad():
            results[when] = model.to(dtype)(IDS).logits if when == "moved" else model(IDS).logits, len(calls)
    return results


def _counted(calls: list[str], forward: Any, x: Tensor) -> Tensor:
    calls.append("")
    return forward(x)


def refusals(rank: int, folders: dict[str, Path], saved: Path) -> dict[str, Any]:
    """What is said where heads cannot be split, a weight is NaN, a shared model cannot be saved as asked, and processes
    that share it are given other things."""
    results: dict[str, Any] = {
        name: said(shared_model, folders[name], torch.float32, tp_size=2)
        for name in ("heads", "slstm heads", "nan", "pickled")
    }
    results["nan, parts of weights"] = said(shared_model, folders["nan"], torch.float32, fsdp_size=2)
    results["pickled, parts of weights"] = said(shared_model, folders["pickled"], torch.float32, fsdp_size=2)
    results["two weights"] = said(shared_model, folders["two weights"], torch.float32, fsdp_size=2)
    model = shared_model(folders["native"], torch.float32, tp_size=2)
    results["original format"] = said(model.save_pretrained, saved, save_original_format=True)
    results["slices"] = said(shard_sequence, model)
    results["another text"] = said(model.generate, IDS + rank, max_new_tokens=2)
    results["another mask"] = said(model.generate, IDS, attention_mask=MASK if rank else MASK.flip(1), max_new_tokens=2)
    torch.manual_seed(rank)
    results["another seed"] = said(model.generate, IDS, max_new_tokens=2, do_sample=True)
    model.train()
    results["other rows"] = said(model, IDS + rank, labels=IDS)
    model.config.dropout = 0.1
    results["other dropout"] = said(model, IDS, labels=IDS)
    torch.manual_seed(0)
    results["sampled"] = model.eval().generate(IDS, max_new_tokens=8, do_sample=True)
    results["state"] = said(model(IDS).past_key_values.save, saved / "state", model)
    return results


def left_alone(rank: int, folder: Path, sizes: dict[str, int]) -> str:
    """What a process is told that goes on with a step, when the last one is gone."""
    model = shared_model(folder, torch.float32, **sizes).train()
    loss = model(IDS, labels=IDS).loss
    if rank == dist.get_world_size() - 1:
        os._exit(0)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("A step without one of the processes must fail.")


def memory_of_loading(rank: int, folder: Path) -> dict[str, int]:
    """Bytes that a process takes at most while it loads its part of a model, and those of the part."""
    return peak_of(lambda name: shared_model(folder / name, torch.float32, tp_size=2))


def tiny_classifier() -> nn.Module:
    return tiny_model("pre_up_slstm", XLSTMForSequenceClassification, num_heads=4, num_labels=3)


def classifier_outcome() -> dict[str, Tensor]:
    model = tiny_classifier().train()
    outputs: Any = model(IDS, attention_mask=MASK, labels=torch.tensor([0, 1, 2, 1]))
    outputs.loss.backward()
    return {"logits": outputs.logits.detach(), **gradients(model)}


assert VOCAB % 2  # so that processes have unequal parts of the vocabulary
