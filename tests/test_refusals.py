"""Whatever the configuration, the text and the cache, illegal ones are refused in one sentence, and nothing changes."""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from models import states
from numerics import assert_exact
from properties import HEADS, SEEDS, Fields, build, configurations, examples, ids_of, mask_of, two_rows
from torch import Tensor
from torture import tried
from transformers import DynamicCache, PreTrainedConfig

import modeling_xlstm
from modeling_xlstm import XLSTMCache, XLSTMConfig, XLSTMForCausalLM
from modeling_xlstm.configuration_xlstm import CHOICES, LARGEST, NOT_NEGATIVE, POSITIVE


PACKAGE = Path(modeling_xlstm.__file__).parent
REFUSALS = (TypeError, ValueError, IndexError)


def refused(call: Callable[[], Any]) -> str:
    """The sentence in which this package refuses the call, or huggingface_hub the type of a field."""
    with pytest.raises((*REFUSALS, StrictDataclassError)) as info:
        call()
    error: BaseException = info.value
    if isinstance(error, StrictDataclassError):
        assert isinstance(error.__cause__, TypeError | ValueError)
        error = error.__cause__
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    path, sentence = Path(trace.tb_frame.f_code.co_filename), str(error)
    assert "\n" not in sentence
    if path.parent == PACKAGE:
        assert sentence.endswith("."), sentence
        assert "got" in sentence or "exclude each other" in sentence, sentence
    else:
        assert path.parts[-2:] == ("huggingface_hub", "dataclasses.py"), f"{path} says {error!r}"
    return sentence


OWN_FIELDS = sorted(
    {f.name for f in dataclasses.fields(XLSTMConfig)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
)
# by the type of a field, values of other types
OF_OTHER_TYPES: dict[Any, list[Any]] = {
    int: ["2", 2.5, 2.0, None, [2], True, 1j],
    int | None: ["2", 2.5, [2], True],
    int | list[int] | None: ["2", 2.5, True, ["2"], [None], (0,)],
    float | int: ["1.0", None, [1.0], True, 1j],
    float | int | None: ["1.0", [1.0], True, 1j],
    bool: [None, 0, 1, "yes", 1.0],
    str: [None, 3, ["exp"], True, b"exp"],
    list[str] | None: ["mlstm", ("mlstm",), 3, [1], [None], {"mlstm": 1}],
}


def impossible(field: str) -> st.SearchStrategy:
    """Values of the right type that a field must not have."""
    numbers = float in getattr(XLSTMConfig.__annotations__[field], "__args__", ())
    huge: st.SearchStrategy = st.integers(LARGEST + 1, 2**70)
    negative: st.SearchStrategy = st.integers(-(2**70), -1)
    if numbers:
        huge |= st.floats(2.0**63, math.inf) | st.just(math.nan)
        negative |= st.floats(-math.inf, -1e-300)
    if field in CHOICES:
        return st.text(max_size=9).filter(lambda name: name not in CHOICES[field])
    if field == "num_hidden_layers":
        return negative | st.just(0)
    if field in POSITIVE:
        return negative | huge | st.just(0) | (st.sampled_from((0.0, -0.0)) if numbers else st.nothing())
    if field in NOT_NEGATIVE:
        return negative | huge
    if field == "dropout":
        return negative | huge | st.floats(1, math.inf) | st.integers(1, 9)
    if field == "block_types":
        name = st.text(max_size=6).filter(lambda name: name not in ("mlstm", "slstm"))
        return st.just([]) | st.just(["mlstm"] * 4) | st.lists(name, min_size=4, max_size=4)
    return st.nothing()


@pytest.mark.parametrize("field", OWN_FIELDS)
def test_an_impossible_field_is_refused_by_name_and_value_at_every_door(field):
    values = st.sampled_from(OF_OTHER_TYPES[XLSTMConfig.__annotations__[field]]) | impossible(field)

    @examples(4, 40)
    @given(field=st.just(field), fields=configurations(), value=values, door=st.sampled_from(DOORS))
    def check(field, fields, value, door):
        tried("examples of an impossible field")
        sentence = refused(lambda: enter(fields, field, value, door))
        assert field in sentence
        assert isinstance(value, list) or any(x in sentence for x in (f"{value}", repr(value), type(value).__name__))

    check()


DOORS = ("fields", "dict", "file", "later")


def enter(fields: Fields, field: str, value: Any, door: str) -> None:
    """Builds a model whose configuration has this value, which is given in one of the ways there are."""
    legal = XLSTMConfig(**fields)
    if door == "later":
        setattr(legal, field, value)
        XLSTMForCausalLM(legal)
    elif door == "file" and type(value) not in (tuple, complex, bytes):  # which JSON does not have
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps({**legal.to_dict(), field: value}))
            XLSTMForCausalLM(XLSTMConfig.from_pretrained(folder))
    elif door == "fields":
        XLSTMForCausalLM(XLSTMConfig(**{**fields, field: value}))
    else:
        XLSTMForCausalLM(XLSTMConfig.from_dict({**legal.to_dict(), field: value}))


def is_legal(fields: Fields) -> bool:
    """Whether heads and blocks divide the widths of the blocks that there are."""
    hidden, heads, kinds = fields["hidden_size"], fields["num_heads"], fields["block_types"] or ["mlstm"]
    slstm_heads = fields["slstm_num_heads"] or heads
    if "slstm" in kinds and hidden % slstm_heads:
        return False
    if "mlstm" not in kinds:
        return True
    if fields["mlstm_block"] == "post_up":
        widths = [int(hidden * fields["qk_dim_factor"]), int(hidden * fields["v_dim_factor"])]
        return all(w and w % heads == 0 for w in widths) and hidden * fields["ffn_proj_factor"] >= 1
    multiple = fields["ffn_round_up_to_multiple_of"]
    inner = math.ceil(hidden * fields["mlstm_proj_factor"] / multiple) * multiple
    return inner % heads == inner % fields["mlstm_qkv_block_size"] == 0


SIZES = st.fixed_dictionaries(
    {},
    optional={
        "hidden_size": st.integers(1, 40),
        "num_heads": st.integers(1, 12),
        "slstm_num_heads": st.none() | st.integers(1, 12),
        "qk_dim_factor": st.floats(0.01, 2),
        "v_dim_factor": st.floats(0.01, 2),
        "mlstm_proj_factor": st.floats(0.01, 3),
        "mlstm_qkv_block_size": st.integers(1, 12),
        "ffn_round_up_to_multiple_of": st.integers(1, 40),
        "ffn_proj_factor": st.floats(0.01, 3),
    },
)


@examples(30, 500)
@given(fields=configurations(), sizes=SIZES)
def test_sizes_build_a_model_that_computes_or_are_refused(fields, sizes):
    tried("examples of sizes that may not fit")
    fields = {**fields, **sizes}
    if is_legal(fields):
        model = build(fields, seed=0)
        assert model(ids_of(fields, 1, 3, seed=0)).logits.isfinite().all()
    else:
        sentence = refused(lambda: XLSTMConfig(**fields))
        assert "must be a multiple of" in sentence or "ffn_proj_factor must be at least 1" in sentence


def pick(n: int, *options: Any) -> Any:
    return options[n % len(options)]


def put(x: Tensor, n: int, value: float) -> Tensor:
    """A copy of x with another value at one place."""
    x = x.clone()
    x.view(-1)[n % x.numel()] = value
    return x


class Legal:
    """A model, and what it may be given, of which something is to be broken: `n` chooses what and where."""

    def __init__(self, fields: Fields, rows: list[str], n: int, seed: int):
        self.model, self.mask, self.n = build(fields, seed), mask_of(rows), n
        self.config, self.vocab = self.model.config, fields["vocab_size"]
        (self.B, self.T), self.D = self.mask.shape, fields["hidden_size"]
        self.ids = ids_of(fields, self.B, self.T, seed)

    def pick(self, *options: Any) -> Any:
        return pick(self.n, *options)

    def embeds(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(shape or (self.B, self.T, self.D), dtype=dtype)

    def bounds(self, *values: float, dtype: torch.dtype = torch.int64, **others: Any) -> dict[str, Any]:
        return {"input_ids": self.ids[:1], "cu_seq_lens_q": torch.tensor(values, dtype=dtype), **others}


# what is wrong: arguments of a model of which it is
BROKEN_INPUTS: dict[str, Callable[[Legal], dict[str, Any]]] = {
    "ids of another dtype": lambda x: {
        "input_ids": x.ids.to(
            x.pick(torch.float32, torch.bool, torch.int8, torch.int16, torch.uint8, torch.float64, torch.complex64)
        )
    },
    "ids of other axes": lambda x: {
        "input_ids": x.pick(x.ids[0], x.ids[None], x.ids[0, 0], x.ids[:, :0], x.ids[:0], x.ids[..., None])
    },
    "ids that are no tensor": lambda x: {"input_ids": x.pick(x.ids.tolist(), x.ids.numpy(), "text", 3, (x.ids,))},
    "ids outside the vocabulary": lambda x: {
        "input_ids": put(x.ids, x.n, x.pick(-1, x.vocab, x.vocab + x.n, -100, 2**40, -(2**63)))
    },
    "nothing": lambda x: {"attention_mask": x.mask},
    "ids and embeddings": lambda x: {"input_ids": x.ids, "inputs_embeds": x.embeds()},
    "embeddings of another width": lambda x: {"inputs_embeds": x.embeds(x.B, x.T, x.D + x.pick(1, 2, x.D))},
    "embeddings of other axes": lambda x: {
        "inputs_embeds": x.pick(x.embeds()[0], x.embeds()[None], x.embeds()[:0], x.embeds()[:, :0])
    },
    "embeddings of another dtype": lambda x: {
        "inputs_embeds": x.embeds(
            dtype=x.pick(torch.float32, torch.int64, torch.bfloat16, torch.float16, torch.bool, torch.complex128)
        )
    },
    "embeddings that are no tensor": lambda x: {"inputs_embeds": x.pick([[0.0] * x.D], x.embeds().numpy(), 3)},
    "a mask of another shape": lambda x: {
        "input_ids": x.ids,
        "attention_mask": torch.ones(
            x.pick((x.B, x.T + 1), (x.B, x.T - 1), (x.B + 1, x.T), (x.T,), (x.B, 1, x.T, x.T), (), (x.B, 0), (0, x.T))
        ),
    },
    "a mask of other numbers": lambda x: {
        "input_ids": x.ids,
        "attention_mask": put(x.mask.double(), x.n, x.pick(2, -1, 0.5, math.nan, math.inf, -1e9, 1 + 1e-12)),
    },
    "a mask that is no tensor": lambda x: {
        "input_ids": x.ids,
        "attention_mask": x.pick(x.mask.tolist(), x.mask.numpy(), "1", 1, True),
    },
    "labels of another shape": lambda x: {
        "input_ids": x.ids,
        "labels": x.pick(x.ids[:, 1:], x.ids[:1].repeat(x.B + 1, 1), x.ids[0], x.ids[None], x.ids[..., None]),
    },
    "labels of another dtype": lambda x: {
        "input_ids": x.ids,
        "labels": x.ids.to(x.pick(torch.int32, torch.bool, torch.float64, torch.uint8, torch.bfloat16)),
    },
    "labels outside the vocabulary": lambda x: {
        "input_ids": x.ids,
        "labels": torch.full_like(x.ids, x.pick(-1, x.vocab, x.vocab + x.n, -99, -101, 2**40)),
    },
    "labels that are no tensor": lambda x: {"input_ids": x.ids, "labels": x.pick(x.ids.tolist(), x.ids.numpy(), 3)},
    "nothing to predict": lambda x: {"input_ids": x.ids, "labels": torch.full_like(x.ids, -100)},
    "labels of padding only": lambda x: {
        "input_ids": x.ids,
        "labels": x.ids,
        "attention_mask": torch.zeros_like(x.mask, dtype=x.pick(torch.int64, torch.bool, torch.float32)),
    },
    "labels of fewer logits": lambda x: {"input_ids": x.ids, "labels": x.ids, "logits_to_keep": 1},
    "shifted labels of another shape": lambda x: {"input_ids": x.ids, "labels": x.ids, "shift_labels": x.ids[:, 1:]},
    "a negative number of logits": lambda x: {"input_ids": x.ids, "logits_to_keep": -1 - x.n},
    "logits of no number": lambda x: {
        "input_ids": x.ids,
        "logits_to_keep": x.pick("1", 1.0, None, [0], (0,), slice(1), torch.tensor([0.0]), torch.tensor([True])),
    },
    "logits of other positions": lambda x: {
        "input_ids": x.ids,
        "logits_to_keep": torch.tensor(x.pick([x.T], [0, -x.T - 1], [[0]], 0, [0, 2**40])),
    },
    "positions of another shape": lambda x: {
        "input_ids": x.ids,
        x.pick("position_ids", "seq_idx"): torch.arange(x.T)[
            pick(x.n // 2, slice(None), (None, slice(1)), (None, None), (slice(None), None))
        ],
    },
    "positions of another dtype": lambda x: {
        "input_ids": x.ids,
        x.pick("position_ids", "seq_idx"): torch.zeros(
            1, x.T, dtype=pick(x.n // 2, torch.float32, torch.bool, torch.complex64, torch.int8)
        ),
    },
    "positions that are no tensor": lambda x: {
        "input_ids": x.ids,
        x.pick("position_ids", "seq_idx"): pick(x.n // 2, [list(range(x.T))], x.ids.numpy(), "0", 0),
    },
    "packed sequences in a batch": lambda x: {
        "input_ids": x.ids,
        **x.pick(
            {"cu_seq_lens_q": torch.tensor([0, x.T])},
            {"position_ids": torch.arange(x.T).flip(0)[None]},
            {"seq_idx": torch.arange(x.T)[None]},
        ),
    },
    "boundaries elsewhere": lambda x: x.bounds(
        *x.pick(
            (0, x.T + 1), (1, x.T), (0, x.T - 1), (0, x.T, x.T - 1), (0, -1, x.T), (0, x.T, 0, x.T), (0, 2**32 + x.T),
            (0, 2**40, x.T), (-(2**32), x.T),
        )
    ),
    "boundaries of another dtype": lambda x: x.bounds(
        0, x.T, dtype=x.pick(torch.float32, torch.int16, torch.uint8, torch.bool, torch.float64)
    ),
    "boundaries of other axes": lambda x: {
        "input_ids": x.ids[:1],
        "cu_seq_lens_q": torch.tensor(x.pick([[0, x.T]], x.T, [0], [], [[0], [x.T]]), dtype=torch.int32),
    },
    "boundaries that are no tensor": lambda x: {
        "input_ids": x.ids[:1],
        "cu_seq_lens_q": x.pick([0, x.T], (0, x.T), "0", x.T),
    },
    "boundaries of another name": lambda x: {
        "input_ids": x.ids[:1],
        x.pick("cu_seqlens", "cu_seq_lens"): torch.tensor([0, x.T]),
    },
    "packed sequences with padding": lambda x: x.bounds(
        0, x.T, attention_mask=put(torch.ones_like(x.mask[:1]), x.n, 0)
    ),
    "a cache that is none": lambda x: {
        "input_ids": x.ids,
        x.pick("past_key_values", "cache", "cache_params"): pick(
            x.n // 3, "cache", (), DynamicCache(), XLSTMCache, 3, x.config
        ),
    },
    "two caches": lambda x: {
        "input_ids": x.ids,
        **dict.fromkeys(
            x.pick(("past_key_values", "cache"), ("cache", "cache_params"), ("past_key_values", "cache_params")),
            XLSTMCache(x.config),
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN_INPUTS)
@torch.no_grad()
@examples(3, 25)
@given(
    fields=configurations(),
    rows=two_rows(),
    n=st.integers(0, 999),
    seed=SEEDS,
)
def test_a_broken_input_is_refused_and_changes_nothing(what, fields, rows, n, seed):
    tried("examples of a broken input")
    legal = Legal(fields, rows, n, seed)
    before = legal.model(legal.ids, attention_mask=legal.mask).logits
    refused(lambda: legal.model(**BROKEN_INPUTS[what](legal)))
    assert torch.equal(legal.model(legal.ids, attention_mask=legal.mask).logits, before)


class LegalCache(Legal):
    """With a cache that has read the text, and what it holds."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.cache = XLSTMCache(self.config)
        self.cache.activate_past_recording()
        self.model(self.ids, attention_mask=self.mask, past_key_values=self.cache)
        self.before = {name: x.clone() for name, x in states(self.cache).items()}
        self.new = self.ids[:, : 1 + self.n % 2]

    def read(self, **kwargs: Any) -> None:
        self.model(**{"input_ids": self.new, "past_key_values": self.cache, **kwargs})

    def read_spoilt(self, change: Callable[[Tensor], Tensor]) -> None:
        """Reads on from a copy in which the states of one layer are others."""
        cache = self.cache.fork(1)
        layer = cache.layers[self.n % len(cache.layers)]
        assert layer.state is not None
        layer.state = layer.state.map(change)
        self.read(past_key_values=cache)

    def read_from_another_model(self) -> None:
        config, blocks = self.config, self.config.block_types
        fields = self.pick(
            {"norm_eps": 2 * config.norm_eps},
            {"keep_gates_in_fp32": not config.keep_gates_in_fp32},
            {"norm_type": "layer_norm" if config.norm_type == "rms_norm" else "rms_norm"},
            {"block_types": [*blocks, "mlstm"], "num_hidden_layers": len(blocks) + 1},
        )
        other = XLSTMForCausalLM(XLSTMConfig(**{**config.to_dict(), **fields})).eval().double()
        self.read(past_key_values=other(self.ids, use_cache=True).past_key_values)

    def read_half_way(self) -> None:
        cache = self.cache.fork(1)
        cache.is_broken = True
        self.pick(
            lambda: self.read(past_key_values=cache), lambda: cache.fork(1), lambda: cache.crop(0),
            lambda: cache.save(Path("nowhere"), self.model),
        )()  # fmt: skip


# what is done wrong to a cache
BROKEN_USES: dict[str, Callable[[LegalCache], Any]] = {
    "other rows": lambda x: x.read(input_ids=x.pick(x.new[:1], x.new.repeat(2, 1))),
    "other rows in a state": lambda x: x.read_spoilt(lambda y: x.pick(y[:1], y.repeat(2, *[1] * (y.dim() - 1)), y[:0])),
    "another dtype of a state": lambda x: x.read_spoilt(
        lambda y: y.to(x.pick(torch.float32, torch.bfloat16, torch.int64))
    ),
    "another device of a state": lambda x: x.read_spoilt(lambda y: y.to("meta")),
    "other axes of a state": lambda x: x.read_spoilt(lambda y: x.pick(y[..., None], y.flatten(), y[None])),
    "the cache of another model": lambda x: x.read_from_another_model(),
    "a cache whose text was not read to its end": lambda x: x.read_half_way(),
    "a mask of neither the past nor the new": lambda x: x.read(
        attention_mask=torch.ones(x.B, x.pick(x.T + x.new.shape[1] + 1, x.T + x.new.shape[1] - 1 + (x.T == 1), 99, 0))
    ),
    "ids outside the vocabulary": lambda x: x.read(input_ids=put(x.new, x.n, x.vocab)),
    "packed sequences": lambda x: x.read(
        input_ids=x.ids[:1], past_key_values=XLSTMCache(x.config),
        cu_seq_lens_q=torch.tensor([0, x.T - 1, x.T]),
    ),
    "crop of no number": lambda x: x.cache.crop(x.pick("1", None, -1.0, -0.5, [1], math.nan, torch.tensor(-1.0))),
    "crop of more than was recorded": lambda x: x.cache.crop(x.pick(1, -x.T - 1, -x.T - x.n - 1, 2**40)),
    "fork into none": lambda x: x.cache.fork(x.pick(0, -1, 1.0, "2", None, True, torch.tensor(2))),
    "repeat of none": lambda x: x.cache.batch_repeat_interleave(x.pick(0, -1, 1.0, "2", None, True, torch.tensor(2))),
    "an order of other rows": lambda x: x.cache.reorder_cache(
        torch.tensor(x.pick([x.B], [0, -1], [[0, 1]], 0, [0, 9]))
    ),
    "an order of no rows": lambda x: x.cache.reorder_cache(
        x.pick([0, 1], None, torch.tensor([0.0, 1.0]), torch.tensor([True, False]), "01", 0)
    ),
    "a choice of other rows": lambda x: x.cache.batch_select_indices(
        torch.tensor(x.pick([x.B], [-1], [[0]], 0, [True] * (x.B + 1), [False] * (x.B - 1)))
    ),
    "a choice of no rows": lambda x: x.cache.batch_select_indices(
        x.pick([0], None, torch.tensor([0.0]), torch.tensor([1], dtype=torch.uint8), slice(1), 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN_USES)
@torch.no_grad()
@examples(3, 25)
@given(fields=configurations(), rows=two_rows(), n=st.integers(0, 999), seed=SEEDS)
def test_a_broken_use_of_a_cache_is_refused_and_leaves_it_as_it_was(what, fields, rows, n, seed):
    tried("examples of a broken use of a cache")
    legal = LegalCache(fields, rows, n, seed)
    refused(lambda: BROKEN_USES[what](legal))
    assert legal.cache.get_seq_length() == legal.T
    assert all(torch.equal(x, legal.before[name]) for name, x in states(legal.cache).items())
    legal.cache.crop(-1)
    logits = legal.model(legal.ids[:, -1:], attention_mask=legal.mask[:, -1:], past_key_values=legal.cache).logits
    assert_exact(logits, legal.model(legal.ids, attention_mask=legal.mask).logits[:, -1:])


@pytest.mark.parametrize("value", [5, None, b"7:1", ["7:1"], 7.1, "8", 8.0, [8]])
def test_what_is_no_ratio_no_preset_no_depth_and_no_configuration_is_refused_by_name(value):
    assert "ratio must be" in refused(lambda: XLSTMConfig.from_ratio(value))
    assert "preset must be" in refused(lambda: XLSTMConfig.preset(value))
    assert "num_hidden_layers must be" in refused(lambda: XLSTMConfig.from_ratio("7:1", num_hidden_layers=value))
    for cls in HEADS.values():
        assert "config must be" in refused(lambda cls=cls: cls(value))


class LegalLayer(Legal):
    """With one of its mixers, what that may be given, and the state that it returns."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.layer = self.model.model.layers[self.n % len(self.model.model.layers)].mixer
        self.x, self.real = self.embeds() + 1, self.mask.bool()
        self.state = self.layer(self.x)[1]

    def pass_on(self, x: Any = None, state: Any = None, **kwargs: Any) -> None:
        self.layer(self.x if x is None else x, state, **kwargs)

    def changed(self, change: Callable[[Tensor], Any]) -> Any:
        """The state with the last tensor of the cell another one."""
        *first, last = self.state.cell
        return self.state._replace(cell=type(self.state.cell)(*first, change(last)))


BROKEN_LAYERS: dict[str, Callable[[LegalLayer], Any]] = {
    "another width": lambda x: x.pass_on(x.embeds(x.B, x.T, x.D + 1)),
    "other axes": lambda x: x.pass_on(x.pick(x.x[0], x.x[None], x.x[:0], x.x[:, :0])),
    "integers": lambda x: x.pass_on(x.x.to(x.pick(torch.int64, torch.bool, torch.complex64))),
    "a mask of another shape": lambda x: x.pass_on(
        mask=x.pick(x.real[:1], x.real[:, 1:], x.real[0], x.real[..., None], x.real[:, :0])
    ),
    "a mask of another dtype": lambda x: x.pass_on(mask=x.pick(x.mask, x.mask.double(), x.mask.tolist(), 1)),
    "boundaries of a batch": lambda x: x.pass_on(cu_seqlens=torch.tensor([0, x.T])),
    "boundaries and a mask": lambda x: x.pass_on(x.x[:1], mask=x.real[:1], cu_seqlens=torch.tensor([0, x.T])),
    "boundaries elsewhere": lambda x: x.pass_on(
        x.x[:1], cu_seqlens=torch.tensor(x.pick([0, x.T + 1], [1, x.T], [0, x.T, 0, x.T], [0, 2**32 + x.T], [[0, x.T]]))
    ),
    "none kept": lambda x: x.pass_on(keep=x.pick(0, -1, 1.0, "1", [1])),
    "a state that is none": lambda x: x.pass_on(state=x.pick(x.state.cell, (x.state.cell, None), "state", 0, ())),
    "the state of other rows": lambda x: x.pass_on(x.x[:1], x.state),
    "a state of another dtype": lambda x: x.pass_on(
        state=x.changed(lambda y: x.pick(y.float(), y.bfloat16(), y.long(), y.tolist(), None))
    ),
    "a state of another shape": lambda x: x.pass_on(
        state=x.changed(lambda y: x.pick(y[:1], y[..., None], y.flatten()[:1], y[None]))
    ),
    "a state of fewer tensors": lambda x: x.pass_on(state=x.state._replace(cell=tuple(x.state.cell)[1:])),
    "a convolution that is not there, or none": lambda x: x.pass_on(
        state=x.state._replace(conv=x.state.cell[0] if x.state.conv is None else None)
    ),
}


@pytest.mark.parametrize("what", BROKEN_LAYERS)
@examples(3, 25)
@given(fields=configurations(), rows=two_rows(), n=st.integers(0, 999), seed=SEEDS)
def test_a_broken_input_of_a_layer_is_refused_and_leaves_the_state_as_it_was(what, fields, rows, n, seed):
    tried("examples of a broken input of a layer")
    legal = LegalLayer(fields, rows, n, seed)
    before = {name: x.clone() for name, x in legal.state.tensors().items()}
    refused(lambda: BROKEN_LAYERS[what](legal))
    assert all(torch.equal(x, before[name]) for name, x in legal.state.tensors().items())
