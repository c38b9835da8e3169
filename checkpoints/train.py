"""Trains the demo model with `transformers.Trainer` on what `prepare_data.py` wrote, and saves it with its model card.

    python checkpoints/train.py --data DIR --out checkpoints/xlstm-demo --steps 2300

The blocks are those of the first paper, the last of them an sLSTM; `--slstm` takes those of xLSTM-7B instead.
With `--max-minutes` alone, a few rehearsal steps are timed and the schedule is sized to end in time; `--steps` fixes
its length. A run whose time is up stops cleanly, and goes on with `--resume`. No network is needed. The model card is
`model_card.md` with what was measured.
"""

import argparse
import csv
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from prepare_data import FILES
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, EvalPrediction, GenerationConfig, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, set_seed

import modeling_xlstm
from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM, count_parameters
from modeling_xlstm.__main__ import DAMAGE, Parser, number, reason
from modeling_xlstm.training_xlstm import XLSTMTrainer, last_checkpoint


STARTED = time.monotonic()
FINISH_SECONDS = 60  # of the budget, kept for the last evaluation, samples and saving
REHEARSAL, WARM = 16, 6  # steps, and how many of them are not timed
EVALUATIONS = 10  # while training
HELD_OUT_COLUMN = "held_out_bits_per_byte"  # in loss.csv
CARD = Path(__file__).with_name("model_card.md")
PROMPTS = [
    "It is a truth universally acknowledged, that",
    "KING HENRY.\nMy lord,",
    "And the LORD said unto",
    "The function returns",
    "To create a new table,",
]


class TrainWindows(Dataset):
    """Windows of consecutive tokens: passes over the whole stream, each cut at another random phase."""

    def __init__(self, tokens: np.ndarray, size: int, count: int, seed: int):
        self.tokens, self.size, self.count = tokens, size, count
        self.per_pass = len(tokens) // size - 1
        self.phases = np.random.default_rng(seed).integers(size, size=math.ceil(count / self.per_pass))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        turn, window = divmod(index, self.per_pass)
        start = self.phases[turn] + window * self.size
        ids = self.tokens[start : start + self.size].astype(np.int64)
        return {"input_ids": ids, "labels": ids}


def held_out_windows(tokens: np.ndarray, size: int, pad: int) -> list[dict[str, np.ndarray]]:
    """Windows that overlap by one token, so that every token but the first is predicted exactly once."""
    windows = []
    for start in range(0, len(tokens) - 1, size - 1):
        ids = tokens[start : start + size].astype(np.int64)
        missing = (0, size - len(ids))
        labels = np.pad(ids, missing, constant_values=-100)
        windows.append({"input_ids": np.pad(ids, missing, constant_values=pad), "labels": labels})
    return windows


def nats_of_windows(logits: Tensor, labels: Tensor) -> Tensor:
    """What the Trainer keeps of an evaluation batch instead of its logits: the summed loss of each window."""
    loss = F.cross_entropy(logits[:, :-1].float().mT, labels[:, 1:], ignore_index=-100, reduction="none")
    return loss.sum(1)


class Clock(TrainerCallback):
    """Times the steps of the rehearsal, and ends the training when its time is up."""

    def __init__(self, deadline: float = math.inf):
        self.deadline, self.marks = deadline, {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (WARM, REHEARSAL):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks[state.global_step] = time.monotonic()
        if time.monotonic() > self.deadline:
            control.should_training_stop = control.should_save = control.should_evaluate = True


def warmup_steps(args: argparse.Namespace, steps: int) -> int:
    return min(args.warmup_steps, steps // 10)


def make_trainer(
    args: argparse.Namespace, data: dict, model: XLSTMForCausalLM, steps: int, **options
) -> XLSTMTrainer:  # fmt: skip
    """A trainer for `steps` steps whose `evaluate` gives the bits per byte of the held-out text."""
    train = np.load(args.data / "train.npy", mmap_mode="r")
    held_out = np.load(args.data / "held_out.npy")

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        nats = float(prediction.predictions.sum(dtype=np.float64))
        return {"bits_per_byte": nats / math.log(2) / data["held_out"]["bytes"]}

    settings = {
        "output_dir": str(args.run),
        "max_steps": steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": warmup_steps(args, steps),
        "weight_decay": 0.1,  # of linear maps
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "bf16": torch.cuda.is_available(),
        "seed": args.seed,
        "logging_steps": max(1, steps // 200),
        "save_strategy": "no",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
    }
    return XLSTMTrainer(
        model,
        TrainingArguments(**{**settings, **options}),
        train_dataset=TrainWindows(train, args.window, steps * args.batch_size, args.seed),
        eval_dataset=held_out_windows(held_out, args.window, model.config.pad_token_id),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=nats_of_windows,
    )


def rehearse(args: argparse.Namespace, data: dict, config: XLSTMConfig) -> float:
    """Seconds of a training step, from a few steps of a model that is thrown away."""
    clock = Clock()
    trainer = make_trainer(args, data, XLSTMForCausalLM(config), REHEARSAL)
    trainer.add_callback(clock)
    trainer.train()
    return (clock.marks[REHEARSAL] - clock.marks[WARM]) / (REHEARSAL - WARM)


def plan(args: argparse.Namespace, data: dict, config: XLSTMConfig) -> dict:
    """The settings of the run; `steps` is given, sized to the budget, or that of the run to resume."""
    path = args.run / "plan.json"
    names = (
        "stack",
        "slstm",
        "width",
        "blocks",
        "heads",
        "batch_size",
        "window",
        "learning_rate",
        "warmup_steps",
        "dropout",
        "seed",
    )
    settings = {name: getattr(args, name) for name in names} | {"recipe": data["recipe"]}
    if args.resume:
        try:
            planned = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            sys.exit(f"error: {path} cannot be read, start without --resume: {error}")
        if settings.items() <= planned.items() and args.steps in (None, planned["steps"]):
            return planned
        sys.exit(f"error: --resume needs the settings of the run, {planned}; got {settings} and --steps {args.steps}.")
    if args.steps is None:
        seconds = rehearse(args, data, config)
        left = 60 * args.max_minutes - (time.monotonic() - STARTED) - FINISH_SECONDS
        # an evaluation only runs forward, a third of the work
        evaluation = data["held_out"]["tokens"] / (args.window * args.batch_size) * seconds / 3
        args.steps = int((0.97 * left / EVALUATIONS - evaluation) / seconds) * EVALUATIONS
        if args.steps < 1:
            least = f"{EVALUATIONS} steps of {seconds:.1f} s and {FINISH_SECONDS} s to finish"
            sys.exit(f"error: --max-minutes must leave time for {least}, got {args.max_minutes}.")
        print(f"{seconds:.3f} s a step: {args.steps} steps fit into {args.max_minutes} minutes")
    settings |= {"steps": args.steps, "seconds": 0.0}
    for earlier in args.run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):  # with which --resume would go on
        print(f"{earlier}, of a run before without --resume, is deleted")
        shutil.rmtree(earlier)
    write_plan(path, settings)
    return settings


def write_plan(path: Path, settings: dict) -> None:
    """In full or not at all: without it, nothing can be resumed."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(settings))
    os.replace(partial, path)


def write_curve(path: Path, log: list[dict], tokens_per_step: int) -> list[dict]:
    """The loss curve as CSV; returns its rows that hold an evaluation."""
    rows: dict[int, dict] = {}
    names = {"loss": "train_loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm",
             "eval_bits_per_byte": HELD_OUT_COLUMN}  # fmt: skip
    for entry in log:
        row = rows.setdefault(entry["step"], {"step": entry["step"], "tokens": entry["step"] * tokens_per_step})
        row.update({column: entry[name] for name, column in names.items() if name in entry})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "tokens", *names.values()])
        writer.writeheader()
        writer.writerows(rows.values())
    return [row for row in rows.values() if HELD_OUT_COLUMN in row]


def write_samples(model: XLSTMForCausalLM, tokenizer, seed: int) -> str:
    """Greedy and sampled continuations of the prompts, as Markdown."""
    set_seed(seed)
    lines = []
    for prompt in tqdm(PROMPTS, "samples", disable=None):
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        for title, options in (
            ("Greedy", {"do_sample": False}),
            ("Sampled", {"do_sample": True, "top_p": 0.95, "temperature": 0.8}),
        ):
            ids = model.generate(**inputs, max_new_tokens=96, **options)[0]
            lines += [f"{title}:", "```text", tokenizer.decode(ids, skip_special_tokens=True), "```", ""]
    return "\n".join(lines)


def write_card(args, data: dict, settings: dict, config: XLSTMConfig, measured: dict) -> None:
    """README.md from its template and measured values."""
    held_out, step, seconds = data["held_out"], measured["step"], settings["seconds"]
    device = f"{platform.machine()} CPU"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"
    tokens = step * args.batch_size * args.window
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    versions |= {module.__name__: module.__version__ for module in (transformers, modeling_xlstm)}
    card = CARD.read_text().format(
        args=args,
        config=config,
        train=data["train"],
        held_out=held_out,
        millions=count_parameters(config) / 1e6,
        minutes=seconds / 60,
        seconds=seconds,
        prompt=PROMPTS[0],
        bits=measured["bits_per_byte"],
        perplexity=2 ** (measured["bits_per_byte"] * held_out["bytes"] / (held_out["tokens"] - 1)),
        context=args.window - 1,
        curve="\n".join(
            f"| {row['step']:,} | {row['tokens']:,} | {row[HELD_OUT_COLUMN]:.3f} |" for row in measured["curve"]
        ),
        command=shlex.join(["python", *sys.argv]),
        blocks=" ".join(config.block_types),
        steps=f"{step:,}" if step == settings["steps"] else f"{step:,} of {settings['steps']:,}, as time was up",
        tokens=tokens,
        passes=tokens / data["train"]["tokens"],
        warmup=warmup_steps(args, settings["steps"]),
        device=device,
        rate=tokens / seconds,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        sources="\n".join(
            f"| {source['title']} | {source['licence']} | {', '.join(f'`{name}`' for name in source['archives'])} "
            f"| {source['train_bytes']:,} | {source['held_out_bytes']:,} |"
            for source in data["sources"]
        ),
        samples=measured["samples"],
    )
    (args.out / "README.md").write_text(card)


def main() -> None:
    count = number(int, "an integer from 1 to 2**31 - 1", lambda x: 0 < x < 2**31)
    above_zero = number(float, "above 0 and at most 1e6", lambda x: 0 < x <= 1e6)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the output of prepare_data.py")
    add("--out", type=Path, required=True, help="receives the model, tokenizer and model card")
    add("--run", type=Path, help="holds the state of the run; runs/NAME by default")
    add("--max-minutes", type=above_zero, help="time for everything after the imports")
    add("--steps", type=count, help="length of the schedule; by default what fits into --max-minutes")
    add("--resume", action="store_true", help="go on with the run in --run")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--stack", default="5:1", help="ratio of mLSTM to sLSTM blocks of the first paper (default: 5:1)")
    kind.add_argument("--slstm", type=int, nargs="*", help="blocks of xLSTM-7B, these numbers of them an sLSTM")
    add("--width", type=count, default=384)
    add("--blocks", type=count, default=6)
    add("--heads", type=count, default=4)
    add("--batch-size", type=count, default=128)
    add("--window", type=number(int, "an integer of at least 2", lambda x: x > 1), default=512)
    add("--learning-rate", type=above_zero, default=3e-3)
    add("--warmup-steps", type=number(int, "an integer of at least 0", lambda x: x >= 0), default=100)
    add("--dropout", type=number(float, "at least 0 and below 1", lambda x: 0 <= x < 1), default=0.1)
    add("--seed", type=number(int, "an integer from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32), default=0)
    args = parser.parse_args()
    if args.steps is None and args.max_minutes is None:
        parser.error("one of --steps and --max-minutes must be given.")
    if missing := [name for name in FILES if not (args.data / name).is_file()]:
        parser.error(f"--data must be the output of prepare_data.py, but {args.data} holds no {missing[0]}.")
    args.run = args.run or Path("runs", args.out.name)
    if args.resume and not (args.run / "plan.json").is_file():
        sys.exit(f"error: --resume needs a run to go on with, but {args.run / 'plan.json'} does not exist.")
    try:
        data = json.loads((args.data / "data.json").read_text())
        tokens = {part: len(np.load(args.data / f"{part}.npy", mmap_mode="r")) for part in ("train", "held_out")}
        if tokens != {part: data[part]["tokens"] for part in tokens}:
            raise ValueError(f"data.json must count the tokens of the parts, which are {tokens}, got others.")
        tokenizer = AutoTokenizer.from_pretrained(args.data)
    except (*DAMAGE, EOFError) as error:
        sys.exit(f"error: The data in {args.data} cannot be read: {reason(error)}")
    if tokens["train"] < 2 * args.window:
        parser.error(f"--window must be at most half of the {tokens['train']} tokens of train.npy, got {args.window}.")
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.width,
        "num_hidden_layers": args.blocks,
        "num_heads": args.heads,
        "dropout": args.dropout,
        "tie_word_embeddings": True,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    if beyond := [i for i in args.slstm or () if not 0 <= i < args.blocks]:
        parser.error(f"--slstm must be numbers of blocks, from 0 to {args.blocks - 1}, got {beyond[0]}.")
    try:
        if args.slstm is None:
            config = XLSTMConfig.from_ratio(args.stack, **options)
        else:
            block_types = ["slstm" if i in args.slstm else "mlstm" for i in range(args.blocks)]
            config = XLSTMConfig(block_types=block_types, **options)
    except (ValueError, StrictDataclassError) as error:
        parser.error(reason(error))
    for option, folder in (("--out", args.out), ("--run", args.run)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"{option} must be a directory that can be made, got {folder}: {error.strerror}.")
        if not os.access(folder, os.W_OK):
            parser.error(f"{option} must be a directory that can be written, got {folder}.")
    settings = plan(args, data, config)
    steps = settings["steps"]
    every = max(1, steps // EVALUATIONS)

    set_seed(args.seed)
    model = XLSTMForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {steps:,} steps of {args.batch_size * args.window:,} tokens")
    schedule = {"eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every}
    trainer = make_trainer(args, data, model, steps, eval_on_start=True, save_total_limit=1, **schedule)
    if args.max_minutes is not None:
        trainer.add_callback(Clock(STARTED + 60 * args.max_minutes - FINISH_SECONDS))
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=last_checkpoint(args.run) if args.resume else None)
    settings["seconds"] += time.monotonic() - start
    write_plan(args.run / "plan.json", settings)

    model.config.use_cache = True  # the Trainer switches it off
    model.save_pretrained(args.run / "float32")
    saved = XLSTMForCausalLM.from_pretrained(args.run / "float32", dtype=torch.bfloat16)
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    saved.generation_config = GenerationConfig(**special, pad_token_id=config.pad_token_id)
    saved.save_pretrained(args.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(args.data / name, args.out / name)

    # What is measured from here on is what was saved.
    in_float32 = XLSTMForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    result = make_trainer(args, data, in_float32, 1, bf16=False).evaluate()
    samples = write_samples(XLSTMForCausalLM.from_pretrained(args.out), tokenizer, args.seed)
    curve = write_curve(args.out / "loss.csv", trainer.state.log_history, args.batch_size * args.window)
    bits = result["eval_bits_per_byte"]
    measured = {"step": trainer.state.global_step, "bits_per_byte": bits, "curve": curve, "samples": samples}
    write_card(args, data, settings, config, measured)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"{bits:.4f} bits per byte held out; {size:,} bytes of weights in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # what the run has saved stays, for --resume
        sys.exit(130)
    except (RuntimeError, FloatingPointError, MemoryError, OSError, SafetensorError) as error:
        sys.exit(f"error: The training failed: {reason(error)}")
