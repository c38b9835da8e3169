"""`python -m modeling_xlstm`: stream a continuation of a prompt, print the card of a checkpoint, or serve a model."""

import argparse
import inspect
import itertools
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from .backends import BACKENDS
from .configuration_xlstm import XLSTMConfig
from .generation_xlstm import NO_CONTINUOUS_BATCHING
from .modeling_xlstm import XLSTMForCausalLM, count_parameters


EXAMPLES = """examples:
  python -m modeling_xlstm generate --model checkpoints/xlstm-demo --prompt "A class is" --seed 1
  echo "To create a new table," | python -m modeling_xlstm generate --model checkpoints/xlstm-demo --prompt - --greedy
  python -m modeling_xlstm info checkpoints/xlstm-demo
  python -m modeling_xlstm serve checkpoints/xlstm-demo --dtype float32 --port 8000
"""
LARGE = 1e9  # bytes of weights, from which on loading takes long enough for a progress bar
# names of the safetensors format: names of PyTorch
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# What other libraries raise where a file is damaged, or says what they did not expect or do not have.
DAMAGE: tuple[type[Exception], ...] = (
    OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ImportError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
# What generating raises where memory, numbers or a generation_config.json do not allow it.
NO_GENERATION: tuple[type[Exception], ...] = (RuntimeError, FloatingPointError, ValueError, TypeError, AssertionError)


class CommandError(Exception):
    """What the user can mend, in one sentence."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


class TimedStreamer(TextStreamer):
    """Streams text and notes when the prompt and each new token passed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_prompt: bool):
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor):
        super().put(value)
        self.times.append(time.perf_counter())


def number(kind: type, legal: str, accept: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` that `accept` accepts; `legal` says which those are."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"must be {legal}, got {text}")
        return value

    return parse


def read_config(directory: str) -> XLSTMConfig:
    """The configuration in `directory`. Raises CommandError unless it is that of an xLSTM."""
    if not os.path.isdir(directory):  # False too where a name is too long, at which Path raises
        raise CommandError(f"The model must be a directory, got {directory}, which is not one.")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except DAMAGE as error:
        raise CommandError(f"{directory} must hold the config.json of an xLSTM: {reason(error)}") from error
    if not isinstance(config, XLSTMConfig):
        raise CommandError(f"{directory} must hold an xLSTM, got a model of type {config.model_type!r}.")
    return config


def is_quantized(config: XLSTMConfig) -> bool:
    """Whether the checkpoint of this configuration holds quantised weights, which keep their dtype."""
    return getattr(config, "quantization_config", None) is not None


def read_tokenizer(directory: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `directory`, if there is one. Raises CommandError if it cannot be read."""
    if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except DAMAGE as error:
        raise CommandError(f"The tokenizer in {directory} cannot be read: {reason(error)}") from error


def read_prompt(prompt: str) -> str:
    """The prompt, from standard input for `-`, less the newline that ends it there."""
    if prompt == "-" and sys.stdin is None:
        raise CommandError("The prompt must come from standard input, which is closed.")
    raw = sys.stdin.buffer.read().removesuffix(b"\n") if prompt == "-" else os.fsencode(prompt)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"The prompt must be UTF-8, got byte {raw[error.start]:#x} at {error.start}.") from error
    if not text:
        raise CommandError("The prompt must hold at least one character, got none.")
    return text


def reason(error: BaseException) -> str:
    """The first line of an error; of one about a config, of its cause."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def generate(args: argparse.Namespace) -> None:
    """Streams prompt and continuation to standard output, and tokens per second to standard error."""
    prompt = read_prompt(args.prompt)
    config = read_config(args.model)
    tokenizer = read_tokenizer(args.model)
    if tokenizer is None:
        raise CommandError(f"{args.model} must hold a tokenizer to read the prompt with, got none.")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = inputs["input_ids"]
    if not ids.numel() or ids.max() >= config.vocab_size:
        got = f"id {ids.max()}" if ids.numel() else "no token"
        raise CommandError(f"The prompt must give token ids below {config.vocab_size}, got {got}.")
    try:
        device = torch.device(args.device)
        if device.type == "meta":
            raise ValueError("The device must be one that computes, got meta.")
        dtype = args.dtype
        if (dtype, device.type) == ("auto", "cpu") and not is_quantized(config):
            dtype = "float32"
        if sys.stderr.isatty() and sum(file.stat().st_size for file in Path(args.model).glob("*.safetensors")) > LARGE:
            logging.enable_progress_bar()
        options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "trust_remote_code": False}
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, **options)
        model.set_backend(args.backend)
        inputs = inputs.to(device)
    except DAMAGE as error:
        raise CommandError(f"{args.model} cannot be loaded on {args.device}: {reason(error)}") from error

    options = {"max_new_tokens": args.max_new_tokens, "repetition_penalty": args.repetition_penalty, "num_beams": 1}
    if args.greedy:
        options.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    else:
        options.update(do_sample=True, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k)
    if args.compile:
        options["compile_config"] = CompileConfig()
        try:  # of three tokens the last comes from a step that is there
            model.generate(**inputs, **options | {"max_new_tokens": 3})
        except NO_GENERATION as error:
            raise CommandError(f"{args.model} cannot be compiled: {reason(error)}") from error
    if args.seed is not None:
        torch.manual_seed(args.seed)
    streamer = TimedStreamer(tokenizer, args.skip_prompt)
    try:
        model.generate(**inputs, streamer=streamer, **options)
    except NO_GENERATION as error:
        raise CommandError(f"{args.model} cannot continue the prompt: {reason(error)}") from error
    prompt_at, first_at, *_, last_at = (*streamer.times, streamer.times[-1])
    spans = {"prefill": (ids.numel(), first_at - prompt_at), "decode": (len(streamer.times) - 2, last_at - first_at)}
    speeds = (f"{name} {n} tokens in {t:.2f} s ({n / t:.1f}/s)" for name, (n, t) in spans.items() if n)
    print(", ".join(speeds), file=sys.stderr)


def read_headers(directory: str) -> tuple[int, set[str], int, int]:
    """Numbers, dtypes, bytes and files of the weights, from the headers of the files alone."""
    folder = Path(directory)
    index = folder / "model.safetensors.index.json"
    count, dtypes, size = 0, set(), 0
    try:
        names = {"model.safetensors"}
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in names:
            with safe_open(folder / name, framework="pt") as file:
                tensors = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118
            count += sum(math.prod(tensor.get_shape()) for tensor in tensors)
            dtypes |= {tensor.get_dtype() for tensor in tensors}
            size += (folder / name).stat().st_size
    except DAMAGE as error:
        raise CommandError(f"The weights in {directory} cannot be read: {reason(error)}") from error
    if not count:
        raise CommandError(f"{directory} must hold the weights of an xLSTM, got files without any.")
    return count, dtypes, size, len(names)


def state_bytes(config: XLSTMConfig) -> int:
    """Size of the float32 state of one sequence: C, n, m or h, c, n, m, and the past of the convolution."""
    mlstm = config.qk_size * config.inner_size // config.num_heads + config.qk_size + config.num_heads
    if config.mlstm_block == "pre_up":
        mlstm += max(0, config.conv_kernel_size - 1) * config.inner_size
    slstm = (4 + max(0, config.slstm_conv_kernel_size - 1)) * config.hidden_size
    return 4 * sum(mlstm if kind == "mlstm" else slstm for kind in config.block_types or [])


def info(args: argparse.Namespace) -> None:
    """Prints the card of a checkpoint, from its config and the headers of its weights."""
    config = read_config(args.directory)
    tokenizer = read_tokenizer(args.directory)
    count, dtypes, size, files = read_headers(args.directory)
    if is_quantized(config):  # several numbers in one, and scales
        count = count_parameters(config)
    kinds = config.block_types or []
    block = (
        f", {config.mlstm_block.replace('_', '-')}, {config.mlstm_input_gate} input gate" if "mlstm" in kinds else ""
    )
    order = ", ".join(f"{len(list(run))} {kind[0]}LSTM" for kind, run in itertools.groupby(kinds))
    heads = {"mlstm": config.num_heads, "slstm": config.slstm_num_heads}
    share = 100 * config.vocab_size * config.hidden_size / count
    names = " and ".join(sorted(DTYPES.get(dtype, dtype) for dtype in dtypes))
    card = {
        "model": f"{args.directory} ({', '.join(config.architectures or ['unknown class'])})",
        "architecture": f"xLSTM[{config.ratio}]{block}",
        "blocks": f"{len(kinds)}: {order}",
        "width": f"{config.hidden_size}, " + ", ".join(f"{heads[k]} {k[0]}LSTM heads" for k in sorted(set(kinds))),
        "parameters": f"{count:,}, of which {share:.1f}% {'tied' if config.tie_word_embeddings else 'input'} embedding",
        "weights": f"{names}, {size:,} bytes in {files} file{'s' if files > 1 else ''}",
        "state": f"{state_bytes(config):,} bytes per sequence of any length",
        "vocabulary": f"{config.vocab_size:,}",
        "tokenizer": "none" if tokenizer is None else f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens",
    }
    for name, value in card.items():
        print(f"{name:<13} {value}")


def check_address(host: str, port: int) -> None:
    """Raises CommandError unless a server can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind((host, port))
    except (OSError, OverflowError, ValueError) as error:
        raise CommandError(f"The server cannot listen on port {port} of {host}: {reason(error)}") from error


def serve(args: argparse.Namespace) -> None:
    """Runs Transformers' own OpenAI-compatible server, with the classes of this package, until it is stopped."""
    if not is_serve_available():
        raise CommandError("The server needs packages that are missing: pip install 'transformers[serving]'.")
    if "--continuous-batching" in args.options:
        raise CommandError(NO_CONTINUOUS_BATCHING)
    import typer  # here, as no other command needs a part of Transformers' command line
    from transformers.cli.serve import Serve

    # where it looks for the class that a config.json names
    setattr(transformers, XLSTMForCausalLM.__name__, XLSTMForCausalLM)

    def start(**options: Any) -> None:
        model, failure = options["force_model"], "The server cannot start"
        if model is not None and os.path.exists(model):
            read_config(model)
        elif model is not None:  # on the Hub, or a mistake
            failure = f"The server cannot start with {model}, which is no directory here"
        check_address(options["host"], options["port"])  # before a model is loaded
        try:
            Serve(**options)
        except DAMAGE as error:
            raise CommandError(f"{failure}: {reason(error)}") from error

    start.__signature__ = inspect.signature(Serve)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=Serve.__doc__, epilog=f"\b\n{EXAMPLES}")(start)  # a paragraph after \b keeps its lines
    app(args.options, prog_name="python -m modeling_xlstm serve")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES}
    parser = Parser(prog="python -m modeling_xlstm", description=__doc__, **layout)
    commands = parser.add_subparsers(required=True, metavar="generate | info | serve")
    run = commands.add_parser("generate", help="stream a text", description=generate.__doc__, **layout)
    run.set_defaults(run=generate)
    card = commands.add_parser("info", help="print a card", description=info.__doc__, **layout)
    card.set_defaults(run=info)
    card.add_argument("directory", metavar="DIR", help="directory of a checkpoint; its weights are not loaded")
    # nothing starts with that character: all options are left to Transformers
    server = commands.add_parser("serve", help="run an OpenAI-compatible server", prefix_chars="\0", add_help=False)
    server.set_defaults(run=serve)
    server.add_argument("options", nargs=argparse.REMAINDER)

    positive = number(float, "from 1e-6 to 1e6", lambda x: 1e-6 <= x <= 1e6)
    share = number(float, "above 0 and at most 1", lambda x: 0 < x <= 1)
    count = number(int, "a positive integer", lambda x: x > 0)
    rank = number(int, "an integer of at least 0", lambda x: x >= 0)
    seed = number(int, "an integer from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = run.add_argument
    add("--model", required=True, metavar="DIR", help="directory of a checkpoint with its tokenizer")
    add("--prompt", required=True, metavar="TEXT", help="text to continue, - for standard input")
    add("--skip-prompt", action="store_true", help="print the continuation only")
    add("--max-new-tokens", type=count, default=128, metavar="N", help="tokens to add at most (%(default)s)")
    add("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    add("--temperature", type=positive, default=0.8, metavar="X", help="of the sampling (%(default)s)")
    add("--top-p", type=share, default=0.95, metavar="P", help="probability sampled from (%(default)s)")
    add("--top-k", type=rank, default=0, metavar="K", help="likeliest tokens sampled from, 0 for all (%(default)s)")
    add("--repetition-penalty", type=positive, default=1.0, metavar="X", help="above 1 against repeats (%(default)s)")
    add("--seed", type=seed, metavar="N", help="the same seed samples the same text")
    of_weights = "of the weights; auto: as on disk, but float32 on a CPU unless quantised"
    add("--dtype", choices=dtypes, default="auto", help=of_weights)
    add("--device", default=device, help="where to run, such as cpu or cuda:1 (%(default)s)")
    add("--compile", action="store_true", help="compile a step first, which takes a while and a C++ compiler")
    add("--backend", choices=BACKENDS, default="auto", help="kernels to run with (%(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 1 with one sentence on standard error."""
    args = build_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        args.run(args)
        print(end="", flush=True)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is still buffered goes
        if not isinstance(error, BrokenPipeError):  # of a reader that had enough
            print(f"error: Reading or writing failed: {error.strerror or error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
