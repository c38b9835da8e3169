"""What the command lines of the benchmarks have in common, without imports of the package: listing them is quick."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def command_line(name: str, doc: str | None, examples: str) -> Parser:
    """A parser for `python -m benchmarks NAME`."""
    layout = argparse.RawDescriptionHelpFormatter
    return Parser(prog=f"python -m benchmarks {name}".strip(), description=doc, epilog=examples, formatter_class=layout)


def integer(least: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `least`."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text}")
        return int(text)

    return parse


def new_file(text: str) -> Path:
    """An argparse type: a file that can be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file that can be written in a directory that exists, got {text}")
    return path


def check_data(parser: argparse.ArgumentParser, data: Path | None, *names: str) -> None:
    """Ends the process unless `data` holds these files."""
    missing = [name for name in names if data is None or not (data / name).is_file()]
    if missing:
        lacks = "" if data is None else f", which holds no {missing[0]}"
        parser.error(f"--data must be the output of checkpoints/prepare_data.py, got {data}{lacks}.")


def show(line: str) -> None:
    """Prints a line at once, above the progress bar if there is one."""
    tqdm.write(line)
    print(end="", flush=True)


def die_of_interrupts() -> None:
    """For processes that measure: Ctrl-C ends them without a stack trace."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(main: Callable[[], object]) -> None:
    """Runs a program that Ctrl-C, or a reader that stops early, ends without a stack trace."""
    try:
        main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is still buffered goes
        if not isinstance(error, BrokenPipeError):
            sys.exit(f"error: Reading or writing failed: {error.strerror or error}")
