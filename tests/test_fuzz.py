"""Files that are damaged or hostile, by the thousand: refused in a sentence, or loaded as what they say.

A mutation is a target (what loads), and a number from which all else follows: a small checkpoint or state, a kind of
damage (`fuzzing.TARGETS`), and where it is done. A process loads one after the other. Of each must hold:

- It ends, with the process alive, in `PATIENCE`.
- Memory grows by no more than twice the size of the files and what loading them undamaged takes; and nobody asks for
  `SPACE` addresses at once, which is less than any size that a mutation declares.
- Nothing is written but the destination of a conversion, which is whole or not there. No code runs that is in a
  checkpoint, no process is started, nobody is connected to.
- What is refused is refused by an exception: ours a ValueError, OSError, TypeError or ConversionError with a sentence,
  that of Transformers whatever it is. `convert` returns 1, and its last line is a sentence.
- What loads is the model that the files say.

The last needs an oracle, as bytes have no checksum: after most mutations there still is a model, a few of which are not
the one that was saved. `judges.read` is a second, plain reader of the same files. Where it fails, or finds what leaves
open which model it is (a weight in two files, numbers that are not of a floating dtype or not finite, for a conversion
a file that leads out of the folder), the target has to refuse. Where it does not, the target may refuse; if it loads,
then

- "equal": weights and configuration are those before the damage, and the model has to be the same in each bit;
- "changed": the files say something else that is legal (another number in a field, a bit of a weight, two tensors
  swapped in a header, a key whose absence stands for a default), and the model has to be that, in each bit again;
- "reported": `from_pretrained` names weights that are missing or that it leaves aside, as Transformers does; all
  others have to be those in the files. `convert` refuses these.

Which weight of a file becomes which of a model is taken from a checkpoint whose every weight is its own number.

What Transformers decides before this package is asked is not judged: it loads from wherever an index points to, loads
without generation settings that it cannot read, makes as many labels as `num_labels` says, and of a pickled tensor that
repeats a few bytes all of its size.

A mutation that fails is printed with its number N; XLSTM_FUZZ=N runs it alone.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import MEASURES_MEMORY, TARGETS, Caught, Growth, Watch, Worker
from huggingface_hub.errors import StrictDataclassError
from judges import Layout, judge_error, judge_weights
from models import tiny_model
from safetensors.torch import load_file, save_file
from torture import tried, tries
from transformers import AutoModelForCausalLM

from convert.__main__ import main
from modeling_xlstm import XLSTMConfig


ROOT = Path(__file__).parents[1]
ONLY = os.environ.get("XLSTM_FUZZ")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("fuzz"))
    yield worker
    worker.stop()


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_refused_or_load_as_what_they_say(target, worker):
    kinds, few, many = TARGETS[target]
    faults, verdicts = [], set()
    for seed in [int(ONLY)] if ONLY else range(tries(few, many)):
        kind, answer = kinds[seed % len(kinds)], worker.ask(target, seed)
        tried(f"mutations of files: {kind}")
        verdicts.add(answer["verdict"])
        if answer["fault"]:
            faults.append(f"XLSTM_FUZZ={seed}, {target}: {kind}, {answer['what']}: {answer['fault']}")
        if len(faults) == 20:
            break
    assert not faults, "\n\n".join(faults)
    assert ONLY or {"refused", "equal", "changed"} <= verdicts


# The judges themselves.


class OneWeight(torch.nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(values))


@pytest.mark.parametrize(
    ("values", "files", "info", "fault"),
    [
        ((3.0, -0.0), {"a": [3.0], "b": [-0.0]}, {}, None),
        ((3.0, 0.0), {"a": [3.0], "b": [-0.0]}, {}, "weight is not what the files say"),
        ((-0.0, 3.0), {"a": [3.0], "b": [-0.0]}, {}, "weight is not what the files say"),
        ((3.0, 0.0, 0.0), {"a": [3.0], "b": [0.0]}, {}, "nothing in the files is weight"),
        ((3.0, 0.0), {"a": [3.0]}, {}, "weight is of weights that are not in the files"),
        ((3.0, 0.0), {"a": [3.0], "b": [0]}, {}, "weight is of weights that are not in the files"),
        ((3.0, math.inf), {"a": [3.0], "b": [math.inf]}, {}, "weight is of weights that are not in the files"),
        ((3.0, 0.0), {"a": [3.0], "b": [0.0], "c": [1.0]}, {}, "c is left aside in silence"),
        ((3.0, 0.0), {"a": [3.0], "b": [0.0], "c": [1.0]}, {"unexpected_keys": {"c"}}, None),
        ((1.0, 1.0), {"a": [3.0]}, {"missing_keys": {"weight"}}, "a is left aside in silence"),
        ((1.0, 1.0), {}, {"missing_keys": {"weight"}}, None),
    ],
)
def test_a_weight_that_is_not_that_of_the_files_is_seen(values, files, info, fault):
    layout = Layout({"a": torch.Size([1]), "b": torch.Size([1])}, {"weight": torch.tensor([1, 2])})
    weights = {name: torch.tensor(value) for name, value in files.items()}
    info = {"missing_keys": set(), "unexpected_keys": set(), **info}
    with contextlib.nullcontext() if fault is None else pytest.raises(AssertionError, match=fault):
        judge_weights(OneWeight(*values), info, weights, layout)


@pytest.mark.parametrize(
    ("where", "error", "fault"),
    [
        ("modeling_xlstm/cache_xlstm.py", "ValueError('The file must be whole, got half of it.')", None),
        ("transformers/x.py", "KeyError('weight_map')", None),
        ("modeling_xlstm/cache_xlstm.py", "KeyError('The file must be whole, got half of it.')", "raised KeyError"),
        ("modeling_xlstm/cache_xlstm.py", "AttributeError('dict has no attribute x')", "raised AttributeError"),
        ("convert/source.py", "UnicodeDecodeError('utf-8', b'x', 0, 1, 'no text')", "raised UnicodeDecodeError"),
        ("transformers/x.py", "MemoryError()", "raised MemoryError"),
        ("transformers/x.py", "SystemExit(3)", "raised SystemExit"),
    ],
)
def test_an_error_that_nobody_should_see_is_seen(where, error, fault):
    with Caught() as caught:
        exec(compile(f"raise {error}", ROOT / where, "exec"))
    assert caught.error is not None
    with contextlib.nullcontext() if fault is None else pytest.raises(AssertionError, match=fault):
        judge_error(caught.error)


def test_what_is_written_run_and_started_elsewhere_is_seen(tmp_path):
    watch = Watch(tmp_path / "to")
    with watch:
        watch.see("open", (str(tmp_path / "to" / "x"), "w", os.O_WRONLY))
        watch.see("open", (str(tmp_path / "from"), "r", os.O_RDONLY))
        watch.see("exec", (compile("", __file__, "exec"),))
        assert not watch.seen
        watch.see("open", (str(tmp_path / "from"), "w", os.O_WRONLY))
        watch.see("exec", (compile("", tmp_path / "from" / "hostile.py", "exec"),))
        watch.see("open", (str(tmp_path / "to-be"), "w", os.O_WRONLY))
        watch.see("os.system", ("true",))
    watch.see("os.system", ("true",))
    assert [what.rsplit("/")[-1] for what in watch.seen] == [
        "from was opened to write",
        "hostile.py was run",
        "to-be was opened to write",
        "os.system ('true',)",
    ]


@pytest.mark.skipif(not MEASURES_MEMORY, reason="only Linux tells")
def test_memory_is_seen_to_grow_though_it_is_given_back():
    with Growth() as growth:
        torch.ones(1 << 24)
    assert growth.bytes >= 1 << 25


# What was found.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model: Any = tiny_model()
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


@pytest.mark.parametrize("text", [None, "[1]", '"x"', "{}"])
def test_a_configuration_that_is_none_is_no_default(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(OSError, match="must hold names and values, got "):
        XLSTMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000 without block_types, got 1000000000."),
        ({"num_hidden_layers": 10**30, "block_types": ["mlstm"]}, "num_hidden_layers must be less than 2 "),
        ({"check_mlstm": 5}, "must have no field 'check_mlstm'"),
        ({"ratio": "1:0"}, "must have no field 'ratio'"),
        ({"__dict__": {}}, "must have no field '__dict__'"),
        ({"model_type": "xlstm", "hidden_size": [1]}, "Field 'hidden_size' expected int, got list"),
        ({"model_type": "xlstm", "chunkwise_kernel": 5, "num_heads": 3}, "must be a multiple of num_heads = 3"),
    ],
)
def test_a_field_that_is_none_is_refused_in_a_sentence(fields, sentence, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=sentence):
        XLSTMConfig.from_pretrained(tmp_path)


def test_a_model_type_that_is_no_name_does_not_matter_to_peft():
    config = XLSTMConfig()
    config.model_type = []
    assert config.to_dict()["hidden_size"] == config.hidden_size


def test_bits_of_floats_are_not_read_as_integers(saved):
    path = next(saved.glob("*.safetensors"))
    weights = {name: x.view(torch.int32) for name, x in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"The weight \S+ must be of dtype F64, F32, F16, BF16, got I32\."):
        AutoModelForCausalLM.from_pretrained(saved)


def test_of_two_values_of_a_weight_none_is_chosen(saved):
    first, *_, last = sorted(saved.glob("*.safetensors"))
    save_file({**load_file(last), **load_file(first)}, last, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="Each weight must be in one file, got "):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_pipe_is_not_waited_for(saved):
    path = next(saved.glob("*.safetensors"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="The weights must be in files, got "):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("a: &a [1, 2]\nvocab_size: *a", "cannot be read: it must hold no aliases, got *a."),
        ("transformers_weights: other.safetensors", "got a configuration with transformers_weights."),
        (f"vocab_size: {'x' * 5000}\nmodel_type: xlstm_lm", "The configuration must be that of an xLSTM: "),
    ],
)
def test_an_odd_configuration_is_not_converted(config, sentence, saved, capsys):
    path = saved.parent / "config.yaml"
    path.write_text(config, encoding="utf-8")
    assert main([str(saved), str(saved.parent / "to"), "--config", str(path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in error and len(error) < 1200
