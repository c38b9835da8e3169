"""Starts train.py with Ray Train: in so many processes, and once more from its last checkpoint if one of them is lost.

`python ray_train.py 2 ...` with the flags of train.py.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def loop(config: dict) -> None:
    """What each process runs; Ray has started the process group."""
    os.chdir(config["folder"])
    runpy.run_path(config["script"])["main"](config["flags"])


if __name__ == "__main__":
    workers, *flags = sys.argv[1:]
    script = str(Path(__file__).resolve().with_name("train.py"))
    TorchTrainer(
        loop,
        train_loop_config={"folder": os.getcwd(), "script": script, "flags": flags},
        scaling_config=ScalingConfig(num_workers=int(workers), use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=1)),
    ).fit()
