"""Formulas of `benchmarks/scaling.py` beside what the package counts, keeps and sends, and the page beside them."""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from benchmarks import scaling, scaling_gpu
from benchmarks.scaling import MODELS, Run, Scheme
from modeling_xlstm import XLSTMConfig, XLSTMModel, backends, count_parameters, layers_xlstm, mlstm_triton
from modeling_xlstm import sequence_parallel as slices


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "benchmarks" / "SCALING.md").read_text(encoding="utf-8")
SMALL = XLSTMConfig(hidden_size=256, num_hidden_layers=3, num_heads=4, vocab_size=512)
CONFIGS = {**MODELS, "small": SMALL}


# sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name):
    assert scaling.parameters(CONFIGS[name]) == count_parameters(CONFIGS[name])


class _GPUNorm(torch.autograd.Function):
    """Keeps what PyTorch's kernel for a GPU keeps: x, the weight, and a number a row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        raise NotImplementedError


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The backend is Triton, of whose ops only shapes are asked."""
    monkeypatch.setattr(backends, "INTERPRETED", True)
    monkeypatch.setattr(mlstm_triton, "shared_memory", lambda device: 232_448)
    monkeypatch.setattr(layers_xlstm, "rms_norm", lambda x, weight, eps: _GPUNorm.apply(x, weight))


def saved_bytes(config: XLSTMConfig, n: int, checkpointing: bool) -> int:
    """Of what two blocks in bfloat16 keep for their backward pass after n tokens, tensors being without memory."""
    fields = {**config.to_dict(), "num_hidden_layers": 2, "block_types": None, "backend": "triton"}
    with torch.device("meta"):
        model: Any = XLSTMModel(XLSTMConfig.from_dict(fields)).train()
    for block in model.layers if checkpointing else ():
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    model = model.to(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _saved_bytes(model.to_empty(device="cpu"), n)


def _saved_bytes(model: XLSTMModel, n: int) -> int:
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    x = torch.empty(1, n, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = model.read(x)
    assert y.shape == x.shape
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_keep_as_many_bytes_as_the_formula_says(name):
    config, n = CONFIGS[name], scaling.T
    assert saved_bytes(config, n, False) == pytest.approx(2 * n * scaling.saved(config), rel=1e-6)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", CONFIGS)
def test_with_checkpointing_blocks_keep_their_inputs(name):
    assert saved_bytes(CONFIGS[name], scaling.T, True) == 2 * scaling.T * 2 * CONFIGS[name].hidden_size


# messages


@pytest.mark.parametrize("sp", [2, 3, 4, 5, 8, 9, 64, 1000])
def test_slices_wait_for_as_many_messages_as_the_formula_says(sp, monkeypatch):
    sent: list[Tensor] = []

    def exchange(x: Tensor, missing: Tensor, distance: int, group: None) -> Tensor:
        sent.append(x)
        return missing.clone()

    monkeypatch.setattr(slices, "_exchange", exchange)
    monkeypatch.setattr(slices.dist, "get_world_size", lambda group: sp)
    H, K, V = SMALL.num_heads, SMALL.qk_size // SMALL.num_heads, SMALL.inner_size // SMALL.num_heads
    k, v, gates = torch.randn(1, 3, H, K), torch.randn(1, 3, H, V), torch.randn(2, 1, 3, H)
    k.requires_grad_()
    state = slices.state_before(k, v, *gates)
    forward = len(sent)
    sum(x.sum() for x in state[:2]).backward()
    assert forward == len(sent) - forward == scaling.rounds(sp)
    assert {x.numel() for x in sent} == {scaling.state_numbers(SMALL)}
    assert scaling.message(SMALL, sp)[0] == sent[0].nbytes


@pytest.mark.parametrize("ranks, per_node", [(1, 8), (2, 8), (8, 8), (64, 8), (128, 1)])
def test_collectives_take_the_time_of_their_slowest_link(ranks, per_node):
    size = 1e9
    volume, seconds = scaling.ring(size, ranks, per_node)
    assert volume == size * (ranks - 1) / ranks and scaling.all_reduce(size, ranks, per_node)[0] == 2 * volume
    rate = scaling.NVLINK if ranks <= 8 and per_node == 8 else min(scaling.NVLINK, per_node * scaling.NET)
    assert seconds == pytest.approx(volume / rate + (ranks > 1) * scaling.START, rel=0.3)
    assert ranks == 1 or 2 * volume / rate < scaling.all_reduce(size, ranks, per_node)[1] <= 2 * seconds


# steps


def test_what_is_sent_for_a_text_a_gpu_is_what_the_page_says():
    """FSDP2 gathers weights twice in bfloat16 and scatters gradients in float32, HSDP reduces them between nodes."""
    P = scaling.parameters(MODELS["7B"]) - MODELS["7B"].hidden_size
    fsdp, hsdp = (scaling.cost("7B", Scheme("", shards=x), Run(64)).volume for x in (None, 8))
    assert fsdp == pytest.approx(8 * P * 63 / 64)
    assert hsdp == pytest.approx(8 * P * 7 / 8 + 2 * 4 * P / 8 * 7 / 8)
    kept = scaling.cost("7B", Scheme("", keep=True), Run(64, passes=4)).volume
    assert kept == pytest.approx((2 + 4 * 4) * P * 63 / 64)


@pytest.mark.parametrize("row", scaling.CHECKS, ids=lambda row: f"{row[0]}, {row[2].tokens}")
def test_steps_took_what_is_computed_if_little_is_hidden(row):
    _, scheme, once, seconds, peak = row
    computed = scaling.cost("7B", scheme, once)
    assert computed.bounds[0] < seconds == pytest.approx(computed.bounds[1], rel=0.08)
    assert computed.memory / 2**30 == pytest.approx(peak, rel=0.05)


def test_more_gpus_need_no_more_memory_and_shares_are_the_whole():
    for name, scheme in ((name, scheme) for name in MODELS for scheme in scaling.SCHEMES):
        peaks = [scaling.memory(MODELS[name], scheme, Run(gpus)) for gpus in (64, 256, 1024)]
        assert peaks == sorted(peaks, reverse=True)
    config = MODELS["7B"]
    whole, eighth = scaling.saved(config), scaling.saved(config, 8)
    assert eighth > whole / 8 and math.isclose(8 * (eighth - 8 * 4096 - 8), whole - 8 * 4096 - 8)


def test_a_scheme_that_cannot_run_says_why():
    assert scaling.best("70B", Scheme("", shards=1), 8, 512, 8192) == "needs 985.4 GiB"
    assert scaling.best("7B", Scheme(""), 1024, 512, 8192) == "0.5 texts a GPU"
    assert scaling.best("7B", Scheme("", shards=64), 8, 512, 8192) == "fewer GPUs than shards"


# the page


@pytest.mark.parametrize("name", scaling.SECTIONS)
def test_the_page_has_the_tables_that_the_command_prints(name, capsys):
    scaling.main([name])
    printed = capsys.readouterr().out
    assert printed.startswith(f"\n{name}\n\n| ") and printed.partition("\n\n|")[2] in PAGE


def test_what_the_page_says_in_short_is_in_its_tables():
    short, rest = PAGE.split("## In short\n")[1].split("\n## ", 1)
    tables = "\n".join(line for line in rest.splitlines() if line.startswith("|"))
    numbers = r"\d[\d.,]*\d|\d"
    assert set(re.findall(numbers, short)) <= set(re.findall(numbers, tables))


def test_constants_of_the_page_are_those_of_the_script():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.,]+) ", PAGE, re.MULTILINE))
    values = {name: float(text.replace(",", "")) for name, text in rows.items()}
    units = {"COPY": 1e12, "PEAK": 1e12, "NVLINK": 1e9, "NET": 1e9, "BUDGET": 2**30} | dict.fromkeys(
        ("START", "HOP_NVLINK", "HOP_NET"), 1e-6
    )
    assert values == pytest.approx({name: getattr(scaling, name) / units.get(name, 1) for name in values})
    assert values.keys() >= units.keys()


def test_a_section_that_is_not_there_is_one_sentence(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["speed"])
    assert "Sections are models, blocks, peaks, links, check, steps, long, slices, limits, got speed." in (
        capsys.readouterr().err
    )


def test_measuring_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="Steps are measured on CUDA GPUs, and PyTorch finds none here."):
        scaling_gpu.main()
