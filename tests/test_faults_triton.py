"""Launches of Triton's kernels that find no memory: a cache is whole or says that it is not, and the next pass is as if
nothing had been."""

from unittest.mock import patch

import pytest
import torch
from models import gradients, random_ids, tiny_model
from test_faults import Watched, is_same, snapshot, some
from torture import tried
from triton_device import DEVICE, GPU, needs_somewhere_to_run


pytestmark = needs_somewhere_to_run
FULL = "Triton Error [CUDA]: out of memory"
TEXT = random_ids(2, 2).to(DEVICE)
MORE = random_ids(2, 3, seed=1).to(DEVICE)
USES = {
    "reads": lambda model, cache: model(MORE, past_key_values=cache),
    "reads a token": lambda model, cache: model(MORE[:, :1], past_key_values=cache),
}


class Launches:
    """Counts the kernels that are launched inside; in place of number `at` it raises an error."""

    def __init__(self, at: int = -1):
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        self.at, self.count = at, 0
        cls = JITFunction if GPU else InterpretedFunction
        self.patch = patch.object(cls, "run", self.launch_of(cls.run))

    def launch_of(self, run):
        def launch(kernel, *args, **options):
            count, self.count = self.count, self.count + 1
            if count == self.at:
                raise RuntimeError(FULL)
            return run(kernel, *args, **options)

        return launch

    def __enter__(self):
        self.patch.start()
        return self

    def __exit__(self, *_):
        self.patch.stop()


@pytest.fixture(scope="module")
def model():
    return tiny_model("pre_up_slstm", block_types=["mlstm", "slstm"], num_hidden_layers=2, backend="triton").to(DEVICE)


def cache_of(model):
    cache = Watched(model.config)
    model(TEXT, past_key_values=cache)
    return cache


def again(use, model, cache):
    """The state after a reset and all that the cache has read."""
    cache.reset()
    model(TEXT, past_key_values=cache)
    USES[use](model, cache)
    return snapshot(cache)


@torch.no_grad()
@pytest.mark.parametrize("use", USES)
def test_a_cache_is_whole_or_says_that_it_is_not_after_a_launch_that_failed(use, model):
    undisturbed = cache_of(model)
    with Launches() as counted:
        USES[use](model, undisturbed)
    legal = [*undisturbed.past[1:], snapshot(undisturbed)]
    expected = again(use, model, undisturbed)
    for at in some(counted.count, 2):
        cache = cache_of(model)
        with pytest.raises(RuntimeError, match="out of memory"), Launches(at):
            USES[use](model, cache)
        if cache.is_broken:
            with pytest.raises(ValueError, match="failed half-way; reset"):
                cache.fork(1)
        else:
            assert any(is_same(snapshot(cache), state) for state in legal), at
        assert is_same(again(use, model, cache), expected), at
        tried("faults: launches without memory")


def test_a_step_of_training_can_be_done_again_after_a_launch_that_failed(model):
    with Launches() as counted:
        model(MORE, labels=MORE).loss.backward()
    expected = gradients(model)
    for at in some(counted.count, 2):
        with pytest.raises(RuntimeError, match="out of memory"), Launches(at):
            model(MORE, labels=MORE).loss.backward()
        model.zero_grad()
        model(MORE, labels=MORE).loss.backward()
        assert is_same(gradients(model), expected), at
        tried("faults: launches without memory")
