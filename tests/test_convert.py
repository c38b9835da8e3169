"""`python -m convert`: every pair of formats, judged by the code that checkpoints come from, and back to the bit."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from models import random_ids, tiny_model
from origins import (
    ORIGINS,
    assert_same_logits,
    assert_same_weights,
    like_trained,
    save,
    text,
    weights,
)
from peers import in_transformers, large, paper
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert.__main__ import main
from convert.source import open_source
from convert.verify import logits
from modeling_xlstm import XLSTMForCausalLM
from modeling_xlstm.checkpoint_xlstm import LAYOUTS


pytestmark = pytest.mark.usefixtures("one_thread")
NEEDS_KERNELS = pytest.mark.skipif(sys.version_info < (3, 11), reason="mlstm_kernels needs Python 3.11")
LARGE = ("transformers", "xlstm-large", "xlstm-large-fused")
PAPER = ("xlstm-paper", "xlstm-paper-cuda")


def cases(*names: str) -> list:
    """Origins by name, skipped where what they need cannot be installed."""
    return [pytest.param(name, marks=NEEDS_KERNELS if name.startswith("large") else ()) for name in names]


@pytest.fixture
def run(capsys: pytest.CaptureFixture):
    """Converts in this process and returns what was printed; a conversion that fails fails the test."""

    def call(*argv: object) -> str:
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


@torch.no_grad()
@pytest.mark.parametrize("name", cases(*ORIGINS))
def test_native_gives_the_logits_of_the_origin_and_returns_to_it_bit_by_bit(name, run, tmp_path):
    build, fields = ORIGINS[name]
    origin = build(**fields)
    if fields.get("blocks", 0) > 10:
        like_trained(origin.model, fields["blocks"])
    source = save(origin, tmp_path / "origin")
    run(source, tmp_path / "native")
    if origin.fmt != "xlstm-paper-cuda":  # whose own code runs on a GPU only
        ids = text()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
        assert type(model) is XLSTMForCausalLM
        assert_same_logits(model(ids).logits, origin.logits(ids))
    run(tmp_path / "native", tmp_path / "back", "--to", origin.fmt)
    assert_same_weights(weights(tmp_path / "back"), weights(source))
    run(tmp_path / "back", tmp_path / "again")
    assert_same_weights(weights(tmp_path / "again"), weights(tmp_path / "native"))
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "native" / "config.json").read_bytes()


@torch.no_grad()
@NEEDS_KERNELS
@pytest.mark.parametrize(("start", "to"), list(itertools.permutations(("native", *LARGE), 2)))
def test_formats_of_the_large_model_turn_into_each_other(start, to, run, tmp_path):
    save(large(use_bias=False), tmp_path / "origin")
    run(tmp_path / "origin", tmp_path / "start", "--to", start)
    out = run(tmp_path / "start", tmp_path / "to", "--to", to, "--verify")
    assert "largest logit difference" in out
    ids = random_ids(2, 17)
    by_origin = [logits(open_source(str(tmp_path / folder)), ids) for folder in ("origin", "to")]
    assert_same_logits(by_origin[1], by_origin[0])
    run(tmp_path / "to", tmp_path / "back", "--to", start)
    assert_same_weights(weights(tmp_path / "back"), weights(tmp_path / "start"))


@pytest.mark.parametrize(("start", "to"), list(itertools.permutations(("native", *PAPER), 2)))
def test_formats_of_the_paper_turn_into_each_other(start, to, run, tmp_path):
    save(paper(blocks=3, slstm_at=[1], slstm_heads=2), tmp_path / "origin")
    run(tmp_path / "origin", tmp_path / "start", "--to", start)
    run(tmp_path / "start", tmp_path / "to", "--to", to)
    run(tmp_path / "to", tmp_path / "back", "--to", start)
    assert_same_weights(weights(tmp_path / "back"), weights(tmp_path / "start"))
    run(tmp_path / "to", tmp_path / "vanilla", "--to", "xlstm-paper", *([] if to == PAPER[1] else ["--verify"]))
    assert_same_weights(weights(tmp_path / "vanilla"), weights(tmp_path / "origin"))


@torch.no_grad()
@pytest.mark.parametrize("to", [*LARGE[:1], *[pytest.param(fmt, marks=NEEDS_KERNELS) for fmt in LARGE[1:]]])
def test_a_tied_model_goes_to_formats_that_do_not_tie_and_is_tied_when_it_returns(to, run, tmp_path):
    model = tiny_model("post_up", hidden_size=64, tie_word_embeddings=True, vocab_size=67)
    model.save_pretrained(tmp_path / "native")
    run(tmp_path / "native", tmp_path / "to", "--to", to, "--verify")
    written = weights(tmp_path / "to")
    assert "lm_head.weight" in written
    run(tmp_path / "to", tmp_path / "back")
    assert_same_weights(weights(tmp_path / "back"), weights(tmp_path / "native"))
    assert XLSTMForCausalLM.from_pretrained(tmp_path / "back").config.tie_word_embeddings


def test_what_transformers_does_not_tie_is_not_tied_here(run, tmp_path):
    save(in_transformers("own", tie_word_embeddings=True), tmp_path / "origin")  # it ignores its own field
    assert "tie_word_embeddings is False" in run(tmp_path / "origin", tmp_path / "native", "--verify")
    assert not XLSTMForCausalLM.from_pretrained(tmp_path / "native").config.tie_word_embeddings


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
@NEEDS_KERNELS
def test_a_state_dict_in_any_order_is_read(suffix, run, tmp_path):
    origin = large(weight_mode="single", blocks=12, hidden=32)
    folder = tmp_path / "origin"
    folder.mkdir()
    torch.save(dict(sorted(origin.model.state_dict().items())), folder / f"weights{suffix}")
    config = tmp_path / "elsewhere.json"
    config.write_text(json.dumps(dataclasses.asdict(origin.config)), encoding="utf-8")
    run(folder, tmp_path / "fused", "--to", "xlstm-large-fused", "--config", config, "--verify")
    run(tmp_path / "fused", tmp_path / "back", "--to", "xlstm-large")
    assert_same_weights(weights(tmp_path / "back"), dict(origin.model.state_dict()))


@torch.no_grad()
@pytest.mark.parametrize("to", ["native", "transformers"])
def test_shards_hold_each_weight_once_and_load(to, run, tmp_path):
    model = tiny_model("post_up")
    model.save_pretrained(tmp_path / "origin")
    run(tmp_path / "origin", tmp_path / "to", "--to", to, "--max-shard-size", "20KB")
    files = sorted(path.name for path in (tmp_path / "to").glob("*.safetensors"))
    index = json.loads((tmp_path / "to" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "to").iterdir())
    ids = random_ids(2, 20)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "to")(ids).logits, model(ids).logits)
    run(tmp_path / "to", tmp_path / "back")
    assert_same_weights(weights(tmp_path / "back"), weights(tmp_path / "origin"))


@torch.no_grad()
@NEEDS_KERNELS
@pytest.mark.parametrize("size", ["20KB", "2GB"])
def test_the_loader_of_the_large_model_reads_what_is_written_for_it(size, run, tmp_path):
    from xlstm.xlstm_large.from_pretrained import load_from_pretrained

    model = tiny_model("post_up", hidden_size=64)
    model.save_pretrained(tmp_path / "origin")
    run(tmp_path / "origin", tmp_path / "to", "--to", "xlstm-large", "--max-shard-size", size)
    assert len(list((tmp_path / "to").glob("*.safetensors"))) == (1 if size == "2GB" else 16)
    native = {"chunkwise_kernel_name": "chunkwise--native_autograd", "step_kernel_name": "native"}
    theirs = load_from_pretrained(tmp_path / "to", sequence_kernel_name="native_sequence__native", **native)
    ids = random_ids(2, 17)
    assert_same_logits(theirs(ids), model(ids).logits)


def test_dtype_rounds_once_and_leaves_the_gates_of_a_native_model(run, tmp_path):
    model = tiny_model("pre_up_slstm")
    model.save_pretrained(tmp_path / "origin")
    run(tmp_path / "origin", tmp_path / "native", "--dtype", "bfloat16")
    for name, weight in weights(tmp_path / "native").items():
        gate = ".gate_" in name
        expected = model.state_dict()[name]
        assert torch.equal(weight, expected if gate else expected.bfloat16()), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    run(tmp_path / "origin", tmp_path / "paper", "--dtype", "float16", "--to", "xlstm-paper")
    assert {weight.dtype for weight in weights(tmp_path / "paper").values()} == {torch.float16}


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(run, tmp_path):
    tiny_model("post_up").save_pretrained(tmp_path / "origin")
    before = sorted(tmp_path.rglob("*"))
    out = run(tmp_path / "origin", tmp_path / "to", "--dry-run", "--to", "transformers", "--push-to-hub", "me/x")
    assert sorted(tmp_path.rglob("*")) == before
    assert out.startswith("from native: ") and "\nto   transformers: " in out
    assert "31,912 parameters, 127,648 bytes in 1 file\n" in out


def test_the_end_of_text_comes_from_the_tokenizer_and_is_told(run, tmp_path):
    demo = Path(__file__).parents[1] / "checkpoints" / "xlstm-demo"
    origin = tmp_path / "origin"
    run(demo, origin)
    for name, eos in (("config.json", 2), ("generation_config.json", 2)):
        fields = json.loads((origin / name).read_text(encoding="utf-8"))
        (origin / name).write_text(json.dumps({**fields, "eos_token_id": eos}), encoding="utf-8")
    assert "eos_token_id is 0, the tokenizer's '<|endoftext|>', not 2, '!'." in run(origin, tmp_path / "native")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "native" / name).read_text(encoding="utf-8"))["eos_token_id"] == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "native" / name).read_bytes() == (demo / name).read_bytes()


def test_what_a_chat_model_stops_at_is_kept(run, tmp_path):
    demo = Path(__file__).parents[1] / "checkpoints" / "xlstm-demo"
    origin = tmp_path / "origin"
    run(demo, origin)
    settings = {"eos_token_id": [0, 7], "temperature": 0.7, "do_sample": False}  # which save_pretrained would refuse
    (origin / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    run(origin, tmp_path / "native")
    written = json.loads((tmp_path / "native" / "generation_config.json").read_text(encoding="utf-8"))
    assert (written["eos_token_id"], written["temperature"]) == ([0, 7], 0.7)


def test_widths_that_the_configuration_has_wrong_are_those_of_the_weights(run, tmp_path):
    """As in checkpoints of versions that rounded the width of feed-forwards otherwise."""
    origin = in_transformers("own", ffn_proj_factor=2.0)
    folder = save(origin, tmp_path / "origin")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**fields, "ffn_proj_factor": 2.667}), encoding="utf-8")
    assert "width 128 of the weights, not 192" in run(folder, tmp_path / "native")
    assert XLSTMForCausalLM.from_pretrained(tmp_path / "native").config.ffn_size == 128


def test_licences_go_along(run, tmp_path):
    tiny_model("post_up").save_pretrained(tmp_path / "origin")
    (tmp_path / "origin" / "LICENSE.txt").write_text("Terms.", encoding="utf-8")
    run(tmp_path / "origin", tmp_path / "native")
    assert (tmp_path / "native" / "LICENSE.txt").read_text(encoding="utf-8") == "Terms."


@pytest.mark.parametrize("fmt", LAYOUTS)
def test_every_format_has_its_words_in_the_card(fmt):
    from convert.card import ORIGINS as WORDS
    from convert.card import USE

    assert fmt in WORDS
    assert fmt in USE or fmt == "transformers-fused"


def test_fields_that_a_format_does_not_know_are_told(run, tmp_path):
    tiny_model("pre_up_slstm", chunk_size=16, conv_kernel_size=3).save_pretrained(tmp_path / "origin")
    out = run(tmp_path / "origin", tmp_path / "to", "--to", "xlstm-paper", "--dry-run")
    assert "note chunk_size is 16, of which the format xlstm-paper knows nothing: it reads as 64.\n" in out
    assert out.count("knows nothing") == 2  # and context_length


@pytest.mark.parametrize("kernel", ["conv_kernel_size", "slstm_conv_kernel_size"])
def test_what_the_code_of_a_format_cannot_run_is_not_written_for_it(kernel, tmp_path, capsys):
    tiny_model("pre_up_slstm", **{kernel: 1}).save_pretrained(tmp_path / "origin")
    assert main([str(tmp_path / "origin"), str(tmp_path / "to"), "--to", "xlstm-paper"]) == 1
    assert f"{kernel} must be " in capsys.readouterr().err


def test_a_stack_without_mlstm_needs_no_fields_of_one(run, tmp_path):
    model = tiny_model("post_up", block_types=["slstm"] * 2, norm_type="layer_norm", norm_eps=1e-5)
    model.config.output_logit_soft_cap = None
    model.save_pretrained(tmp_path / "origin")
    run(tmp_path / "origin", tmp_path / "to", "--to", "xlstm-paper", "--verify")


@NEEDS_KERNELS
def test_sigmoid_gates_that_cannot_be_verified_are_told_before_anything_is_written(tmp_path, capsys):
    tiny_model("post_up", mlstm_input_gate="sigmoid").save_pretrained(tmp_path / "origin")
    assert main([str(tmp_path / "origin"), str(tmp_path / "to"), "--to", "xlstm-large", "--verify"]) == 1
    assert "--verify must have exponential input gates" in capsys.readouterr().err


def test_the_words_of_a_tokenizer_of_another_kind_go_along(run, tmp_path):
    tiny_model("post_up").save_pretrained(tmp_path / "origin")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "origin" / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (tmp_path / "origin" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
    (tmp_path / "origin" / "additional_chat_templates").mkdir()
    (tmp_path / "origin" / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}", encoding="utf-8")
    run(tmp_path / "origin", tmp_path / "native")
    assert (tmp_path / "native" / "additional_chat_templates" / "tools.jinja").is_file()
    tokens = [AutoTokenizer.from_pretrained(tmp_path / folder)("a b").input_ids for folder in ("origin", "native")]
    assert tokens[0] == tokens[1]


def test_a_training_folder_holds_one_model(run, tmp_path):
    model = tiny_model("post_up")
    folder = tmp_path / "checkpoint-7"
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": 7}, folder / name)
    run(folder, tmp_path / "native", "--verify")
    assert_same_weights(weights(tmp_path / "native"), model.state_dict())
