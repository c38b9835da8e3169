"""Jobs with a fault in them: a process that has everything imported forks a child for each, which is killed, for one.

File operations of a child below the folder that it works in, and what it sends to a Hub, are counted from 0. A fault
comes before one of them: `kill`, `interrupt` (a SIGINT) and `stop` (a SIGSTOP, from which `Faulty.go_on` wakes it) are
signals; `cut` kills where from then on a file grows beyond `size` bytes; from then on a disk is `full`, so that nothing
can be made or written, or `read-only`, so that nothing can be changed; `broken` fails this operation only. `memory`
counts operations of PyTorch instead, one of which finds no memory.
"""

import ctypes
import errno
import hashlib
import importlib
import json
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


ROOT = Path(__file__).parents[1]
IMPORTED = ("models", "prepare_data", "convert.__main__", "modeling_xlstm.__main__", "modeling_xlstm.training_xlstm")
LIMIT = 120  # seconds of a job
NOT_HERE = 77  # the exit code of a job that this system does not allow
CHANGES = (
    "fcntl.flock", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
)  # fmt: skip
TAKES_SPACE = ("open", "os.link", "os.mkdir", "os.rename", "os.symlink", "fsync", "safetensors")
SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "stop": signal.SIGSTOP}


class End(NamedTuple):
    """How a job ended, or where it was stopped: then the code is None. Of one killed by a signal it is below 0."""

    code: int | None
    out: str
    err: str
    operations: list[str]
    orphans: bool  # whether processes that it started were still there
    pid: int

    def sentence(self) -> str:
        """The one sentence with which it failed."""
        last = self.err.rstrip("\n").splitlines()[-1:]
        assert self.code in (1, 2) and re.match(r"(\S+: )?error: ", last[0]), self
        assert "Traceback" not in self.out + self.err, self
        return last[0]


class Faulty:
    """The process that forks, while it is entered; what jobs print goes to `folder`."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        path = os.pathsep.join(map(str, (ROOT, ROOT / "checkpoints")))
        ours = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.command = [sys.executable, __file__, str(folder)]
        self.environment = {**os.environ, **ours, **environment}

    def __enter__(self) -> "Faulty":
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(self.command, env=self.environment, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, **request: Any) -> End:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request, default=str), file=self.process.stdin, flush=True)
        end = End(**json.loads(self.process.stdout.readline()))
        assert not end.orphans, end
        return end

    def run(self, job: str, folder: Path, *args: object, **fault: object) -> End:
        """A job in a folder, until it ends or is stopped. Of a fault `how` is what, and where is `at` an operation, or
        `after` so many seconds or `printed` bytes; before operation `killed` it is killed as well."""
        folder.mkdir(exist_ok=True)
        return self.ask(job=job, folder=folder, args=args, fault=fault)

    def go_on(self, stopped: End) -> End:
        """The end of a job that was stopped."""
        return self.ask(pid=stopped.pid)


def digests(folder: Path) -> dict[str, str]:
    """By path, what tells the contents of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(content(path)).hexdigest() for path in files}


def content(path: Path) -> bytes:
    """The bytes of a file; what comes first in a header of safetensors changes from process to process."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch that are done inside; that of number `at` raises an error."""

    def __init__(self, at: int = -1, error: BaseException | None = None):
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count, self.count = self.count, self.count + 1
        if count == self.at and self.error is not None:
            raise self.error
        return func(*args, **(kwargs or {}))


def no_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0 has less.")


# What the child does.


class Watch:
    """An audit hook that counts file operations, and before one of them does what a fault says."""

    def __init__(self, log: int, how: str = "", at: int | None = None, size: int = 0, killed: int | None = None):
        self.folder, self.log, self.how, self.at, self.size, self.killed = os.getcwd(), log, how, at, size, killed
        self.count = 0

    def __call__(self, event: str, args: tuple) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in CHANGES or writes:
            path = name_of(args[0]) if isinstance(args[0], int) else os.fsdecode(args[0])
            if event in ("os.remove", "os.rmdir") and args[1] >= 0:
                path = os.path.join(name_of(args[1]), path)
            self.before(event, os.path.abspath(path))

    def before(self, event: str, path: str) -> None:
        """An operation on a path is to come."""
        if not path.startswith(self.folder):
            return
        if self.log:
            os.write(self.log, f"{event} {os.path.relpath(path, self.folder)}\n".encode())
        count, self.count = self.count, self.count + 1
        if count == self.killed:
            signal.raise_signal(signal.SIGKILL)
        if self.at is None or count < self.at:
            return
        if self.how == "read-only":
            fail(event, path, errno.EROFS)
        if self.how == "full" and event in TAKES_SPACE:
            fail(event, path, errno.ENOSPC)
        if count > self.at:
            return
        if self.how == "broken":
            fail(event, path, errno.EIO)
        if self.how in SIGNALS:
            signal.raise_signal(SIGNALS[self.how])
        if self.how == "cut":
            self.log = 0
            for stream in (1, 2):  # whose files are none of the job's
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))

    def install(self) -> None:
        """Watches audit events, and what has none: `os.fsync`, safetensors' files and sockets."""
        import safetensors.torch

        sync, write, send = os.fsync, safetensors.torch.serialize_file, socket.socket.send

        def fsync(file: Any) -> None:
            self.before("fsync", name_of(file))
            sync(file)

        def serialize_file(tensors: Any, path: Any, **options: Any) -> None:
            self.before("safetensors", os.path.abspath(path))
            write(tensors, path, **options)

        def send_and_count(connection: Any, *args: Any) -> int:
            self.before("send", self.folder)
            sent = send(connection, *args)
            self.before("sent", self.folder)
            return sent

        os.fsync, safetensors.torch.serialize_file = fsync, serialize_file  # type: ignore[assignment]
        socket.socket.send = send_and_count  # type: ignore[method-assign]
        sys.addaudithook(self)


def name_of(descriptor: int) -> str:
    """What an open file or folder is called."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


def fail(event: str, path: str, number: int) -> None:
    """Raises what an operation raises that the system refuses."""
    from safetensors import SafetensorError

    if event == "safetensors":
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    if event not in ("send", "sent"):
        raise OSError(number, os.strerror(number), path)


def convert(*argv: str) -> int:
    """`python -m convert`, with the folder `cache` for what comes from the Hub, and with short pauses."""
    from huggingface_hub import constants, file_download

    import convert.__main__

    constants.HF_HUB_CACHE = os.path.abspath("cache")
    convert.__main__.PATIENCE, file_download._ETAG_RETRY_TIMEOUT = 0.3, 1  # which is a minute, six times
    sleep = time.sleep
    time.sleep = lambda _: sleep(0.01)  # with no pause at all, threads that wait for something would keep others off
    return convert.__main__.main(list(argv))


def generate(*argv: str) -> int:
    """`python -m modeling_xlstm generate`."""
    import modeling_xlstm.__main__

    return modeling_xlstm.__main__.main(["generate", *map(str, argv)])


def save(source: str, destination: str, size: str, original: bool) -> int:
    """`save_pretrained`, in shards of a size."""
    from modeling_xlstm import XLSTMForCausalLM

    model = XLSTMForCausalLM.from_pretrained(source)
    model.save_pretrained(destination, max_shard_size=size, save_original_format=original)
    return 0


def keep(source: str, tokens: int, path: str) -> int:
    """Saves the state after some tokens."""
    import torch
    from models import random_ids

    from modeling_xlstm import XLSTMForCausalLM

    model = XLSTMForCausalLM.from_pretrained(source)
    with torch.no_grad():
        cache = model(random_ids(1, tokens), use_cache=True).past_key_values
    try:
        cache.save(path, model)
    except OSError as error:
        sys.exit(f"error: {error}")
    return 0


def train(*argv: object) -> int:
    """`checkpoints/train.py`, whose samples hold nothing that was generated."""
    from modeling_xlstm import XLSTMForCausalLM

    XLSTMForCausalLM.generate = lambda self, input_ids, **_: input_ids  # type: ignore[method-assign]
    sys.argv = ["train.py", *map(str, argv)]
    runpy.run_path(str(ROOT / "checkpoints" / "train.py"), run_name="__main__")
    return 0


def windows(source: str, resume: bool, workers: int) -> int:
    """An `XLSTMTrainer` on a text longer than memory, whose last state and weights go to the folder `out`."""
    from models import random_ids
    from transformers import TrainingArguments

    from modeling_xlstm import XLSTMForCausalLM
    from modeling_xlstm.training_xlstm import Windows, XLSTMTrainer

    settings: dict[str, Any] = {
        "max_steps": 4, "save_steps": 1, "save_total_limit": 1, "per_device_train_batch_size": 3, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": workers,
    }  # fmt: skip
    model = XLSTMForCausalLM.from_pretrained(source)
    data = Windows(random_ids(1, 400)[0], 3, 8)
    trainer = XLSTMTrainer(model=model, args=TrainingArguments("run", **settings), train_dataset=data)
    trainer.train(resume_from_checkpoint=resume or None)
    assert trainer.cache is not None
    trainer.cache.save("state.safetensors", model)
    model.save_pretrained("out")
    return 0


def on_a_small_disk(what: str, left: int, job: str, *args: Any) -> int:
    """A job on a disk which holds what the folder `before` does and has so many `pages` of 4 KB or `files` left, or can
    only be read (`nothing`); then once more on a large one. Its exit codes, and what the disk holds after each, go to
    the file `result.json`."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private, read_only, again = 0x00020000, 1 << 18 | 0x4000, 1, 32
    large = "size=64m,nr_inodes=10000"

    def mount(flags: int, options: str) -> None:
        if libc.mount(b"tmpfs", b"disk", b"tmpfs", flags, options.encode()):
            sys.exit(NOT_HERE)

    Path("disk").mkdir()
    if libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, private, None):
        sys.exit(NOT_HERE)
    mount(0, large)
    if Path("before").exists():
        shutil.copytree("before", "disk", dirs_exist_ok=True)
    disk, home = Path("disk").absolute(), Path.cwd()
    found = os.statvfs(disk)
    pages, files = found.f_blocks - found.f_bfree + left, found.f_files - found.f_ffree + left
    small = {"pages": f"size={4096 * pages}", "files": f"nr_inodes={files}", "nothing": large}
    mount(again | (read_only if what == "nothing" else 0), small[what])
    result: list[Any] = []
    for _ in range(2):
        os.chdir(disk)
        result += [exit_code(job, args), digests(disk)]
        os.chdir(home)
        mount(again, large)
    Path("result.json").write_text(json.dumps(result))
    return 0


def exit_code(job: str, args: Any) -> int:
    """The exit code of a job, as that of a script."""
    jobs: dict[str, Callable[..., int]] = {
        "convert": convert,
        "generate": generate,
        "save": save,
        "keep": keep,
        "train": train,
        "windows": windows,
        "on_a_small_disk": on_a_small_disk,
    }
    try:
        return jobs[job](*args)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
            return 1
        return stop.code or 0


def inject(fault: dict[str, Any], log: int, stack: ExitStack) -> None:
    """Prepares a fault, for as long as the stack is not unwound."""
    if fault.get("how") == "memory":
        stack.enter_context(Operations(fault["at"], no_memory()))
    is_from_outside = fault.get("how") == "memory" or fault.keys() & {"after", "printed"}
    Watch(log, **({} if is_from_outside else fault)).install()


def child(folder: Path, request: dict[str, Any]) -> None:
    """Does the job and ends the process."""
    os.setpgid(0, 0)
    signal.alarm(LIMIT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    files = [os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("out", "err", "log")]
    for file, stream in zip((os.open(os.devnull, os.O_RDONLY), *files[:2]), range(3), strict=True):
        os.dup2(file, stream)
    code = 1
    try:
        os.chdir(request["folder"])
        with ExitStack() as stack:
            inject(request["fault"], files[2], stack)
            code = exit_code(request["job"], request["args"])
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        os._exit(code)


# What the process that forks does.


def wait(folder: Path, pid: int) -> End:
    """Until a child ends or is stopped."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    code = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    out, err, log = ((folder / name).read_text(errors="replace") for name in ("out", "err", "log"))
    return End(code, out, err, log.splitlines(), code is not None and has_orphans(pid), pid)


def has_orphans(group: int) -> bool:
    """Whether there still is a process of a group in which there was a child: they have 15 seconds to end."""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    return True


def size(path: Path) -> int:
    """Of a file that may not be there yet."""
    return path.stat().st_size if path.exists() else 0


def serve(home: Path) -> None:
    """Does what is asked for in lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever imports print
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if (pid := request.get("pid")) is not None:
            os.kill(pid, signal.SIGCONT)
        else:
            number = len(list(home.iterdir()))
            (home / str(number)).mkdir()
            pid = os.fork()
            if pid == 0:
                child(home / str(number), request)
            folders[pid] = home / str(number)
            fault = request["fault"]
            if fault.keys() & {"after", "printed"}:
                time.sleep(fault.get("after", 0))
                while size(home / str(number) / "out") < fault.get("printed", 0):
                    time.sleep(0.001)
                os.kill(pid, SIGNALS[fault["how"]])
        print(json.dumps(wait(folders[pid], pid)._asdict()), file=answers, flush=True)


folders: dict[int, Path] = {}  # of children, by process


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
