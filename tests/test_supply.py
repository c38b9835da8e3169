"""What a user takes in: the wheel with old and new packages beside it, an import that does nothing but import, and
checkpoints of which nothing is executed.
"""

import json
import os
import pickle
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import random_ids, tiny_model
from packaging.requirements import Requirement
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.checkpoint import FileSystemReader
from torture import TORTURE, tried, tries
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from convert.__main__ import main as convert
from convert.remote_code import code_files
from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM
from modeling_xlstm.__main__ import main as xlstm
from modeling_xlstm.training_xlstm import XLSTMTrainer


ROOT = Path(__file__).parents[1]
DEMO = ROOT / "checkpoints" / "xlstm-demo"
PROMPT = "My lord,"
OPTIONAL = {"bitsandbytes", "datasets", "matplotlib", "mlstm_kernels", "peft", "torchao", "trl", "typer", "xlstm"}
GENERATE = ["generate", "--model", str(DEMO), "--prompt", PROMPT, "--greedy", "--max-new-tokens", "12"]


# An import that does nothing but import.

WATCH = """
import json, os, sys, time, warnings

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = "mkdir rename remove rmdir link symlink truncate chmod chown utime setxattr".split()
STARTS = {"subprocess.Popen", *(f"os.{name}" for name in "exec posix_spawn spawn fork forkpty system".split())}
stage, seen, done = "transformers", [], []


def watch(event, args):
    kind = event.partition(".")[0]
    if kind in ("socket", "urllib", "http", "ftplib", "smtplib"):
        seen.append((stage, "network", f"{event} {args}"))
        raise ConnectionRefusedError(f"{event} {args}")
    if event in STARTS:
        seen.append((stage, "programs", f"{event} {args}"))
    elif kind in ("shutil", "tempfile") or event in [f"os.{name}" for name in CHANGES]:
        seen.append((stage, "files", f"{event} {args}"))
    elif event == "open" and args[2] & WRITING and args[0] != os.devnull:
        seen.append((stage, "files", f"open {args}"))


def end(name):
    global stage
    done.append((stage, time.process_time(), {module.partition(".")[0] for module in sys.modules}))
    stage = name


sys.addaudithook(watch)
start = time.process_time()
try:
    from transformers import AutoModelForCausalLM, PreTrainedModel
except Warning as warning:
    print(json.dumps({"warning": repr(warning)}))
    sys.exit()
end("import")
import modeling_xlstm
end("use")
warnings.simplefilter("ignore")
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
text = tokenizer.decode(model.generate(**tokenizer(sys.argv[2], return_tensors="pt"), max_new_tokens=12, do_sample=False)[0])
end("end")
base, ours, _ = done
print(json.dumps({
    "seen": [what for what in seen if what[0] != "transformers"],
    "ratio": (ours[1] - start) / (base[1] - start),
    "modules": sorted(ours[2] - base[2]),
    "file": modeling_xlstm.__file__,
    "text": text,
}))
"""  # noqa: E501  # a line of a script


class Watched(NamedTuple):
    """What was seen of a process that imports the package, loads the demo and writes a text."""

    seen: list[tuple[str, str, str]]  # stage, kind, event
    left: list[Path]  # in the folder it ran in and in its home
    ratio: float  # processor time of the import of this package, over that of what it needs of Transformers
    modules: set[str]
    file: str
    text: str


def run(python: Any, *command: Any, folder: Path, **environment: Any) -> subprocess.CompletedProcess[str]:
    """A Python with these arguments in a folder, of an environment that knows neither the repository nor caches."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "HF_", "XDG_", "TRITON_", "TORCH", "TRANSFORMERS_"))
    }
    fixed = {"PYTHONDONTWRITEBYTECODE": 1, "OMP_NUM_THREADS": 1, **environment}
    return subprocess.run(
        [str(python), *map(str, command)],
        cwd=folder,
        env=kept | {name: str(value) for name, value in fixed.items()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=580,
    )


def watch(python: Any, folder: Path, **environment: Any) -> Watched:
    """Any warning of the import is an error. Skips the test where Transformers alone warns."""
    places = [folder / name for name in ("home", "work", "temporary")]
    for place in places:
        place.mkdir(parents=True)
    environment |= {"HOME": places[0], "TMPDIR": places[2], "USER": "somebody"}
    done = run(python, "-W", "error", "-c", WATCH, DEMO, PROMPT, folder=places[1], **environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if "warning" in found:
        pytest.skip(f"an import of Transformers itself warns here: {found['warning']}")
    left = [path for place in places[:2] for path in place.rglob("*")]
    return Watched(found["seen"], left, found["ratio"], set(found["modules"]), found["file"], found["text"])


def check_watched(watched: list[Watched]) -> None:
    """It asks for nothing, writes nothing, starts nothing, and takes little longer than what it needs."""
    for one in watched:
        assert one.seen == []
        assert one.left == []
        assert not one.modules & OPTIONAL
    assert statistics.median(one.ratio for one in watched) < 2


def test_an_import_and_a_text_need_no_network_and_write_nothing(tmp_path):
    """Nor does the import warn, load what is optional, or take twice as long as that of Transformers' own classes."""
    paths = {"PYTHONPATH": ROOT}
    watched = [watch(sys.executable, tmp_path / str(i), **paths) for i in range(tries(1, 3))]
    check_watched(watched)
    assert all(one.text.startswith(PROMPT) and len(one.text) > len(PROMPT) for one in watched)
    tried("imports watched", len(watched))


# Checkpoints of which nothing is executed.


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def mark(tmp_path):
    """A file that is there once code of a checkpoint was executed."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.fixture
def checkpoint(tmp_path):
    """A model with a tokenizer."""
    folder = tmp_path / "checkpoint"
    tiny_model(vocab_size=8192).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    return folder


def change(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def module(mark: Path) -> str:
    """A file of Python with everything that could be asked for, which executes when it is imported."""
    names = ("XLSTMConfig", "XLSTMForCausalLM", "Tokenizer")
    classes = "".join(f"class {name}: pass\n" for name in names)
    return f"from pathlib import Path\nPath({str(mark)!r}).touch()\n{classes}def generate(*args, **kwargs): pass\n"


PICKLES: dict[str, Callable[[Any, Path], object]] = {
    "zip": torch.save,
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "plain": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "by an index"])
@pytest.mark.parametrize("form", PICKLES)
def test_weights_in_a_hostile_pickle_are_refused(form, sharded, checkpoint, mark):
    (checkpoint / "model.safetensors").unlink()
    weights = {**tiny_model(vocab_size=8192).state_dict(), "payload": Hostile(mark)}
    name = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
    PICKLES[form](weights, checkpoint / name)
    if sharded:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
        (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@torch.no_grad()
def test_weights_in_an_honest_pickle_load_as_those_of_safetensors(checkpoint):
    ids, expected = random_ids(2, 9), AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    torch.save(expected.state_dict(), checkpoint / "pytorch_model.bin")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits, expected(ids).logits)


def test_pickles_beside_the_weights_are_not_read(checkpoint, mark):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save(Hostile(mark), checkpoint / name)
    assert isinstance(AutoModelForCausalLM.from_pretrained(checkpoint), XLSTMForCausalLM)


@pytest.mark.parametrize("trust", [None, False, True])
def test_code_for_a_model_is_that_of_the_package_whatever_a_checkpoint_names(trust, checkpoint, mark):
    autos = {"AutoConfig": "code.XLSTMConfig", "AutoModelForCausalLM": "code.XLSTMForCausalLM"}
    change(checkpoint / "config.json", auto_map=autos)
    (checkpoint / "code.py").write_text(module(mark), encoding="utf-8")
    assert type(AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust)) is XLSTMConfig
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=trust)) is XLSTMForCausalLM


def hostile_code(checkpoint: Path, mark: Path) -> None:
    """A checkpoint with code wherever Transformers would look for it."""
    (checkpoint / "custom_generate").mkdir()
    for name in ("code.py", "custom_generate/generate.py", "modeling_xlstm.py", "configuration_xlstm.py"):
        (checkpoint / name).write_text(module(mark), encoding="utf-8")
    change(checkpoint / "config.json", auto_map={"AutoModelForCausalLM": "code.XLSTMForCausalLM"})


def test_code_for_generate_is_not_run_without_trust(checkpoint, mark):
    hostile_code(checkpoint, mark)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.generate(random_ids(1, 4), max_new_tokens=2, eos_token_id=None).shape == (1, 6)


def test_the_commands_run_no_code_of_a_checkpoint(checkpoint, mark, capsys):
    hostile_code(checkpoint, mark)
    argv = ["generate", "--model", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "2"]
    assert xlstm(argv) == 0
    assert xlstm(["info", str(checkpoint)]) == 0
    auto_map = {"AutoTokenizer": [None, "code.Tokenizer"]}
    change(checkpoint / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
    capsys.readouterr()
    assert xlstm(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: The tokenizer in {checkpoint} cannot be read: ") and "custom code" in error


def test_a_conversion_carries_the_code_of_the_package_and_none_of_the_source(checkpoint, mark, tmp_path):
    hostile_code(checkpoint, mark)
    assert convert([str(checkpoint), str(tmp_path / "to"), "--verify"]) == 0
    carried = {path.relative_to(tmp_path / "to") for path in (tmp_path / "to").rglob("*.py")}
    assert carried == {Path(path.name) for path in code_files()}
    assert all((tmp_path / "to" / path.name).read_bytes() == path.read_bytes() for path in code_files())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_in_a_hostile_pickle_is_refused(mark, tmp_path):
    get_peft_model(tiny_model(), LoraConfig()).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"payload": Hostile(mark)}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")


def train(folder: Path, resumed: Path | None = None) -> None:
    """Two steps, or the second of them."""
    data = [{"input_ids": random_ids(1, 8, seed=i)[0], "labels": random_ids(1, 8, seed=i)[0]} for i in range(8)]
    settings: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(folder), **settings)
    trainer = XLSTMTrainer(model=tiny_model().train(), args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What is saved after the first of two steps."""
    folder = tmp_path_factory.mktemp("training")
    train(folder)
    return folder / "checkpoint-1"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_nothing_in_the_pickles_of_a_training_is_executed(name, trained, mark, tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(trained, checkpoint)
    assert (checkpoint / name).is_file()
    torch.save(Hostile(mark), checkpoint / name)
    if name == "training_args.bin":  # which nobody reads
        train(tmp_path, checkpoint)
        return
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        train(tmp_path, checkpoint)


def test_pytorch_executes_what_stands_for_the_metadata_of_sharded_states(tmp_path):
    """The page about security says so: once it is otherwise, the page can say more."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "executed")))
    with pytest.raises(AttributeError, match="storage_meta"):
        FileSystemReader(tmp_path).read_metadata()
    assert (tmp_path / "executed").exists()


def test_a_chat_template_reaches_no_python():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="access to attribute '__class__' of 'list' object is unsafe") as raised:
        tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False)
    assert type(raised.value).__name__ == "SecurityError"


def test_what_the_page_about_security_says_is_shown_by_tests_that_there_are():
    names = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert names
    assert {name for name in names if f"\ndef {name}(" not in tests} == set()


# The wheel in clean environments.

USE = """
import json, sys, torch, modeling_xlstm, transformers
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

folder, ids = Path(sys.argv[1]), torch.arange(40).view(2, 20) + 2
for kind in ({}, {"mlstm_block": "pre_up", "block_types": ["mlstm", "slstm"]}):
    config = modeling_xlstm.XLSTMConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_heads=2, eos_token_id=None, pad_token_id=1, **kind
    )
    model = modeling_xlstm.XLSTMForCausalLM(config)
    model(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())
    model.eval().save_pretrained(folder / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert type(loaded) is modeling_xlstm.XLSTMForCausalLM
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 8, "do_sample": False}
    text = loaded.generate(ids, **options)
    assert text.shape == (2, 28) and torch.equal(text, loaded.generate(ids, use_cache=False, **options))
    mask = (torch.arange(20) > 4).long().expand(2, -1).clone()
    padded = loaded.generate(ids, attention_mask=mask, **options)[:, 20:]
    assert torch.equal(padded, loaded.generate(ids[:, 5:], **options)[:, 15:])
    adapted = get_peft_model(loaded, LoraConfig(target_modules=None))
    adapted(ids, labels=ids).loss.backward()
    assert any(weight.grad is not None for name, weight in adapted.named_parameters() if "lora_" in name)
print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}))
"""


def requirements() -> dict[str, Version]:
    """The packages of which `setup.cfg` names the oldest version, with that."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    parsed = map(Requirement, setup["options"]["install_requires"].split("\n")[1:])
    return {needed.name: Version(next(iter(needed.specifier)).version) for needed in parsed if needed.specifier}


def pip(python: Any, *command: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    return run(python, "-m", "pip", "--quiet", "--disable-pip-version-check", *command, folder=folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel as `pip` builds it, with what it builds with from the package index."""
    if not TORTURE:
        pytest.skip("installs clean environments, which takes minutes: in `make torture`")
    folder = tmp_path_factory.mktemp("wheel")
    there = pip(sys.executable, "install", "--dry-run", "--ignore-installed", "--no-deps", "setuptools", folder=folder)
    if there.returncode:
        pytest.skip("pip reaches no package index, without which there is no clean environment")
    for name in ("modeling_xlstm", "convert"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / "tree" / name)
    built = pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder / "out", folder / "tree", folder=folder)
    assert built.returncode == 0, built.stderr
    return next((folder / "out").glob("modeling_xlstm-*.whl"))


def newest_torch(folder: Path) -> Version:
    """What the index would install."""
    options = "--dry-run", "--ignore-installed", "--no-deps", "--report", "report.json"
    done = pip(sys.executable, "install", *options, f"torch>={requirements()['torch']}", folder=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Version(report["install"][0]["metadata"]["version"])


def torch_to_install(which: str, folder: Path) -> str:
    """A requirement of that torch as a build for a CPU. Skips the test where there is none."""
    version = newest_torch(folder) if which == "newest" else requirements()["torch"]
    numbers = [*version.release, 0, 0][:3]
    wanted = "torch=={}.{}.{}".format(*numbers)
    if Version(torch.__version__).release == tuple(numbers):
        pytest.skip(f"{wanted} is the one that is here, with which the other environments are")
    if platform.system() == "Linux" and version.local != "cpu":
        wanted += "+cpu"
    there = pip(sys.executable, "install", "--dry-run", "--ignore-installed", "--no-deps", wanted, folder=folder)
    if there.returncode:
        pytest.skip(f"the package index has no {wanted}, and a build for CUDA takes gigabytes")
    return wanted


def link_torch(python: Path, folder: Path) -> str:
    """Gives an environment the torch that is here, by links, and returns the requirement that it meets."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip(f"the packages that torch {torch.__version__}, which is here, needs for GPUs take gigabytes")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", where, folder=folder).stdout.strip())
    installed = metadata.distribution("torch")
    for name in {file.parts[0] for file in installed.files or [] if file.parts[0] != ".."}:
        (site / name).symlink_to(Path(str(installed.locate_file(name))))
    return f"torch=={torch.__version__}"


@pytest.fixture
def environment(tmp_path):
    """The folder of a virtual environment, which takes half a gigabyte for as long as the test takes."""
    folder = tmp_path / "environment"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("source", ["torch of here", "torch of the index"])
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_the_wheel_works_in_a_clean_environment(which, source, wheel, environment, tmp_path):
    """Of the oldest versions of what it requires, and of the newest that there are."""
    python = environment / "bin" / "python"
    wanted = torch_to_install(which, tmp_path) if source == "torch of the index" else ""
    assert run(sys.executable, "-m", "venv", environment, folder=tmp_path).returncode == 0
    wanted = wanted or link_torch(python, tmp_path)
    others = [name for name in requirements() if name != "torch"]
    if which == "oldest":
        others = [f"{name}=={requirements()[name]}" for name in others]
    done = pip(python, "install", wheel, wanted, *others, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    done = pip(python, "check", folder=tmp_path)
    assert done.returncode == 0, done.stdout

    watched = watch(python, tmp_path / "watched")
    check_watched([watched])
    assert watched.file.startswith(str(environment))
    done = run(python, "-c", USE, tmp_path, folder=tmp_path, HF_HUB_OFFLINE=1)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if which == "oldest":
        assert Version(found["transformers"]).release[:2] == requirements()["transformers"].release[:2]
    done = run(python, "-m", "modeling_xlstm", *GENERATE, folder=tmp_path, HF_HUB_OFFLINE=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.removesuffix("\n") == watched.text
    command = python.parent / "xlstm-convert"
    for argv in (["--help"], [DEMO, tmp_path / "converted"]):
        done = run(python, command, *argv, folder=tmp_path, HF_HUB_OFFLINE=1)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "converted").glob("*.py")} == {path.name for path in code_files()}
    tried("clean environments")
    print(f"{which}: torch {found['torch']}, transformers {found['transformers']}")  # noqa: T201
