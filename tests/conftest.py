"""Environment and fixtures shared by all tests."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small: threads that wait for each other cost minutes
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what a mode of PyTorch asks for that fills memory

import pytest
import torch
from torture import TRIED


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "numerics.py")  # the comparisons hold the tests of themselves


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TRIED:
        terminalreporter.section("tried")
        for what, count in sorted(TRIED.items()):
            terminalreporter.write_line(f"{count:>8} {what}")


@pytest.fixture(autouse=True)
def same_start() -> None:
    """Every test starts from the same random state and precision, whatever ran before: `Trainer` switches TF32 on."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def poisoned_memory():
    """`torch.empty` and its kin return NaN, so that an output which an op forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    # the mode that fills memory; an error where an op has no such mode, but on a GPU, whose cumsum has none
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def one_thread():
    """Models this small are slower on more threads, by far on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
