"""Runs a benchmark by its name: `python -m benchmarks cpu` is `python -m benchmarks.cpu`, options included.

`python -m benchmarks NAME --help` says what it measures and how, which options it has, and how to call it.
"""

import argparse
from importlib import import_module

from benchmarks.command import command_line, run


BENCHMARKS = {
    "cpu": "whole models on a CPU beside their peers",
    "generation": "whole models that write, on one GPU beside their peers",
    "training": "steps of training whole models, on one GPU beside their peers",
    "quality": "what small models learn, beside a Llama of their size",
    "quantization": "what quantised weights cost in perplexity",
    "stress": "what rounding adds up to over a long text",
    "ops": "single ops on one GPU beside their peers",
    "kernels": "single Triton kernels of the mLSTM on one GPU",
    "resources": "what these kernels need of a GPU, as the compiler has it",
    "scaling": "what a step costs on many GPUs, by formulas",
    "pictures": "the tables of notebooks/benchmarks.md, drawn",
}
EXAMPLES = """examples:
  python -m benchmarks cpu --tiny --rounds 1
  python -m benchmarks generation position --tiny
  python -m benchmarks quality languages --tiny --seeds 1 --models xLSTM-7B
  python -m benchmarks resources 64 64 --arch 80

on a GPU:
  python -m benchmarks ops --op "mlstm forward"
  python -m benchmarks generation
"""


def build_parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<14}{measures}" for name, measures in BENCHMARKS.items())
    parser = command_line("", __doc__, f"benchmarks:\n{names}\n\n{EXAMPLES}")
    parser.add_argument("name", metavar="NAME", choices=BENCHMARKS, help="of a benchmark")
    options = parser.add_argument("options", metavar="...", nargs=argparse.REMAINDER, help="its own options")
    options.required = False
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    import_module(f"benchmarks.{args.name}").main(args.options)


if __name__ == "__main__":
    run(main)
