"""Examples of configurations, texts and models, by hypothesis.

An example is plain data: fields of a configuration, rows of a mask as strings of 0 and 1, names and numbers. So what
hypothesis prints of one that fails, `test_name(fields=..., rows=...)`, fails again as
`test_name.hypothesis.inner_test(fields=..., rows=...)`; the examples are the same in every run.
"""

import math
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from models import randomise
from torch import Tensor
from torture import tries

from modeling_xlstm import (
    XLSTMConfig,
    XLSTMForCausalLM,
    XLSTMForSequenceClassification,
    XLSTMForTokenClassification,
    XLSTMModel,
)
from modeling_xlstm.configuration_xlstm import CHOICES


Fields = dict[str, Any]
HEADS: dict[str, type] = {
    "XLSTMForCausalLM": XLSTMForCausalLM,
    "XLSTMModel": XLSTMModel,
    "XLSTMForTokenClassification": XLSTMForTokenClassification,
    "XLSTMForSequenceClassification": XLSTMForSequenceClassification,
}
SEEDS = st.integers(0, 2**32 - 1)


def examples(few: int, many: int) -> settings:
    """So many examples of a property, always the same; a configuration has more fields than hypothesis expects."""
    return settings(
        max_examples=tries(few, many),
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
    )


def divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, most + 1) if n % d == 0]


def factor(size: int, hidden_size: int) -> float:
    """Of which `int(hidden_size * factor)` is the size, although a quotient may be rounded down."""
    exact = size / hidden_size
    return exact if int(hidden_size * exact) == size else (size + 0.5) / hidden_size


@st.composite
def configurations(draw) -> Fields:
    """Every field of its own of a legal configuration; the simplest is close to a tiny xLSTM-7B."""
    hidden, layers, vocab = draw(st.integers(1, 64)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    kinds = st.lists(st.sampled_from(("mlstm", "slstm")), min_size=layers, max_size=layers)
    multiple, proj_factor = draw(st.integers(1, 16)), draw(st.sampled_from((2.0, 0.5, 1, 1.3, 2.667)))
    inner = math.ceil(proj_factor * hidden / multiple) * multiple
    block = draw(st.sampled_from(CHOICES["mlstm_block"]))
    heads = draw(st.sampled_from(divisors(inner, 6) if block == "pre_up" else range(1, 7)))
    slstm_heads = st.sampled_from(divisors(hidden, 6))
    token = st.integers(0, vocab - 1)
    names = {name: st.sampled_from(legal) for name, legal in CHOICES.items() if name not in ("mlstm_block", "backend")}
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_heads": heads,
        "block_types": draw(st.none() | kinds),
        "mlstm_block": block,
        "qk_dim_factor": factor(heads * draw(st.integers(1, 16)), hidden),
        "v_dim_factor": factor(heads * draw(st.integers(1, 16)), hidden),
        "mlstm_proj_factor": proj_factor,
        "mlstm_qkv_block_size": draw(st.sampled_from(divisors(inner, 8))),
        "conv_kernel_size": draw(st.integers(0, 6)),
        "ffn_proj_factor": draw(st.sampled_from((2.667, 1, 1.3))),
        "ffn_round_up_to_multiple_of": multiple,
        "slstm_num_heads": draw(st.none() | slstm_heads if hidden % heads == 0 else slstm_heads),
        "slstm_conv_kernel_size": draw(st.integers(0, 6)),
        "slstm_ffn_proj_factor": draw(st.sampled_from((1.3, 0, 0.5, 2))),
        "norm_eps": draw(st.sampled_from((1e-6, 1e-5, 1e-3))),
        "eps": draw(st.sampled_from((1e-6, 0, 1e-3))),
        "gate_soft_cap": draw(st.sampled_from((15.0, None, 3))),
        "output_logit_soft_cap": draw(st.sampled_from((30.0, None, 3))),
        "use_bias": draw(st.booleans()),
        "add_out_norm": draw(st.booleans()),
        "dropout": draw(st.sampled_from((0.0, 0.1, 0.9, 0))),
        "chunk_size": draw(st.integers(1, 50)),
        "backend": draw(st.sampled_from(("auto", "torch"))),
        "context_length": draw(st.none() | st.integers(1, 99)),
        "keep_gates_in_fp32": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "use_cache": draw(st.booleans()),
        "pad_token_id": draw(st.none() | token),
        "bos_token_id": draw(st.none() | token),
        "eos_token_id": draw(st.none() | token | st.lists(token, min_size=1, max_size=2)),
        **{name: draw(strategy) for name, strategy in names.items()},
    }


def cuts(most: int = 40) -> st.SearchStrategy[list[int]]:
    """Lengths of the pieces that a text of at most so many tokens is read in: a prefill and steps, or any."""
    steps = st.builds(lambda prefill, steps: [prefill] + [1] * steps, st.integers(1, most // 2), st.integers(0, 9))
    return steps | st.lists(st.integers(1, most // 4), min_size=1, max_size=4)


@st.composite
def masks(draw, length: int | None = None, fewest: int = 0, most_rows: int = 3) -> list[str]:
    """Rows of one length with 1 at tokens and 0 at padding, on any side or inside, of at least so many tokens."""
    T = draw(st.integers(max(1, fewest), 40)) if length is None else length
    real = st.integers(fewest, T)
    row = (
        st.just("1" * T)
        | real.map(lambda n: "1" * n + "0" * (T - n))
        | real.map(lambda n: "0" * (T - n) + "1" * n)
        | st.text("01", min_size=T, max_size=T).filter(lambda x: x.count("1") >= fewest)
    )
    return draw(st.lists(row, min_size=1, max_size=most_rows))


def two_rows() -> st.SearchStrategy[list[str]]:
    return masks(fewest=2, most_rows=2).map(lambda rows: (rows * 2)[:2])


@st.composite
def cut_masks(draw) -> tuple[list[str], list[int]]:
    pieces = draw(cuts())
    return draw(masks(sum(pieces))), pieces


def mask_of(rows: list[str]) -> Tensor:
    return torch.tensor([[int(x) for x in row] for row in rows])


def build(fields: Fields, seed: int, dtype: torch.dtype = torch.float64, cls: type = XLSTMForCausalLM) -> Any:
    """A model in evaluation mode with every parameter random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(cls(XLSTMConfig(**fields)), seed).eval().to(dtype)


def ids_of(fields: Fields, batch: int, time: int, seed: int) -> Tensor:
    return torch.randint(0, fields["vocab_size"], (batch, time), generator=torch.Generator().manual_seed(seed))
