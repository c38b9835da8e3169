"""Threads that share a model, a state or a file: each gets, to the bit, what it would get alone."""

import copy
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from models import KINDS, TWO_KINDS, random_ids, states, tiny_model
from torch import Tensor
from torture import TORTURE, tried, tries
from transformers import AutoModelForCausalLM, CompileConfig, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from modeling_xlstm import XLSTMCache
from modeling_xlstm.backends import HAS_ONEDNN_PACKING


pytestmark = pytest.mark.usefixtures("one_thread", "busy")

Works = dict[str, Callable[[], list[Tensor]]]
THREADS = 8
NEVER = [0, 1]  # a text with the padding token would be taken for padded
SOME_KINDS = KINDS if TORTURE else TWO_KINDS
DTYPES = ["float32", pytest.param("bfloat16", marks=pytest.mark.skipif(not HAS_ONEDNN_PACKING, reason="packs nothing"))]


@pytest.fixture
def busy() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Draw(LogitsProcessor):
    """Makes a sample of what is greedy, of random numbers of its own: `do_sample` draws from those of all threads."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores - torch.empty_like(scores).exponential_(generator=self.generator).log()


class Stream(BaseStreamer):
    """Gives what is generated to another thread."""

    def __init__(self) -> None:
        self.pieces: queue.Queue[Tensor | None] = queue.Queue()

    def put(self, value: Tensor) -> None:
        self.pieces.put(value.flatten())

    def end(self) -> None:
        self.pieces.put(None)


def write(model, ids: Tensor, seed: int | None = None, **options) -> list[Tensor]:
    """A text, the logits that it was chosen by, and the states that it leaves."""
    draws = [] if seed is None else [Draw(seed)]
    fixed = {"do_sample": False, "suppress_tokens": NEVER, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(ids, logits_processor=draws, **{"max_new_tokens": 8, **fixed, **options})
    return [output.sequences, *output.logits, *states(output.past_key_values).values()]


def converse(model, ids: Tensor, **options) -> list[Tensor]:
    """Two turns of a conversation, the second read on from the state that the first has left."""
    cache = XLSTMCache(model.config)
    first = write(model, ids, past_key_values=cache, **options)
    second = torch.cat((first[0], random_ids(len(ids), 4, seed=9)), 1)
    return first + write(model, second, past_key_values=cache, **options)


def stream(model, ids: Tensor) -> list[Tensor]:
    """A text as another thread writes it, piece by piece."""
    streamer, text = Stream(), list[Tensor]()
    thread = threading.Thread(target=lambda: text.extend(write(model, ids, streamer=streamer)))
    thread.start()
    pieces = list(iter(lambda: streamer.pieces.get(timeout=120), None))
    thread.join()
    assert torch.equal(torch.cat(pieces), text[0][0])
    return text


def read(model, ids: Tensor, **options) -> list[Tensor]:
    """A forward pass and all that it can show."""
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, output_gates=True, **options)
    return [output.logits, *output.hidden_states, *(x for gates in output.gates for x in gates if x is not None)]


def differentiate(model, ids: Tensor) -> list[Tensor]:
    """A loss and its gradients, which nobody else sees."""
    loss = model(ids, labels=ids).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def train(model, ids: Tensor) -> list[Tensor]:
    """Three steps of a copy of the model: the losses, and its weights after them."""
    model = copy.deepcopy(model).train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *model.state_dict().values()]


def padded(batch: int, time: int, seed: int = 0) -> dict[str, Any]:
    """Texts of different lengths, padded on the left."""
    ids = random_ids(batch, time, seed)
    padding = torch.arange(time) < torch.arange(batch)[:, None] * time // (batch + 1)
    return {"ids": ids.masked_fill(padding, 1), "attention_mask": (~padding).long()}


def texts(model) -> Works:
    """One of every way to write or to read a text."""
    long, prefix, bounds = random_ids(2, 40, seed=1), random_ids(1, 20, seed=2), torch.tensor([0, 5, 6, 30])
    with torch.inference_mode():
        shared = model(prefix[:, :-1]).past_key_values
    ways = prefix.repeat(3, 1)
    return {
        "a text": lambda: write(model, random_ids(1, 5)),
        "a long prompt": lambda: write(model, long),
        "a padded batch": lambda: write(model, **padded(3, 9)),
        "samples of a padded batch": lambda: write(model, **padded(3, 9), seed=1),
        "a conversation": lambda: converse(model, random_ids(2, 8, seed=3)),
        "a stream": lambda: stream(model, random_ids(1, 9, seed=4)),
        "beams": lambda: write(model, random_ids(2, 6, seed=5), num_beams=3),
        "a text looked up": lambda: write(model, random_ids(1, 12, seed=6), prompt_lookup_num_tokens=3),
        "ways on from a prefix": lambda: write(model, ways, past_key_values=shared.fork(3), seed=2),
        "other ways on from it": lambda: write(model, ways, past_key_values=shared.fork(3), seed=3),
        "a state that is shared": lambda: list(states(shared).values()),
        "a pass": lambda: read(model, long),
        "a packed pass": lambda: read(model, random_ids(1, 30, seed=7), cu_seq_lens_q=bounds),
    }


def assert_same(name: str, actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected), name
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.dtype == y.dtype and torch.equal(x, y), f"tensor {i} of {name} is another than alone"


def check_together(works: Works, rounds: int, alone: dict[str, list[Tensor]] | None = None) -> None:
    """Does all works at once, again and again, each thread another first: what they give is what they give alone."""
    names = list(works)
    expected = {name: work() for name, work in works.items()} if alone is None else alone
    start = threading.Barrier(THREADS, timeout=120)

    def work(thread: int) -> None:
        start.wait()
        for turn in range(rounds):
            name = names[(thread + turn) % len(names)]
            assert_same(name, works[name](), expected[name])
            tried("texts by threads")

    with ThreadPoolExecutor(THREADS) as threads:
        assert list(threads.map(work, range(THREADS))) == [None] * THREADS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_texts_by_threads_are_those_of_one(kind, dtype):
    """In bfloat16 each `generate` packs the weights for itself."""
    model = tiny_model(kind).to(getattr(torch, dtype))
    check_together(texts(model), tries(2, 25))


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_training_beside_changes_no_text_and_no_gradient(kind):
    model, ids = tiny_model(kind), random_ids(2, 20)
    works: Works = {
        "a text": lambda: write(model, ids),
        "gradients of the same model": lambda: differentiate(model, ids),
        "a training of a copy": lambda: train(model, ids),
        "other gradients": lambda: differentiate(model, random_ids(1, 33, seed=1)),
        "a padded batch": lambda: write(model, **padded(3, 9)),
    }
    check_together(works, tries(2, 25))


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_a_model_is_saved_and_another_loaded_while_threads_write(kind, tmp_path):
    """Another of another dtype, which Transformers makes PyTorch's default for all threads as long as it loads."""
    model, ids = tiny_model(kind), random_ids(2, 9)
    model.save_pretrained(tmp_path / "half", state_dict=tiny_model(kind).bfloat16().state_dict())

    def save() -> list[Tensor]:
        folder = tmp_path / str(threading.get_ident())
        model.save_pretrained(folder)
        return [torch.frombuffer(bytearray((folder / "model.safetensors").read_bytes()), dtype=torch.uint8)]

    def load() -> list[Tensor]:
        with one_at_a_time:
            return list(AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="bfloat16").state_dict().values())

    one_at_a_time = threading.Lock()  # Transformers loads one model at a time
    works: Works = {
        "a text": lambda: write(model, ids),
        "a saved model": save,
        "a padded batch": lambda: write(model, **padded(3, 9), seed=1),
        "a loaded model": load,
        "gradients": lambda: differentiate(model, ids),
    }
    check_together(works, tries(3, 25))


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_threads_save_fork_and_load_one_state(kind, tmp_path):
    model, prefix, path = tiny_model(kind), random_ids(1, 20), tmp_path / "prefix.safetensors"
    with torch.no_grad():
        cache = model(prefix[:, :-1]).past_key_values
    cache.save(path, model)

    def save() -> list[Tensor]:
        cache.save(path, model)
        return list(states(cache).values())

    works: Works = {
        "a saved state": save,
        "a loaded state": lambda: list(states(XLSTMCache.load(path, model)).values()),
        "a forked state": lambda: list(states(cache.fork(2)).values()),
        "a text from the file": lambda: write(model, prefix, past_key_values=XLSTMCache.load(path, model)),
        "a text from a fork": lambda: write(model, prefix, past_key_values=cache.fork(1)),
    }
    check_together(works, tries(4, 60))
    assert sorted(tmp_path.iterdir()) == [path]


BACKENDS = [
    "eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
            pytest.mark.skipif(not TORTURE, reason="compiles for long: in `make torture`"),
        ],
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", TWO_KINDS if TORTURE else ["post_up"])
def test_compiled_steps_in_threads_are_those_of_one(kind, backend):
    """Of one size, as another would be compiled while others run."""
    model = tiny_model(kind)
    torch._dynamo.reset()
    options = {"compile_config": CompileConfig(backend=backend, mode=None)}
    works: Works = {
        "texts": lambda: write(model, random_ids(2, 5), **options),
        "long prompts": lambda: write(model, random_ids(2, 40, seed=1), **options),
        "a padded batch": lambda: write(model, **padded(2, 9), **options),
        "samples": lambda: write(model, **padded(2, 9), seed=1, **options),
        "a conversation": lambda: converse(model, random_ids(2, 8, seed=2), **options),
    }
    for work in works.values():
        work()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    check_together(works, tries(4, 25))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_texts_do_not_depend_on_the_default_dtype():
    """Which another thread may set at any time: Transformers does, while it loads a model."""
    model = tiny_model("pre_up_slstm")
    works = texts(model) | {"gradients": lambda: differentiate(model, random_ids(2, 20))}
    expected = {name: work() for name, work in works.items()}
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = {name: work() for name, work in works.items()}
    finally:
        torch.set_default_dtype(torch.float32)
    for name in works:
        assert_same(name, actual[name], expected[name])


FIRST = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
import test_concurrency
from models import tiny_model

torch.set_num_threads(1)
sys.setswitchinterval(1e-5)
model = tiny_model("pre_up_slstm")
works = test_concurrency.texts(model) | {
    "gradients": lambda: test_concurrency.differentiate(model, test_concurrency.random_ids(2, 20)),
}
first = {}
threads = [
    test_concurrency.threading.Thread(target=lambda name=name, work=work: first.update({name: work()}))
    for name, work in works.items()
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for name, work in works.items():
    test_concurrency.assert_same(name, first[name], work())
print(len(first))
"""


@pytest.mark.skipif(not TORTURE, reason="takes a process for each try: in `make torture`")
@pytest.mark.parametrize("turn", range(5))
def test_the_first_calls_of_a_process_may_be_those_of_threads(turn):
    """What is made when it is first used, of PyTorch, Transformers or this package, is made once or alike."""
    folders = Path(__file__).parent, Path(__file__).parents[1]
    command = [sys.executable, "-c", FIRST, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    tried("texts by threads", int(done.stdout.splitlines()[-1]))


def test_a_thread_is_not_in_the_hands_of_the_compiler_of_another():
    """PyTorch's `is_compiling` says yes in all threads while one compiles."""
    model, ids, positions = tiny_model(), random_ids(1, 12), torch.arange(12)[None] % 5
    works: Works = {
        "a packed pass": lambda: read(model, ids, position_ids=positions),
        "a text": lambda: write(model, ids),
        "gradients": lambda: differentiate(model, random_ids(2, 20)),
    }
    expected = {name: work() for name, work in works.items()}
    begun, finish = threading.Event(), threading.Event()

    def backend(graph, inputs):
        begun.set()
        assert finish.wait(60)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x.sin(), backend=backend)
    thread = threading.Thread(target=lambda: compiled(torch.ones(2)))
    thread.start()
    try:
        assert begun.wait(60)
        for name, work in works.items():
            assert_same(name, work(), expected[name])
        with pytest.raises(IndexError, match="input_ids must be from 0 to 98, got values from -1 to -1"):
            model(torch.tensor([[-1]]))
    finally:
        finish.set()
        thread.join()


@pytest.mark.skipif(not TORTURE, reason="compiles for long: in `make torture`")
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_texts_are_the_same_while_threads_compile(kind):
    """Of those that are compiled the tokens only: PyTorch compiles no more than a few times, and steps aside then."""
    model = tiny_model(kind)
    options = {"compile_config": CompileConfig(backend="eager", mode=None)}
    works: Works = {
        "compiled": lambda: write(model, random_ids(1, 5), **options)[:1],
        "a text": lambda: write(model, random_ids(2, 9)),
        "two compiled": lambda: write(model, random_ids(2, 5, seed=1), **options)[:1],
        "gradients": lambda: differentiate(model, random_ids(2, 20)),
        "three compiled": lambda: write(model, **padded(3, 9), **options)[:1],
    }
    expected = {name: work() for name, work in works.items()}
    torch._dynamo.reset()
    check_together(works, tries(2, 25), expected)
