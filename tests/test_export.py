"""Exported programs of prefill and decode, and the compiled package of a decode step, compute what the model does."""

import copy
import subprocess
import sys
from functools import cache
from operator import getitem
from pathlib import Path

import pytest
import torch
from models import assert_near, random_ids, states, tiny_model
from numerics import assert_each, assert_exact, assert_matches
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from modeling_xlstm import (
    XLSTMCache,
    XLSTMModel,
    export_decode,
    export_prefill,
    initial_states,
    package_decode,
)


NEW_TOKENS = 20
# name: fields besides those of the kind; one layer where all are the same, for the time it takes
KINDS = {
    "post_up": {"num_hidden_layers": 1},
    "sigmoid": {"num_hidden_layers": 1},
    "pre_up": {"num_hidden_layers": 1},
    "post_up_slstm": {},
    "pre_up_slstm": {},
}


@cache
def exported(kind, dtype=torch.float64):
    """A model and its programs, exported once for all tests."""
    model = tiny_model(kind, **KINDS[kind]).to(dtype)
    return model, export_prefill(model), export_decode(model)


def padded(B, T):
    """Ids, and a mask with padding on the left of every other sequence."""
    mask = torch.ones(B, T, dtype=torch.int64)
    for row in range(1, B, 2):
        mask[row, : min(row, T - 1)] = 0
    return random_ids(B, T), mask


def named_states(cache):
    return {"layers_" + name.replace(".", "_"): tensor for name, tensor in states(cache).items()}


@torch.no_grad()
def by_model(model, ids, mask, steps):
    """Logits of the prompt and of `steps` tokens after it, and the states after each."""
    past, out = XLSTMCache(model.config), []
    for new, new_mask in [(ids, mask), *((random_ids(len(ids), 1, seed), None) for seed in range(steps))]:
        logits = model(new, attention_mask=new_mask, past_key_values=past).logits[:, -1]
        out.append({"logits": logits, **{name: tensor.clone() for name, tensor in named_states(past).items()}})
    return out


def by_programs(model, prefill, decode, ids, mask, steps):
    """The same by exported programs."""
    logits, state = prefill(ids, mask, **initial_states(model, len(ids)))
    out = [{"logits": logits, **state}]
    for seed in range(steps):
        logits, state = decode(random_ids(len(ids), 1, seed), **state)
        out.append({"logits": logits, **state})
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_exported_programs_compute_what_the_model_does_for_any_batch_and_length(kind):
    model, prefill, decode = exported(kind)
    run_prefill, run_decode = prefill.module(), decode.module()
    for B, T in ((1, 1), (1, 2), (2, 1), (1, 40), (3, 7), (4, 16), (5, 33)):
        ids, mask = padded(B, T)
        actual = by_programs(model, run_prefill, run_decode, ids, mask, 2)
        for a, b in zip(actual, by_model(model, ids, mask, 2), strict=True):
            assert_each(assert_exact, a, b)


@pytest.mark.parametrize("kind, dtype", [("pre_up", torch.float32), ("post_up_slstm", torch.bfloat16)])
def test_exported_programs_are_as_exact_as_the_model(kind, dtype):
    model, prefill, decode = exported(kind, dtype)
    ids, mask = padded(5, 33)
    actual = by_programs(model, prefill.module(), decode.module(), ids, mask, 2)
    baseline = by_model(model, ids, mask, 2)
    oracle = by_model(copy.deepcopy(model).double(), ids, mask, 2)
    for results in zip(actual, oracle, baseline, strict=True):
        assert_each(assert_matches, *results)


@pytest.mark.parametrize("kind", KINDS)
def test_exported_programs_write_the_text_of_generate(kind):
    model, prefill, decode = exported(kind)
    ids, mask = padded(3, 11)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    logits, state = prefill.module()(ids, mask, **initial_states(model, 3))
    run, tokens = decode.module(), [logits.argmax(-1, keepdim=True)]
    while len(tokens) < NEW_TOKENS:
        logits, state = run(tokens[-1], **state)
        tokens.append(logits.argmax(-1, keepdim=True))
    assert torch.equal(torch.cat(tokens, 1), text[:, 11:])


def test_a_prompt_may_be_read_in_pieces():
    model, prefill, _ = exported("pre_up_slstm")
    run, (ids, mask) = prefill.module(), padded(3, 30)
    logits, state = run(ids, mask, **initial_states(model, 3))
    _, first = run(ids[:, :13], mask[:, :13], **initial_states(model, 3))
    last_logits, last_state = run(ids[:, 13:], mask[:, 13:], **first)
    assert_each(assert_exact, {"logits": last_logits, **last_state}, {"logits": logits, **state})


@pytest.mark.parametrize("kind", KINDS)
def test_initial_states_have_the_names_shapes_and_dtypes_of_the_states_of_the_model(kind):
    model = tiny_model(kind, **KINDS[kind]).bfloat16()
    past = model(random_ids(3, 2), use_cache=True).past_key_values

    def described(tensors):
        return [(name, x.shape, x.dtype, x.device) for name, x in tensors.items()]

    assert described(initial_states(model, 3)) == described(named_states(past))
    assert not any(x.any() for x in initial_states(model, 3).values())


def test_a_decode_program_consists_of_ops_of_pytorch():
    for kind in KINDS:
        _, prefill, decode = exported(kind)
        namespaces = [
            {x.target.namespace for x in program.graph.nodes if x.op == "call_function" and x.target is not getitem}
            for program in (prefill, decode)
        ]
        assert namespaces == [{"aten", "modeling_xlstm"}, {"aten"}]


def test_a_program_shares_the_weights_and_nothing_else_with_the_model():
    model = tiny_model("post_up_slstm", backend="auto").train()
    program = export_decode(model)
    assert model.training
    assert all(x.requires_grad for x in model.parameters())
    assert {model.config.backend, *(layer.mixer.backend for layer in model.model.layers)} == {"auto"}
    ids, state = random_ids(2, 1), initial_states(model, 2)
    run = program.module()
    before, _ = run(ids, **state)
    assert_near(before, tiny_model("post_up_slstm")(ids).logits[:, -1])
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert before.any() and not run(ids, **state)[0].any()


def test_programs_run_without_gradients_where_gradients_are_on():
    model, prefill, _ = exported("pre_up_slstm")
    assert any(x.requires_grad for x in model.parameters()) and torch.is_grad_enabled()
    logits, state = prefill.module()(*padded(2, 5), **initial_states(model, 2))
    assert not any(x.requires_grad for x in (logits, *state.values()))


def run_elsewhere(script, folder):
    """Runs Python code in a new process that has `folder` as its directory."""
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_saved_programs_run_in_another_process_and_the_decode_step_without_this_package(tmp_path):
    model, prefill, decode = exported("post_up_slstm")
    ids, mask = padded(3, 19)
    torch.export.save(prefill, tmp_path / "prefill.pt2")
    torch.export.save(decode, tmp_path / "decode.pt2")
    logits, state = prefill.module()(ids, mask, **initial_states(model, 3))
    token = logits.argmax(-1, keepdim=True)
    torch.save((ids, mask, initial_states(model, 3), token, state), tmp_path / "inputs.pt")
    run_elsewhere(
        "import sys, torch\n"
        "ids, mask, empty, token, state = torch.load('inputs.pt')\n"
        "second = torch.export.load('decode.pt2').module()(token, **state)\n"
        "assert 'modeling_xlstm' not in sys.modules\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import modeling_xlstm\n"
        "first = torch.export.load('prefill.pt2').module()(ids, mask, **empty)\n"
        "torch.save((first, second), 'outputs.pt')\n",
        tmp_path,
    )
    (first_logits, first_state), (second_logits, second_state) = torch.load(tmp_path / "outputs.pt")
    assert_each(assert_exact, {"logits": first_logits, **first_state}, {"logits": logits, **state})
    logits, state = decode.module()(token, **state)
    assert_each(assert_exact, {"logits": second_logits, **second_state}, {"logits": logits, **state})


def has_cpp_compiler():
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


IN_BATCHES_THAT_SHRINK = """
import sys, torch
run = torch._inductor.aoti_load_package("decode.pt2")
token, state = torch.load("inputs.pt")
tokens, every_logits = [token], []
for step in range(1, 20):
    rows = 3 - step // 7
    logits, state = run(tokens[-1][:rows], **{name: x[:rows] for name, x in reversed(state.items())})
    every_logits.append(logits)
    tokens.append(logits.argmax(-1, keepdim=True))
assert "modeling_xlstm" not in sys.modules
torch.save((tokens, every_logits), "outputs.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif(not has_cpp_compiler(), reason="AOTInductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of the compiler, at itself
@pytest.mark.parametrize("kind, dtype", [("post_up_slstm", torch.float32), ("pre_up", torch.bfloat16)])
def test_a_packaged_decode_step_writes_the_text_without_this_package(kind, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")
    model = tiny_model(kind, **KINDS[kind]).to(dtype)
    assert package_decode(model, tmp_path / "decode.pt2") == str(tmp_path / "decode.pt2")
    ids, mask = padded(3, 11)
    with torch.no_grad():
        past = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    token = past.logits[:, -1].argmax(-1, keepdim=True)
    torch.save((token, named_states(past.past_key_values)), tmp_path / "inputs.pt")
    run_elsewhere(IN_BATCHES_THAT_SHRINK, tmp_path)
    tokens, every_logits = torch.load(tmp_path / "outputs.pt")
    assert {len(x) for x in tokens} == {1, 2, 3}
    if dtype == torch.float32:  # bfloat16 often has several largest logits
        text = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)[:, 11:]
        assert all(torch.equal(x[:, 0], text[: len(x), i]) for i, x in enumerate(tokens))
    read = torch.cat((ids[:1], torch.cat([x[:1] for x in tokens[:-1]], 1)), 1)
    with torch.no_grad():
        baseline, exact = (x(read).logits[0, 11:] for x in (model, copy.deepcopy(model).double()))
    assert_matches(torch.cat([x[:1] for x in every_logits]), exact, baseline)


def test_what_cannot_be_exported_is_refused_in_a_sentence(tmp_path):
    model = tiny_model("post_up")
    for function in (export_prefill, export_decode, lambda x: package_decode(x, "decode.pt2")):
        with pytest.raises(TypeError, match="^model must be an XLSTMForCausalLM, got XLSTMModel.$"):
            function(tiny_model("post_up", XLSTMModel))
    with pytest.raises(ValueError, match="^backend must be one of auto, torch, triton, got 'fast'.$"):
        export_prefill(model, "fast")
    with pytest.raises(ValueError, match="^path must end with .pt2, got 'decode.so'.$"):
        package_decode(model, "decode.so")
    with pytest.raises(ValueError, match="^batch_size must be an integer of at least 1, got 0.$"):
        initial_states(model, 0)


def test_programs_refuse_inputs_that_do_not_fit():
    model, _, decode = exported("post_up")
    run, state = decode.module(), initial_states(model, 2)
    with pytest.raises(AssertionError, match=r"layers_0_C.size\(\)\[0\] == input_ids.size\(\)\[0\]"):
        run(random_ids(3, 1), **state)
    with pytest.raises(AssertionError, match=r"input_ids.size\(\)\[1\] == 1"):
        run(random_ids(2, 2), **state)
    del state["layers_0_m"]
    with pytest.raises(ValueError, match="layers_0_m"):
        run(random_ids(2, 1), **state)
