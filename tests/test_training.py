"""Training: gradients of whole, cut, padded and packed texts; checkpointing, precision, compilation, Trainer."""

import pytest
import torch
from models import (
    KINDS,
    TWO_KINDS,
    CountingBackend,
    assert_near,
    assert_same_gradients,
    gradients,
    random_ids,
    states,
    tiny_config,
    tiny_model,
    use_checkpointing,
)
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from modeling_xlstm import XLSTMCache, XLSTMForCausalLM, XLSTMForSequenceClassification, XLSTMForTokenClassification


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def loss_gradients(model, ids, **kwargs):
    """Gradients of the sum of the losses of all tokens to predict."""
    kwargs.setdefault("labels", ids)
    model(ids, num_items_in_batch=1, **kwargs).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("length", [2, 63, 64, 65, 127])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_training_step_needs_no_setting(kind, length):
    model, ids = XLSTMForCausalLM(tiny_config(kind)), random_ids(2, length)
    model.train()
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.past_key_values is None
    assert 3.5 < output.loss < 6  # log(99) = 4.6
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    model, ids = tiny_model(kind).double(), random_ids(2, 37)
    weights = torch.randn(2, 37, 99, dtype=torch.float64)
    (model(ids).logits.sin() * weights).sum().backward()
    grads = gradients(model)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected = sum((grads[name] * d).sum() for name, d in direction.items())

    @torch.no_grad()
    def moved(step):
        for name, p in model.named_parameters():
            p.add_(direction[name], alpha=step)
        loss = (model(ids).logits.sin() * weights).sum()
        for name, p in model.named_parameters():
            p.sub_(direction[name], alpha=step)
        return loss

    step = 1e-6
    assert_near((moved(step) - moved(-step)) / (2 * step), expected, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_mode_with_a_cache_has_the_same_gradients(kind):
    model, ids = tiny_model(kind), random_ids(2, 40)
    expected = loss_gradients(model.train(), ids)
    model.eval()
    output = model(ids, labels=ids, num_items_in_batch=1)
    assert isinstance(output.past_key_values, XLSTMCache)
    output.loss.backward()
    assert_same_gradients(gradients(model), expected, 0)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("sizes", [(20, 20), (1, 39), (39, 1), (7, 1, 1, 31)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_the_states_of_a_cache(kind, sizes, mode):
    model, ids = getattr(tiny_model(kind).double(), mode)(), random_ids(2, 40)
    whole = model(ids).logits
    weights = torch.randn_like(whole)
    (whole * weights).sum().backward()
    expected = gradients(model)
    cache = XLSTMCache(model.config)
    logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, 1)], 1)
    (logits * weights).sum().backward()
    assert_same_gradients(gradients(model), expected, 1e-9)


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_windows_of_a_long_text_are_trained_with_a_detached_state(kind):
    model, ids = tiny_model(kind).train().double(), random_ids(2, 60)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    cache = XLSTMCache(model.config)
    for window in ids.split(20, 1):
        fixed = XLSTMCache(model.config)  # the same state, which never had a gradient
        for layer, old in zip(fixed.layers, cache.layers, strict=True):
            layer.state = None if old.state is None else old.state.map(torch.clone)
        model(window, labels=window, past_key_values=cache, num_items_in_batch=1).loss.backward()
        actual = gradients(model)
        assert all(tensor.requires_grad for tensor in states(cache).values())
        assert_same_gradients(actual, loss_gradients(model, window, past_key_values=fixed), 0)
        for layer in cache.layers:
            layer.map(torch.Tensor.detach)
        for name, p in model.named_parameters():
            p.grad = actual[name]
        optimizer.step()
        model.zero_grad()
    assert cache.get_seq_length() == 60
    assert not any(tensor.requires_grad for tensor in states(cache).values())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_recomputes_the_same_gradients(kind, use_reentrant):
    ids = random_ids(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    bounds = torch.tensor([0, 11, 40], dtype=torch.int32)
    plain, model = (tiny_model(kind, dropout=0.1).train() for _ in range(2))
    use_checkpointing(model, use_reentrant)
    passes = []
    model.model.layers[0].mixer_norm.register_forward_hook(lambda *_: passes.append(1))
    for inputs, kwargs in ((ids, {}), (ids, {"attention_mask": mask}), (ids[:1], {"cu_seq_lens_q": bounds})):
        passes.clear()
        torch.manual_seed(5)
        actual = loss_gradients(model, inputs, **kwargs)
        assert len(passes) == 2
        torch.manual_seed(5)
        assert_same_gradients(actual, loss_gradients(plain, inputs, **kwargs), 1e-6)


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_checkpointing_keeps_the_gradient_of_the_states_or_refuses(kind):
    model, ids = tiny_model(kind).train(), random_ids(2, 40)

    def carried():
        cache = XLSTMCache(model.config)
        losses = [model(piece, labels=piece, past_key_values=cache).loss for piece in ids.split(20, 1)]
        sum(losses).backward()
        return gradients(model)

    expected = carried()
    use_checkpointing(model, use_reentrant=False)
    assert_same_gradients(carried(), expected, 1e-6)
    use_checkpointing(model, use_reentrant=True)
    with pytest.raises(
        ValueError, match="must have use_reentrant=False to train through past_key_values, got use_reentrant"
    ):
        carried()
    model.eval()  # which has no checkpoints
    assert_same_gradients(carried(), expected, 1e-6)


def test_a_loss_without_logits_is_that_with_them():
    model, ids = tiny_model().train(), random_ids(2, 20)
    with_logits, without = (model(ids, labels=ids, skip_logits=skip) for skip in (False, True))
    assert torch.equal(without.loss, with_logits.loss)
    assert without.logits is None
    assert model(ids, skip_logits=True).logits is not None  # nothing is to be predicted


def test_the_loss_is_divided_by_the_number_of_items_when_given():
    model, ids = tiny_model().train(), random_ids(2, 21)
    mean = model(ids, labels=ids).loss
    assert_near(model(ids, labels=ids, num_items_in_batch=80).loss, mean / 2)
    assert_near(model(ids, labels=ids, num_items_in_batch=torch.tensor(80)).loss, mean / 2)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_gradient(kind, side):
    model, ids = tiny_model(kind).train().double(), random_ids(2, 30)
    expected = loss_gradients(model, ids)
    start = {"left": 0, "right": 30, "middle": 13}[side]
    pad = random_ids(2, 9, seed=1)
    padded = torch.cat((ids[:, :start], pad, ids[:, start:]), 1)
    mask = torch.ones_like(padded)
    mask[:, start : start + 9] = 0
    # logits [i] predict token [i + 1] of the text, whatever is between
    logits = model(padded, attention_mask=mask).logits[mask.bool()].view(2, 30, -1)
    model.loss_function(logits=logits, labels=ids, vocab_size=99, num_items_in_batch=1).backward()
    assert_same_gradients(gradients(model), expected, 1e-9)


@pytest.mark.parametrize("boundaries", ["position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_have_the_gradients_of_separate_ones(kind, boundaries):
    model = tiny_model(kind).train().double()
    texts = [random_ids(1, length, seed=length) for length in (9, 2, 31, 16)]
    expected = {}
    for text in texts:
        for name, gradient in loss_gradients(model, text).items():
            expected[name] = expected.get(name, 0) + gradient
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=boundaries == "cu_seq_lens_q", return_tensors="pt")
    batch = collate([{"input_ids": text[0].tolist()} for text in texts])
    if boundaries == "cu_seq_lens_q":
        del batch["position_ids"]
    assert_same_gradients(loss_gradients(model, batch.pop("input_ids"), **batch), expected, 1e-9)


# Losses differ by at most 6e-4 of their value.
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_trains_with_float32_states_and_gradients(kind):
    model, ids = tiny_model(kind).train(), random_ids(2, 70)
    exact = model(ids, labels=ids).loss
    cache = XLSTMCache(model.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids, past_key_values=cache)
    assert output.logits.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in states(cache).values()} == {torch.float32}
    assert_near(output.loss, exact, 2e-3)
    output.loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# Losses differ by at most 1.1e-3 and 1.4e-4 of their value; the cosine between gradients is at least 0.87 and 0.9999.
@pytest.mark.parametrize(
    ("dtype", "bound", "cosine"), [(torch.bfloat16, 3e-3, 0.8), (torch.float16, 4e-4, 0.9997)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_trains_close_to_float32(kind, dtype, bound, cosine):
    model, ids = tiny_model(kind).train(), random_ids(2, 70)
    exact_loss = model(ids, labels=ids).loss
    exact_loss.backward()
    exact = torch.cat([g.flatten() for g in gradients(model).values()])
    model.to(dtype)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {dtype}
    actual = torch.cat([g.flatten().float() for g in gradients(model).values()])
    assert_near(loss.float(), exact_loss, bound)
    assert torch.cosine_similarity(actual, exact, 0) > cosine


@pytest.mark.parametrize("size", [30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_gates_train_under_autocast_with_a_scaler(kind, dtype, size):
    """Gates that are shut, wide open, or either from token to token."""
    model = tiny_model(kind, gate_soft_cap=None).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("gate_proj.bias", "gate_bias")):
                p.copy_(size * torch.linspace(-1, 1, p.numel()).view_as(p))
            elif name.endswith("gate_proj.weight"):
                p.mul_(10)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16, init_scale=1024.0)
    model, ids = model.to(DEVICE), random_ids(2, 70).to(DEVICE)
    optimizer, finite = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for _ in range(12):
        with torch.autocast(DEVICE, dtype=dtype):
            loss = model(ids, labels=ids).loss
        assert loss.isfinite()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        finite.append(all(p.grad.isfinite().all() for p in model.parameters()))
        scaler.step(optimizer)  # skipped, and the scale halved, where a scaled gradient is too large for float16
        scaler.update()
        optimizer.zero_grad()
    assert finite.count(False) <= (0 if dtype == torch.bfloat16 else 8) and finite[-1]
    assert all(p.isfinite().all() for p in model.parameters())


# Losses differ by at most 1.9e-3 of their value, of one kind, and 1e-3 of the others.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_on_a_gpu_have_the_losses_of_a_cpu(kind):
    curves = []
    for device in ("cpu", "cuda"):
        model = tiny_model(kind).to(device).train()
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for step in range(50):
            ids = random_ids(2, 70, seed=step % 5).to(device)
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-5:].mean() < 0.9 * curves[0][:5].mean()
    torch.testing.assert_close(*curves, rtol=5e-3, atol=0)


def test_dropout_acts_in_training_only():
    plain, model, ids = tiny_model("pre_up_slstm"), tiny_model("pre_up_slstm", dropout=0.3), random_ids(2, 20)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.train()
    first, second = model(ids).logits, model(ids).logits
    assert (first - second).abs().max() > 0.1
    torch.manual_seed(1)
    third = model(ids).logits
    torch.manual_seed(1)
    assert torch.equal(model(ids).logits, third)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_dropout_acts_on_all_that_a_block_adds(kind, layer):
    block = tiny_model(kind, dropout=0.9).model.layers[layer].train()
    x = torch.randn(4, 50, 32)
    kept = (block(x)[0] == x).float().mean()
    expected = 0.9 if block.ffn is None else 0.9**2
    assert abs(kept - expected) < 0.02  # 4 standard errors of 6400 entries are 0.02


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_frozen_embeddings_leave_other_gradients_as_they_are(kind, checkpointing):
    model, ids = tiny_model(kind).train(), random_ids(2, 40)
    expected = loss_gradients(model, ids)
    model.get_input_embeddings().weight.requires_grad_(False)
    if checkpointing:
        use_checkpointing(model, use_reentrant=True)
    actual = loss_gradients(model, ids)
    del expected["model.embed_tokens.weight"]
    assert_same_gradients(actual, expected, 1e-6)


def test_tied_embeddings_sum_both_gradients():
    tied = tiny_model(tie_word_embeddings=True).double().train()
    free = tiny_model().double().train()
    free.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.lm_head.weight.detach().clone()})
    ids = random_ids(2, 20)
    grads, free_grads = loss_gradients(tied, ids), loss_gradients(free, ids)
    expected = free_grads["model.embed_tokens.weight"] + free_grads["lm_head.weight"]
    assert_near(grads["model.embed_tokens.weight"], expected, 1e-12)


@pytest.mark.parametrize("cls", [XLSTMForSequenceClassification, XLSTMForTokenClassification])
def test_classifiers_train(cls):
    model, ids = tiny_model("pre_up_slstm", cls=cls, num_labels=3).train(), random_ids(4, 12)
    labels = torch.tensor([0, 1, 2, 0]) if cls is XLSTMForSequenceClassification else ids % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("cls", [XLSTMForSequenceClassification, XLSTMForTokenClassification])
def test_a_classifier_has_the_loss_of_a_batch_that_is_accumulated(cls, tmp_path):
    ids = random_ids(8, 12)
    labels = torch.arange(8) % 3 if cls is XLSTMForSequenceClassification else ids % 3
    data = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
    logs = []
    for size, steps in ((8, 1), (2, 4)):
        model = tiny_model("post_up", cls=cls, num_labels=3, classifier_dropout=0.0)
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
            logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=0.0,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=data)
        trainer.train()
        logs.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_compiles_to_one_graph_with_the_same_gradients(kind):
    backend = CountingBackend()
    model, ids, more = tiny_model(kind).train(), random_ids(2, 70), random_ids(2, 70, seed=1)
    expected, expected_more = loss_gradients(model, ids), loss_gradients(model, more)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(ids, labels=ids.clone(), num_items_in_batch=1).loss.backward()
    assert_same_gradients(gradients(model), expected, 1e-4)
    assert len(backend.graphs) == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(more, labels=more.clone(), num_items_in_batch=1).loss.backward()
    assert_same_gradients(gradients(model), expected_more, 1e-4)


# Dynamo looks at the gradient of a hidden state where it breaks the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_training_on_packed_positions_is_not_silently_wrong():
    backend = CountingBackend()
    model, ids = tiny_model("pre_up_slstm").train(), random_ids(1, 30)
    positions = torch.tensor([[*range(11), *range(19)]])
    expected = loss_gradients(model, ids, position_ids=positions)
    compiled = torch.compile(model, backend=backend)
    compiled(ids, labels=ids, num_items_in_batch=1, position_ids=positions).loss.backward()
    assert_same_gradients(gradients(model), expected, 1e-4)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(ids, labels=ids, num_items_in_batch=1, cu_seq_lens_q=torch.tensor([0, 11, 30])).loss.backward()
    assert_same_gradients(gradients(model), expected, 1e-4)


def trainer(model, folder, **arguments):
    """A Trainer of 20 steps that saves after 10, and the list that every step's loss is added to."""
    texts = [random_ids(1, 24, seed=i)[0] for i in range(48)]
    settings = {
        "max_steps": 20,
        "save_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 5,
        "seed": 3,
    }
    args = TrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    losses = []
    model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.item()))
    dataset = [{"input_ids": text, "labels": text} for text in texts]
    return Trainer(model=model, args=args, train_dataset=dataset), losses


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_resumed_training_is_bit_equal_to_an_uninterrupted_one(kind, tmp_path):
    model = tiny_model(kind, dropout=0.1)
    whole, losses = trainer(model, tmp_path / "whole")
    whole.train()
    assert len(losses) == 20
    assert sum(losses[15:]) < sum(losses[:5])
    other = tiny_model(kind, dropout=0.1)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    resumed, resumed_losses = trainer(other, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    assert resumed_losses == losses[10:]
    for (name, expected), actual in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_trainer_compiles_to_one_graph_and_trains_the_same(kind, packed, tmp_path):
    torch._dynamo.reset()
    curves, options = [], {"max_steps": 4, "save_strategy": "no"}
    for compilation in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        train, _ = trainer(tiny_model(kind), tmp_path, logging_steps=1, **options, **compilation)
        train.model._forward_hooks.clear()  # which breaks a graph
        if packed:
            train.data_collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
        torch._dynamo.utils.counters.clear()
        train.train()
        curves.append(torch.tensor([log["loss"] for log in train.state.log_history if "loss" in log]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)


# Newer versions of Transformers say activation_checkpointing.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_trainer_takes_checkpointing_bfloat16_packing_and_evaluation(tmp_path):
    model = tiny_model("pre_up_slstm")
    options = {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    options |= {"max_steps": 4, "save_strategy": "no"}
    train, losses = trainer(model, tmp_path, **options)
    train.data_collator = DataCollatorWithFlattening(return_tensors="pt")
    train.eval_dataset = train.train_dataset
    train.train()
    assert len(losses) == 8
    assert all(4 < loss * 2 < 8 for loss in losses), losses
    assert train.evaluate()["eval_loss"] < 8


def test_label_smoothing_of_the_trainer_predicts_the_next_token(tmp_path):
    model, ids = tiny_model(), random_ids(2, 20)
    args = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    loss = Trainer(model, args).compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    assert_near(loss, expected)


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_what_a_training_pass_returns_may_be_changed_in_place(kind):
    # a soft cap reads its result again in the backward pass
    model, ids = tiny_model(kind, output_logit_soft_cap=None).train(), random_ids(2, 20)
    (model(ids).logits[:, :-1] / 0.7).logsumexp(-1).sum().backward()
    expected = gradients(model)
    logits = model(ids).logits[:, :-1]
    logits /= 0.7
    logits.logsumexp(-1).sum().backward()
    assert_same_gradients(gradients(model), expected, 1e-6)
    hidden = model.model(ids).last_hidden_state
    hidden[:, 0] = 0
    hidden.sum().backward()
