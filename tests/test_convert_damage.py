"""`python -m convert` on what is broken, hostile or cut off: one sentence, and the destination as it was."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from models import tiny_model
from safetensors.torch import load_file, save_file

import convert.destination
from convert.__main__ import main
from convert.destination import LOCK


ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in the format of Transformers, in one file."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tiny_model("post_up").save_pretrained(folder, save_original_format=True)  # type: ignore[operator]
    return folder


@pytest.fixture(scope="module")
def shards(checkpoint: Path) -> Path:
    """The same in several files."""
    folder = checkpoint.parent / "shards"
    assert main([str(checkpoint), str(folder), "--to", "transformers", "--max-shard-size", "50KB"]) == 0
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture, tmp_path: Path):
    """Converts in this process, sees that it fails as it should, and returns its sentence."""

    def call(source: object, *argv: object, destination: Path | None = None) -> str:
        to = tmp_path / "to" if destination is None else destination
        before = contents(to)
        assert main([str(arg) for arg in (source, to, *argv)]) == 1
        assert contents(to) == before
        assert not list(to.parent.glob(".*")), "something is left beside the destination"
        *_, sentence = capsys.readouterr().err.strip().splitlines()
        assert sentence.startswith("error: ")
        return sentence.removeprefix("error: ")

    return call


def contents(path: Path) -> dict[str, bytes] | bytes | None:
    """All that is at a path."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return path.read_bytes() if path.exists() else None


def edit_json(path: Path, **fields: object) -> None:
    """Sets fields of a JSON file, and deletes those that are None."""
    value = {**json.loads(path.read_text(encoding="utf-8")), **fields}
    value = {key: item for key, item in value.items() if item is not None}
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes the weights of a folder in place."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def cut(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size + size if size < 0 else size)


def header(path: Path, text: bytes) -> None:
    """Replaces the header of a safetensors file."""
    path.write_bytes(struct.pack("<Q", len(text)) + text + path.read_bytes()[-1000:])


LM_HEAD, EMBEDDING = "lm_head.weight", "backbone.embeddings.weight"
Q = "backbone.blocks.1.mlstm_layer.q.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: cut(f / WEIGHTS, -8), "The weights in model.safetensors cannot be read: "),
    "cut in the header": (lambda f: cut(f / WEIGHTS, 99), "The weights in model.safetensors cannot be read: "),
    "empty": (lambda f: cut(f / WEIGHTS, 0), "The weights in model.safetensors cannot be read: "),
    "noise": (lambda f: (f / WEIGHTS).write_bytes(b"\x07" * 999), "The weights in model.safetensors cannot be read: "),
    "no JSON": (lambda f: header(f / WEIGHTS, b"{]"), "The weights in model.safetensors cannot be read: "),
    "wild offsets": (
        lambda f: header(f / WEIGHTS, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[9000,9004]}}'),
        "The weights in model.safetensors cannot be read: ",
    ),
    "huge shape": (
        lambda f: header(f / WEIGHTS, b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}'),
        "The weights in model.safetensors cannot be read: ",
    ),
    "a pickle by another name": (
        lambda f: torch.save({}, f / WEIGHTS),
        "The weights in model.safetensors cannot be read: ",
    ),
    "other tensors": (
        lambda f: save_file({"a": torch.zeros(3)}, f / WEIGHTS),
        "The weights must be those of a language model, with one of model.embed_tokens.weight, ",
    ),
    "integers": (
        lambda f: edit_weights(f, lambda x: x.update({Q: x[Q].to(torch.int8)})),
        f"{Q} must be of dtype F64, F32, F16, BF16, got I8.",
    ),
    "not a number": (
        lambda f: edit_weights(f, lambda x: x[Q].fill_(float("nan"))),
        "All weights must be finite in torch.float32, got NaN or infinity in what becomes model.layers.1.mixer.qkvo",
    ),
    "a weight less": (lambda f: edit_weights(f, lambda x: x.pop(Q)), f"got no {Q}."),
    "a weight more": (
        lambda f: edit_weights(f, lambda x: x.update({"score.weight": torch.zeros(3)})),
        "got an unexpected score.weight.",
    ),
    "a wrong shape": (
        lambda f: edit_weights(f, lambda x: x.update({Q: torch.zeros(3, 32)})),
        "model.layers.1.mixer.qkvo_proj.weight must have shape [96, 32], got ",
    ),
    "a wrong number of axes": (
        lambda f: edit_weights(f, lambda x: x.update({Q: torch.zeros(3)})),
        "model.layers.1.mixer.qkvo_proj.weight must have shape [96, 32], got ",
    ),
    "another vocabulary": (
        lambda f: edit_json(f / "config.json", vocab_size=100),
        "model.embed_tokens.weight must have shape [100, 32], got backbone.embeddings.weight [99, 32].",
    ),
    "fewer blocks": (
        lambda f: edit_json(f / "config.json", num_blocks=1, num_hidden_layers=1),
        "got an unexpected backbone.blocks.1.",
    ),
    "heads that do not divide": (
        lambda f: edit_json(f / "config.json", num_heads=5),
        "The configuration must be that of an xLSTM: hidden_size * qk_dim_factor must be a multiple of num_heads = 5",
    ),
    "a field of a wrong type": (
        lambda f: edit_json(f / "config.json", num_heads="two"),
        "The configuration must be that of an xLSTM: ",
    ),
    "two widths": (
        lambda f: edit_json(f / "config.json", hidden_size=64),
        "hidden_size and embedding_dim must be equal",
    ),
    "a Llama": (
        lambda f: edit_json(f / "config.json", model_type="llama"),
        "model_type 'xlstm', got 'llama'.",
    ),
    "no model type": (
        lambda f: edit_json(f / "config.json", model_type=None),
        "model_type 'xlstm', got None.",
    ),
    "quantised": (
        lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}),
        "The weights must not be quantised, got a configuration with quantization_config.",
    ),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read: "),
    "a config that is no text": (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json cannot be read: "),
    "a config that is a list": (
        lambda f: (f / "config.json").write_text("[1]"),
        "config.json must hold a mapping of names to values, got list.",
    ),
    "a config nested without end": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "config.json cannot be read: ",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "must hold a config.json or config.yaml, got neither"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "must hold weights as *.safetensors or one state dict"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "The tokenizer in "),
    "generation settings of a wrong type": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        "generation_config.json must hold a mapping of names to values, got list.",
    ),
    "a config that leads out": (
        lambda f: link_out(f / "config.json"),
        "All files of the source must be in ",
    ),
    "weights that lead out": (lambda f: link_out(f / WEIGHTS), "All files of the source must be in "),
    "a tokenizer that leads out": (
        lambda f: link_out(f / "tokenizer.json", "{}"),
        "All files of the source must be in ",
    ),
    "a licence that leads out": (
        lambda f: link_out(f / "LICENSE", "x"),
        "All files of the source must be in ",
    ),
}


def link_out(path: Path, text: str | None = None) -> None:
    """Moves a file out of its folder and leaves a link; with `text`, makes the file first."""
    if text is not None:
        path.write_text(text, encoding="utf-8")
    outside = path.parent.parent / f"outside-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused(name, refused, checkpoint, tmp_path):
    damage, sentence = DAMAGE[name]
    folder = tmp_path / "source" / "model"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    assert sentence in refused(folder)


SHARD = "model-00002-of-00003.safetensors"
INDEX_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard less": (lambda f: (f / SHARD).unlink(), f"{INDEX} names the file {SHARD}, which is not in "),
    "a truncated shard": (lambda f: cut(f / SHARD, -8), f"The weights in {SHARD} cannot be read: "),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("nothing"), f"{INDEX} cannot be read: "),
    "an index without a map": (lambda f: edit_json(f / INDEX, weight_map=None), f"{INDEX} must hold a weight_map"),
    "an index that leads out": (
        lambda f: redirect(f, "../stolen.safetensors"),
        f"The files in {INDEX} must be names of files beside it, got '../stolen.safetensors'.",
    ),
    "an index with an absolute name": (
        lambda f: redirect(f, "/etc/hostname"),
        f"The files in {INDEX} must be names of files beside it, got '/etc/hostname'.",
    ),
    "an index of other things": (
        lambda f: redirect(f, {"a": 1}),
        f"The files in {INDEX} must be names of files beside it, got \"{{'a': 1}}\".",
    ),
    "an index with a long name": (
        lambda f: redirect(f, "x" * 5000),
        f"The files in {INDEX} must be names of files beside it, got '{'x' * 199}.",
    ),
    "an index with a weight too many": (
        lambda f: edit_json(f / INDEX, weight_map={**weight_map(f), "x": SHARD}),
        f"{INDEX} and its files must hold the same weights, got x in the index only.",
    ),
    "an index with a weight too few": (
        lambda f: edit_json(f / INDEX, weight_map={k: v for k, v in weight_map(f).items() if k != LM_HEAD}),
        f"{INDEX} and its files must hold the same weights, got {LM_HEAD} in the files only.",
    ),
    "a weight in two shards": (
        lambda f: shutil.copyfile(f / SHARD, f / "model-00001-of-00003.safetensors"),
        "Each weight must be in one file, got ",
    ),
    "a shard that leads out": (lambda f: link_out(f / SHARD), "All files of the source must be in "),
}


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]


def redirect(folder: Path, file: object) -> None:
    """Makes the index say that a weight is in another file, which there is."""
    (folder.parent / "stolen.safetensors").write_bytes((folder / SHARD).read_bytes())
    edit_json(folder / INDEX, weight_map={**weight_map(folder), LM_HEAD: file})


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_a_damaged_index_is_refused(name, refused, shards, tmp_path):
    damage, sentence = INDEX_DAMAGE[name]
    folder = tmp_path / "source" / "model"
    shutil.copytree(shards, folder)
    damage(folder)
    assert sentence in refused(folder)


def test_every_weight_left_over_on_either_side_is_printed(checkpoint, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    edit_weights(folder, lambda x: [x.update({f"more.{i}": torch.zeros(1)}) for i in range(20)] and x.pop(LM_HEAD))
    assert main([str(folder), str(tmp_path / "to")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("missing in the source: ")] == [
        f"missing in the source: {LM_HEAD}"
    ]
    assert len([line for line in lines if line.startswith("left over in the source: more.")]) == 20


def test_a_name_of_any_length_is_a_line(checkpoint, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    edit_weights(folder, lambda x: x.update({"x" * 5000: torch.zeros(1)}))
    assert main([str(folder), str(tmp_path / "to")]) == 1
    assert max(map(len, capsys.readouterr().err.splitlines())) < 500


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth", ".ckpt"])
@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain pickle"])
def test_nothing_in_a_hostile_pickle_is_executed(protocol, suffix, refused, checkpoint, tmp_path):
    folder, mark = tmp_path / "source", tmp_path / "executed"
    folder.mkdir()
    shutil.copyfile(checkpoint / "config.json", folder / "config.json")
    state_dict = {**load_file(checkpoint / WEIGHTS), "payload": Hostile(mark)}
    path = folder / f"weights{suffix}"
    if protocol == "plain pickle":
        path.write_bytes(pickle.dumps(state_dict))
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=protocol == "zip")
    assert "must hold nothing but tensors" in refused(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([torch.zeros(3)], "must hold a state dict of names to tensors, got list."),
        (
            {"model": {}, "step": 7},
            "must hold a state dict of names to tensors, got dict under 'model'; save ",
        ),
        ({"a": torch.zeros(3, dtype=torch.int64)}, "a must be a dense tensor of a floating dtype, got torch.int64"),
    ],
)
def test_a_pickle_of_other_things_is_refused(value, sentence, refused, checkpoint, tmp_path):
    (tmp_path / "source").mkdir()
    shutil.copyfile(checkpoint / "config.json", tmp_path / "source" / "config.json")
    torch.save(value, tmp_path / "source" / "weights.pt")
    assert sentence in refused(tmp_path / "source")


def test_yaml_makes_no_objects(refused, checkpoint, tmp_path):
    config, mark = tmp_path / "config.yaml", tmp_path / "executed"
    config.write_text(f"!!python/object/apply:os.system ['touch {mark}']", encoding="utf-8")
    assert "config.yaml cannot be read: " in refused(checkpoint, "--config", config)
    assert not mark.exists()


def test_several_state_dicts_are_not_chosen_from(refused, checkpoint, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copyfile(checkpoint / "config.json", folder / "config.json")
    for name in ("a.pt", "b.pt"):
        torch.save({}, folder / name)
    assert "got several state dicts: a.pt, b.pt." in refused(folder)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--to", "xlstm-paper"], "mlstm_block must be 'pre_up' in the format xlstm-paper, got 'post_up'."),
        (["--config", "nowhere.json"], "--config must name a file, got nowhere.json, which is none."),
        (["--max-shard-size", "plenty"], "--max-shard-size must be a size such as 500MB, got plenty."),
        (["--to", "xlstm-paper", "--dry-run"], "mlstm_block must be 'pre_up' in the format xlstm-paper"),
    ],
)
def test_what_cannot_be_done_is_refused(argv, sentence, refused, checkpoint):
    assert sentence in refused(checkpoint, *argv)


def test_a_source_that_is_no_folder_is_refused(refused, checkpoint, tmp_path):
    assert "The source must be a folder or a repository on the Hub, got " in refused(tmp_path / "nowhere")
    assert "got the file " in refused(checkpoint / WEIGHTS)


@pytest.mark.parametrize("argv", [["--to", "onnx"], ["--dtype", "int8"], ["--nonsense"], []])
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(argv, checkpoint, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(checkpoint), *(["to"] if argv else []), *argv])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("python -m convert: error: ")


# The destination is there in full, or as it was.


def test_a_destination_with_something_in_it_is_not_touched(refused, checkpoint, tmp_path):
    for name in ("folder", "file"):
        destination = tmp_path / name
        if name == "folder":
            destination.mkdir()
        (destination / "mine" if name == "folder" else destination).write_text("mine", encoding="utf-8")
        assert "The destination must be new or an empty folder" in refused(checkpoint, destination=destination)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    assert "The destination must be new or an empty folder" in refused(checkpoint, destination=link)


def test_an_empty_folder_is_filled(checkpoint, tmp_path):
    (tmp_path / "to").mkdir()
    assert main([str(checkpoint), str(tmp_path / "to")]) == 0
    assert (tmp_path / "to" / WEIGHTS).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


def test_a_destination_that_cannot_be_made_is_refused(refused, checkpoint, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert main([str(checkpoint), str(tmp_path / "file" / "to")]) == 1
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_an_error_of_the_system_is_one_sentence(error, refused, checkpoint, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(convert.destination.os, "fsync", fail)
    assert error.strerror in refused(checkpoint)


# In a process of its own, so that what is done to it is not done to the tests.
LIMITED = """
import resource, signal, sys
from convert.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""
KILLED = """
import os, signal, sys
import convert.destination
from convert.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
save, left = convert.destination.save_file, [int(sys.argv[1])]
def save_file(*args, **kwargs):
    save(*args, **kwargs)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), int(sys.argv[2]))
convert.destination.save_file = save_file
sys.exit(main(sys.argv[3:]))
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter, with the repository as its folder."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system has no such limit")
def test_a_full_disk_is_one_sentence(checkpoint, tmp_path):
    """As far as a test can fill one: files may not grow beyond 64 KB."""
    done = python(LIMITED, 1 << 16, checkpoint, tmp_path / "to")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: model.safetensors cannot be written: ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("after", [1, 3])
def test_a_conversion_that_is_killed_leaves_no_destination_and_can_be_started_again(after, shards, tmp_path):
    destination = tmp_path / "to"
    argv = [shards, destination, "--max-shard-size", "20KB"]
    assert python(KILLED, after, signal.SIGKILL.value, *argv).returncode == -signal.SIGKILL
    assert not destination.exists()
    assert len(list(tmp_path.iterdir())) == 1  # what it had written
    assert main([str(arg) for arg in argv]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    assert not (destination / LOCK).exists()


def test_a_conversion_that_is_interrupted_cleans_up(shards, tmp_path):
    argv = [shards, tmp_path / "to", "--max-shard-size", "20KB"]
    done = python(KILLED, 2, signal.SIGINT.value, *argv)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_lock_of_what_is_cleaned_up_goes_last(checkpoint, tmp_path, monkeypatch):
    """Without it the next conversion would not know that the rest may go."""
    removed, unlink = [], os.unlink

    def note(path, **options):
        removed.append(os.path.basename(path))
        unlink(path, **options)

    def fail(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "unlink", note)
    monkeypatch.setattr(convert.destination, "sync", fail)
    assert main([str(checkpoint), str(tmp_path / "to")]) == 1
    assert removed[-1] == LOCK and {WEIGHTS, "config.json"} <= set(removed)


def test_a_conversion_waits_for_nobody_and_takes_nothing_from_another(refused, checkpoint, tmp_path):
    running = tmp_path / ".to.partial-0badcafe"
    running.mkdir()
    with FileLock(running / LOCK):
        assert main([str(checkpoint), str(tmp_path / "to")]) == 1
        assert running.is_dir() and not (tmp_path / "to").exists()
    assert main([str(checkpoint), str(tmp_path / "to")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


def test_a_destination_that_another_made_meanwhile_is_kept(checkpoint, tmp_path, monkeypatch, capsys):
    destination, sync = tmp_path / "to", convert.destination.sync

    def slow(folder: Path) -> None:
        sync(folder)
        destination.mkdir()
        (destination / "theirs").write_text("theirs", encoding="utf-8")

    monkeypatch.setattr(convert.destination, "sync", slow)
    assert main([str(checkpoint), str(destination)]) == 1
    assert "The destination must be new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    assert contents(destination) == {"theirs": b"theirs"}


# What a first round of breaking it found.


@pytest.mark.parametrize("size", [0, 3, 100, 1000])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_truncated_state_dict_is_refused(legacy, size, refused, checkpoint, tmp_path):
    (tmp_path / "source").mkdir()
    shutil.copyfile(checkpoint / "config.json", tmp_path / "source" / "config.json")
    path = tmp_path / "source" / "weights.bin"
    torch.save(load_file(checkpoint / WEIGHTS), path, _use_new_zipfile_serialization=not legacy)
    cut(path, size)
    assert "weights.bin" in refused(tmp_path / "source")


@pytest.mark.parametrize(
    "state_dict",
    [
        {1: torch.zeros(3)},
        {"token_embedding.weight": torch.zeros(9, 4), "x._recurrent_kernel_": torch.zeros(3)},
        {"backbone.embeddings.weight": torch.zeros(9, 4).to_sparse()},
        {"backbone.embeddings.weight": torch.zeros(9, 4, device="meta")},
        {"backbone.embeddings.weight\nerror: \x1b[31m": torch.zeros(9)},
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_odd_state_dicts_are_refused_in_one_line(state_dict, refused, checkpoint, tmp_path):
    (tmp_path / "source").mkdir()
    shutil.copyfile(checkpoint / "config.json", tmp_path / "source" / "config.json")
    torch.save(state_dict, tmp_path / "source" / "weights.pt")
    sentence = refused(tmp_path / "source")
    assert len(sentence) < 400 and "\x1b" not in sentence


@pytest.mark.parametrize("value", ["2024-13-45", "9" * 5000, "!!int x", "!!timestamp x", "!!bool x", "[" * 3000])
def test_odd_yaml_is_refused(value, refused, checkpoint, tmp_path):
    (tmp_path / "config.yml").write_text(f"vocab_size: {value}", encoding="utf-8")
    assert "config.yml cannot be read: " in refused(checkpoint, "--config", tmp_path / "config.yml")


@pytest.mark.parametrize("eos", ["x", -1, 10**30, 2.5, {}])
def test_odd_generation_settings_are_refused_or_kept(eos, checkpoint, tmp_path, capsys):
    folder = tmp_path / "source"
    shutil.copytree(checkpoint, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}), encoding="utf-8")
    code = main([str(folder), str(tmp_path / "to")])
    assert code == 0 or capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
    assert (tmp_path / "to").exists() == (code == 0)


def test_a_tokenizer_of_an_unknown_kind_is_refused(refused, checkpoint, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(checkpoint, folder)
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "Unheard", "vocab": {}}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")
    assert "The tokenizer in " in refused(folder)


def test_more_blocks_than_weights_are_not_even_built(refused, checkpoint, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(checkpoint, folder)
    edit_json(folder / "config.json", num_blocks=10**9, num_hidden_layers=10**9)
    assert "The weights must be those of 1000000000 blocks, as many as configured, got 2." in refused(folder)


def test_weights_that_a_dtype_cannot_hold_are_refused(refused, checkpoint, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(checkpoint, folder)
    edit_weights(folder, lambda x: x[EMBEDDING].mul_(1e6))
    assert "All weights must be finite in torch.float16, got NaN or infinity" in refused(folder, "--dtype", "float16")


@pytest.mark.parametrize("to", ["native", "transformers"])
def test_values_that_a_format_cannot_hold_are_refused(to, refused, tmp_path):
    """Which headers do not tell: a bias that the origin lacks, and tied weights that differ."""
    folder = tmp_path / "source"
    tiny_model("post_up", use_bias=to == "transformers", tie_word_embeddings=to == "native").save_pretrained(folder)
    if to == "native":
        edit_weights(folder, lambda x: x.update({LM_HEAD: torch.ones(99, 32)}))
    sentence = (
        "model.norm.bias must be zero" if to == "transformers" else "lm_head.weight must equal model.embed_tokens"
    )
    assert sentence in refused(folder, "--to", to)


def test_the_working_directory_is_not_replaced(refused, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([str(checkpoint), "."]) == 1
    assert "must not be the working directory" in refused(checkpoint, destination=tmp_path / "here")


def test_a_name_with_wildcards_cleans_up_after_itself_only(checkpoint, tmp_path):
    for name in (".other.partial-1", ".[a].partial-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK).touch()
    assert main([str(checkpoint), str(tmp_path / "[a]")]) == 0
    assert main([str(checkpoint), str(tmp_path / "*")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["*", ".other.partial-1", "[a]"]
