"""`python -m convert`: every pair of formats, judged by the code that checkpoints come from, and back to the bit."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import random_ids, tiny_model
from peers import Peer, in_transformers, large, paper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from convert.__main__ import EXAMPLES, build_parser, main
from convert.source import open_source
from convert.verify import logits
from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, XLSTMModel
from modeling_xlstm.checkpoint_xlstm import LAYOUTS


NEEDS_KERNELS = pytest.mark.skipif(sys.version_info < (3, 11), reason="mlstm_kernels needs Python 3.11")
LARGE = ("transformers", "xlstm-large", "xlstm-large-fused")
PAPER = ("xlstm-paper", "xlstm-paper-cuda")

# As their origins save them, with every parameter random.
ORIGINS: dict[str, tuple[Callable[..., Peer], dict[str, Any]]] = {
    "paper": (paper, {"blocks": 3, "slstm_at": [1]}),
    "paper_mlstm": (paper, {}),
    "paper_slstm": (paper, {"slstm_at": "all"}),
    "paper_cuda": (paper, {"blocks": 3, "slstm_at": [0, 2], "backend": "cuda", "slstm_heads": 2}),
    "paper_tied": (paper, {"slstm_at": [1], "tie_weights": True}),
    "paper_bias": (paper, {"slstm_at": [1], "bias": True, "ffn": {"bias": True}}),
    "paper_no_ffn": (paper, {"slstm_at": [1], "ffn": None, "add_post_blocks_norm": False}),
    "paper_48_blocks": (paper, {"blocks": 48, "slstm_at": [3, 20, 47]}),
    "large": (large, {}),
    "large_bias": (large, {"use_bias": True}),
    "large_fused": (large, {"weight_mode": "fused"}),
    "large_fused_12_blocks": (large, {"weight_mode": "fused", "blocks": 12, "hidden": 48}),
    "large_fused_32_blocks": (large, {"weight_mode": "fused", "blocks": 32, "hidden": 56}),
    "large_48_blocks": (large, {"blocks": 48, "hidden": 48}),
    "large_sigmoid": (
        large,
        {"chunkwise_kernel": "parallel--native_siging_autograd", "mode": "train", "return_last_states": False},
    ),
    "large_no_caps_no_norm": (
        large,
        {"add_out_norm": False, "gate_soft_cap": None, "output_logit_soft_cap": None, "norm_eps": 1e-5},
    ),
    "transformers": (in_transformers, {"which": "own"}),
    "transformers_bias": (in_transformers, {"which": "own", "use_bias": True}),
    "transformers_odd_width": (in_transformers, {"which": "own", "hidden": 96, "heads": 3, "blocks": 3}),
}


def cases(*names: str) -> list:
    """Origins by name, skipped where what they need cannot be installed."""
    return [pytest.param(name, marks=NEEDS_KERNELS if name.startswith("large") else ()) for name in names]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys: pytest.CaptureFixture):
    """Converts in this process and returns what was printed; a conversion that fails fails the test."""

    def call(*argv: object) -> str:
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


def save(origin: Peer, folder: Path) -> Path:
    """The checkpoint of a peer, as its own code would leave it."""
    if origin.fmt == "transformers":
        origin.model.save_pretrained(folder)  # type: ignore[operator]
        return folder
    folder.mkdir()
    state_dict = {name: weight.clone() for name, weight in origin.model.state_dict().items()}
    save_file(state_dict, folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(origin.config)), encoding="utf-8")
    return folder


@torch.no_grad()
def like_trained(model: nn.Module, blocks: int) -> None:
    """Weights still random, but as training starts from and keeps them: a deep stack that does not magnify rounding.

    What a block adds shrinks with the depth, and input gates are nearly closed, so that no normaliser is near zero.
    """
    for name, parameter in model.named_parameters():
        if "proj_down" in name or "out_proj" in name:
            parameter.mul_((2 * blocks) ** -0.5)
        if name.endswith("igate_preact.bias"):
            parameter.sub_(10)
        if name.endswith("ifgate_preact.bias"):  # [i | f]
            parameter[: len(parameter) // 2].sub_(10)


def weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a converted checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


def text() -> Tensor:
    """Token ids, one of the texts of `test_parity`, in which no head's normaliser nearly vanishes."""
    return torch.randint(0, 99, (2, 17), generator=torch.Generator().manual_seed(70))


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert actual[name].dtype == weight.dtype
        assert torch.equal(actual[name], weight), name


def assert_same_logits(actual: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= bound, f"differs by {error:.1e} of the largest value, allowed {bound:.0e}"


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


@pytest.mark.parametrize("line", EXAMPLES.splitlines()[1:])
def test_the_examples_of_the_help_are_valid(line):
    assert line.startswith("  python -m convert ")
    build_parser().parse_args(line.split()[3:])


# What Transformers' own format asks of from_pretrained, without a conversion.


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["transformers", "transformers_bias", "transformers_odd_width"])
def test_checkpoints_of_transformers_load_as_they_are(name, fused, tmp_path):
    build, fields = ORIGINS[name]
    origin = build(**fields)
    folder = save(origin, tmp_path / "origin")
    if fused:
        save_file(fuse(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    published = {
        "model_type": "xlstm", "architectures": ["xLSTMForCausalLM"], "vocab_size": 99, "torch_dtype": "float32",
        "embedding_dim": origin.config.hidden_size, "num_blocks": origin.config.num_hidden_layers,
        "num_heads": origin.config.num_heads, "use_bias": origin.config.use_bias,
        "chunkwise_kernel": "chunkwise--triton_xl_chunk", "sequence_kernel": "native_sequence__triton",
        "step_kernel": "triton", "mode": "inference", "weight_mode": "single", "add_qk_norm": False,
        "add_post_blocks_norm": True, "igate_bias_init_range": -10, "force_bos_token_insert": True,
        "mlstm_round_up_to_multiple_of": 64, "head_dim": 32, "cell_norm_eps": 1e-6,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(published), encoding="utf-8")
    ids = text()
    for loader in (AutoModelForCausalLM, XLSTMForCausalLM):
        model, info = loader.from_pretrained(folder, output_loading_info=True)
        assert type(model) is XLSTMForCausalLM and not any(info.values())
        assert_same_logits(model(ids).logits, origin.logits(ids))
        assert model.config.eos_token_id == 2
    bare = XLSTMModel.from_pretrained(folder)
    assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)


def fuse(single: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as `xLSTMLarge` fuses them."""
    fused = dict(single)
    groups = {
        "mlstm_layer.qkv_opreact": ["mlstm_layer.q", "mlstm_layer.k", "mlstm_layer.v", "mlstm_layer.ogate_preact"],
        "mlstm_layer.ifgate_preact": ["mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"],
        "ffn.proj_up_gate_z": ["ffn.proj_up_gate", "ffn.proj_up"],
    }
    blocks = {name.split(".")[2] for name in single if name.startswith("backbone.blocks.")}
    for block, (new, old), kind in itertools.product(blocks, groups.items(), ("weight", "bias")):
        names = [f"backbone.blocks.{block}.{part}.{kind}" for part in old]
        if names[0] in fused:
            fused[f"backbone.blocks.{block}.{new}.{kind}"] = torch.cat([fused.pop(part) for part in names])
    return fused


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformers", "transformers_bias", "transformers_odd_width"])
def test_save_pretrained_writes_the_format_of_transformers_when_asked_to(name, tmp_path):
    build, fields = ORIGINS[name]
    origin = build(**fields)
    folder = save(origin, tmp_path / "origin")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "theirs", save_original_format=True)
    assert_same_weights(weights(tmp_path / "theirs"), weights(folder))
    again = type(origin.model).from_pretrained(tmp_path / "theirs")
    ids = random_ids(2, 17)
    assert torch.equal(again(ids, use_cache=False).logits, origin.logits(ids))
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))["model_type"] == "xlstm_lm"
    assert_same_weights(weights(tmp_path / "ours"), model.state_dict())


@torch.no_grad()
def test_save_pretrained_writes_both_weights_of_a_tied_model_for_transformers(tmp_path):
    """Its own xLSTM does not tie, and would start from a random projection."""
    model = tiny_model("post_up", hidden_size=64, tie_word_embeddings=True)
    model.save_pretrained(tmp_path, save_original_format=True)
    written = weights(tmp_path)
    assert torch.equal(written["lm_head.weight"], written["backbone.embeddings.weight"])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: tiny_model("pre_up_slstm"), {}, "mlstm_block must be 'post_up' in the format transformers"),
        (lambda: tiny_model("post_up", mlstm_input_gate="sigmoid"), {}, "mlstm_input_gate must be 'exp' in the format"),
        (lambda: tiny_model("post_up", gate_soft_cap=None), {}, "gate_soft_cap must be a number in the format"),
        (lambda: tiny_model("post_up", cls=XLSTMModel), {}, "that of a language model, got XLSTMModel"),
        (lambda: tiny_model("post_up"), {"push_to_hub": True}, "to a directory only, got push_to_hub=True"),
    ],
)
def test_what_transformers_cannot_express_is_not_saved_for_it(make, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make().save_pretrained(tmp_path / "to", save_original_format=True, **options)
    assert not (tmp_path / "to").exists()


def test_an_adapted_configuration_of_transformers_keeps_what_is_not_about_kernels():
    fields = {"model_type": "xlstm", "embedding_dim": 64, "num_blocks": 2, "num_heads": 2, "vocab_size": 99}
    labels = {"0": "bad", "1": "fair", "2": "good"}
    config = XLSTMConfig.from_dict({**fields, "id2label": labels, "torch_dtype": "bfloat16", "author": "me"})
    assert (config.num_labels, config.id2label[2], config.dtype, config.author) == (3, "good", torch.bfloat16, "me")
    assert (config.hidden_size, config.num_hidden_layers, config.model_type) == (64, 2, "xlstm_lm")
