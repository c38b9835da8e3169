"""The example of Ray Train, in two processes on a CPU: `make test-engines`."""

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import ranks_data


pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
STEPS = 100


def workers(folder: Path) -> list[int]:
    """Processes of Ray that train in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"RayTrainWorker" in (process / "cmdline").read_bytes() and (process / "cwd").readlink() == folder:
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
    return found


def test_the_command_of_the_page_goes_on_without_a_trace_when_a_process_is_killed(tmp_path):
    source = ranks_data.tiny_source(tmp_path)
    (tmp_path / "notebooks").symlink_to(ranks_data.ROOT / "notebooks")
    others = ["--max_steps", str(STEPS), "--save_steps", "10", "--per_device_train_batch_size", "2"]
    (line,) = ranks_data.page_commands("python notebooks")
    command = [sys.executable, *shlex.split(line)[1:], *ranks_data.flags_of(source, "killed", *others)]
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ranks_data.ROOT)}
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out) as ray:
        while not list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")):
            time.sleep(0.01)
            assert ray.poll() is None, log.read_text()
        assert not (tmp_path / "killed" / f"checkpoint-{STEPS}").exists()
        os.kill(max(workers(tmp_path)), signal.SIGKILL)
        assert ray.wait(300) == 0, log.read_text()
    for name, world, rows in (("whole", 2, 2), ("alone", 1, 4)):
        (tmp_path / f"{name} processes").mkdir()
        flags = ranks_data.flags_of(source, name, *others[:-1], str(rows))
        script = str(ranks_data.EXAMPLES / "train.py")
        ranks.run(ranks_data.example, world, tmp_path / f"{name} processes", tmp_path, [script, *flags])
    ranks_data.assert_same_training(tmp_path / "killed", tmp_path / "whole", STEPS)
    actual, expected = (ranks_data.curve(tmp_path / name, STEPS)[:4] for name in ("killed", "alone"))
    assert actual == pytest.approx(expected, rel=1e-5)
