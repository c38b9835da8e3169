"""Whole models on the Triton kernels compute what they do on PyTorch."""

import pytest
import torch
from models import tiny_model, use_checkpointing
from numerics import assert_each, assert_matches
from triton_device import DEVICE, GPU, needs_somewhere_to_run

from modeling_xlstm import (
    MLSTMPreUpLayer,
    XLSTMConfig,
    export_decode,
    export_prefill,
    initial_states,
    logits_triton,
)


pytestmark = needs_somewhere_to_run

KINDS = ["post_up", "pre_up", "pre_up_slstm"]


def pair(kind, dtype=torch.float32):
    """The same model on PyTorch and on Triton."""
    return [tiny_model(kind, backend=backend).to(DEVICE, dtype) for backend in ("torch", "triton")]


def ids(B, T):
    return torch.randint(1, 60, (B, T), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_pytorch(kind):
    tokens, results = ids(2, 9), []
    for model in pair(kind):
        out = model(tokens, labels=tokens)
        out.loss.backward()
        results.append((out.logits, {name: p.grad for name, p in model.named_parameters()}))
    (logits, grads), (logits_triton, grads_triton) = results
    torch.testing.assert_close(logits_triton, logits, atol=1e-4, rtol=1e-4)
    for name, grad in grads.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(grads_triton[name], grad, atol=1e-4 * scale + 1e-9, rtol=1e-3, msg=name)


@pytest.mark.parametrize("autocast", [False, True] if GPU else [False])
def test_a_loss_without_logits_is_that_with_them(autocast, monkeypatch):
    monkeypatch.setattr(logits_triton, "PART", 300)
    tokens, results = ids(2, 9), []
    labels = tokens.where(tokens % 5 != 0, -100)
    _, model = pair("post_up")
    for options in ({}, {"skip_logits": True}):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            out = model(tokens, labels=labels, num_items_in_batch=7, **options)
        assert (out.logits is None) == bool(options)
        out.loss.backward()
        results.append((out.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
        model.zero_grad()
    (loss, grads), (loss_alone, grads_alone) = results
    bound = 1e-2 if autocast else 1e-5
    torch.testing.assert_close(loss_alone, loss, atol=bound, rtol=bound)
    flat, flat_alone = (torch.cat([grad.flatten().float() for grad in x.values()]) for x in (grads, grads_alone))
    assert (flat_alone - flat).norm() <= bound * flat.norm()
    for name, grad in grads.items():
        assert grads_alone[name].any() == grad.any(), name


def test_a_head_with_something_around_it_is_called_for_a_loss_without_logits():
    tokens, calls = ids(2, 9), []
    _, model = pair("post_up")
    expected = model(tokens, labels=tokens).loss
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(tokens, labels=tokens, skip_logits=True).loss, expected)
    assert calls


# in half precision other kernels are used, which the interpreter has no numbers for
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if GPU else [torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_with_checkpointing(kind, dtype):
    tokens, grads = ids(2, 9), []
    plain, model = (tiny_model(kind, backend="triton").to(DEVICE, dtype).train() for _ in range(2))
    for x in (plain, use_checkpointing(model)):
        x(tokens, labels=tokens).loss.backward()
        grads.append([p.grad for p in x.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padded_prefill_and_steps_are_those_of_pytorch(kind):
    tokens, mask = ids(2, 8), torch.ones(2, 8, dtype=torch.long, device=DEVICE)
    mask[1, :3] = 0
    results = []
    for model in pair(kind):
        first = model(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True)
        second = model(tokens[:, 6:7], attention_mask=mask[:, :7], past_key_values=first.past_key_values)
        third = model(tokens[:, 7:], attention_mask=mask, past_key_values=second.past_key_values)
        results.append(torch.cat((first.logits, second.logits, third.logits), 1)[mask.bool()])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_norm_of_heads_with_something_around_it_is_called_at_each_step():
    """As where its weight is a part of the one that it has."""
    calls, logits = [], []
    for watched in (False, True):
        model = pair("post_up")[1]
        if watched:
            model.model.layers[0].mixer.head_norm.register_forward_hook(lambda *_: calls.append(1))
        cache = model(ids(2, 6), use_cache=True).past_key_values
        calls.clear()
        logits.append([model(ids(2, 1), past_key_values=cache).logits for _ in range(2)])
    assert len(calls) == 2
    for actual, expected in zip(logits[1], logits[0], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_gates_are_those_of_pytorch_and_looking_changes_nothing(kind):
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long, device=DEVICE)
    mask[1, :3] = 0
    expected, seen = (model(tokens, attention_mask=mask, output_gates=True) for model in pair(kind))
    for layer, layer_triton in zip(expected.gates, seen.gates, strict=True):
        for gate, gate_triton in zip(layer, layer_triton, strict=True):
            torch.testing.assert_close(gate_triton, gate, atol=1e-4, rtol=1e-4)
    _, model = pair(kind)
    assert torch.equal(seen.logits, model(tokens, attention_mask=mask).logits)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_looking_at_the_gates_of_a_step_in_half_precision_changes_no_more_than_rounding(kind):
    """Without a look, a kernel for a whole step may be taken."""
    _, model = pair(kind, torch.bfloat16)
    tokens, exact = ids(2, 9), tiny_model(kind, backend="torch").to(DEVICE, torch.bfloat16).double()
    outputs = []
    for options in ({}, {"output_gates": True}):
        cache = model(tokens[:, :8]).past_key_values
        outputs.append(model(tokens[:, 8:], past_key_values=cache, **options))
    expected = exact(tokens, output_gates=True)
    error, error_seen = ((output.logits - expected.logits[:, 8:]).norm() for output in outputs)
    assert error_seen <= 1.5 * error + 1e-3 * expected.logits[:, 8:].norm()
    for layer, gates in zip(outputs[1].gates, expected.gates, strict=True):
        assert all(x.dtype == torch.float32 for x in layer)
        assert (layer.forget - gates.forget[:, 8:]).abs().max() < 0.05


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:The CUDA Graph is empty")  # of the compiler
@pytest.mark.parametrize("kind", KINDS)
def test_it_generates_what_pytorch_generates(kind):
    options = {"max_new_tokens": 3, "do_sample": False}
    texts = [model.generate(ids(2, 5), **options) for model in pair(kind)]
    assert torch.equal(*texts)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_models_err_no_more_than_on_pytorch(kind):
    tokens, models = ids(2, 70), pair(kind, torch.bfloat16)
    exact = tiny_model(kind, backend="torch").to(DEVICE, torch.bfloat16).double()(tokens).logits
    error, error_triton = ((model(tokens).logits - exact).norm() for model in models)
    assert error_triton <= 1.1 * error <= 0.05 * exact.norm()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_has_one_graph(kind, dtype):
    tokens = ids(2, 70)
    _, model = pair(kind, dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, expected = compiled(tokens).logits, model(tokens).logits
    assert (logits - expected).norm() <= (1e-5 if dtype == torch.float32 else 0.03) * expected.norm()


@pytest.mark.parametrize("kind", ["post_up", "pre_up_slstm"])
@torch.no_grad()
def test_exported_programs_call_the_kernels(kind):
    on_torch, on_triton = pair(kind)
    tokens, results = ids(2, 6), []
    mask = (torch.arange(6, device=DEVICE) >= torch.tensor([[2], [0]], device=DEVICE)).long()
    for model, backend in ((on_torch, "torch"), (on_triton, "triton")):
        prefill, decode = export_prefill(model, backend), export_decode(model, backend)
        calls = {str(x.target) for program in (prefill, decode) for x in program.graph.nodes}
        assert any("_triton" in call for call in calls) == (backend == "triton")
        logits, state = prefill.module()(tokens, mask, **initial_states(model, 2))
        next_logits, state = decode.module()(tokens[:, :1], **state)
        results.append((logits, next_logits, *state.values()))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if GPU else [torch.float16])
@pytest.mark.parametrize("options", [{}, {"conv_kernel_size": 0}, {"use_bias": True}])
def test_the_mixer_of_the_first_paper_is_right_in_half_precision(options, dtype):
    """Where q, k, v and gates have a kernel of their own, unless they have a bias."""
    config = XLSTMConfig.from_ratio("1:0", hidden_size=64, num_hidden_layers=2, num_heads=2, **options)
    layers = [MLSTMPreUpLayer(config).to(DEVICE, dtype) for _ in range(3)]
    for layer, backend in zip(layers, ("triton", "torch", "torch"), strict=True):
        layer.load_state_dict(layers[0].state_dict())
        for module in layer.modules():
            module.backend = backend
    oracle = layers[2].double()
    results: list[dict[str, list]] = [{}, {}, {}]
    for _ in range(4):  # a single text has few gradients of biases to judge by
        x, dy = (torch.randn(2, 70, 64, device=DEVICE).to(dtype) for _ in range(2))
        for layer, result in zip((*layers[:2], oracle), results, strict=True):
            leaf = x.to(layer.skip.dtype).requires_grad_()
            y, _ = layer(leaf)
            parameters = dict(layer.named_parameters())
            grads = torch.autograd.grad(y, [leaf, *parameters.values()], dy.to(y))
            for name, tensor in zip(("y", "x", *parameters), (y.detach(), *grads), strict=True):
                result.setdefault(name, []).append(tensor)
    actual, baseline, exact = ({name: torch.stack(of) for name, of in result.items()} for result in results)
    assert_each(assert_matches, actual, exact, baseline)
