"""`output_gates=True`: the gates of every block, which with the definition of a cell give what the cell gives."""

import pytest
import torch
import torch.nn.functional as F
from models import KINDS, TWO_KINDS, random_ids, tiny_model
from peft import LoraConfig, get_peft_model

from modeling_xlstm import (
    GateActivations,
    MLSTMLayer,
    SLSTMLayer,
    XLSTMForSequenceClassification,
    XLSTMForTokenClassification,
    XLSTMModel,
)


FIELDS = GateActivations._fields


def gates_of(model, ids, **options):
    return model(ids, output_gates=True, **options).gates


def shown(layer, *args, **options):
    """What a layer shows of its gates in a call."""
    gates = []
    layer(*args, on_gates=gates.append, **options)
    return gates


def assert_same(actual, expected, bound=1e-10):
    assert len(actual) == len(expected)
    for gates, others in zip(actual, expected, strict=True):
        for name, x, y in zip(FIELDS, gates, others, strict=True):
            torch.testing.assert_close(x, y, rtol=bound, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


def of_tokens(gates, tokens):
    return [GateActivations(*(x[:, tokens] for x in layer)) for layer in gates]


def joined(*parts):
    return [
        GateActivations(*(torch.cat(x, 1) for x in zip(*layers, strict=True))) for layers in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_one_for_each_head_or_channel(kind):
    model, ids = tiny_model(kind), random_ids(3, 9)
    gates = gates_of(model, ids)
    config = model.config
    assert len(gates) == config.num_hidden_layers
    for layer, block in zip(gates, config.block_types, strict=True):
        size = (3, 9, 2) if block == "mlstm" else (3, 9, 2, 16)
        output = (3, 9, 2, config.inner_size // 2) if block == "mlstm" else size
        assert tuple(tuple(x.shape) for x in layer) == (size, size, output)
        assert all(x.dtype == torch.float32 for x in layer)


def test_nothing_is_computed_that_was_not_asked_for():
    output = tiny_model()(random_ids(1, 4))
    assert output.gates is None
    assert "gates" not in output


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_they_lead_the_cells_to_their_states(kind):
    """Each cell as the papers write it, without stabiliser, one step after the other: from gates to its final state."""
    model, ids = tiny_model(kind).double(), random_ids(2, 12)
    inputs = []
    for block in model.model.layers:
        block.mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    output = model(ids, output_gates=True)
    for block, x, gates, layer in zip(
        model.model.layers, inputs, output.gates, output.past_key_values.layers, strict=True
    ):
        mixer, cell = block.mixer, layer.state.cell
        i, f, o = gates
        if isinstance(mixer, SLSTMLayer):
            c, _ = (x, None) if mixer.conv is None else mixer.conv(x)
            pre = mixer._gates(c, x)[..., 2, :]
            c, n, h = torch.zeros(3, *cell.h.shape, dtype=torch.float64)
            for t in range(12):
                z = torch.tanh(pre[:, t] + torch.einsum("bhd,hod->bho", h, mixer.recurrent_weight[:, 2]))
                c, n = f[:, t] * c + i[:, t] * z, f[:, t] * n + i[:, t]
                h = o[:, t] * c / n
            torch.testing.assert_close(h, cell.h, rtol=1e-9, atol=1e-9)
        else:
            k, v = keys_and_values(mixer, x)
            C, n = torch.zeros_like(cell.C), torch.zeros_like(cell.n)
            for t in range(12):
                C = f[:, t, :, None, None] * C + i[:, t, :, None, None] * k[:, t, ..., None] * v[:, t, :, None]
                n = f[:, t, :, None] * n + i[:, t, :, None] * k[:, t]
            scale = torch.exp(cell.m)[..., None]
            torch.testing.assert_close(n, cell.n * scale, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(C, cell.C * scale[..., None], rtol=1e-9, atol=1e-9)


def keys_and_values(mixer, x):
    K, V = mixer.head_sizes
    if isinstance(mixer, MLSTMLayer):
        _, k, v, _ = mixer.qkvo_proj(x).split(mixer.splits, -1)
    else:
        x, _ = mixer.up_proj(x).chunk(2, -1)
        c = x if mixer.conv is None else mixer.conv(x)[0]
        k, v = mixer.k_proj(c), mixer.v_proj(x)
    return k.unflatten(-1, (-1, K)), v.unflatten(-1, (-1, V))


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_output_gates_multiply_what_goes_out(kind):
    """Where they are closed, a mixer gives nothing."""
    model = tiny_model(kind, use_bias=True).double()
    mixer, x = model.model.layers[0].mixer, torch.randn(2, 5, 32, dtype=torch.float64)
    project, last = (mixer.qkvo_proj, mixer.out_proj) if kind == "post_up" else (mixer.up_proj, mixer.down_proj)
    given = []
    last.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    (gates,) = (layer.output.flatten(-2) for layer in shown(mixer, x))
    size = gates.shape[-1]
    project.weight[-size:], project.bias[-size:] = 0.0, 1.0  # the same gate everywhere
    mixer(x)
    opened = torch.sigmoid(torch.ones(())) if kind == "post_up" else F.silu(torch.ones(()))
    torch.testing.assert_close(given[0] / gates, given[1] / opened)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_parts_has_the_gates_of_the_whole(kind):
    model, ids = tiny_model(kind).double(), random_ids(2, 20)
    whole, cache = gates_of(model, ids), None
    parts = []
    for part in ids.split((7, 1, 12), 1):
        output = model(part, past_key_values=cache, output_gates=True, logits_to_keep=1)
        cache = output.past_key_values
        parts.append(output.gates)
    assert_same(joined(*parts), whole)
    torch.testing.assert_close(output.logits, model(ids).logits[:, -1:])  # as if nobody had looked


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_padding_they_are_closed_and_nothing_is_forgotten(kind, side):
    model, ids = tiny_model(kind).double(), random_ids(2, 9)
    real = {"left": range(3, 9), "right": range(6), "inside": [0, 1, 5, 6, 8]}[side]
    mask = torch.zeros_like(ids)
    mask[:, list(real)] = 1
    gates = gates_of(model, ids, attention_mask=mask)
    assert_same(of_tokens(gates, list(real)), gates_of(model, ids[:, list(real)]))
    for i, f, o in of_tokens(gates, [t for t in range(9) if t not in real]):
        assert (i == 0).all() and (f == 1).all() and (o == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_packed_texts_have_the_gates_of_separate_ones(kind):
    model, texts = tiny_model(kind).double(), [random_ids(1, n, seed=n) for n in (5, 1, 8)]
    bounds = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    packed = gates_of(model, torch.cat(texts, 1), cu_seq_lens_q=bounds)
    assert_same(packed, joined(*(gates_of(model, text) for text in texts)))


@torch.no_grad()
def test_packed_sequences_of_a_layer_go_on_from_states_of_their_own():
    layer = tiny_model("slstm").double().model.layers[0].mixer
    x = torch.randn(3, 6, 32, dtype=torch.float64)
    _, state = layer(x[:, :2])
    (expected,) = shown(layer, x[:, 2:], state)
    rows = torch.cat((x[0, 2:], x[2, 2:]))[None]  # nothing of the second
    (packed,) = shown(layer, rows, state, cu_seqlens=torch.tensor([0, 4, 4, 8]))
    for actual, wanted in zip(packed, expected, strict=True):
        torch.testing.assert_close(actual.view(2, 4, *actual.shape[2:]), wanted[[0, 2]])


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_they_can_be_a_part_of_a_loss(kind):
    model, ids = tiny_model(kind).train(), random_ids(2, 6)
    sum(gate.log().sum() for layer in gates_of(model, ids) for gate in (layer.forget, layer.input)).backward()
    for block in model.model.layers[:-1]:
        gradients = [p.grad for name, p in block.named_parameters() if "gate" in name]
        assert gradients and all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)


@torch.no_grad()
@pytest.mark.parametrize("keep_gates_in_fp32", [True, False])
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_they_are_float32_in_a_half_precision_model(kind, keep_gates_in_fp32):
    model, ids = tiny_model(kind, keep_gates_in_fp32=keep_gates_in_fp32), random_ids(2, 30)
    exact, rounded = gates_of(model, ids), gates_of(model.bfloat16(), ids)
    for layer, others in zip(rounded, exact, strict=True):
        assert all(x.dtype == torch.float32 for x in layer)
        assert (layer.forget - others.forget).abs().max() < 0.05


@torch.no_grad()
def test_autocast_does_not_reach_into_those_of_an_slstm():
    layer = tiny_model("slstm", slstm_conv_kernel_size=0).model.layers[0].mixer
    x = torch.randn(2, 9, 32)
    (expected,) = shown(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        (actual,) = shown(layer, x)
    assert all(map(torch.equal, actual, expected))


@torch.no_grad()
def test_a_stack_by_itself_and_a_pass_with_hidden_states_give_them_too():
    model, ids = tiny_model("pre_up_slstm"), random_ids(2, 6)
    output = model(ids, output_gates=True, output_hidden_states=True)
    assert len(output.hidden_states) == len(output.gates) + 1
    assert isinstance(model.model, XLSTMModel)
    assert_same(gates_of(model.model, ids), output.gates)


@torch.no_grad()
@pytest.mark.parametrize("cls", [XLSTMForSequenceClassification, XLSTMForTokenClassification])
def test_classifiers_give_those_of_their_stack_last(cls):
    model, ids = tiny_model("pre_up_slstm", cls=cls), random_ids(2, 6)
    options = {"attention_mask": torch.ones_like(ids), "output_gates": True}
    assert_same(model(ids, **options).gates, gates_of(model.model, ids))
    assert_same(model(ids, **options, return_dict=False)[-1], gates_of(model.model, ids))
    assert "gates" not in model(ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_nothing_whatever_is_random_inside(kind):
    lora = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5, init_lora_weights=False)
    model, ids = get_peft_model(tiny_model(kind, dropout=0.2), lora).train(), random_ids(2, 9)
    torch.manual_seed(1)
    expected = model(input_ids=ids).logits
    torch.manual_seed(1)
    assert torch.equal(model(input_ids=ids, output_gates=True).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_shows_its_gates_and_does_what_it_does_otherwise(kind):
    model, ids = tiny_model(kind), random_ids(2, 9)
    caches = [model(ids[:, :8]).past_key_values for _ in range(2)]
    seen = model(ids[:, 8:], past_key_values=caches[0], output_gates=True)
    assert torch.equal(seen.logits, model(ids[:, 8:], past_key_values=caches[1]).logits)
    assert_same(seen.gates, of_tokens(gates_of(model, ids), [8]), bound=1e-4)


def test_they_are_refused_where_they_would_have_no_gradient_or_nobody_to_go_to():
    model, ids = tiny_model().train(), random_ids(1, 4)
    model.model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="^output_gates must be off with gradient checkpointing"):
        model(ids, output_gates=True)
    with pytest.raises(
        ValueError, match="^output_gates is for a forward pass, of which generate makes many, got True.$"
    ):
        model.eval().generate(ids, max_new_tokens=2, output_gates=True)
