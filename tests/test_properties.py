"""Whatever the configuration and the text, legal ones keep the promises of the model."""

import copy
import json
import math
import tempfile
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from models import gradients, states
from numerics import assert_each, assert_exact, assert_matches, least_exact
from properties import HEADS, SEEDS, Fields, build, configurations, cut_masks, examples, ids_of, mask_of, masks
from torch import Tensor
from torture import tried

from modeling_xlstm import XLSTMCache, XLSTMConfig, XLSTMForCausalLM, count_parameters


DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad}


def in_pieces(model: Any, ids: Tensor, mask: Tensor, pieces: list[int], whole_mask: bool = True):
    """Logits of a text that is read in pieces, and the cache. A mask may be of the past as well, or of a piece."""
    cache, logits = XLSTMCache(model.config), []
    for start, end in pairwise((0, *accumulate(pieces))):
        given = mask[:, 0 if whole_mask else start : end]
        logits.append(model(ids[:, start:end], attention_mask=given, past_key_values=cache).logits)
    return torch.cat(logits, 1), cache


def states_of(cache: XLSTMCache, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Those of some rows by name, but for the empty ones of convolutions of one token."""
    return {name: x[rows].detach() for name, x in states(cache).items() if x.numel()}


def results(logits: Tensor, cache: XLSTMCache, rows: slice = slice(None)) -> dict[str, Tensor]:
    """What a text leaves, by name."""
    return {"logits": logits.detach()} | states_of(cache, rows)


@examples(15, 300)
@given(fields=configurations())
def test_a_legal_configuration_comes_back_from_a_dict_and_a_file_and_builds_a_model(fields):
    tried("examples of a configuration that is built")
    config = XLSTMConfig(**fields, transformers_version=transformers.__version__)  # which `to_dict` writes
    assert XLSTMConfig.from_dict(config.to_dict()) == config
    assert XLSTMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        assert XLSTMConfig.from_pretrained(folder).to_dict() == config.to_dict()
    for name, value in fields.items():
        if value is not None or name not in ("block_types", "slstm_num_heads"):
            assert getattr(config, name) == value
    model = XLSTMForCausalLM(config)
    assert count_parameters(config) == model.num_parameters()
    assert all(p.isfinite().all() for p in model.parameters())
    ids = ids_of(fields, 2, 5, seed=0)
    assert model.eval()(ids).logits.shape == (2, 5, config.vocab_size)
    assert model.train()(ids, labels=ids).loss.isfinite()


@examples(10, 200)
@given(ratio=st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any), periods=st.integers(1, 3))
def test_a_ratio_is_that_of_its_blocks(ratio, periods):
    tried("examples of a ratio")
    (a, b), size = ratio, {"hidden_size": 8, "num_heads": 2, "ffn_round_up_to_multiple_of": 4}
    config = XLSTMConfig.from_ratio(f"{a}:{b}", num_hidden_layers=(a + b) * periods, vocab_size=5, **size)
    assert config.block_types == (["mlstm"] * a + ["slstm"] * b) * periods
    shared = math.gcd(a, b)
    assert config.ratio == f"{a // shared}:{b // shared}"
    assert XLSTMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@examples(5, 120)
@given(fields=configurations(), dtype=st.sampled_from(sorted(DTYPES)), rows=masks(), seed=SEEDS)
def test_a_saved_model_has_the_same_weights_and_bits_of_logits_once_it_is_loaded(fields, dtype, rows, seed):
    tried("examples of a model that is saved and loaded")
    model, mask = build(fields, seed, DTYPES[dtype]), mask_of(rows)
    ids = ids_of(fields, *mask.shape, seed)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        model.save_pretrained(first)
        loaded = XLSTMForCausalLM.from_pretrained(first, dtype="auto")
        in_half = XLSTMForCausalLM.from_pretrained(first, dtype=torch.bfloat16)
        in_half.save_pretrained(second)
        again = XLSTMForCausalLM.from_pretrained(second, dtype="auto")
    kept = fields["keep_gates_in_fp32"]
    for name, weight in in_half.named_parameters():
        is_gate = any(gate in name for gate in ("gate_proj", "gate_weight", "gate_bias"))
        assert weight.dtype == (torch.float32 if is_gate and kept else torch.bfloat16), name
    pairs = [(loaded, model), (again, in_half)] if dtype != "bfloat16" or not kept else [(again, in_half)]
    for actual, expected in pairs:
        weights = expected.state_dict()
        assert actual.state_dict().keys() == weights.keys()
        assert all(x.dtype == weights[name].dtype for name, x in actual.state_dict().items())
        assert all(torch.equal(x, weights[name]) for name, x in actual.state_dict().items())
        assert not actual.training
        # copies, as the order of sums depends on where memory begins, and a file has weights anywhere
        with torch.no_grad():
            logits, logits_expected = (copy.deepcopy(x)(ids, attention_mask=mask).logits for x in (actual, expected))
        assert torch.equal(logits, logits_expected)


@examples(25, 350)
@given(
    fields=configurations(),
    text=cut_masks(),
    mode=st.sampled_from(sorted(MODES)),
    whole_mask=st.booleans(),
    seed=SEEDS,
)
def test_a_text_in_pieces_has_the_logits_and_the_state_of_one_pass(fields, text, mode, whole_mask, seed):
    tried("examples of a text in pieces")
    (rows, pieces), model = text, build(fields, seed)
    mask = mask_of(rows)
    ids = ids_of(fields, *mask.shape, seed)
    with MODES[mode]():
        whole = model(ids, attention_mask=mask, use_cache=True)
        logits, cache = in_pieces(model, ids, mask, pieces, whole_mask)
        last = model(ids, attention_mask=mask, logits_to_keep=1).logits
    assert_each(assert_exact, results(logits, cache), results(whole.logits, whole.past_key_values))
    assert_exact(last, whole.logits[:, -1:])
    assert cache.get_seq_length() == mask.shape[1]


def moved(model: Any, dtype: torch.dtype, seed: int) -> Any:
    """The model with each weight another one, at most two steps of `dtype` away: as if it had been rounded."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 2 * torch.finfo(dtype).eps * (2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1))
    return model


@torch.no_grad()
@examples(10, 150)
@given(fields=configurations(), dtype=st.sampled_from(("float32", "bfloat16")), text=cut_masks(), seed=SEEDS)
def test_rounding_is_no_worse_in_pieces(fields, dtype, text, seed):
    """The baselines are one pass, in two sizes of chunks, and what a rounding of the weights alone would do."""
    tried("examples of a text in float32 and bfloat16")
    (rows, pieces), model = text, build(fields, seed, DTYPES[dtype])
    mask = mask_of(rows)
    ids, real = ids_of(fields, *mask.shape, seed), mask.bool()
    exact = copy.deepcopy(model).double()

    def one_pass(model: Any) -> dict[str, Tensor]:
        output = model(ids, attention_mask=mask, use_cache=True)
        return results(output.logits[real], output.past_key_values)

    oracle, baselines = one_pass(exact), [one_pass(model)]
    logits, cache = in_pieces(model, ids, mask, pieces)
    dtypes = {name: x.dtype for name, x in baselines[0].items()}
    for i in range(6):
        by_rounding = one_pass(moved(exact, DTYPES[dtype], i))
        baselines.append({name: x.to(dtypes[name]) for name, x in by_rounding.items()})
    model.config.chunk_size = 1
    baselines.append(one_pass(model))
    actual = results(logits[real], cache)
    assert {x.dtype for x in states(cache).values()} == {torch.float32}
    if real.any():
        assert_each(assert_matches, actual, oracle, least_exact(oracle, *baselines))


def shown(output: Any, rows: Tensor | slice, mask: Tensor) -> Tensor:
    """What a model gives at the tokens of some rows, or for the rows, if it gives one vector for each."""
    y = getattr(output, "logits", None)
    y = output.last_hidden_state if y is None else y
    return y[rows] if y.dim() == 2 else y[rows][mask[rows].bool()]


@torch.no_grad()
@examples(20, 250)
@given(fields=configurations(), rows=masks(fewest=1), head=st.sampled_from(list(HEADS)), seed=SEEDS)
def test_a_row_does_not_depend_on_padding_other_rows_or_their_order(fields, rows, head, seed):
    tried("examples of a padded batch")
    model, mask = build(fields, seed, cls=HEADS[head]), mask_of(rows)
    ids = ids_of(fields, *mask.shape, seed)
    batch = model(ids, attention_mask=mask, use_cache=True)
    cache = getattr(batch, "past_key_values", None)
    for i, real in enumerate(mask.bool()):
        ones = torch.ones_like(ids[i : i + 1, real])
        alone = model(ids[i : i + 1, real], attention_mask=ones, use_cache=True)
        assert_exact(shown(batch, slice(i, i + 1), mask), shown(alone, slice(1), ones))
        if cache is not None:
            assert_each(assert_exact, states_of(cache, slice(i, i + 1)), states_of(alone.past_key_values))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    permuted = model(ids[order], attention_mask=mask[order])
    assert_exact(shown(permuted, slice(None), mask[order]), shown(batch, order, mask))


@torch.no_grad()
@examples(20, 250)
@given(
    fields=configurations(),
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=5).filter(any),
    name=st.sampled_from(("cu_seq_lens_q", "position_ids", "seq_idx")),
    dtype=st.sampled_from((torch.int64, torch.int32)),
    head=st.sampled_from(list(HEADS)),
    seed=SEEDS,
)
def test_packed_sequences_are_the_sequences(fields, lengths, name, dtype, head, seed):
    tried("examples of packed sequences")
    fields = {**fields, "pad_token_id": None}  # a single text that ends with it would be padded
    model, real = build(fields, seed, cls=HEADS[head]), [n for n in lengths if n]
    if head == "XLSTMForSequenceClassification" or name != "cu_seq_lens_q":
        lengths = real  # of an empty sequence there is no token to label or to number
    ids = ids_of(fields, 1, sum(lengths), seed)
    boundaries = {
        "cu_seq_lens_q": torch.tensor([0, *accumulate(lengths)]),
        "position_ids": torch.cat([torch.arange(n) for n in real])[None],
        "seq_idx": torch.repeat_interleave(torch.arange(len(real)), torch.tensor(real))[None],
    }
    packed = model(ids, **{name: boundaries[name].to(dtype)})
    ones = torch.ones_like(ids)
    pieces = zip(ids.split(real, 1), ones.split(real, 1), strict=True)
    alone = [shown(model(x, attention_mask=mask), slice(None), mask) for x, mask in pieces]
    assert_exact(shown(packed, slice(None), ones), torch.cat(alone))


@torch.no_grad()
@examples(6, 120)
@given(fields=configurations(), rows=masks(), chunk_size=st.integers(1, 50), at=st.integers(0, 39), seed=SEEDS)
def test_neither_later_tokens_nor_the_size_of_chunks_change_what_came_before(fields, rows, chunk_size, at, seed):
    tried("examples of other later tokens")
    model, mask = build(fields, seed), mask_of(rows)
    ids, others = (ids_of(fields, *mask.shape, s) for s in (seed, seed + 1))
    at %= mask.shape[1]
    whole = model(ids, attention_mask=mask).logits[:, : at + 1]
    model.config.chunk_size = chunk_size
    changed = torch.cat((ids[:, : at + 1], others[:, at + 1 :]), 1)
    assert_exact(model(changed, attention_mask=mask).logits[:, : at + 1], whole)


@examples(12, 200)
@given(fields=configurations(), text=cut_masks(), seed=SEEDS)
def test_gradients_through_the_states_are_those_of_finite_differences(fields, text, seed):
    tried("examples of gradients")
    (rows, pieces), model = text, build(fields, seed)
    mask, generator = mask_of(rows), torch.Generator().manual_seed(seed)
    ids = ids_of(fields, *mask.shape, seed)
    shape = (*ids.shape, fields["vocab_size"])
    weights = torch.randn(shape, generator=generator, dtype=torch.float64) * mask[..., None]
    (in_pieces(model, ids, mask, pieces)[0] * weights).sum().backward()
    grads = gradients(model)
    assert all(g.isfinite().all() for g in grads.values())
    direction = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in model.named_parameters()}

    @torch.no_grad()
    def loss_at(step: float) -> float:
        for name, p in model.named_parameters():
            p.add_(direction[name], alpha=step)
        loss = (model(ids, attention_mask=mask).logits * weights).sum().item()
        for name, p in model.named_parameters():
            p.sub_(direction[name], alpha=step)
        return loss

    expected = sum((g * direction[name]).sum().item() for name, g in grads.items())
    scale = math.sqrt(sum(g.square().sum().item() for g in grads.values()))
    # A large step may cross a kink, where the stabiliser or the denominator becomes another, or a curve; the latter
    # two steps tell together. A small one is rounded.
    slopes = [(loss_at(step) - loss_at(-step)) / (2 * step) for step in (1e-5, 1e-6, 1e-7)]
    slopes += [(100 * fine - coarse) / 99 for coarse, fine in pairwise(slopes)]
    error = min(abs(slope - expected) for slope in slopes)
    assert error <= 1e-6 * scale, f"{expected} is off by {error:.3g}, with gradients of norm {scale:.3g}"


@examples(6, 120)
@given(fields=configurations(), dtype=st.sampled_from(sorted(DTYPES)), rows=masks(fewest=2), seed=SEEDS)
def test_a_step_of_training_has_finite_gradients_in_every_dtype(fields, dtype, rows, seed):
    tried("examples of a step of training")
    model, mask = build(fields, seed, DTYPES[dtype]).train(), mask_of(rows)
    ids = ids_of(fields, *mask.shape, seed)
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all(), name


OPERATIONS = ("read", "crop", "fork", "reorder", "repeat", "select", "copy", "reset", "save")


class Text:
    """A cache, and what it should have read: of each row the tokens, and which of them are padding."""

    def __init__(self, model: Any, fields: Fields, rows: int):
        self.model, self.fields = model, fields
        self.ids, self.mask = torch.zeros(2, rows, 0, dtype=torch.long)
        self.recorded = 0
        self.record(XLSTMCache(model.config))

    def record(self, cache: XLSTMCache) -> None:
        self.cache, self.recorded = cache, 0
        cache.activate_past_recording()

    def keep(self, rows: Tensor) -> None:
        self.ids, self.mask, self.recorded = self.ids[rows], self.mask[rows], 0

    def read(self, length: int, seed: int, padding: float = 0.3) -> Tensor:
        """Logits of more tokens."""
        ids = ids_of(self.fields, len(self.ids), length, seed)
        mask = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) >= padding).long()
        self.ids, self.mask = torch.cat((self.ids, ids), 1), torch.cat((self.mask, mask), 1)
        self.recorded += length
        return self.model(ids, attention_mask=self.mask, past_key_values=self.cache).logits

    def apply(self, operation: str, n: int) -> None:
        """One of `OPERATIONS`, of which n says what is to be chosen in it."""
        B, T = self.ids.shape
        generator, times = torch.Generator().manual_seed(n), 1 + n % 3 if B <= 2 else 1
        if operation == "read":
            self.read(1 + n % 9, seed=n)
        elif operation == "crop":
            tokens = n % (self.recorded + 1)
            self.cache.crop(-tokens)
            self.ids, self.mask, self.recorded = self.ids[:, : T - tokens], self.mask[:, : T - tokens], 0
        elif operation == "fork":
            self.keep(torch.arange(B).repeat_interleave(times))
            self.record(self.cache.fork(times))
        elif operation == "repeat":
            self.keep(torch.arange(B).repeat_interleave(times))
            self.cache.batch_repeat_interleave(times)
        elif operation == "reorder":
            rows = torch.randint(0, B, (B,), generator=generator)
            self.keep(rows)
            self.cache.reorder_cache(rows)
        elif operation == "select":
            rows = torch.randperm(B, generator=generator)[: 1 + n % B]
            self.keep(rows)
            self.cache.batch_select_indices(rows)
        elif operation == "copy" and not torch.is_grad_enabled():  # PyTorch copies no tensor that has a gradient
            self.record(copy.deepcopy(self.cache))
        elif operation == "reset":
            self.cache.reset()
            self.ids, self.mask, self.recorded = self.ids[:, :0], self.mask[:, :0], 0
        elif operation == "save" and T:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "state.safetensors")
                self.cache.save(path, self.model)
                self.record(XLSTMCache.load(path, self.model))

    def check(self) -> None:
        """The states, and the logits of three more tokens, are those of each row alone in one pass."""
        logits = self.read(3, seed=0, padding=0.0)
        assert self.cache.get_seq_length() == self.ids.shape[1]
        for i, real in enumerate(self.mask.bool()):
            alone = self.model(self.ids[i : i + 1, real], use_cache=True)
            expected = results(alone.logits[:, -3:], alone.past_key_values)
            assert_each(assert_exact, results(logits[i : i + 1], self.cache, slice(i, i + 1)), expected)


@examples(25, 350)
@given(
    fields=configurations(),
    rows=st.integers(1, 3),
    operations=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**31)), max_size=8),
    mode=st.sampled_from(sorted(MODES)),
    seed=SEEDS,
)
def test_a_cache_holds_what_its_rows_have_read_whatever_is_done_with_it(fields, rows, operations, mode, seed):
    tried("examples of what is done with a cache")
    with MODES[mode]():
        text = Text(build(fields, seed), fields, rows)
        for operation, n in operations:
            text.apply(operation, n)
            tried("operations on caches")
        text.check()


@torch.no_grad()
@examples(3, 50)
@given(fields=configurations(), rows=masks(length=7, fewest=1), seed=SEEDS)
def test_generate_takes_the_likeliest_token_of_one_pass(fields, rows, seed):
    tried("examples of generated tokens")
    fields = {**fields, "eos_token_id": None, "pad_token_id": 0}
    model, mask = build(fields, seed), mask_of(rows)
    ids = ids_of(fields, *mask.shape, seed)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens[:, :7], ids) and tokens.shape == (len(rows), 11)
    for row, real in zip(tokens, mask.bool(), strict=True):
        text = torch.cat((row[:7][real], row[7:]))
        logits = model(text[None]).logits[0, -5:-1]
        chosen = logits.gather(1, text[-4:, None])[:, 0]
        assert_exact(chosen, logits.amax(1))  # two tokens may be equally likely
