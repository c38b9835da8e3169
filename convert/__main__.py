"""Converts an xLSTM checkpoint to another format, and publishes it.

Formats: native (modeling_xlstm), transformers (Transformers' own xLSTM, such as NX-AI/xLSTM-7b), xlstm-large and
xlstm-large-fused (xLSTMLarge), xlstm-paper and xlstm-paper-cuda (xLSTMLMModel, by sLSTM backend). The source tells
its own. A round trip is exact to the bit, unless --dtype rounds.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_session, set_client_factory
from transformers.utils import logging

from modeling_xlstm.__main__ import Parser

from .card import model_card
from .conversion import FORMATS, MAX_SHARD_SIZE, Conversion, prepare
from .destination import check_new, new_folder
from .errors import ConversionError
from .publish import check_login, check_repo, push
from .source import open_source
from .verify import BOUND, check_runnable, largest_difference


EXAMPLES = """examples:
  python -m convert checkpoints/xlstm-demo demo-float32 --dtype float32 --verify
  python -m convert checkpoints/xlstm-demo demo-of-the-paper --to xlstm-paper --max-shard-size 5MB
  python -m convert checkpoints/xlstm-demo demo-copy --dry-run

with the Hub:
  python -m convert NX-AI/xLSTM-7b xlstm-7b --dtype bfloat16
  python -m convert run-17 published --config run-17/model.yaml --push-to-hub me/my-xlstm
"""
PATIENCE = 120.0  # seconds that the Hub may be silent in the middle of a request
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def repository(text: str) -> str:
    """An argparse type: the name of a repository on the Hub."""
    try:
        return check_repo(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be {error}") from None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="xlstm-convert" if __package__ == "modeling_xlstm_convert" else "python -m convert",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder of a checkpoint, or repository on the Hub")
    add("destination", metavar="DEST", help="folder to make, new or empty")
    add("--to", choices=FORMATS, default="native", help="format to write (%(default)s)")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the weights, as in the source when omitted; gates of native models keep float32",
    )
    add("--config", metavar="FILE", help="configuration of the source, in place of that beside the weights")
    add("--max-shard-size", default=MAX_SHARD_SIZE, metavar="SIZE", help="of a file (%(default)s)")
    add("--verify", action="store_true", help="run the code of both formats and compare logits before DEST is made")
    add("--push-to-hub", type=repository, metavar="REPO", help="upload DEST to this repository, such as me/my-xlstm")
    add("--private", action="store_true", help="make that repository a private one, if it is new")
    add("--dry-run", action="store_true", help="say what would be written, from headers and configurations alone")
    return parser


def describe(conversion: Conversion, destination: str) -> None:
    """Prints what is converted to what."""
    source, files = conversion.source, len(conversion.shards.files)
    size = f"{conversion.parameters:,} parameters, {conversion.shards.size:,} bytes in {files} file{'s' * (files > 1)}"
    print(f"from {source.fmt}: {source.folder}, {len(source.meta)} weights")
    print(f"to   {conversion.to}: {destination}, {size}")
    for note in conversion.notes:
        print(f"note {note}")


def run(args: argparse.Namespace) -> None:
    """One conversion. Raises ConversionError or OSError, and leaves no destination then."""
    destination = Path(args.destination)
    check_new(destination)
    source = open_source(args.source, args.config)
    dtype = DTYPES[args.dtype] if args.dtype else None
    conversion = prepare(source, args.to, dtype, args.max_shard_size)
    card = model_card(conversion, args.push_to_hub or destination.resolve().name, args.push_to_hub)
    if args.verify:
        check_runnable(conversion.config, source.fmt, args.to)
    describe(conversion, args.destination)
    if args.dry_run:
        return
    if args.push_to_hub:
        check_login()
    start = time.perf_counter()
    with new_folder(destination) as folder:
        conversion.write(folder, card)
        if args.verify:
            difference, scale = largest_difference(source, folder)
            print(f"largest logit difference {difference:.2e}, {difference / scale:.1e} of the largest logit")
            if dtype is None and not difference <= BOUND * scale:
                raise ConversionError(
                    f"The logits must differ by at most {BOUND:.0e} of the largest, got {difference / scale:.1e}."
                )
    seconds = time.perf_counter() - start
    print(f"done in {seconds:.1f} s")
    if args.push_to_hub:
        print(f"pushed to {push(destination, args.push_to_hub, args.private)}")


def make_impatient() -> None:
    """The client that talks to the Hub waits without end: has one in its place that waits for `PATIENCE`."""
    client = get_session()
    hooks = client.event_hooks
    if limit_patience not in hooks["request"]:
        hooks = {**hooks, "request": [*hooks["request"], limit_patience]}
        # by a factory, as a client is made anew where a connection failed
        same: dict[str, Any] = {"follow_redirects": client.follow_redirects, "timeout": client.timeout}
        set_client_factory(lambda: type(client)(event_hooks=hooks, **same))


def limit_patience(request: Any) -> None:
    """Bounds what a request may be waited for, where that is not bounded yet: most requests say `timeout=None`."""
    bounds = request.extensions["timeout"]
    request.extensions["timeout"] = {what: PATIENCE if bound is None else bound for what, bound in bounds.items()}


def main(argv: list[str] | None = None) -> int:
    """Converts and returns the exit code: 0, or 1 with one sentence on standard error."""
    args = build_parser().parse_args(argv)
    logging.set_verbosity_error()
    make_impatient()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # those of the Hub too
    try:
        run(args)
    except ConversionError as error:
        print(*error.details, f"error: {error}", sep="\n", file=sys.stderr)
        return 1
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        print(f"error: The conversion failed: {error.strerror or error}{name}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
