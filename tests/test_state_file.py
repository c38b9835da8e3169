"""Saved states: continued in a new process as if nothing had been, refused by all but their model and tokenizer."""

import json
import os
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import KINDS, TWO_KINDS, assert_same_states, random_ids, states, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_generation import greedy, letters_tokenizer
from transformers import AutoModelForCausalLM

from modeling_xlstm import LayerState, XLSTMCache, cache_xlstm, state_file


ROOT = Path(__file__).parents[1]


def cache_after(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


def run_python(script, *arguments, returncode=0):
    """In a new process, which has to end with `returncode`."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == returncode, run.stderr


@pytest.fixture
def saved(tmp_path):
    """A model, a cache of it, and the file where that is."""
    model, path = tiny_model("post_up_slstm"), tmp_path / "state.safetensors"
    cache = cache_after(model, random_ids(2, 20))
    cache.save(path, model)
    return model, cache, path


READ_ON = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from modeling_xlstm import XLSTMCache

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = XLSTMCache.load(f"{folder}/state.safetensors", model, AutoTokenizer.from_pretrained(folder))
    text, new = torch.load(f"{folder}/ids.pt")
    whole = torch.cat((text, new), 1)
    written = model.generate(whole, past_key_values=cache.fork(1), max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        logits = model(new, past_key_values=cache).logits
    states = [list(layer.state.tensors().values()) for layer in cache.layers]
    torch.save((written, logits, states, cache.get_seq_length()), f"{folder}/results.pt")
"""


@torch.no_grad()
def test_states_continued_in_a_new_process_are_those_that_were_never_interrupted(tmp_path):
    tokenizer, caches = letters_tokenizer(), {}
    ids = tokenizer(["It was a dark evening", "and the captain spoke"], return_tensors="pt").input_ids
    text, new = ids.split([14, ids.shape[1] - 14], 1)
    for kind in TWO_KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            folder = tmp_path / f"{kind} {dtype}"
            tiny_model(kind).to(dtype).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            torch.save((text, new), folder / "ids.pt")
            model = AutoModelForCausalLM.from_pretrained(folder)
            assert model.dtype == dtype
            caches[folder] = model, cache_after(model, text)
            caches[folder][1].save(folder / "state.safetensors", model, tokenizer)
    run_python(READ_ON, *caches)
    for folder, (model, cache) in caches.items():
        written, logits, there, seen = torch.load(folder / "results.pt")
        assert torch.equal(
            written, model.generate(ids, past_key_values=cache.fork(1), max_new_tokens=12, do_sample=False)
        )
        assert torch.equal(logits, model(new, past_key_values=cache).logits)
        for layer, theirs in zip(cache.layers, there, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(layer.state.tensors().values(), theirs, strict=True))
        assert seen == cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_cache_loads_and_continues_exactly(kind, tmp_path):
    model, ids = tiny_model(kind), random_ids(2, 20)
    cache = cache_after(model, ids)
    cache.save(str(tmp_path / "state.safetensors"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    loaded = XLSTMCache.load(tmp_path / "state.safetensors", model)
    assert_same_states(loaded, cache, 0)
    assert {tensor.dtype for tensor in states(loaded).values()} == {torch.float32}
    new = random_ids(2, 5, seed=1)
    with torch.no_grad():
        assert torch.equal(model(new, past_key_values=loaded).logits, model(new, past_key_values=cache).logits)
    assert loaded.get_seq_length() == 25


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_the_state_of_a_double_precision_model_is_saved_in_double_precision(kind, tmp_path):
    model = tiny_model(kind).double()
    cache = cache_after(model, random_ids(2, 20))
    cache.save(tmp_path / "state", model)
    loaded = XLSTMCache.load(tmp_path / "state", model)
    assert {tensor.dtype for tensor in states(loaded).values()} == {torch.float64}
    assert_same_states(loaded, cache, 0)


def test_a_cache_under_autograd_and_one_whose_states_share_memory_can_be_saved(tmp_path):
    model, ids = tiny_model("pre_up_slstm"), random_ids(2, 20)
    cache = model(ids).past_key_values
    cache.save(tmp_path / "state", model)
    assert_same_states(XLSTMCache.load(tmp_path / "state", model), cache, 0)
    for layer in cache.layers:
        shared = torch.cat([x.detach().flatten() for x in layer.state.tensors().values()])
        parts = shared.split([x.numel() for x in layer.state.tensors().values()])
        named = {name: part.view_as(x) for part, (name, x) in zip(parts, layer.state.tensors().items(), strict=True)}
        conv = named.pop("conv", None)
        layer.state = LayerState(type(layer.state.cell)(**named), conv)
    cache.save(tmp_path / "state", model)
    assert_same_states(XLSTMCache.load(tmp_path / "state", model), cache, 0)


def test_states_in_another_order_of_memory_can_be_saved(tmp_path):
    model = tiny_model("pre_up_slstm")
    cache = model(random_ids(2, 20)).past_key_values
    for layer in cache.layers:
        layer.state = layer.state.map(lambda x: x.detach().transpose(0, 1).contiguous().transpose(0, 1))
    assert not cache.layers[0].state.cell[0].is_contiguous()
    cache.save(tmp_path / "state", model)
    assert_same_states(XLSTMCache.load(tmp_path / "state", model), cache, 0)


@torch.no_grad()
def test_a_loaded_cache_can_be_forked_and_takes_back_what_it_has_recorded_itself(saved):
    model, cache, path = saved
    cache.activate_past_recording()
    new = random_ids(2, 6, seed=1)
    model(new, past_key_values=cache)
    cache.save(path, model)  # of what is recorded nothing is in the file
    loaded = XLSTMCache.load(path, model)
    with pytest.raises(ValueError, match="of which 0 are recorded"):
        loaded.crop(-1)
    loaded.activate_past_recording()
    model(new, past_key_values=loaded)
    loaded.crop(-6)
    assert_same_states(loaded, cache, 0)
    assert_same_states(loaded.fork(2), cache.fork(2), 0)
    cache.crop(-6)
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_the_state_of_an_adapted_model_is_that_of_the_same_adapters_only(tmp_path):
    base, path = tiny_model(), tmp_path / "state"
    options = {"target_modules": ["qkvo_proj"], "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    ids = random_ids(1, 20)
    cache = model(ids[:, :12]).past_key_values
    cache.save(path, model)
    text = greedy(model, ids, 8)
    assert torch.equal(greedy(model, ids, 8, past_key_values=XLSTMCache.load(path, model)), text)
    for other in (tiny_model(), get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", **options))):
        with pytest.raises(ValueError, match="must be of this very model, got a state of one with other weights, ada"):
            XLSTMCache.load(path, other)
    with model.disable_adapter(), pytest.raises(ValueError, match="must be of this very model"):
        XLSTMCache.load(path, model)


@torch.no_grad()
def test_a_state_is_refused_by_all_models_but_its_own(saved):
    model, cache, path = saved
    assert_same_states(XLSTMCache.load(path, model.model), cache, 0)  # whatever the head
    other = tiny_model("post_up_slstm")
    other.lm_head.weight.zero_()
    assert_same_states(XLSTMCache.load(path, other), cache, 0)
    other.model.layers[1].ffn.up_proj.weight[3, 5] += 1e-3
    for another in (other, tiny_model("post_up"), tiny_model("post_up_slstm", norm_eps=1e-3)):
        with pytest.raises(
            ValueError,
            match=r"^\S+ must be of this very model, got a state of one with other weights, adapters or configuration",
        ):
            XLSTMCache.load(path, another)
    for dtype in (torch.bfloat16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=rf"must be of this model in {name}, got a state of a model in float32\.$"):
            XLSTMCache.load(path, tiny_model("post_up_slstm").to(dtype))
    with pytest.raises(TypeError, match="model must be an xLSTM of this package, got XLSTMConfig"):
        XLSTMCache.load(path, model.config)
    with pytest.raises(ValueError, match="not offloaded or sharded, got the meta device"):
        XLSTMCache.load(path, tiny_model("post_up_slstm").to("meta"))


def test_a_state_is_refused_with_another_tokenizer_and_where_only_one_side_has_one(saved):
    model, cache, path = saved
    tokenizer, other = letters_tokenizer(), letters_tokenizer()
    other.add_tokens(["word"])
    with pytest.raises(ValueError, match=r"must be loaded without a tokenizer, as it was saved without one, got one"):
        XLSTMCache.load(path, model, tokenizer)
    cache.save(path, model, tokenizer)
    assert_same_states(XLSTMCache.load(path, model, tokenizer), cache, 0)
    with pytest.raises(ValueError, match="must be loaded with its tokenizer, as it was saved with one, got none"):
        XLSTMCache.load(path, model)
    with pytest.raises(ValueError, match="must be of this tokenizer, got a state of a text in the ids of another"):
        XLSTMCache.load(path, model, other)
    with pytest.raises(TypeError, match="tokenizer must be one of Transformers, got str"):
        cache.save(path, model, "a name")
    assert_same_states(XLSTMCache.load(path, model, tokenizer), cache, 0)


def test_what_is_not_the_state_of_the_model_is_not_saved(tmp_path):
    model, path = tiny_model(), tmp_path / "state"
    used = cache_after(model, random_ids(1, 5))
    used.reset()
    for empty in (XLSTMCache(tiny_config()), used):
        with pytest.raises(
            ValueError, match="Only a cache with a state in each layer .*, got one that has seen no tok"
        ):
            empty.save(path, model)
    cache = cache_after(model, random_ids(1, 5))
    with pytest.raises(ValueError, match="must be of a model with mlstm_input_gate 'sigmoid', got 'exp'"):
        cache.save(path, tiny_model("sigmoid"))
    with pytest.raises(ValueError, match="must hold C of layer 0 as torch.float64 .*, got torch.float32"):
        cache.save(path, tiny_model().double())
    cache.layers[1].state.cell.n[0, 1, 3] = float("nan")
    with pytest.raises(
        ValueError, match=r"All states must be finite, got NaN or infinity in layers\.1\.n of the cache"
    ):
        cache.save(path, model)
    assert list(tmp_path.iterdir()) == []


def rewritten(path, tensors=None, **metadata):
    """The file with other tensors, and with other metadata; None leaves an entry out."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    new = {name: value for name, value in {**old, **metadata}.items() if value is not None}
    save_file({**load_file(path), **(tensors or {})}, path, metadata=new)


def without(path, name):
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del tensors[name]
    save_file(tensors, path, metadata=metadata)


def with_header(path, header):
    data = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(data)) + data)


def as_folder(path):
    path.unlink()
    path.mkdir()


BROKEN = r"must be a file written by XLSTMCache\.save, got one that is broken: "
ODD = "must hold the states of the model's layers and nothing else, got "
# what happens to the file of a post_up_slstm model and 2 rows: how, sentence
DAMAGE = {
    "empty": (lambda path: path.write_bytes(b""), BROKEN),
    "text": (lambda path: path.write_text("not safetensors, though long enough"), BROKEN),
    "first byte": (lambda path: path.write_bytes(path.read_bytes()[:1]), BROKEN),
    "half a header": (lambda path: path.write_bytes(path.read_bytes()[:300]), BROKEN),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), BROKEN),
    "all but the last byte": (lambda path: path.write_bytes(path.read_bytes()[:-1]), BROKEN),
    "a byte too many": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), BROKEN),
    "endless header": (lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]), BROKEN),
    "no JSON": (lambda path: with_header(path, b'{"layers.0.C": '), BROKEN),
    "numbers as metadata": (lambda path: with_header(path, {"__metadata__": {"seen_tokens": 5}}), BROKEN),
    "endless tensor": (
        lambda path: with_header(path, {"C": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}),
        BROKEN,
    ),
    "folder": (as_folder, r"must be a file written by XLSTMCache\.save, got a folder or a device"),
    "a checkpoint": (
        lambda path: save_file({"weight": torch.zeros(2)}, path, metadata={"format": "pt"}),
        r"must be a file written by XLSTMCache\.save, got format 'pt'",
    ),
    "no metadata": (lambda path: save_file(load_file(path), path), "got format None"),
    "later format": (lambda path: rewritten(path, format="xlstm-state-2"), "got format 'xlstm-state-2'"),
    "no count": (lambda path: rewritten(path, seen_tokens=None), "must count the tokens of its text, got None"),
    "negative count": (lambda path: rewritten(path, seen_tokens="-1"), "must count the tokens of its text, got '-1'"),
    "fractional count": (lambda path: rewritten(path, seen_tokens="1.5"), "the tokens of its text, got '1.5'"),
    "absurd count": (lambda path: rewritten(path, seen_tokens="9" * 5000), "got '9{79}\\.$"),
    "digits of another script": (lambda path: rewritten(path, seen_tokens="٣"), "must count the tokens of its text"),
    "no fingerprint": (lambda path: rewritten(path, model=None), "must be of this very model"),
    "no dtype": (lambda path: rewritten(path, dtype=None), "in float32, got a state of a model in none"),
    "layer missing": (lambda path: without(path, "layers.1.h"), ODD + r"no layers\.1\.h\.$"),
    "convolution missing": (lambda path: without(path, "layers.1.conv"), ODD + r"no layers\.1\.conv\.$"),
    "convolution too many": (
        lambda path: rewritten(path, {"layers.0.conv": torch.zeros(2, 3, 32)}),
        ODD + r"layers\.0\.conv\.$",
    ),
    "layer too many": (lambda path: rewritten(path, {"layers.2.C": torch.zeros(2)}), ODD + r"layers\.2\.C\.$"),
    "endless name": (lambda path: rewritten(path, {"a" * 10000: torch.zeros(2)}), ODD + r"a{80}\.$"),
    "half precision": (
        lambda path: rewritten(path, {"layers.1.c": torch.zeros(2, 2, 16).bfloat16()}),
        r"must hold layers\.1\.c as F32 of shape \[2, 2, 16\], got BF16 of shape \[2, 2, 16\]",
    ),
    "integers": (
        lambda path: rewritten(path, {"layers.0.m": torch.zeros(2, 2, dtype=torch.int32)}),
        r"must hold layers\.0\.m as F32 of shape \[2, 2\], got I32 of shape \[2, 2\]",
    ),
    "row missing": (
        lambda path: rewritten(path, {"layers.0.n": torch.zeros(1, 2, 8)}),
        r"must hold layers\.0\.n as F32 of shape \[2, 2, 8\], got F32 of shape \[1, 2, 8\]",
    ),
    "no rows": (
        lambda path: rewritten(path, {name: x[:0] for name, x in load_file(path).items()}),
        r"must hold layers\.0\.C as F32 of shape \[1, 2, 8, 16\], got F32 of shape \[0, 2, 8, 16\]",
    ),
    "a number": (lambda path: rewritten(path, {"layers.0.C": torch.tensor(1.0)}), r"got F32 of shape \[\]"),
    "transposed": (
        lambda path: rewritten(path, {"layers.0.C": torch.zeros(2, 2, 16, 8)}),
        r"must hold layers\.0\.C as F32 of shape \[2, 2, 8, 16\], got F32 of shape \[2, 2, 16, 8\]",
    ),
    "NaN": (
        lambda path: rewritten(path, {"layers.1.n": torch.full((2, 2, 16), float("nan"))}),
        r"All states must be finite, got NaN or infinity in layers\.1\.n of ",
    ),
    "infinity": (
        lambda path: rewritten(path, {"layers.0.m": torch.tensor([[0.0, 0.0], [0.0, -float("inf")]])}),
        r"All states must be finite, got NaN or infinity in layers\.0\.m of ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_damaged_or_hostile_is_refused_in_a_sentence(damage, saved):
    model, _, path = saved
    how, sentence = DAMAGE[damage]
    how(path)
    with pytest.raises(ValueError, match=sentence) as refusal:
        XLSTMCache.load(path, model)
    assert str(refusal.value).count("\n") == 0 and len(str(refusal.value)) < 400


def test_what_was_loaded_stays_whatever_becomes_of_the_file(saved):
    model, cache, path = saved
    loaded = XLSTMCache.load(path, model)
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))
        file.truncate(100)
    assert_same_states(loaded, cache, bound=0)


def test_what_was_checked_is_what_is_loaded(saved, monkeypatch):
    model, cache, path = saved
    other = path.with_name("other")
    cache_after(model, random_ids(1, 4)).save(other, model)
    fingerprint = cache_xlstm.model_fingerprint

    def replaced_meanwhile(*args):
        os.replace(other, path)
        return fingerprint(*args)

    monkeypatch.setattr(cache_xlstm, "model_fingerprint", replaced_meanwhile)
    assert_same_states(XLSTMCache.load(path, model), cache, bound=0)


def test_a_link_stays_one_and_permissions_are_kept(saved):
    model, cache, path = saved
    link, new, umask = path.with_name("link"), path.with_name("x" * 255), os.umask(0o022)
    try:
        link.symlink_to(path)
        path.chmod(0o640)
        cache_after(model, random_ids(2, 20)).save(link, model)
        cache.save(new, model)
    finally:
        os.umask(umask)
    assert link.is_symlink()
    assert [stat.S_IMODE(file.stat().st_mode) for file in (path, new)] == [0o640, 0o644]
    for file in (link, new):
        assert_same_states(XLSTMCache.load(file, model), cache, bound=0)


@pytest.mark.parametrize("where", ["state.safetensors/below", "no/folder", "y" * 300, "", "pipe"])
def test_what_cannot_be_a_file_is_refused_in_a_sentence_and_left(saved, where):
    model, cache, path = saved
    os.mkfifo(path.with_name("pipe"))
    before = sorted(path.parent.iterdir())
    with pytest.raises(OSError, match="cannot be written") as refusal:
        cache.save(path.parent / where, model)
    assert "xlstm-state" not in str(refusal.value)
    assert sorted(path.parent.iterdir()) == before
    assert path.with_name("pipe").is_fifo()


def test_a_file_that_is_missing_is_said_to_be(saved):
    model, _, path = saved
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        XLSTMCache.load(path.with_name("none.safetensors"), model)


KILLED_WHILE_WRITING = """
import os, signal, sys
import torch
from modeling_xlstm import XLSTMCache, XLSTMConfig, XLSTMForCausalLM, state_file

save_file = state_file.save_file

def save_and_die(tensors, path, metadata):
    save_file(tensors, path, metadata=metadata)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

state_file.save_file = save_and_die
model = XLSTMForCausalLM(XLSTMConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_heads=2))
cache = XLSTMCache(model.config)
model(torch.zeros(1, 3, dtype=torch.long), past_key_values=cache)
cache.save(sys.argv[1], model)
"""


def test_a_file_whose_writer_is_killed_is_the_one_before(saved):
    _, _, path = saved
    before = path.read_bytes()
    run_python(KILLED_WHILE_WRITING, path, returncode=-signal.SIGKILL)
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_written_is_the_one_before_and_nothing_is_left(saved, monkeypatch):
    model, cache, path = saved
    before = path.read_bytes()

    def fail(error):
        def save_file(tensors, partial, metadata):
            partial.write_bytes(b"half")
            raise error

        return save_file

    for error, raised, message in (
        (SafetensorError("No space left on device"), OSError, "cannot be written: No space left on device"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
    ):
        monkeypatch.setattr(state_file, "save_file", fail(error))
        with pytest.raises(raised, match=message):
            cache.save(path, model)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(OSError, match="cannot be written"):
        cache.save(path.parent / "missing" / "state", model)
