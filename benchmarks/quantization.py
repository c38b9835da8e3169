"""What quantised weights cost in perplexity: `python -m benchmarks.quantization --data DIR [--device cuda]`.

`DIR` is the output of `checkpoints/prepare_data.py`. The trained `checkpoints/xlstm-demo` reads the held-out text in
each form: the same windows of 512 tokens, spread evenly over the text, which is read with the model's own tokenizer.
The tests of quantised models run first, and nothing is printed if they fail.

The cost is the change of perplexity from bfloat16, the form on disk, and its standard error that of the mean difference
over the windows. Bytes are those of all weights in memory, scales included.
"""

import argparse
import logging
import math
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

import modeling_xlstm  # noqa: F401  # registers xLSTM with the Auto classes

from .command import check_data, command_line, integer, run, show
from .ops import ROOT, obstacle


MODEL = ROOT / "checkpoints" / "xlstm-demo"
WINDOW, BATCH, IGNORED = 512, 32, -100
TESTS = ("tests/test_quantization.py",)
PACKAGES = ("bitsandbytes", "torchao")
EXAMPLES = """with what `python checkpoints/prepare_data.py --cache .` fetches from the network:
  python -m benchmarks quantization --data data --windows 8
  python -m benchmarks quantization --data data --device cuda  # on a GPU
"""


def torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def torchao_int4(group_size: int, device: str) -> TorchAoConfig:
    """In a layout of torchao that the device can multiply with."""
    if device == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=group_size))
    from torchao.quantization import Int4WeightOnlyConfig

    return TorchAoConfig(Int4WeightOnlyConfig(group_size=group_size, int4_packing_format="tile_packed_to_4d"))


QUANTIZED: dict[str, Callable[[str], BitsAndBytesConfig | TorchAoConfig]] = {
    "bitsandbytes 8-bit": lambda device: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4-bit (nf4)": lambda device: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao int8": lambda device: torchao_int8(),
    "torchao int4, groups of 64": lambda device: torchao_int4(64, device),
    "torchao int4, groups of 32": lambda device: torchao_int4(32, device),
}


def forms(device: str) -> dict[str, dict[str, Any]]:
    """Names and options of `from_pretrained`, the form on disk first."""
    plain = {dtype: {"dtype": dtype} for dtype in ("bfloat16", "float32")}
    return plain | {name: {"quantization_config": config(device)} for name, config in QUANTIZED.items()}


def read_tokens(data: Path) -> np.ndarray:
    """The held-out text in tokens of the model; `data` may hold another tokenizer."""
    text = AutoTokenizer.from_pretrained(data).decode(np.load(data / "held_out.npy"))
    return np.array(AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"])


def windows(tokens: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Ids and labels `[count, WINDOW]`, evenly from all windows, which overlap by the token that only one predicts."""
    total = math.ceil((len(tokens) - 1) / (WINDOW - 1))
    chosen = np.linspace(0, total - 1, min(count, total)).astype(int)
    at = chosen[:, None] * (WINDOW - 1) + np.arange(WINDOW)
    ids = torch.from_numpy(tokens[at.clip(max=len(tokens) - 1)])
    return ids, torch.where(torch.from_numpy(at < len(tokens)), ids, IGNORED)


@torch.no_grad()
def window_losses(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """The loss of each window, summed over its tokens, in float64 on the CPU."""
    losses = []
    for x, y in zip(ids.split(BATCH), labels.split(BATCH), strict=True):
        logits = model(x.to(model.device), use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.mT, y[:, 1:].to(model.device), ignore_index=IGNORED, reduction="none")
        losses.append(loss.double().sum(1).cpu())
    return torch.cat(losses)


def parts(weight: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a weight, which may be of a class that packs it into several."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from parts(getattr(weight, name))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights in memory, scales and tables included, tied ones once."""
    tensors = [part for weight in model.state_dict().values() for part in parts(weight)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def cost(losses: Tensor, baseline: Tensor, tokens: Tensor) -> str:
    """The change of perplexity and its standard error, that of a ratio of sums over windows."""
    difference = (losses - baseline).sum() / tokens.sum()
    error = (losses - baseline - difference * tokens).std() * len(tokens) ** 0.5 / tokens.sum()
    return f"{100 * difference.expm1():+.2f} % ± {100 * error:.2f}"


def build_parser() -> argparse.ArgumentParser:
    parser = command_line("quantization", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="the output of checkpoints/prepare_data.py")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (%(default)s)")
    add("--windows", type=integer(2), default=128, metavar="N", help="how many to read, at most all (%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    check_data(parser, args.data, "held_out.npy", "tokenizer.json")
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        sys.exit(f"Weights are quantised by {' and '.join(PACKAGES)}, got no {missing[0]}: it is not installed.")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda must have a CUDA GPU, and PyTorch finds none here.")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at each product that it multiplies in float16
    if reason := obstacle(TESTS):
        sys.exit(f"No numbers without correct results: {reason}")

    try:
        ids, labels = windows(read_tokens(args.data), args.windows)
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"The held-out text in {args.data} cannot be read: {error}")
    tokens = (labels[:, 1:] != IGNORED).sum(1).double()
    machine = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name()
    packages = ("torch", "transformers", *PACKAGES)
    print(f"{int(tokens.sum()):,} tokens, {machine}, " + ", ".join(f"{name} {version(name)}" for name in packages))
    show("| weights | bytes | perplexity | cost |\n|---|---|---|---|")
    baseline = None
    for name, options in tqdm(forms(args.device).items(), "forms", disable=None):
        model = AutoModelForCausalLM.from_pretrained(MODEL, device_map=args.device, **options)
        size, losses = weight_bytes(model), window_losses(model, ids, labels)
        shown = "" if baseline is None else cost(losses, baseline, tokens)
        baseline = losses if baseline is None else baseline
        perplexity = (losses.sum() / tokens.sum()).exp()
        show(f"| {name} | {size:,} | {perplexity:.3f} | {shown} |")


if __name__ == "__main__":
    run(main)
