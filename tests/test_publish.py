"""Publishing: a converted folder used with the package and with the code it carries, on the Hub, and from a wheel."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
import torch
import yaml
from hub import NO_ANSWER, Hub
from models import TWO_KINDS, random_ids, tiny_model
from origins import assert_same_weights, weights
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_imports

import modeling_xlstm
from convert.__main__ import main, make_impatient
from convert.remote_code import code_files
from modeling_xlstm import XLSTMForCausalLM


ROOT = Path(__file__).parents[1]
DEMO = ROOT / "checkpoints" / "xlstm-demo"
MODELS = {
    "AutoModel": "XLSTMModel",
    "AutoModelForCausalLM": "XLSTMForCausalLM",
    "AutoModelForSequenceClassification": "XLSTMForSequenceClassification",
    "AutoModelForTokenClassification": "XLSTMForTokenClassification",
}
CARD = """---
license: mit
language: de
tags:
- poems
---

# Tiny

Knows nothing.
"""
SIZES = {"many": "100KB", "few": "700KB", "one": "2GB"}  # of shards, by how many there are then
PAIRS = ["many-then-one", "one-then-many", "many-then-few"]
PULLED = ["me/tiny", "me/one-then-many"]  # a single file left from before would be read in place of shards
FAULTS = {
    "me/refused-commit": ("/me/refused-commit/commit/", [500] * 9),
    "me/dropped-commit": ("/me/dropped-commit/commit/", [NO_ANSWER] * 9),
    "me/dropped-weights": ("/me/dropped-weights.git/info/lfs/", [NO_ANSWER] * 9),
    "me/forbidden": ("/me/forbidden/preupload/", [403]),
}
ILLEGAL = ["me/two words", "me/too/deep", "me/..", "me/ends-in-.git", "bare", "", "https://example.org/me/tiny"]
NO_SOURCES = ["me/unreachable", "me/nobody", "no/such/folder", "no-such-folder", "me/two words"]
BEFORE = {"config.json": b"{}", "model.safetensors": b"", "README.md": b"Before."}


class Done(NamedTuple):
    """How a conversion ended."""

    code: int
    out: str
    err: str

    def address(self) -> str:
        """Where it says that it has pushed to."""
        assert self.code == 0, self.err
        last = self.out.splitlines()[-1]
        assert last.startswith("pushed to ")
        return last.removeprefix("pushed to ")

    def sentence(self) -> str:
        """The one sentence with which it failed."""
        last = self.err.rstrip("\n").splitlines()[-1]
        assert self.code == 1 and last.startswith("error: ") and "Traceback" not in self.out + self.err, self
        return last


def run(*command: object, folder: Path = ROOT, **environment: object) -> Done:
    """Runs Python with these arguments in a fresh process, in the repository or elsewhere; nobody is at its input."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": "", **{name: str(value) for name, value in environment.items()}},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return Done(done.returncode, done.stdout, done.stderr)


# As where only Transformers is installed; before anything else can import them.
ABSENT = """
import sys
for name in "modeling_xlstm", "modeling_xlstm_convert", "triton", "xlstm", "mlstm_kernels":
    sys.modules[name] = None
"""
PRESENT = "import sys, modeling_xlstm\n"
WAYS = {"by the package": PRESENT, "by its own code": ABSENT}

LOAD = """
import torch, transformers

out, ids, models, *folders = sys.argv[1:]
options = {"trust_remote_code": True} if sys.modules["modeling_xlstm"] is None else {}
ids, results = torch.load(ids), {}


def load(auto, folder):
    torch.manual_seed(0)  # the heads of classifiers are new
    return getattr(transformers, auto).from_pretrained(folder, **options)


def note(name, loaded, *tensors):
    results[name] = [type(loaded).__module__, type(loaded).__name__, *tensors]


with torch.no_grad():
    for i, folder in enumerate(folders):
        note(f"{i} AutoConfig", load("AutoConfig", folder))
        for auto in models.split(","):
            model = load(auto, folder)
            note(f"{i} {auto}", model, model(ids)[0])
        model = load("AutoModelForCausalLM", folder)
        generated = model.generate(ids, max_new_tokens=8, do_sample=False)
        model.save_pretrained(f"{out}/{i}")
        model = load("AutoModelForCausalLM", f"{out}/{i}")
        note(f"{i} again", model, model(ids).logits, generated)
torch.save(results, f"{out}/results.pt")
"""

REFUSED = """
import json, transformers

answers = {}
for auto in sys.argv[2].split(","):
    for options in {}, {"trust_remote_code": None}, {"trust_remote_code": False}:
        try:
            answers[f"{auto} {options}"] = repr(getattr(transformers, auto).from_pretrained(sys.argv[1], **options))
        except ValueError as error:
            answers[f"{auto} {options}"] = f"ValueError: {error}"
print()  # ends the question whether to run the code, which nobody has answered
print(json.dumps(answers))
"""

PULL = """
import re, torch, transformers
from huggingface_hub import hf_hub_download

out, *names = sys.argv[1:]
options = {"trust_remote_code": True} if sys.modules["modeling_xlstm"] is None else {}
pulled = {}
for name in names:
    if options:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
    else:
        with open(hf_hub_download(name, "README.md"), encoding="utf-8") as card:
            block = re.search("```python\\n(.*?)```", card.read(), re.DOTALL)[1]
        exec(block, of_card := {})
        model = of_card["model"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    ids = tokenizer("My lord,", return_tensors="pt").input_ids
    pulled[name] = [type(model).__module__, ids, model(ids).logits.detach(), model.state_dict()]
torch.save(pulled, f"{out}/results.pt")
"""

FIND = """
import json, sys
from importlib.util import find_spec

specs = {name: find_spec(name) for name in sys.argv[1:]}
print(json.dumps({name: spec and spec.origin for name, spec in specs.items()}))
"""

CONVERT = """
import contextlib, io, json, sys, time

time.sleep = lambda seconds: None  # which clients of the Hub do before they try again
from convert.__main__ import main

answers = []
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    answers.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
"""


def convert_all(environment: dict[str, Any], *argvs: list) -> list[Done]:
    """Runs conversions one after the other in one fresh process, which starts as slowly as it converts quickly."""
    done = run("-c", CONVERT, json.dumps([[str(arg) for arg in argv] for argv in argvs]), **environment)
    assert done.code == 0, done.err
    return [Done(*answer) for answer in json.loads(done.out.splitlines()[-1])]


def convert(*argv: object) -> None:
    """Converts in this process, where the Hub is out of reach."""
    assert main([str(arg) for arg in argv]) == 0


def own_part(card: str) -> str:
    """What a card says itself, without that of its source."""
    return card.partition("## Card of the source")[0]


def front_matter(card: str) -> dict[str, Any]:
    """The YAML at the beginning of a card."""
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Small checkpoints of every code path, with a tokenizer and a card."""
    folders = {}
    for kind in TWO_KINDS:
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny_model(kind, vocab_size=4096).save_pretrained(folders[kind])
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO / name, folders[kind] / name)
        (folders[kind] / "README.md").write_text(CARD, encoding="utf-8")
    return folders


@pytest.fixture(scope="module")
def native(sources, tmp_path_factory) -> dict[str, Path]:
    """The same, converted to `native`."""
    folder = tmp_path_factory.mktemp("native")
    for kind, source in sources.items():
        convert(source, folder / kind)
    return {kind: folder / kind for kind in sources}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which a process sees nothing of the repository."""
    return tmp_path_factory.mktemp("elsewhere")


def both_ways(code: str, out: Path, argv: list, folder: Path, **environment: str) -> dict[str, dict[str, list]]:
    """What fresh processes, one with and one without the package, leave in the folder that is their first argument."""
    results = {}
    for way, start in WAYS.items():
        place = out / way
        place.mkdir()
        caches = {"HF_HOME": place, "HF_HUB_CACHE": place / "hub", "HF_MODULES_CACHE": place / "modules"}
        paths = {"PYTHONPATH": ROOT if start == PRESENT else ""}
        done = run("-c", start + code, place, *argv, folder=folder, **{**environment, **caches, **paths})
        assert done.code == 0, done.err
        results[way] = torch.load(place / "results.pt")
    return results


@pytest.fixture(scope="module")
def loaded(native, elsewhere, tmp_path_factory) -> dict[str, dict[str, list]]:
    """By way, what loading the native checkpoints gave: modules, classes and outputs."""
    folder = tmp_path_factory.mktemp("loaded")
    torch.save(random_ids(2, 20), folder / "ids.pt")
    return both_ways(LOAD, folder, [folder / "ids.pt", ",".join(MODELS), *native.values()], elsewhere)


def imported_files() -> set[str]:
    """Files of the package that its configuration and models import, and what these import."""
    package = Path(modeling_xlstm.__file__).parent
    found, new = set[str](), {"configuration_xlstm", "modeling_xlstm"}
    while new:
        found |= new
        trees = [ast.walk(ast.parse((package / f"{name}.py").read_text(encoding="utf-8"))) for name in new]
        imports = [node for tree in trees for node in tree if isinstance(node, ast.ImportFrom) and node.level == 1]
        new = {name for node in imports for name in ([node.module] if node.module else [x.name for x in node.names])}
        new -= found
    return {f"{name}.py" for name in found}


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_the_code_in_a_native_checkpoint_is_whole_and_that_of_the_package(kind, native):
    copied = {path.name: path.read_bytes() for path in native[kind].glob("*.py")}
    package = Path(modeling_xlstm.__file__).parent
    assert copied == {name: (package / name).read_bytes() for name in imported_files()}
    config = json.loads((native[kind] / "config.json").read_text(encoding="utf-8"))
    classes = {auto: f"modeling_xlstm.{cls}" for auto, cls in MODELS.items()}
    assert config["auto_map"] == {"AutoConfig": "configuration_xlstm.XLSTMConfig", **classes}


@torch.no_grad()
def test_a_native_checkpoint_is_of_the_classes_of_the_package_where_that_is_imported(sources, loaded):
    results, ids = loaded["by the package"], random_ids(2, 20)
    for i, kind in enumerate(TWO_KINDS):
        assert results[f"{i} AutoConfig"] == ["modeling_xlstm.configuration_xlstm", "XLSTMConfig"]
        for auto, cls in MODELS.items():
            assert results[f"{i} {auto}"][:2] == ["modeling_xlstm.modeling_xlstm", cls]
        original = AutoModelForCausalLM.from_pretrained(sources[kind])
        assert torch.equal(results[f"{i} AutoModelForCausalLM"][2], original(ids).logits)
        generated = results[f"{i} again"][3]
        assert generated.shape[1] > 20
        assert torch.equal(generated, original.generate(ids, max_new_tokens=8, do_sample=False))


def test_a_native_checkpoint_runs_to_the_bit_by_its_own_code_where_the_package_is_absent(loaded):
    package, itself = loaded["by the package"], loaded["by its own code"]
    assert itself.keys() == package.keys()
    for name, (module, cls, *tensors) in itself.items():
        assert module.startswith("transformers_modules."), name
        assert cls == package[name][1], name
        assert all(torch.equal(*pair) for pair in zip(tensors, package[name][2:], strict=True)), name


def test_a_native_checkpoint_is_refused_where_its_code_is_neither_installed_nor_allowed(native, elsewhere, tmp_path):
    autos = ["AutoConfig", *MODELS]
    argv = native["pre_up_slstm"], ",".join(autos)
    done = run("-c", ABSENT + REFUSED, *argv, folder=elsewhere, HF_MODULES_CACHE=tmp_path / "modules")
    assert done.code == 0, done.err
    answers = json.loads(done.out.splitlines()[-1])
    assert len(answers) == 3 * len(autos)
    for name, answer in answers.items():
        assert answer.startswith("ValueError: ") and "contains custom code which must be executed" in answer, name
        assert "`trust_remote_code=True` to allow custom code to be run" in answer, name
    assert not list(tmp_path.rglob("*xlstm*.py"))


@pytest.mark.parametrize("to", ["native", "transformers"])
def test_the_code_in_a_card_names_the_folder(to, sources, tmp_path):
    convert(sources["post_up"], tmp_path / "my-model", "--to", to)
    card = own_part((tmp_path / "my-model" / "README.md").read_text(encoding="utf-8"))
    assert set(re.findall(r'from_pretrained\("(.*?)"', card)) == {"my-model"}
    assert card.count("```") == 2


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub with nothing on it."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, sources, tmp_path_factory) -> tuple[Done, Path]:
    """A conversion pushed to `me/tiny`, and its folder."""
    folder = tmp_path_factory.mktemp("pushed")
    argv = sources["post_up"], folder / "folder", "--push-to-hub", "me/tiny"
    return run("-m", "convert", *argv, **hub.environment(folder / "cache")), folder / "folder"


def test_a_push_leaves_on_the_hub_what_the_folder_holds_byte_by_byte(pushed, hub):
    done, folder = pushed
    assert done.address() == f"{hub.url}/me/tiny"
    assert hub.files("me/tiny") == contents(folder)


def test_the_card_of_a_push_is_valid_and_names_the_repository(pushed, hub):
    card = (pushed[1] / "README.md").read_text(encoding="utf-8")
    data = front_matter(card)
    assert data in map(yaml.safe_load, hub.validated)
    assert data == {
        "license": "mit",
        "language": "de",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["poems", "xlstm"],
    }
    assert set(re.findall(r'from_pretrained\("(.*?)"', own_part(card))) == {"me/tiny"}
    assert card.endswith("## Card of the source\n\n# Tiny\n\nKnows nothing.\n")


@pytest.fixture(scope="module")
def more(pushed, hub, sources, tmp_path_factory) -> tuple[dict[str, Done], Path]:
    """How more conversions ended, each named as its folder: pairs of pushes to one repository, and one of `me/tiny`."""
    pushed[0].address()
    folder, first, second = tmp_path_factory.mktemp("more"), sources["pre_up_slstm"], sources["post_up"]
    argvs: dict[str, list[object]] = {"other": ["me/tiny", folder / "other", "--to", "transformers"]}
    for pair in PAIRS:
        for i, size in enumerate(pair.split("-then-")):
            options = "--max-shard-size", SIZES[size], "--push-to-hub", f"me/{pair}"
            argvs[f"{pair}-{i}"] = [(first, second)[i], folder / f"{pair}-{i}", *options]
    ends = convert_all(hub.environment(folder / "cache"), *argvs.values())
    return dict(zip(argvs, ends, strict=True)), folder


@pytest.mark.parametrize("pair", PAIRS)
def test_a_push_in_other_shards_leaves_no_file_of_the_weights_that_were_there(pair, more, hub):
    ends, folder = more
    assert ends[f"{pair}-0"].address() == ends[f"{pair}-1"].address() == f"{hub.url}/me/{pair}"
    first, second = contents(folder / f"{pair}-0"), contents(folder / f"{pair}-1")
    assert hub.files(f"me/{pair}") == second
    assert first in [files for (repo, _), files in hub.history.items() if repo == f"me/{pair}"]
    assert {name for name in first if "safetensors" in name} != {name for name in second if "safetensors" in name}


@pytest.fixture(scope="module")
def pulled(pushed, more, hub, elsewhere, tmp_path_factory) -> dict[str, dict[str, list]]:
    """By way, what came from the repositories: modules, ids, logits and weights."""
    folder = tmp_path_factory.mktemp("pulled")
    return both_ways(PULL, folder, PULLED, elsewhere, **hub.environment(folder))


@torch.no_grad()
@pytest.mark.parametrize("name", PULLED)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_pulled_is_what_was_pushed_last(way, name, pulled, sources):
    module, ids, logits, state_dict = pulled[way][name]
    assert module.startswith("modeling_xlstm." if way == "by the package" else "transformers_modules.me.")
    original = AutoModelForCausalLM.from_pretrained(sources["post_up"])
    assert ids.tolist() == [AutoTokenizer.from_pretrained(DEMO)("My lord,").input_ids]
    assert torch.equal(logits, original(ids).logits)
    assert_same_weights(state_dict, original.state_dict())


def test_a_repository_is_converted_and_named_as_the_base_model(more, sources, tmp_path):
    ends, other = more[0], more[1] / "other"
    assert ends["other"].code == 0, ends["other"].err
    card = (other / "README.md").read_text(encoding="utf-8")
    data = front_matter(card)
    assert (data["base_model"], data["license"], data["language"]) == ("me/tiny", "mit", "de")
    assert set(re.findall(r'from_pretrained\("(.*?)"', own_part(card))) == {"other"}
    assert card.endswith("Knows nothing.\n")
    assert "auto_map" not in json.loads((other / "config.json").read_text(encoding="utf-8"))
    assert not list(other.glob("*.py"))
    convert(other, tmp_path / "back")
    assert_same_weights(weights(tmp_path / "back"), weights(sources["post_up"]))
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def failed(hub, sources, tmp_path_factory) -> tuple[dict[str, Done], Path]:
    """How conversions end that cannot, by repository; folders have the names of these, with - for /."""
    folder = tmp_path_factory.mktemp("failed")
    for repo, (request, answers) in FAULTS.items():
        hub.faults[request] = answers
        hub.path(repo).mkdir(parents=True)
        for name, content in BEFORE.items():
            (hub.path(repo) / name).write_bytes(content)
    hub.faults["/me/unreachable/"] = [500] * 99
    pushes = [[sources["post_up"], place(folder, repo), "--push-to-hub", repo] for repo in FAULTS]
    pulls = [[repo, place(folder, f"from {repo}")] for repo in NO_SOURCES]
    ends = convert_all(hub.environment(folder / "cache"), *pushes, *pulls)
    names = [*FAULTS, *(f"from {repo}" for repo in NO_SOURCES)]
    return dict(zip(names, ends, strict=True)), folder


def place(folder: Path, repo: str) -> Path:
    """Where the conversion that concerns a repository has its destination."""
    return folder / "at" / re.sub(r"\W", "-", repo)


@torch.no_grad()
def assert_complete(folder: Path, source: Path) -> None:
    """The folder is all that a conversion to `native` makes of the source, and nothing unfinished is beside it."""
    ids = random_ids(2, 20)
    logits, expected = (XLSTMForCausalLM.from_pretrained(path)(ids).logits for path in (folder, source))
    assert torch.equal(logits, expected)
    assert {"README.md", "tokenizer.json", "generation_config.json", *imported_files()} <= contents(folder).keys()
    assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize("repo", FAULTS)
def test_a_hub_that_fails_is_a_sentence_and_keeps_what_it_had(repo, failed, hub, sources):
    ends, folder = failed
    assert f"{place(folder, repo)}, but could not be pushed to {repo} " in ends[repo].sentence()
    assert_complete(place(folder, repo), sources["post_up"])
    assert hub.files(repo) == BEFORE
    assert "pushed to" not in ends[repo].out


def test_a_hub_that_says_nothing_is_not_waited_for_without_end(monkeypatch):
    """Though it was asked to be, and also by the client that follows one which was closed."""
    monkeypatch.setattr("convert.__main__.PATIENCE", 0.1)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    make_impatient()
    with socket.create_server(("127.0.0.1", 0)) as hub:
        end = threading.Timer(20, hub.close)  # who waits then is told that the connection is no more
        end.daemon = True
        end.start()
        for _ in range(2):
            with pytest.raises(Exception, match="timed out"):
                huggingface_hub.get_session().get(f"http://127.0.0.1:{hub.getsockname()[1]}", timeout=None)
            assert set(huggingface_hub.get_session().timeout.as_dict().values()) == {None}  # no shorter one
            huggingface_hub.close_session()


@pytest.mark.parametrize("repo", ILLEGAL)
def test_a_repository_of_an_impossible_name_is_refused_before_anything_is_done(repo, sources, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(sources["post_up"]), str(tmp_path / "to"), "--push-to-hub", repo])
    assert stop.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "argument --push-to-hub: must be a repository" in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("repo", NO_SOURCES)
def test_a_source_that_is_nowhere_is_refused_in_a_sentence(repo, failed):
    ends, folder = failed
    sentence = ends[f"from {repo}"].sentence()
    assert sentence.startswith(f"error: The source must be a folder or a repository on the Hub, got {repo}, no folder")
    assert not place(folder, f"from {repo}").exists()


def test_without_a_network_or_a_login_nothing_is_converted_to_be_pushed(hub, sources, tmp_path):
    argv = sources["post_up"], tmp_path / "at" / "folder", "--push-to-hub", "me/offline"
    environment = hub.environment(tmp_path / "cache")
    for change in ({"HF_HUB_OFFLINE": "1"}, {"HF_TOKEN": "hf_wrong"}):
        sentence = run("-m", "convert", *argv, **{**environment, **change}).sentence()
        assert sentence.startswith("error: --push-to-hub must have a login to the Hub: ")
        assert not (tmp_path / "at").exists()


def has_builder() -> bool:
    """Whether setuptools can build a wheel by itself here."""
    if importlib.util.find_spec("setuptools") is None:
        return False
    version = importlib.metadata.version("setuptools").split(".")
    return (int(version[0]), int(version[1])) >= (70, 1) or importlib.util.find_spec("wheel") is not None


@pytest.mark.skipif(not has_builder(), reason="needs a setuptools that builds wheels")
def test_the_wheel_holds_the_converter_under_a_name_of_its_own_and_runs_it(sources, tmp_path):
    tree, out, site, away = (tmp_path / name for name in ("tree", "wheels", "site", "away"))
    for folder in ("modeling_xlstm", "convert"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tree / name)
    options = "--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir", "--disable-pip-version-check"
    done = run("-m", "pip", "wheel", *options, "--wheel-dir", out, tree, folder=tmp_path)
    assert done.code == 0, done.err
    (wheel,) = out.iterdir()
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(site)
        names = opened.namelist()
    (info,) = site.glob("*.dist-info")
    packages = {"modeling_xlstm", "modeling_xlstm_convert"}
    assert set((info / "top_level.txt").read_text(encoding="utf-8").split()) == packages
    assert {name.split("/")[0] for name in names} == {*packages, info.name}
    for folder, name in (("modeling_xlstm", "modeling_xlstm"), ("convert", "modeling_xlstm_convert")):
        assert {path.name for path in (site / name).iterdir()} == {path.name for path in (tree / folder).iterdir()}
    entry_points = ConfigParser()
    entry_points.read(info / "entry_points.txt", encoding="utf-8")
    assert entry_points["console_scripts"]["xlstm-convert"] == "modeling_xlstm_convert.__main__:main"

    away.mkdir()
    argv = sources["post_up"], away / "x", "--dry-run"
    done = run("-m", "modeling_xlstm_convert", *argv, folder=away, PYTHONPATH=site)
    assert done.code == 0, done.err
    assert done.out.startswith("from native: ") and not list(away.iterdir())
    done = run("-c", FIND, "modeling_xlstm", "modeling_xlstm_convert.__main__", "convert", folder=away, PYTHONPATH=site)
    assert done.code == 0, done.err
    assert json.loads(done.out) == {
        "modeling_xlstm": str(site / "modeling_xlstm" / "__init__.py"),
        "modeling_xlstm_convert.__main__": str(site / "modeling_xlstm_convert" / "__main__.py"),
        "convert": None,
    }


def test_a_push_replaces_what_would_be_read_in_place_of_the_new_and_nothing_else(hub, sources, tmp_path):
    old = ["chat_template.jinja", "added_tokens.json", "model-00001-of-00009.safetensors", "pytorch_model.bin"]
    mine = ["handler.py", "scripts/eval.py", "ckpt-100/model.safetensors", "notes.txt", "loss.csv"]
    for name in old + mine:
        path = hub.path("me/mine") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}", encoding="utf-8")
    argv = sources["post_up"], tmp_path / "to", "--push-to-hub", "me/mine"
    run("-m", "convert", *argv, **hub.environment(tmp_path / "cache")).address()
    assert hub.files("me/mine").keys() == {*mine, *contents(tmp_path / "to")}


def test_a_repository_is_not_named_as_its_own_base_model_and_keeps_one_card(hub, sources, tmp_path):
    environment = hub.environment(tmp_path / "cache")
    for source, folder in ((sources["post_up"], "first"), ("me/again", "second")):
        run("-m", "convert", source, tmp_path / folder, "--push-to-hub", "me/again", **environment).address()
    card = hub.files("me/again")["README.md"].decode()
    assert "base_model" not in front_matter(card)
    assert card.count("## Card of the source") == 1 and card.count("Knows nothing.") == 1


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\na: [\n---\n# X", None),
        ("---\nlicense: mit\ntags: [2024, xlstm]\n---\n# X", ["2024", "xlstm"]),
        ("---\nlicense: mit\ntags: [{a: b}]\n---\n# X", ["xlstm", "{'a': 'b'}"]),
        ("\ufeff---\nlicense: mit\n---\n# X", ["xlstm"]),
        ("---\nlicense: mit\neval_results: 3\n---\n# X", None),
        ("# X", ["xlstm"]),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_card_of_any_kind_is_carried_over_or_refused_in_a_sentence(card, expected, sources, tmp_path, capsys):
    shutil.copytree(sources["post_up"], tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text(card, encoding="utf-8")
    code = main([str(tmp_path / "source"), str(tmp_path / "to")])
    if expected is None:
        assert code == 1 and not (tmp_path / "to").exists()
        assert capsys.readouterr().err.startswith("error: The card ")
        return
    assert code == 0
    data = front_matter((tmp_path / "to" / "README.md").read_text(encoding="utf-8"))
    assert data["tags"] == expected
    assert data.get("license") == ("mit" if "mit" in card else None)


def test_a_checkpoint_saved_by_the_package_does_not_promise_code_that_is_not_there(sources, tmp_path):
    convert(sources["post_up"], tmp_path / "native")
    XLSTMForCausalLM.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "tuned")
    assert "auto_map" not in json.loads((tmp_path / "tuned" / "config.json").read_text(encoding="utf-8"))


def test_the_code_of_a_checkpoint_asks_for_nothing_that_the_package_does_not_require():
    """Transformers downloads no file whose imports are not installed, and kernels are for those who have Triton."""
    names = {path.name for path in code_files()}
    assert {
        "mlstm_triton.py",
        "mlstm_triton_kernels.py",
        "mlstm_triton_step.py",
        "head_norm_triton.py",
        "slstm_triton.py",
        "slstm_triton_kernels.py",
        "triton_language.py",
    } <= names
    asked = {name for path in code_files() for name in get_imports(path)} - sys.stdlib_module_names
    assert asked <= {"torch", "transformers", "safetensors", "filelock", "huggingface_hub", "packaging"}
