"""A process that loads damaged files one after the other, and judges what came of each; and one that asks it."""

import contextlib
import faulthandler
import functools
import io
import json
import multiprocessing
import os
import resource
import shutil
import stat
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from traceback import format_exception
from types import TracebackType
from typing import Any
from unittest.mock import patch

import peft  # noqa: F401  # which Transformers imports for an adapter_config.json
import torch
from judges import (
    OF_PACKAGE,
    READING_ERRORS,
    SAME,
    TOKENS,
    Layout,
    Reading,
    RefusedError,
    bare,
    bits,
    judge_error,
    judge_fields,
    judge_weights,
    read,
    untied,
    weight_files,
)
from models import random_ids, states, tiny_model
from mutations_of_bytes import IN_BYTES, IN_HEADERS, IN_JSON, in_order
from mutations_of_files import IN_FOLDERS, applies, damage
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_generation import letters_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

import convert.conversion
from convert.__main__ import main
from convert.remote_code import code_files
from convert.source import TOKENIZER_FILES
from modeling_xlstm import XLSTMCache, XLSTMConfig


PATIENCE = 60  # seconds
SPACE = 4 << 30  # bytes
NOISE = 16 << 20  # bytes by which the memory of a process grows now and then, whatever it does


# The process that loads.


class Caught:
    """What a block raises, whatever it is."""

    error: BaseException | None = None

    def __enter__(self) -> "Caught":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        self.error = error
        return True


def is_in(folder: Path, path: str) -> bool:
    """Whether it is the folder, or something in it."""
    return path == str(folder) or path.startswith(f"{folder}{os.sep}")


class Watch:
    """Which files are written, code is run and processes are started within a block, where that must not be."""

    def __init__(self, destination: Path) -> None:
        self.destination, self.on = destination, False
        self.seen: list[str] = []

    def __enter__(self) -> None:
        self.seen, self.on = [], True

    def __exit__(self, *_: object) -> None:
        self.on = False

    def see(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not isinstance(path, int):
                path = os.path.abspath(os.fsdecode(path))
                hidden = self.destination.with_name(f".{self.destination.name}.partial-")
                if not is_in(self.destination, path) and not path.startswith((str(hidden), "/dev/null")):
                    self.seen.append(f"{path} was opened to write")
        elif event == "exec":
            file = getattr(arguments[0], "co_filename", "")
            if is_in(self.destination.parent, file):
                self.seen.append(f"{file} was run")
        elif event.startswith(("os.exec", "os.fork", "os.posix_spawn", "os.system", "subprocess", "socket.connect")):
            self.seen.append(f"{event} {arguments!r:.200}")


def tree(folder: Path) -> dict[str, tuple[int, ...]]:
    """All that is in a folder: of which kind, which it is, and of files the size and when they changed."""
    found = {}
    for where, folders, files in os.walk(folder):
        for path in (os.path.join(where, name) for name in folders + files):
            about = os.lstat(path)
            changes = () if stat.S_ISDIR(about.st_mode) else (about.st_size, about.st_mtime_ns)
            found[path] = (about.st_mode, about.st_ino, *changes)
    return found


def memory(what: str) -> int:
    """In bytes, what Linux says of this process: VmRSS, its peak VmHWM, or VmSize."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(what))


MEASURES_MEMORY = os.access("/proc/self/clear_refs", os.W_OK)


class Growth:
    """By how many bytes memory grows within a block, at its peak."""

    bytes = 0

    def __enter__(self) -> "Growth":
        if MEASURES_MEMORY:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")  # a new peak begins
            self.bytes = memory("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if MEASURES_MEMORY:
            self.bytes = memory("VmHWM") - self.bytes


OF_WEIGHTS = {"weights doubled", "indexes that lead elsewhere", *(kind for kind in IN_FOLDERS if "pickles" in kind)}
OF_CONVERT = {"values repeated by aliases", "pickles of huge declared sizes"}
# what loads: kinds of damage, and how many mutations are tried
TARGETS = {
    "config": ([x for x in (*IN_BYTES, *IN_JSON, *IN_FOLDERS) if x not in OF_CONVERT | OF_WEIGHTS], 80, 3000),
    "model": ([x for x in (*IN_BYTES, *IN_JSON, *IN_HEADERS, *IN_FOLDERS) if x not in OF_CONVERT], 90, 2600),
    "convert": ([*IN_BYTES, *IN_JSON, *IN_HEADERS, *IN_FOLDERS], 90, 2000),
    "state": ([*IN_BYTES, *IN_HEADERS, "files missing", "links", "folders and pipes in place of files"], 80, 3200),
}


class Bench:
    """Whole checkpoints and states, what is known of them, and a place to damage and load them.

    `bases` are folders by target and name.
    """

    def __init__(self, folder: Path) -> None:
        self.whole, self.world, self.case = folder / "whole", folder / "world", folder / "world" / "case"
        self.to = self.case / "to"
        self.bases: dict[str, dict[str, Path]] = {target: {} for target in TARGETS}
        self.readings: dict[Path, Reading] = {}
        self.layouts: dict[Path, Layout] = {}
        self.configs: dict[Path, dict[str, Any]] = {}
        self.allowed: dict[Path, int] = {}
        self.load: dict[str, Callable[[Path, str], Any]] = {
            "config": lambda source, base: XLSTMConfig.from_pretrained(source),
            "model": lambda source, base: AutoModelForCausalLM.from_pretrained(source, output_loading_info=True),
            "convert": self.convert,
            "state": lambda source, base: XLSTMCache.load(source / "state.safetensors", self.model),
        }
        self.judge: dict[str, Callable[[Path, str, Any], str]] = {
            "config": self.judge_config,
            "model": self.judge_model,
            "convert": self.judge_conversion,
            "state": self.judge_state,
        }
        self.make_checkpoints()
        self.make_state()
        self.watch = Watch(self.to)
        sys.addaudithook(self.watch.see)
        for target, base in [(target, base) for target, bases in self.bases.items() for base in bases]:
            self.learn(target, base)

    def begin(self) -> None:
        os.chdir(self.world)
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        os.chdir(self.case)

    def base(self, target: str, name: str) -> Path:
        folder = self.bases[target][name] = self.whole / target / name
        return folder

    def make_checkpoints(self) -> None:
        own: Any = tiny_model("post_up")
        other: Any = tiny_model("pre_up_slstm")
        for target in ("model", "convert"):
            own.save_pretrained(self.base(target, "post_up"))
            other.save_pretrained(self.base(target, "shards"), max_shard_size="40KB")
            own.save_pretrained(self.base(target, "transformers"), save_original_format=True)
            own.save_pretrained(
                self.base(target, "transformers in shards"), save_original_format=True, max_shard_size="40KB"
            )
            own.config.save_pretrained(self.base(target, "pickle"))
            torch.save(own.state_dict(), self.bases[target]["pickle"] / "pytorch_model.bin")
        half: Any = tiny_model("post_up_slstm").bfloat16()
        half.save_pretrained(self.base("model", "bfloat16"))
        tied: Any = tiny_model("post_up", tie_word_embeddings=True)
        tied.save_pretrained(self.base("convert", "tied"))
        letters_tokenizer().save_pretrained(self.bases["convert"]["post_up"])
        shutil.copytree(self.bases["convert"]["post_up"], self.base("convert", "to transformers"))
        for fmt, source in (("xlstm-large", "post_up"), ("xlstm-paper", "shards")):
            assert main([str(self.bases["model"][source]), str(self.base("convert", fmt)), "--to", fmt]) == 0
            (self.bases["convert"][fmt] / "README.md").unlink()
        for name in ("post_up", "shards", "transformers"):
            self.base("config", name).mkdir(parents=True)
            shutil.copy(self.bases["model"][name] / "config.json", self.bases["config"][name])

    def make_state(self) -> None:
        self.model = tiny_model("post_up_slstm")
        self.base("state", "state").mkdir(parents=True)
        with torch.no_grad():
            cache = self.model(random_ids(2, 20), use_cache=True).past_key_values
        path = self.bases["state"]["state"] / "state.safetensors"
        cache.save(path, self.model)
        path.write_bytes(in_order(path.read_bytes()))

    def learn(self, target: str, base: str) -> None:
        """What a whole one is, and the memory that it takes."""
        folder = self.bases[target][base]
        if target != "state":
            self.readings[folder] = read(folder, base, confined=True, weights=target != "config")
        if target in ("model", "convert"):
            self.layouts[folder] = self.layout(target, base)
        self.allowed[folder] = 1 << 40
        for _ in range(2):  # what is done for the first time takes more
            answer = self.attempt(target, None, base)
            assert answer["verdict"] == "equal", answer
        self.allowed[folder] = 2 * answer["growth"] + NOISE

    def layout(self, target: str, base: str) -> Layout:
        """From the same checkpoint with numbers in place of its weights."""
        self.begin()
        numbered, weights = self.case / "numbered", self.readings[self.bases[target][base]].weights
        shutil.copytree(self.bases[target][base], numbered)
        shapes = {name: weights[name].shape for name in sorted(weights)}
        sizes = [shape.numel() for shape in shapes.values()]
        ids = torch.arange(1, 1 + sum(sizes), dtype=torch.float32).split(sizes)
        counted = {name: x.view(shape) for x, (name, shape) in zip(ids, shapes.items(), strict=True)}
        for path in weight_files(numbered, True):
            if path.suffix == ".safetensors":
                save_file({name: counted[name] for name in load_file(path)}, path, metadata={"format": "pt"})
            else:
                torch.save(counted, path)
        if target == "convert":
            self.convert(numbered, base, "--dtype", "float32")
        written = numbered if target == "model" else self.to
        model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
        shapes = {bare(name): shape for name, shape in shapes.items()}
        return Layout(shapes, {name: x.long() for name, x in model.state_dict().items()})

    def convert(self, source: Path, base: str, *options: str) -> None:
        """Raises RefusedError if it fails."""
        to = ["--to", "transformers"] if base == "to transformers" else []
        printed = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            code = main([str(source), str(self.to), *to, *options])
        if code:
            raise RefusedError(code, printed.getvalue().strip().splitlines()[-1])

    def attempt(self, target: str, seed: int | None, base: str = "") -> dict[str, Any]:
        """Damages a checkpoint, or not, and loads it. What came of it: `fault` is what must not be, if anything."""
        source, kind, what = self.case / "source", "none", base
        self.begin()
        if seed is not None:
            random, kinds = Random(f"{target} {seed}"), TARGETS[target][0]
            kind = kinds[seed % len(kinds)]
            base = random.choice([name for name, folder in self.bases[target].items() if applies(kind, folder)])
        folder = self.bases[target][base]
        shutil.copytree(folder, source)
        shutil.copytree(folder, self.case / "outside")
        if seed is not None:
            what = f"{base}, {damage(random, kind, source)}"
        before = tree(self.world)
        size = sum(about[2] for path, about in before.items() if len(about) > 2 and path.startswith(str(source)))
        with Growth() as growth, self.watch, Caught() as loading:
            result = self.load[target](source, base)
        answer = {"kind": kind, "what": what, "growth": growth.bytes, "verdict": "", "error": "", "fault": ""}
        with Caught() as judging:
            if loading.error is not None:
                answer |= {"verdict": "refused", "error": judge_error(loading.error)}
            else:
                answer["verdict"] = self.judge[target](source, base, result)
            self.judge_effects(before, loading.error is None and target == "convert")
            bound = 2 * size + self.allowed[folder]
            assert growth.bytes <= bound, f"memory grew by {growth.bytes} bytes, more than {bound}"
        if judging.error is not None:
            answer["fault"] = "".join(format_exception(judging.error))
        return answer

    def judge_effects(self, before: dict[str, tuple[int, ...]], written: bool) -> None:
        """Nothing happened but that the destination was written, if it was."""
        assert not self.watch.seen, self.watch.seen[0]
        after = {path: about for path, about in tree(self.world).items() if not written or not is_in(self.to, path)}
        changed = [path for path in before.keys() | after if before.get(path) != after.get(path)]
        assert not changed, f"{min(changed)} changed"

    def clear(self, source: Path, base: str, **options: bool) -> Reading:
        """What a folder says that was loaded. Raises AssertionError if it says no such thing."""
        try:
            return read(source, base, **options)
        except (*READING_ERRORS, StopIteration) as error:
            raise AssertionError(f"it was loaded, but {error!r:.300}") from error

    def judge_config(self, source: Path, base: str, config: XLSTMConfig) -> str:
        reading = self.clear(source, base, weights=False)
        judge_fields(config, reading.fields)
        return self.verdict("config", base, config, reading)

    def judge_model(self, source: Path, base: str, result: tuple[Any, dict[str, Any]]) -> str:
        (model, info), reading = result, self.clear(source, base)
        if reading.config["model_type"] not in ("xlstm", "xlstm_lm"):
            return "changed"  # into a model of Transformers
        judge_weights(model, info, reading.weights, self.layouts[self.bases["model"][base]])
        judge_fields(model.config, reading.fields, untied(reading.weights))
        if info["missing_keys"] or info["unexpected_keys"]:
            return "reported"
        return self.verdict("model", base, model.config, reading)

    def verdict(self, target: str, base: str, config: XLSTMConfig, reading: Reading) -> str:
        """Whether it is the model of before. It has to be, where files say what they said before."""
        folder = self.bases[target][base]
        fields = {name: getattr(config, name) for name in XLSTMConfig.__annotations__.keys() - set(TOKENS)}
        before, whole = self.configs.setdefault(folder, fields), self.readings[folder]
        weights = {bare(name): bits(x) for name, x in reading.weights.items()}
        has_same = all(torch.equal(bits(x), weights[bare(name)]) for name, x in whole.weights.items())
        is_same = has_same and reading.config == whole.config
        assert fields == before or not is_same, f"the configuration differs: {fields}"
        return "equal" if fields == before and has_same else "changed"

    def judge_conversion(self, source: Path, base: str, _: None) -> str:
        reading = self.clear(source, base, confined=True)
        model, info = self.load["model"](self.to, base)
        assert not info["missing_keys"] and not info["unexpected_keys"], f"what was written is not whole: {info}"
        judge_weights(model, info, reading.weights, self.layouts[self.bases["convert"][base]])
        free = {*TOKENS} | untied(reading.weights)  # tokens are those of the tokenizer
        fields = reading.fields
        if base == "to transformers":
            fields = {name: fields[name] for name in (*SAME, *OF_PACKAGE.values())}
        if reading.config.get("model_type") != "xlstm_lm":
            free |= {"ffn_proj_factor", "ffn_round_up_to_multiple_of"}  # which are those of the weights
        judge_fields(model.config, fields, free)
        self.judge_files(source)
        return self.verdict("convert", base, model.config, reading)

    def judge_files(self, source: Path) -> None:
        """Those of the tokenizer are the same, and the settings of generation."""
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                assert (self.to / name).read_bytes() == (source / name).read_bytes(), f"{name} differs"
        path, other = source / "generation_config.json", self.to / "generation_config.json"
        settings, written = (json.loads(x.read_bytes()) if x.is_file() else {} for x in (path, other))
        defaults = GenerationConfig().to_dict()
        for name, value in settings.items():
            if value is not None and name in defaults.keys() - {*TOKENS, "transformers_version"}:
                got = written.get(name, defaults.get(name))
                assert got == value, f"{name} of generation is {got!r:.80}, the file says {value!r:.80}"

    def judge_state(self, source: Path, base: str, cache: XLSTMCache) -> str:
        name = "state.safetensors"
        try:
            said, tensors = read_state(source / name)
        except READING_ERRORS as error:
            raise AssertionError(f"it was loaded, but {error!r:.300}") from error
        said_before, before = read_state(self.bases["state"][base] / name)
        for key in said_before.keys() - {"seen_tokens"}:
            assert said.get(key) == said_before[key], f"{key} is {said.get(key)!r:.80}"
        assert str(cache.get_seq_length()) == (said["seen_tokens"].lstrip("0") or "0")
        loaded = {f"layers.{name}": x for name, x in states(cache).items()}
        assert loaded.keys() == tensors.keys() == before.keys()
        for name, x in loaded.items():
            assert x.dtype == before[name].dtype and x.shape[1:] == before[name].shape[1:], f"{name} is misshapen"
            assert x.isfinite().all() and torch.equal(bits(x), bits(tensors[name])), f"{name} is not what the file says"
        is_same = said == said_before and all(torch.equal(bits(x), bits(before[name])) for name, x in loaded.items())
        return "equal" if is_same else "changed"


def read_state(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"{path.name} is no file")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return metadata, load_file(path)


def serve(connection: Connection, folder: Path) -> None:
    """Answers `(target, seed)` until nobody asks any more."""
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    faulthandler.enable()
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # a machine that stops is the matter of other tests
    convert.conversion.code_files = functools.cache(code_files)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(folder)
    if MEASURES_MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + SPACE,) * 2)
    with contextlib.suppress(EOFError):
        connection.send({})
        while True:
            connection.send(bench.attempt(*connection.recv()))


# The process that asks.


class Worker:
    """A process that loads what is damaged, and another when that has died."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.start()

    def start(self) -> None:
        self.started += 1
        self.log = self.folder / str(self.started) / "stderr"
        home = self.log.parent / "world" / "home"
        home.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.log.parent), daemon=True)
        with patch.dict(os.environ, HF_HOME=str(home), TMPDIR=str(home), PYTHONDONTWRITEBYTECODE="1"):
            self.process.start()
        theirs.close()
        try:
            self.answer(300)
        except EOFError as error:
            raise RuntimeError(self.log.read_text(errors="replace")[-2000:]) from error

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()

    def answer(self, patience: float) -> dict[str, Any]:
        """Raises ConnectionError or EOFError if the process has died, TimeoutError if it says nothing."""
        if not self.connection.poll(patience):
            raise TimeoutError
        return self.connection.recv()

    def ask(self, target: str, seed: int) -> dict[str, Any]:
        self.connection.send((target, seed))
        try:
            return self.answer(PATIENCE)
        except TimeoutError:
            fault = f"It did not end in {PATIENCE} seconds."
        except (EOFError, ConnectionError):
            fault = f"The process died: {self.log.read_text(errors='replace')[-1000:]}"
        self.stop()
        self.start()
        return {"fault": fault, "what": "see there", "verdict": "", "error": ""}
