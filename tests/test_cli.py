"""`python -m modeling_xlstm`: what it prints, and how it refuses."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from models import KINDS, tiny_config, tiny_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, PreTrainedTokenizerFast

import modeling_xlstm.__main__
from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, XLSTMPreTrainedModel, count_parameters
from modeling_xlstm.__main__ import EXAMPLES, main, state_bytes


pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
DEMO = ROOT / "checkpoints" / "xlstm-demo"
PROMPT = "The class statement"
SPEED = r"prefill \d+ tokens in [\d.]+ s \([\d.]+/s\)(, decode \d+ tokens in [\d.]+ s \([\d.]+/s\))?"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens, learned from the help texts of Python."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|padding|>"]
    options: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, **options)
    bpe.train_from_iterator(list(topics.values())[:10], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0], pad_token=special[1])


@pytest.fixture(scope="module")
def checkpoint(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one mLSTM and one sLSTM block with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model: Any = tiny_model("post_up_slstm", vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture):
    """Runs a command in this process: exit code, standard output, standard error."""

    def call(*argv: object) -> tuple[Any, str, str]:
        code: Any
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def generate(run, checkpoint: Path):
    """Runs `generate` on the random checkpoint and returns standard output."""

    def call(*argv: object, prompt: str = PROMPT) -> str:
        code, out, err = run("generate", "--model", checkpoint, "--prompt", prompt, "--max-new-tokens", 12, *argv)
        assert code == 0, err
        assert re.fullmatch(SPEED, err.strip())
        return out

    return call


def expected_text(checkpoint: Path, tokenizer: PreTrainedTokenizerFast, dtype: str = "auto", **options) -> str:
    """Prompt and greedy continuation by 12 tokens, without the command line."""
    model = XLSTMForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    options = {"attention_mask": inputs.attention_mask, "max_new_tokens": 12, "do_sample": False, **options}
    ids = model.generate(inputs.input_ids, **options)
    return f"{tokenizer.decode(ids[0], skip_special_tokens=True)}\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_generation_prints_prompt_and_continuation(generate, checkpoint, tokenizer, dtype):
    out = generate("--greedy", "--dtype", dtype)
    assert out.startswith(PROMPT)
    assert len(out) > len(PROMPT) + 1
    assert out == expected_text(checkpoint, tokenizer, dtype)


def test_half_precision_weights_are_float32_on_a_cpu_unless_asked_for(run, tokenizer, tmp_path, monkeypatch):
    dtypes, original = [], XLSTMForCausalLM.generate

    def generate(model, *args, **kwargs):
        dtypes.append(model.lm_head.weight.dtype)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(XLSTMForCausalLM, "generate", generate)
    tiny_model(vocab_size=len(tokenizer)).bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for option in ((), ("--dtype", "bfloat16")):
        code, _, err = run("generate", "--model", tmp_path, "--prompt", PROMPT, "--device", "cpu", *option)
        assert code == 0, err
    assert dtypes == [torch.float32, torch.bfloat16]


def test_skip_prompt_prints_the_continuation_only(generate):
    whole = generate("--greedy")
    assert whole == PROMPT + generate("--greedy", "--skip-prompt")


def test_the_text_is_flushed_while_it_is_generated(generate, monkeypatch):
    class Terminal(io.StringIO):
        shown = []

        def flush(self):
            self.shown.append(self.getvalue())

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    generate("--seed", 0, "--temperature", 1.5, "--max-new-tokens", 64)
    steps = [text for text, after in itertools.pairwise(terminal.shown) if text != after]
    assert len(steps) > 5
    assert all(after.startswith(text) for text, after in itertools.pairwise(steps))


def test_a_seed_repeats_the_text(generate):
    first = generate("--seed", 1)
    assert generate("--seed", 1) == first
    assert generate("--seed", 2) != first


@pytest.mark.parametrize("option", [("--top-k", 1), ("--top-p", 1e-9), ("--temperature", 1e-6)])
def test_each_sampling_option_arrives(generate, option):
    assert generate("--seed", 1, "--temperature", 2.0, *option) == generate("--greedy")
    assert generate("--seed", 1, "--temperature", 2.0) != generate("--greedy")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_step_writes_the_same_text(generate):
    assert generate("--compile", "--greedy") == generate("--greedy")


def test_without_a_compiler_a_step_is_not_compiled(run, checkpoint):
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent/g++")}):
        code, out, err = run("generate", "--model", str(checkpoint), "--prompt", PROMPT, "--compile")
    assert code == 1
    assert not out
    assert re.fullmatch(r"error: .* cannot be compiled: .*C\+\+ compiler.*\n", err)


def test_a_repetition_penalty_arrives(generate, checkpoint, tokenizer):
    out = generate("--greedy", "--repetition-penalty", 0.01)
    assert out == expected_text(checkpoint, tokenizer, repetition_penalty=0.01)
    assert out != generate("--greedy")


def test_the_prompt_can_come_from_standard_input(generate, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode() + b"\n")))
    assert generate("--greedy", prompt="-") == generate("--greedy")


def test_one_new_token_has_no_decoding_speed(run, checkpoint):
    code, _, err = run("generate", "--model", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 1)
    assert code == 0
    assert "decode" not in err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ((), "required: generate | info"),
        (("talk",), "invalid choice: 'talk'"),
        (("generate", "--prompt", "a"), "required: --model"),
        (("generate", "--model", ".", "--prompt", "a", "--temperature", "-1"), "must be from 1e-6 to 1e6, got -1"),
        (("generate", "--model", ".", "--prompt", "a", "--temperature", "nan"), "must be from 1e-6 to 1e6, got nan"),
        (
            ("generate", "--model", ".", "--prompt", "a", "--temperature", "1e-40"),
            "must be from 1e-6 to 1e6, got 1e-40",
        ),
        (("generate", "--model", ".", "--prompt", "a", "--top-p", "1.5"), "must be above 0 and at most 1, got 1.5"),
        (("generate", "--model", ".", "--prompt", "a", "--top-k", "-1"), "must be an integer of at least 0, got -1"),
        (("generate", "--model", ".", "--prompt", "a", "--max-new-tokens", "0"), "must be a positive integer, got 0"),
        (("generate", "--model", ".", "--prompt", "a", "--seed", "x"), "must be an integer from 0 to 2**63 - 1, got x"),
        (("generate", "--model", ".", "--prompt", "a", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("info",), "required: DIR"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(run, argv, sentence):
    code, out, err = run(*argv)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


def without(name: str):
    return lambda folder: (folder / name).unlink()


def edit_config(**fields):
    def edit(folder: Path):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return edit


def damage_index(text: str):
    def damage(folder: Path):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


DAMAGE = {
    "no directory": (shutil.rmtree, "must be a directory"),
    "no config": (without("config.json"), "config.json"),
    "config is not JSON": (write("config.json", "{"), "config.json"),
    "config is not a dictionary": (write("config.json", "[]"), "config.json"),
    "config without end": (write("config.json", "[" * 100_000), "config.json"),
    "another model": (lambda folder: GPT2Config().save_pretrained(folder), "got a model of type 'gpt2'"),
    "impossible config": (edit_config(num_heads=7), "num_heads = 7"),
    "impossible dtype": (edit_config(dtype="float33"), "config.json of an xLSTM: module 'torch' has no"),
    "no weights": (without("model.safetensors"), "model.safetensors"),
    "weights cut off": (lambda folder: os.truncate(folder / "model.safetensors", 9000), "cannot be"),
    "index of shards is not JSON": (damage_index("{"), "cannot be"),
    "index of shards names none": (damage_index("{}"), "cannot be"),
    "index of shards is not a dictionary": (damage_index("[]"), "cannot be"),
    "tokenizer is not JSON": (write("tokenizer.json", "{"), "tokenizer"),
    "tokenizer is empty": (write("tokenizer.json", "{}"), "The tokenizer in"),
    "tokenizer is not a dictionary": (write("tokenizer_config.json", "[]"), "The tokenizer in"),
}


@pytest.mark.parametrize("command", ["generate", "info"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_sentence_and_exit_code_1(run, checkpoint, tmp_path, command, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    apply, sentence = DAMAGE[damage]
    apply(folder)
    code, out, err = run(*(("info", folder) if command == "info" else ("generate", "--model", folder, "--prompt", "a")))
    assert code == 1
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--prompt", ""), "at least one character"),
        (("--prompt", os.fsdecode(b"ab\xff")), "must be UTF-8, got byte 0xff at 2"),
        (("--prompt", "a", "--device", "nonsense"), "cannot be loaded on nonsense"),
        (("--prompt", "a", "--device", "meta"), "must be one that computes, got meta"),
        (("--prompt", "a", "--backend", "triton", "--device", "cpu"), "triton"),
    ],
)
def test_what_cannot_be_generated_is_one_sentence_and_exit_code_1(run, checkpoint, argv, sentence):
    code, out, err = run("generate", "--model", checkpoint, *argv)
    assert code == 1
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["", "a" * 5000])
def test_what_cannot_be_a_directory_is_refused(run, name):
    assert run("info", name) == (1, "", f"error: The model must be a directory, got {name}, which is not one.\n")


@pytest.mark.parametrize("compiled", [(), ("--compile",)])
@pytest.mark.parametrize("fields", [{"eos_token_id": "x"}, {"cache_implementation": "quantized"}])
def test_what_a_checkpoint_cannot_generate_with_is_refused(run, checkpoint, tmp_path, fields, compiled):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    code, _, err = run("generate", "--model", tmp_path, "--prompt", "a", *compiled)
    assert code == 1
    sentence = "cannot be compiled" if compiled else "cannot continue the prompt"
    assert err.startswith(f"error: {tmp_path} {sentence}: ")
    assert err.count("\n") == 1


def test_a_stream_has_one_beam_whatever_the_checkpoint_asks_for(run, generate, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text('{"num_beams": 3}')
    options = ("--prompt", PROMPT, "--max-new-tokens", 12, "--greedy")
    assert run("generate", "--model", tmp_path, *options)[:2] == (0, generate("--greedy"))


def test_a_prompt_from_a_standard_input_that_is_closed_is_refused(run, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    _, _, err = run("generate", "--model", checkpoint, "--prompt", "-")
    assert err == "error: The prompt must come from standard input, which is closed.\n"


def test_info_on_a_file_without_weights_is_refused(run, checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    code, _, err = run("info", tmp_path)
    assert code == 1
    assert "must hold the weights of an xLSTM" in err


def test_generation_without_a_tokenizer_is_refused(run, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    code, _, err = run("generate", "--model", tmp_path, "--prompt", "a")
    assert code == 1
    assert "must hold a tokenizer" in err


def test_a_tokenizer_of_another_model_is_refused(run, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, _, err = run("generate", "--model", tmp_path, "--prompt", PROMPT)
    assert code == 1
    assert "must give token ids below 99" in err


def read_card(out: str) -> dict[str, str]:
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())


def test_info_prints_the_card_without_loading_weights(run, checkpoint, monkeypatch):
    monkeypatch.setattr(XLSTMPreTrainedModel, "from_pretrained", None)
    code, out, _ = run("info", checkpoint)
    assert code == 0
    config = XLSTMConfig.from_pretrained(checkpoint)
    parameters = count_parameters(config)
    assert read_card(out) == {
        "model": f"{checkpoint} (XLSTMForCausalLM)",
        "architecture": "xLSTM[1:1], post-up, exp input gate",
        "blocks": "2: 1 mLSTM, 1 sLSTM",
        "width": "32, 2 mLSTM heads, 2 sLSTM heads",
        "parameters": f"{parameters:,}, of which {100 * 400 * 32 / parameters:.1f}% input embedding",
        "weights": f"float32, {(checkpoint / 'model.safetensors').stat().st_size:,} bytes in 1 file",
        "state": f"{state_bytes(config):,} bytes per sequence of any length",
        "vocabulary": "400",
        "tokenizer": f"{type(PreTrainedTokenizerFast.from_pretrained(checkpoint)).__name__}, 400 tokens",
    }


def test_info_knows_shards_dtypes_ties_and_a_missing_tokenizer(run, tmp_path):
    fields = {"tie_word_embeddings": True, "num_hidden_layers": 5, "block_types": ["mlstm", "slstm", *["mlstm"] * 3]}
    model = XLSTMForCausalLM(tiny_config("pre_up", **fields)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    code, out, _ = run("info", tmp_path)
    card = read_card(out)
    files = list(tmp_path.glob("*.safetensors"))
    assert code == 0
    assert len(files) > 1
    assert card["architecture"] == "xLSTM[4:1], pre-up, exp input gate"
    assert card["blocks"] == "5: 1 mLSTM, 1 sLSTM, 3 mLSTM"
    assert card["parameters"].startswith(f"{model.num_parameters():,}, ")
    assert card["parameters"].endswith("tied embedding")
    assert card["weights"] == f"bfloat16, {sum(file.stat().st_size for file in files):,} bytes in {len(files)} files"
    assert card["tokenizer"] == "none"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{}, {"conv_kernel_size": 0, "slstm_conv_kernel_size": 0, "v_dim_factor": 2.0}])
def test_the_size_of_the_state_is_that_of_the_cache(kind, fields):
    model = tiny_model(kind, **fields)
    cache = model(torch.tensor([[2, 3, 4]])).past_key_values
    size = sum(tensor.nbytes for layer in cache.layers for tensor in layer.state.tensors().values())
    assert state_bytes(model.config) == size


@pytest.mark.parametrize(("terminal", "large"), [(True, True), (True, False), (False, True)])
def test_loading_has_a_progress_bar_where_it_takes_long_on_a_terminal(run, checkpoint, monkeypatch, terminal, large):
    monkeypatch.setattr(modeling_xlstm.__main__, "LARGE", 1 if large else 1e9)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    code, _, err = run("generate", "--model", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 1)
    assert code == 0
    assert ("Loading weights: 100%" in err) == (terminal and large)


def test_memory_that_does_not_suffice_is_one_sentence(run, checkpoint, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0 has less.")

    monkeypatch.setattr(XLSTMForCausalLM, "generate", fail)
    code, _, err = run("generate", "--model", checkpoint, "--prompt", PROMPT)
    assert code == 1
    assert err == f"error: {checkpoint} cannot continue the prompt: CUDA out of memory. Tried to allocate 9 GiB.\n"


def program(*argv: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "modeling_xlstm", *map(str, argv)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, encoding="utf-8", **{**pipes, **options})


def test_as_a_program(checkpoint, generate):
    options = ("--prompt", "-", "--greedy", "--max-new-tokens", 12)
    with program("generate", "--model", checkpoint, *options, stdin=subprocess.PIPE) as child:
        out, err = child.communicate(PROMPT)
    assert child.returncode == 0
    assert out == generate("--greedy")
    assert re.search(SPEED, err)

    with program("generate", "--model", checkpoint / "nowhere", "--prompt", "a") as child:
        out, err = child.communicate()
    assert child.returncode == 1
    assert out == ""
    assert "must be a directory" in err
    assert "Traceback" not in err


def test_help_shows_examples_and_every_command():
    with program("--help") as child:
        out, _ = child.communicate()
    assert child.returncode == 0
    assert EXAMPLES.strip() in out
    assert {"generate", "info", "serve"} <= set(out.split())


def test_a_reader_that_stops_early_is_no_error(checkpoint):
    with program("generate", "--model", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 4000) as child:
        assert child.stdout.read(len(PROMPT)) == PROMPT
        child.stdout.close()
        assert "Traceback" not in child.stderr.read()
    assert child.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_is_one_sentence(checkpoint):
    with open("/dev/full", "w") as full, program("info", checkpoint, stdout=full) as child:
        _, err = child.communicate()
    assert child.returncode == 1
    assert err.endswith("error: Reading or writing failed: No space left on device\n")
    assert "Traceback" not in err


def test_nothing_is_printed_where_standard_output_is_closed(run, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert run("info", checkpoint) == (0, "", "")


def test_info_on_the_shipped_checkpoint(run):
    code, out, err = run("info", DEMO)
    assert code == 0, err
    card = read_card(out)
    parameters = count_parameters(XLSTMConfig.from_pretrained(DEMO))
    assert card["parameters"].startswith(f"{parameters:,}, ")
    assert card["tokenizer"] != "none"


def test_the_shipped_checkpoint_writes_words(run):
    code, out, err = run("generate", "--model", DEMO, "--prompt", PROMPT, "--seed", 0, "--max-new-tokens", 48)
    assert code == 0, err
    assert out.startswith(PROMPT)
    assert "\N{REPLACEMENT CHARACTER}" not in out
    words = re.findall(r"[a-z]+", out.removeprefix(PROMPT).lower())
    assert {"the", "a", "of", "to", "and", "is", "in"} & set(words)
    assert len(set(words)) > 8
