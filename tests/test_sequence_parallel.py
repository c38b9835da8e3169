"""One text split over processes: what each computes is what one process computes of its slice."""

import pytest
import ranks
import torch
from numerics import difference
from torch import Tensor

from modeling_xlstm import sequence_parallel as slices
from modeling_xlstm.sequence_parallel import shard_sequence


WORLDS = (2, 3, 4)
SLICES = ("h", "dq", "dk", "dv", "di", "df", "y", "logits")  # what each process has its part of, along time
Results = dict[tuple, dict[str, Tensor]]


@pytest.fixture(scope="module")
def whole() -> Results:
    """All cases in one process."""
    return ranks.all_cases(0, 1)


@pytest.fixture(scope="module", params=WORLDS)
def split(request, tmp_path_factory) -> Results:
    """All cases in several processes, put together."""
    parts = ranks.run(ranks.all_cases, request.param, tmp_path_factory.mktemp("ranks"), request.param)
    return {case: {name: _join(name, [part[case] for part in parts]) for name in parts[-1][case]} for case in parts[0]}


def _join(name: str, parts: list[dict[str, Tensor]]) -> Tensor:
    """A tensor of all slices, or the last of those that are of the whole text."""
    if name in SLICES:
        return torch.cat([part[name] for part in parts], 1)
    if name == "loss" or not name.startswith("final"):
        assert all(torch.equal(part[name], parts[0][name]) for part in parts), f"{name} must be the same everywhere"
    return parts[-1][name]


ALL = [(kind, name) for kind, (_, names) in ranks.CASES.items() for name in names]


@pytest.mark.parametrize("kind, name", ALL)
def test_slices_are_those_of_one_process_in_float64(kind, name, whole, split):
    actual, expected = split[kind, name, torch.float64], whole[kind, name, torch.float64]
    assert actual.keys() == expected.keys()
    for key, x in expected.items():
        assert difference(actual[key], x) <= 1e-12, key


@pytest.mark.parametrize("kind, name", ALL)
def test_slices_round_like_one_process_in_float32(kind, name, whole, split):
    """To 1e-6, or 4 times what rounding does in one process, as in `numerics`: gradients of models are badly
    conditioned."""
    actual, one, oracle = (
        split[kind, name, torch.float32],
        whole[kind, name, torch.float32],
        whole[kind, name, torch.float64],
    )
    rounding = max(difference(one[key].double(), x) for key, x in oracle.items())
    for key, x in oracle.items():
        assert difference(actual[key], one[key]) <= max(1e-6, 4 * rounding), key
        assert difference(actual[key].double(), x) <= max(1e-6, 4 * rounding), key


def weighted_sum(k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    k = k * w.mT[..., None]
    return torch.einsum("bthk,bthv->bhkv", k, v), k.sum(1)


@pytest.mark.parametrize(
    "dtype, rounding",
    [(torch.float64, 2**-50), (torch.float32, 2**-21), (torch.float16, 2**-21), (torch.bfloat16, 2**-21)],
)
def test_sums_over_a_slice_round_little(dtype, rounding):
    """Relative to the sum of absolute terms, beside what gradients of half-precision numbers lose when stored so."""
    B, T, H, K, V = 2, 50, 3, 5, 7
    k, v = (torch.randn(B, T, H, size).to(dtype) for size in (K, V))
    # some of them less than the smallest number of float16
    w = torch.exp(-20 * torch.rand(B, H, T)).to(slices.state_dtype(dtype))
    inputs, d_outputs = (k, v, w), (torch.randn(B, H, K, V).to(w), torch.randn(B, H, K).to(w))

    def everything(function, transform) -> list[Tensor]:
        given = [transform(x).requires_grad_() for x in inputs]
        results = function(*given)
        return [*results, *torch.autograd.grad(results, given, [transform(x) for x in d_outputs])]

    actual = everything(slices._WeightedSum.apply, torch.clone)
    expected = everything(weighted_sum, Tensor.double)
    of_absolute_terms = everything(weighted_sum, lambda x: x.double().abs())
    assert [x.dtype for x in actual] == [w.dtype, w.dtype, dtype, dtype, w.dtype]
    for x, oracle, scale in zip(actual, expected, of_absolute_terms, strict=True):
        numbers = torch.finfo(x.dtype)
        stored = numbers.eps / 2 * oracle.abs().clamp(min=numbers.smallest_normal)
        assert ((x - oracle).abs() <= rounding * scale + stored).all()


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("refusals")
    return ranks.run(ranks.refusals, 2, folder, folder / "training")


@pytest.mark.parametrize(
    "what, sentence",
    {
        "slstm": "the recurrence of an sLSTM is not linear: its state after a slice cannot be had before that in front "
        "of it is known. Got sLSTM layers model.layers.1.mixer.",
        "twice": "once, got one that is already",
        "none": "must have mLSTM layers, got a Linear",
        "classifier": "Only language models and stacks can be split over processes, got a classifier",
        "cache": "is not generated, got use_cache=True",
        "generate": "is not generated, got ",
        "state": "starts from an empty state, got past_key_values",
        "labels": "split by split_sequence, got some without shift_labels and num_items_in_batch",
        "positions": "which gives cu_seq_lens_q, got position_ids",
        "rows": r"got (rows, gradients, training) (1, 1, 0) and (2, 1, 0)",
        "unknown": "got token_type_ids",
        "no ids": "must have input_ids or inputs_embeds, got labels",
        "lengths": "Lengths must be 2 numbers of at least 1 and sum up to 37, got [37, 0]",
        "batches": "must be given the same batch, got another in process 1 of them than in process 0.",
        "padding": "must have a token that is not padding, got none in slice 1",
        "size": "must divide the number of processes, of which there must be two or more, got 3 of 2.",
        "smoothing": "label_smoothing_factor must be 0.0 to split texts, got 0.1",
        "loss": "is that of the model, got a compute_loss_func",
        "stream": "must have a length, and dispatch_batches must be off, got a",
        "no labels": "must come with labels, got input_ids",
        "predictions": "prediction_loss_only must be True where texts are split, got False",
    }.items(),
)
def test_what_cannot_be_split_is_refused_in_every_process(what, sentence, sentences):
    for of_one in sentences:
        assert sentence in of_one[what]


def test_a_process_outside_the_group_is_refused(sentences):
    assert "outside" not in sentences[0]
    assert "Only processes of the group can shard a model over it" in sentences[1]["outside"]


def test_a_single_process_is_told_to_initialise_torch_distributed():
    with pytest.raises(RuntimeError, match=r"torch.distributed must be initialised to split texts over processes\."):
        shard_sequence(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "how, world",
    [("killed", 2), ("killed", 3), ("killed before backward", 2), ("killed before backward", 3), ("stuck", 3)],
)
def test_processes_that_are_left_alone_end_with_an_error(how, world, tmp_path):
    timeout = 4.0
    *left, none = ranks.run(ranks.left_alone, world, tmp_path, how, timeout, timeout=timeout)
    assert none is None and len(left) == world - 1
    for sentence, seconds in left:
        assert sentence
        assert seconds < (2 * timeout if how == "stuck" else timeout)


def test_an_error_in_a_process_is_raised_with_its_traceback(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="ZeroDivisionError: this one fails"):
        ranks.run(ranks.fails, 2, tmp_path)


@pytest.mark.parametrize("world, size, rows", [(2, None, 2), (4, 2, 1)])
def test_three_steps_of_a_trainer_are_those_of_one_process(world, size, rows, tmp_path):
    """4 processes are 2 groups that share a text each, with 1 row each of 2."""
    expected = ranks.train(0, tmp_path / "one", 2)
    results = ranks.run(ranks.train, world, tmp_path, tmp_path / "many", rows, size, world)
    for actual in results:
        assert actual.keys() == expected.keys()
        for name, x in expected.items():
            # losses are added up in float32
            assert difference(actual[name], x) <= (1e-6 if "loss" in name else 1e-10), name
