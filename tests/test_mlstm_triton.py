"""The Triton kernels of the mLSTM against the definition, on a GPU or (float32, float16) in Triton's interpreter."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from cases import (
    MLSTM_TOKENS,
    PACKED,
    REGIMES,
    fresh,
    in_two,
    mlstm_inputs,
    outputs_and_grads,
    packed,
    padded,
    padding_mask,
    rounded,
    strided,
)
from numerics import assert_each, assert_matches, least_exact
from triton_device import DEVICE, GPU, RUN, compilations, needs_somewhere_to_run

from modeling_xlstm.fused import soft_cap
from modeling_xlstm.mlstm import MLSTMState, mlstm_chunkwise


pytestmark = [pytest.mark.usefixtures("poisoned_memory"), needs_somewhere_to_run]

if RUN:
    from modeling_xlstm import mlstm_triton

INPUT_GATES = ("exp", "sigmoid")
BATCH, HEADS = (8, 3) if GPU else (3, 3)  # the more rows, the better errors are measured
# The interpreter has no products in bfloat16.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32,)
HALVES = (torch.float16, torch.bfloat16) if GPU else (torch.float16,)


def chunkwise(x, backend, **options):
    state = MLSTMState(x["C"], x["n"], x["m"]) if "C" in x else None
    return mlstm_chunkwise(*(x[name] for name in MLSTM_TOKENS), state, backend=backend, **options)


def inputs(*sizes, **options):
    return {name: t.to(DEVICE) for name, t in mlstm_inputs(*sizes, **options).items()}


on_triton, on_torch = (partial(chunkwise, backend=backend) for backend in ("triton", "torch"))


def plain(x, input_gate="exp", gate_soft_cap=None, eps=1e-6, cu_seqlens=None):
    """The parallel form of the paper in plain PyTorch, products in the dtype of the inputs, gates in float32.

    Results are rounded to that dtype, states too: they are sums of products of rounded operands. The gradient of the
    denominator comes from the rounded output, as in every implementation that keeps its output and no numerator.
    """
    if "C" not in x:
        B, _, H, K = x["q"].shape
        shapes = {"C": (B, H, K, x["v"].shape[-1]), "n": (B, H, K), "m": (B, H)}
        x = x | {name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()}
    bounds = [0, x["q"].shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    dtype, outputs, states = x["q"].dtype, [], []
    for row, (start, end) in enumerate(pairwise(bounds)):
        C, n, m = (x[name] if cu_seqlens is None else x[name][row : row + 1] for name in ("C", "n", "m"))
        if start < end:
            tokens = [x[name][:, start:end].transpose(1, 2) for name in MLSTM_TOKENS]
            h, C, n, m = _parallel(*tokens, C, n, m, input_gate, gate_soft_cap, eps)
            outputs.append(h.transpose(1, 2))
        states.append((C, n, m))
    state = (torch.cat(parts).to(dtype).float() for parts in zip(*states, strict=True))
    return torch.cat(outputs, 1), MLSTMState(*state)


def _parallel(q, k, v, igate, fgate, C, n, m, input_gate, gate_soft_cap, eps):
    dtype, T = q.dtype, q.shape[2]
    igate, fgate = (soft_cap(gate.float(), gate_soft_cap) for gate in (igate, fgate))
    logf = F.logsigmoid(fgate)
    closed = torch.isneginf(igate) & torch.isneginf(fgate)
    k, igate = k.masked_fill(closed[..., None], 0.0), igate.masked_fill(closed, 0.0)
    igate = F.logsigmoid(igate) if input_gate == "sigmoid" else igate
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    D = logf[..., None].expand(*logf.shape, T).masked_fill(~causal.tril(-1), 0.0).cumsum(-2) + igate[..., None, :]
    D, through = D.masked_fill(~causal, -math.inf), logf.cumsum(-1)
    m_rows = torch.zeros_like(through)
    if input_gate == "exp":
        through = through + m[..., None]
        m_rows = torch.maximum(through, D.max(-1)[0])
    W, g = (D - m_rows[..., None]).exp(), (through - m_rows).exp()
    S = (q @ k.mT) * (W * q.shape[-1] ** -0.5).to(dtype)
    q = q * (g * q.shape[-1] ** -0.5)[..., None].to(dtype)
    normaliser = S.float().sum(-1) + (q.float() * n[..., None, :]).sum(-1)
    denominator = torch.maximum(normaliser.abs(), (-m_rows).clamp(max=80.0).exp()) + eps
    h = (S @ v + q @ C.to(dtype)) / denominator.detach()[..., None].to(dtype)
    h = h + h.detach() * (1 - denominator / denominator.detach())[..., None].to(dtype)
    k = k * W[..., -1, :, None].to(dtype)
    C = g[..., -1, None, None] * C + (k.mT @ v).float()
    return h, C, g[..., -1, None] * n + k.float().sum(-2), m_rows[..., -1]


def results(x, dtype, way=lambda op: op, **options):
    """Outputs, final state and all gradients of the kernels, for inputs `x` in `dtype` that `way` feeds to an op, those
    of the definition in float64, and those of a baseline.

    The baseline of each is the less exact of our PyTorch backend, which computes in float32, and plain PyTorch.
    """
    x = rounded(x, dtype)
    fixed = {}
    if options.get("input_gate") == "sigmoid":
        fixed = {"m": torch.zeros_like(x.pop("m"))}  # no input

    def held(op):
        return lambda t, **more: op(t | {name: m.to(t["C"].dtype) for name, m in fixed.items()}, **more)

    oracle = outputs_and_grads(way(held(partial(on_torch, **options))), {name: t.double() for name, t in x.items()})
    ops = (partial(op, **options) for op in (on_triton, on_torch, plain))
    actual, *baselines = (outputs_and_grads(way(held(op)), x) for op in ops)
    return actual, oracle, least_exact(oracle, *baselines)


def assert_correct(x, dtype, way=lambda op: op, **options):
    assert_each(assert_matches, *results(x, dtype, way, **options))


@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200, 300] if GPU else [1, 65])
def test_any_length_is_right(T, dtype, input_gate):
    assert_correct(inputs(BATCH, T, HEADS, aligned=True), dtype, input_gate=input_gate)


@pytest.mark.parametrize("input_gate", INPUT_GATES if GPU else ("exp",))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", [*REGIMES[1:], "closed"] if GPU else ["keep", "overwrite", "closed"])
def test_extreme_gates_are_right(regime, dtype, input_gate):
    assert_correct(inputs(BATCH, 150 if GPU else 70, HEADS, regime=regime), dtype, input_gate=input_gate)


SHAPES = [(3, 33, 2, 16, 16), (2, 70, 2, 24, 96), (2, 9, 3, 17, 33)]
LARGE = [(16, 300, 2, 64, 128), (16, 270, 2, 192, 192), (16, 520, 2, 128, 256), (16, 520, 2, 256, 512)]
LARGE += [(40, 300, 2, 128, 256), (4, 600, 9, 8, 4)]
LARGE += [(8, 520, 4, 44, 88), (4, 300, 2, 100, 200), (4, 520, 2, 65, 63)]  # heads that do not start at 16 bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, H, K, V", SHAPES + LARGE if GPU else SHAPES)
def test_any_head_size_is_right(B, T, H, K, V, dtype):
    assert_correct(inputs(B, T, H, K, V, aligned=True), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_right(dtype):
    assert_correct(inputs(2, 40, 2, 24, 17, aligned=True), dtype)


@pytest.mark.parametrize("input_gate", INPUT_GATES if GPU else ("exp",))
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_are_right(dtype, input_gate):
    x = inputs(1, sum(PACKED), HEADS, rows=len(PACKED), aligned=True)
    assert_correct(x, dtype, packed, input_gate=input_gate)


@pytest.mark.skipif(not GPU, reason="too slow in the interpreter")
def test_many_packed_sequences_are_right():
    lengths = (300, 1, 0, 255, 256, 257, 512, 0, 33)
    x = inputs(1, sum(lengths), rows=len(lengths), aligned=True)
    assert_correct(x, torch.bfloat16, partial(packed, lengths=lengths))


@pytest.mark.parametrize("side", ["left", "scattered"] if GPU else ["scattered"])
def test_padding_is_right(side):
    """Against the PyTorch backend, whose padding has tests of its own."""
    mask = padding_mask(side).to(DEVICE)
    x = rounded(inputs(1, sum(PACKED), HEADS, rows=len(PACKED), aligned=True), torch.float32)
    oracle = {name: t.double() for name, t in x.items()}
    results = [
        outputs_and_grads(padded(op, mask), tensors)
        for op, tensors in ((on_triton, x), (on_torch, oracle), (on_torch, x))
    ]
    assert_each(assert_matches, *results)


@pytest.mark.parametrize("input_gate", INPUT_GATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_soft_cap_on_gates_is_right(dtype, input_gate):
    # with the other seed no normaliser is within 4 % of 1, from where on it divides, and a gradient jumps
    x = inputs(BATCH, 40, HEADS, aligned=True, seed={"exp": 0, "sigmoid": 219}[input_gate])
    x |= {name: 10 * x[name] for name in ("igate", "fgate")}
    assert_correct(x, dtype, input_gate=input_gate, gate_soft_cap=5.0)


def test_padding_and_a_soft_cap_go_together():
    mask = padding_mask("left").to(DEVICE)
    x = rounded(inputs(1, sum(PACKED), HEADS, rows=len(PACKED), aligned=True), torch.float32)
    ops = [partial(op, gate_soft_cap=2.0) for op in (on_triton, on_torch)]
    h, expected = (padded(op, mask)(x)[0] for op in ops)
    torch.testing.assert_close(h, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["sparse", "reversed"])
def test_views_that_are_not_contiguous_are_right(layout):
    assert_correct(inputs(2, 20, HEADS, aligned=True), torch.float32, partial(strided, layout=layout))


def test_a_fused_projection_needs_no_copies():
    """q, k and v as the layers have them: slices of one tensor, read where they are."""
    B, T, H, K, V = 2, 40, 2, 16, 32
    x = torch.randn(B, T, 2 * H * K + H * V, device=DEVICE)
    q, k, v = x.split((H * K, H * K, H * V), -1)
    q, k, v = q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (H, V))
    igate, fgate = torch.randn(B, T, 2 * H, device=DEVICE).chunk(2, -1)
    h, state = mlstm_chunkwise(q, k, v, igate, fgate, backend="triton")
    dense = (t.contiguous() for t in (q, k, v, igate, fgate))
    h_dense, state_dense = mlstm_chunkwise(*dense, backend="triton")
    assert torch.equal(h, h_dense)
    assert all(map(torch.equal, state, state_dense))


@pytest.mark.parametrize("start", [1, 4, 8])
@pytest.mark.parametrize("dtype", HALVES)
def test_lines_that_start_anywhere_are_read_as_whole_ones(dtype, start):
    """ptxas 12.8 errs where a kernel reads half precision one number at a time."""
    B, T, H, K, V = 2, 20, 2, 16, 32
    x = inputs(B, T, H, K, V, aligned=True)
    gates = [x[name].float() for name in MLSTM_TOKENS[3:]]
    dense = [x[name].to(dtype) for name in MLSTM_TOKENS[:3]]
    moved = [torch.empty(t.numel() + start, dtype=dtype, device=DEVICE)[start:].view(t.shape).copy_(t) for t in dense]
    assert all(mlstm_triton._at_16(*map(mlstm_triton._rows, moved)))
    h, _ = mlstm_chunkwise(*moved, *gates, backend="triton")
    assert torch.equal(h, mlstm_chunkwise(*dense, *gates, backend="triton")[0])


@pytest.mark.parametrize("split", [1, 64, 77] if GPU else [65])
def test_a_sequence_in_two_parts_is_right(split):
    assert_correct(inputs(2, 130, HEADS, aligned=True), torch.float32, partial(in_two, split=split))


@pytest.mark.parametrize("input_gate", INPUT_GATES)
def test_no_state_is_a_state_of_zeros(input_gate):
    x = rounded(fresh(inputs(2, 20, 2, aligned=True)), torch.float32)
    tokens = {name: x[name] for name in MLSTM_TOKENS}

    def without(t):
        return mlstm_chunkwise(*(t[name] for name in MLSTM_TOKENS), input_gate=input_gate, backend="triton")

    def zeros(t):
        return on_triton(x | t, input_gate=input_gate)

    expected = outputs_and_grads(zeros, tokens)
    for name, result in outputs_and_grads(without, tokens).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [130, 600] if GPU else [130])
def test_training_without_a_state_is_right_over_many_chunks(T, dtype):
    """With a loss on h alone: states that must be zero are not in memory then, at either end of a sequence."""

    def of_h_alone(op):
        def run(tokens):
            h, state = op(tokens)
            return h, MLSTMState(*(t.detach() for t in state))

        return run

    x = inputs(BATCH // 2 + 1, T, HEADS, aligned=True)
    assert_correct({name: x[name] for name in MLSTM_TOKENS}, dtype, of_h_alone)


def test_two_runs_are_bit_equal():
    x = rounded(inputs(2, 70, 2, aligned=True), DTYPES[-1])
    first, second = (outputs_and_grads(on_triton, x) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


RANGE = ("h", "final C", "final n", *(f"gradient of {name}" for name in MLSTM_TOKENS))


@pytest.mark.parametrize("dtype", HALVES)
def test_large_products_err_like_others(dtype):
    """Products of queries and keys beyond the range of float16; of the baselines one has the same limit."""
    errors = []
    for factor in (1, 150):
        x = rounded(fresh(inputs(2, 40, 2, 16, 16, aligned=True)), dtype)
        actual, oracle, _ = results(x | {name: factor * x[name] for name in "qk"}, dtype)
        errors.append([((actual[name] - oracle[name]).norm() / oracle[name].norm()).item() for name in RANGE])
    for name, ordinary, large in zip(RANGE, *errors, strict=True):
        assert large <= 2 * ordinary, name


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_too_small_for_float16_are_right(dtype):
    x = fresh(inputs(2, 40, 2, 16, 16, aligned=True))
    x |= {"igate": x["igate"] - 17, "fgate": x["fgate"] + 6, "v": 1000 * x["v"]}
    compared = results(x, dtype)
    for name in RANGE:
        assert_matches(*(result[name] for result in compared), name)


@pytest.mark.parametrize("lengths", [None, PACKED], ids=["batch", "packed"])
def test_scores_may_be_in_memory_a_few_at_a_time(monkeypatch, lengths):
    way, sizes = (lambda op: op, (2, 150)) if lengths is None else (packed, (1, sum(PACKED)))
    x = rounded(inputs(*sizes, 2, rows=None if lengths is None else len(lengths), aligned=True), DTYPES[-1])
    expected, blocks = outputs_and_grads(way(on_triton), x), mlstm_triton._blocks
    for size in (1, 200_000):
        small = partial(lambda size, *args: blocks(*args)._replace(scores_bytes=size, d_scores_bytes=size), size)
        monkeypatch.setattr(mlstm_triton, "_blocks", small)
        for name, result in outputs_and_grads(way(on_triton), x).items():
            assert torch.equal(result, expected[name]), name


def test_gradients_of_parts_of_the_outputs_are_right():
    x = rounded(inputs(1, 40, 2, aligned=True), torch.float32)
    for pick in (0, 1, 2, 3):
        grads = []
        for op in (on_triton, on_torch):
            leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
            h, state = op(leaves)
            weight = torch.linspace(-1, 1, (h, *state)[pick].numel(), device=DEVICE).view_as((h, *state)[pick])
            loss = ((h, *state)[pick] * weight).sum()
            grads.append(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))
        for name, actual, expected in zip(x, *grads, strict=True):
            scale = expected.abs().max().item()
            torch.testing.assert_close(actual, expected, atol=2e-5 * max(scale, 1e-3), rtol=1e-4, msg=name)


def test_unneeded_gradients_are_left_out():
    x = rounded(fresh(inputs(1, 17, 2)), torch.float32)
    v = x["v"].clone().requires_grad_()
    h, state = on_triton(x | {"v": v})
    assert h.requires_grad and all(t.requires_grad for t in state)
    (grad,) = torch.autograd.grad(h.sum(), v)
    assert grad.isfinite().all()
    with torch.no_grad():
        assert not on_triton(x | {"v": v})[0].requires_grad


@pytest.mark.parametrize("has_state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("bounds", [None, [0, 7, 7, 19]], ids=["batch", "packed"])
def test_the_op_keeps_the_promises_of_a_custom_op(bounds, has_state):
    x = rounded(inputs(1, 19, 2, 4, 3, rows=None if bounds is None else len(bounds) - 1), torch.float32)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    tensors = [t.requires_grad_() if has_state or name in MLSTM_TOKENS else None for name, t in x.items()]
    # What the backward pass reads again has no gradient, which the autograd check asks for, and unwritten places.
    torch.library.opcheck(
        torch.ops.modeling_xlstm.mlstm_chunkwise_triton,
        (*tensors, cu_seqlens, "exp", None, 1e-6),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_it_is_one_op_to_a_compiler():
    x = rounded(inputs(2, 19), torch.float32)
    leaves = [{name: t.clone().requires_grad_() for name, t in x.items()} for _ in range(2)]
    op = partial(chunkwise, backend="triton")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    grads = []
    for run, tensors in zip((op, compiled), leaves, strict=True):
        h, state = run(tensors)
        loss = h.square().sum() + sum(t.sum() for t in state)
        grads.append(torch.autograd.grad(loss, list(tensors.values())))
    assert all(map(torch.equal, *grads))


def test_it_is_one_op_in_an_exported_program():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, igate, fgate):
            return mlstm_chunkwise(q, k, v, igate, fgate, backend="triton")[0]

    def tokens(B, T):
        return tuple(rounded(inputs(B, T, 2), torch.float32)[name] for name in MLSTM_TOKENS)

    B, T = torch.export.Dim("B", max=64), torch.export.Dim("T", max=4096)
    program = torch.export.export(Module(), tokens(2, 19), dynamic_shapes=[{0: B, 1: T}] * 5)
    ops = [node.target for node in program.graph.nodes if "modeling_xlstm" in str(node.target)]
    assert ops == [torch.ops.modeling_xlstm.mlstm_chunkwise_triton.default]
    assert torch.equal(program.module()(*tokens(3, 70)), Module()(*tokens(3, 70)))


@pytest.mark.skipif(not GPU, reason="counts what is compiled for a GPU")
@pytest.mark.parametrize("layout", ["tokens", "heads"])
@pytest.mark.parametrize("H, K, V", [(2, 24, 40), (16, 128, 256)])
def test_nothing_is_compiled_again_for_another_batch_or_length(H, K, V, layout):
    def run(B, T):
        x = rounded(inputs(B, T, H, K, V), torch.bfloat16)
        if layout == "heads":  # as others have them, and gates in slices of one tensor
            x |= {name: x[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
            x |= dict(zip(("igate", "fgate"), torch.cat((x["igate"], x["fgate"]), -1).chunk(2, -1), strict=True))
        outputs_and_grads(on_triton, x)
        return compilations(mlstm_triton)

    compiled = run(1, 1)
    assert compiled > 0
    assert [run(B, T) for B, T in ((2, 17), (3, 256), (80, 16), (5, 513), (1, 129))] == [compiled] * 5


@pytest.mark.skipif(not GPU, reason="too slow in the interpreter")
def test_many_chunks_are_right():
    """More than the kernels for stabilisers take at a time."""
    assert_correct(inputs(2, 8300, 2, 16, 16, aligned=True), torch.float32)


@pytest.mark.skipif(not GPU, reason="needs thirty gigabytes")
def test_a_million_tokens_are_finite_and_those_of_their_parts():
    """In places beyond 2^32 too, where the second part alone is not."""
    T, H, K, V = 2**20, 8, 16, 520
    assert T * H * V > 2**32
    q, k = torch.randn(2, 1, T, H, K, device=DEVICE, dtype=torch.bfloat16).abs().unbind()
    v = torch.randn(1, T, H, V, device=DEVICE, dtype=torch.bfloat16)
    igate, fgate = (torch.randn(1, T, H, device=DEVICE) + mean for mean in (-3, 4.5))
    tokens = (q, k, v, igate, fgate)
    h, state = mlstm_chunkwise(*tokens, backend="triton")
    assert h.sum(dtype=torch.float32).isfinite()
    split = T - 10000
    h_part, between = mlstm_chunkwise(*(x[:, :split] for x in tokens), backend="triton")
    assert torch.equal(h[:, :split], h_part)
    del h_part
    rest = [x[:, split:] for x in tokens]
    parts = mlstm_chunkwise(*rest, state=between, backend="triton")
    double = MLSTMState(*(x.double() for x in between))
    oracle = mlstm_chunkwise(*(x.double() for x in rest), state=double, backend="torch")
    for names in zip((h[:, split:], *state), (oracle[0], *oracle[1]), (parts[0], *parts[1]), strict=True):
        assert_matches(*names)


@pytest.mark.parametrize("dtype", sorted({*DTYPES, *HALVES}, key=str))
def test_nan_in_a_state_stays_nan(dtype):
    """Even in what is rounded by its bits: these are all set in the NaN that a GPU makes."""
    x = rounded(inputs(2, 5), dtype)
    x["C"] = torch.full_like(x["C"], -1, dtype=torch.int32).view(torch.float32)
    h, state = chunkwise(x, "triton")
    assert h.isnan().all() and state.C.isnan().all() and state.n.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_gate, names", [("exp", "q k v igate fgate C n m"), ("sigmoid", "igate fgate n")])
def test_what_is_not_a_number_shows(input_gate, names, dtype):
    """In all that the definition has it in, and nowhere else."""
    T, t = (700, 260) if GPU else (70, 20)
    clean = rounded(inputs(2, T, 2, 16, 16, aligned=True), dtype)
    h, state = on_triton(clean, input_gate=input_gate)
    for name in names.split():
        x = clean | {name: clean[name].clone()}
        x[name][(1, t, 1) if name in MLSTM_TOKENS else (1, 1)] = math.nan
        outputs = [(h, *state) for h, state in (op(x, input_gate=input_gate) for op in (on_triton, on_torch))]
        for actual, expected, right in zip(*outputs, (h, *state), strict=True):
            assert torch.equal(actual.isnan(), expected.isnan()), name
            assert torch.equal(actual[~actual.isnan()], right[~actual.isnan()]), name
        assert outputs[0][0].isnan().any(), name


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_auto_is_triton_on_a_gpu_and_torch_where_it_cannot_serve():
    x = inputs(2, 19)
    single = rounded(x, torch.float32)
    assert torch.equal(chunkwise(single, "auto")[0], chunkwise(single, "triton")[0])
    assert torch.equal(chunkwise(x, "auto")[0], chunkwise(x, "torch")[0])


def test_float64_is_refused_with_the_reason():
    x = inputs(2, 5)
    with pytest.raises(NotImplementedError, match="the kernels take float16, bfloat16 and float32, not float64"):
        chunkwise(x, "triton")


@pytest.mark.skipif(not GPU, reason="too slow in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "K, V", [(16, 16), (24, 96), (40, 192), (64, 64), (96, 128), (128, 256), (192, 24), (256, 512), (72, 384)]
)
def test_random_shapes_are_right(K, V, dtype):
    """All shapes together, each tensor in units of its largest entry: a few numbers are no measure of an error."""
    generator = torch.Generator().manual_seed(K + 1000 * DTYPES.index(dtype))

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    together: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    for seed in range(8):  # 216 different ones in all
        B, T, H = draw(1, 2, 3, 5), int(torch.randint(1, 700, (), generator=generator)), draw(1, 2, 4)
        x = inputs(B, T, H, K, V, aligned=True, seed=seed)
        actual, oracle, baseline = results(x, dtype, input_gate=draw("exp", "sigmoid"))
        for name, expected in oracle.items():
            assert actual[name].dtype == baseline[name].dtype, (name, B, T, H)
            scale = expected.abs().max().clamp(min=1e-300)
            scaled = ((t.double() / scale).flatten() for t in (actual[name], expected, baseline[name]))
            together.setdefault(name, []).append(tuple(scaled))
    for name, parts in together.items():
        assert_matches(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)), name)
