"""The choice of a backend, and the ops without Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_xlstm.backends import BACKENDS, resolve


CPU = torch.zeros(1)


def test_auto_on_cpu_is_torch():
    assert resolve("auto", CPU) == "torch"


def test_torch_is_torch():
    assert resolve("torch", CPU) == "torch"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, got 'pytorch'"):
        resolve("pytorch", CPU)
    assert BACKENDS == ("auto", "torch", "triton")


def test_triton_on_cpu_is_refused_with_a_reason():
    with pytest.raises(NotImplementedError, match="backend 'triton' was requested for tensors on cpu, but .*"):
        resolve("triton", CPU)


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None

import torch

from modeling_xlstm.mlstm import mlstm_chunkwise, mlstm_step
from modeling_xlstm.slstm import slstm_scan, slstm_step

q, k, v = torch.randn(3, 2, 9, 3, 5, requires_grad=True).unbind(0)
igate, fgate = torch.randn(2, 2, 9, 3).unbind(0)
gates, R = torch.randn(2, 9, 3, 4, 5, requires_grad=True), torch.randn(3, 4, 5, 5)

h, state = mlstm_chunkwise(q, k, v, igate, fgate)
h.sum().backward()
mlstm_step(q[:, 0], k[:, 0], v[:, 0], igate[:, 0], fgate[:, 0], state)
h, state = slstm_scan(gates, R)
h.sum().backward()
slstm_step(gates[:, 0], R, state)
print("fine without", sys.modules["triton"])
"""


def test_every_op_runs_where_triton_cannot_be_imported():
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "fine without None"
