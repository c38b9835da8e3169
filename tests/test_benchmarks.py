"""Benchmarks without a GPU: formulas and inputs of ops, tiny models that write, and what is said without a number."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from numerics import assert_exact

import benchmarks.__main__ as by_name
from benchmarks import cpu as cpu_benchmark
from benchmarks import generation, kernels, ops, quantization, resources, training
from benchmarks.command import run
from modeling_xlstm.fused import causal_lm_loss, soft_cap


SMALL = ops.Shape("small", B=1, T=3, H=2, K=4, V=8)
OP = {op.name: op for op in ops.OPS}
MACHINE = {"gpu": "a GPU", "torch": "2", "triton": "3", "copy GB/s": 2000.0, "matmul TFLOP/s": 500.0}


def fake_measurement(self, function, *args):
    """Ours takes 2 ms, peers 3 ms; the ceilings are those of `MACHINE`."""
    if function is ops.ceilings:
        return (2000.0, 500.0), ""
    return ((2.0 if args[-1] == ops.OURS else 3.0), 0.5), ""


@pytest.fixture
def machine(monkeypatch):
    """A GPU and all peers, as far as anyone asks, and green tests."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(ops, "find_spec", lambda package: package)
    monkeypatch.setattr(ops, "obstacle", lambda tests: "")
    monkeypatch.setattr(ops.Worker, "attempt", fake_measurement)


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(ops, "DEVICE", "cpu")


def rows_of_all_ops():
    return [
        ops.row_of(op, shape, peer, (2.0 + i, 0.5), "", (2.0, 0.5), MACHINE)
        for op in ops.OPS
        for shape in op.shapes
        for i, peer in enumerate(op.implementations)
    ]


# what is counted


def test_bytes_and_flops_are_those_counted_by_hand():
    tokens = 1 * 3 * 2
    q, k, v, gates, h = tokens * 4 * 2, tokens * 4 * 2, tokens * 8 * 2, tokens * 2 * 4, tokens * 8 * 2
    assert OP["mlstm forward"].traffic(SMALL) == q + k + v + gates + h == 336
    backward = (q + k + v + gates + h) + (q + k + v + gates)
    assert OP["mlstm forward + backward"].traffic(SMALL) == 336 + backward == 912
    # k v^T and q C, then q k^T and (q k^T) v with (256 + 1) / 2 tokens
    assert OP["mlstm forward"].flops(SMALL) == tokens * (2 * 32 + 2 * 32 + 257 * 4 + 257 * 8) == 19272
    assert OP["mlstm forward + backward"].flops(SMALL) == 3 * 19272
    state, token = 2 * (32 + 4 + 1) * 4, 2 * (4 + 4 + 8 + 8) * 2 + 2 * 2 * 4
    assert OP["mlstm step"].traffic(SMALL) == 2 * state + token == 704
    assert OP["mlstm step"].flops(SMALL) == 2 * (2 * 32 + 2 * 32)
    assert OP["gated head norm"].traffic(SMALL) == 3 * (tokens * 8 * 2) + 16 * 2 == 320
    assert OP["gated head norm"].flops(SMALL) == 0
    gates, R, h = 1 * 3 * 2 * 4 * 4 * 2, 2 * 4 * 4 * 4 * 2, tokens * 4 * 2
    assert OP["slstm forward"].traffic(SMALL) == gates + R + h == 496
    assert OP["slstm forward + backward"].traffic(SMALL) == 496 + 2 * (gates + R) + h == 1440
    assert OP["slstm forward"].flops(SMALL) == tokens * 4 * 2 * 16
    assert OP["slstm forward + backward"].flops(SMALL) == 3 * tokens * 4 * 2 * 16
    hidden, projection, labels = 3 * 4 * 2, 8 * 4 * 2, 3 * 8
    assert OP["loss forward + backward"].traffic(SMALL) == 2 * (hidden + projection) + labels == 200
    assert OP["loss forward + backward"].flops(SMALL) == 3 * (2 * 3 * 4 * 8)


@pytest.mark.parametrize("op", ["mlstm forward", "mlstm step", "mlstm gated step", "gated head norm"])
def test_bytes_are_those_of_inputs_and_outputs(op, cpu):
    x = OP[op].inputs(SMALL)
    output = x["h" if op == "gated head norm" else "v"]
    written = [output, *(x[name] for name in ("C", "n", "m") if name in x)]
    assert OP[op].traffic(SMALL) == sum(t.nbytes for t in [*x.values(), *written])


def test_a_share_is_the_time_at_the_ceiling_and_not_of_what_computes_something_else():
    op = OP["mlstm forward"]
    ours, *_, attention = op.implementations
    row = ops.row_of(op, op.shapes[0], ours, (2.0, 0.5), "", (2.0, 0.5), MACHINE)
    assert row["of copy"] == pytest.approx(op.traffic(op.shapes[0]) / 2e-3 / 2000e9)
    assert row["of matmul"] == pytest.approx(op.flops(op.shapes[0]) / 2e-3 / 500e12)
    row = ops.row_of(op, op.shapes[0], attention, (3.0, 0.5), "", (2.0, 0.5), MACHINE)
    assert row["of ours"] == 1.5
    assert row["of copy"] is None and row["of matmul"] is None and "attention" in row["remark"]


def test_names_are_unique_and_ours_comes_first():
    assert len(OP) == len(ops.OPS)
    for op in ops.OPS:
        for names in ([shape.name for shape in op.shapes], [peer.name for peer in op.implementations]):
            assert len(set(names)) == len(names)
        assert op.implementations[0].name == ops.OURS


# what runs


@pytest.mark.parametrize("op", OP)
def test_every_op_has_tests_that_exist(op):
    files = [ops.ROOT / argument.partition("::")[0] for argument in OP[op].tests if not argument.startswith("-")]
    assert files and all(file.is_file() for file in files)


@pytest.mark.parametrize("op", ["mlstm forward", "mlstm forward + backward"])
def test_a_peer_runs_in_a_layout_of_its_own(op, cpu):
    shape = ops.Shape("small", B=2, T=5, H=2, K=64, V=128)
    (sdpa,) = (peer for peer in OP[op].implementations if peer.name == "sdpa")
    h, *grads = ops.prepared(OP[op], shape, sdpa)()
    assert h.shape == (2, 2, 5, 128)
    assert [grad.shape for grad in grads] == ([h.shape] * 3 if OP[op].backward else [])


@pytest.mark.parametrize("op", ["slstm forward", "slstm forward + backward"])
def test_an_lstm_runs_as_a_module(op, cpu):
    (lstm,) = (peer for peer in OP[op].implementations if peer.name == "cuDNN LSTM")
    h, *grads = ops.prepared(OP[op], ops.Shape("small", B=2, T=5, H=2, K=8, V=8), lstm)()
    assert h.shape == (2, 5, 16)
    assert [grad.shape for grad in grads] == ([h.shape] if OP[op].backward else [])


def test_the_formula_of_the_head_norm_is_right(cpu):
    (formula,) = (peer for peer in OP["gated head norm"].implementations if peer.name == "formula")
    x = {name: t.double() for name, t in OP["gated head norm"].inputs(SMALL).items()}
    h = x["h"] - x["h"].mean(-1, keepdim=True)
    h = h / (h.square().mean(-1, keepdim=True) + ops.EPS).sqrt()
    assert_exact(formula.load()(**x), h.flatten(-2) * x["weight"] / (1 + (-x["o"]).exp()))


def test_the_formula_of_the_loss_is_right(cpu):
    shape = ops.Shape("small", B=2, T=5, H=1, K=8, V=30)
    op = OP["loss forward + backward"]
    (formula,) = (peer for peer in op.implementations if peer.name == "formula")
    loss, *grads = ops.prepared(op, shape, formula)()
    assert loss.shape == () and [grad.shape for grad in grads] == [(10, 8), (30, 8)]
    x = op.inputs(shape)
    logits = soft_cap(x["x"] @ x["weight"].t(), ops.CAP)
    expected = 10 * causal_lm_loss(logits[None], None, 30, shift_labels=x["labels"][None])
    torch.testing.assert_close(ops.loss_by_formula(**x), expected, atol=0.05, rtol=0.01)  # these logits are rounded


def test_the_module_imports_no_peer_and_no_triton():
    packages = {"triton", *(peer.package for op in ops.OPS for peer in op.implementations)} - {"torch"}
    code = f"import sys, benchmarks.ops; print({packages} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ops.ROOT, capture_output=True, text=True)
    assert run.stdout == "set()\n"


def test_inputs_fit_our_ops(cpu):
    from modeling_xlstm import MLSTMState, mlstm_chunkwise, mlstm_step, slstm_scan

    h, _ = mlstm_chunkwise(**OP["mlstm forward"].inputs(SMALL))
    assert h.shape == (1, 3, 2, 8)
    x = OP["mlstm step"].inputs(SMALL)
    state = MLSTMState(*(x.pop(name) for name in MLSTMState._fields))
    assert mlstm_step(**x, state=state)[0].shape == (1, 2, 8)
    assert slstm_scan(**OP["slstm forward"].inputs(SMALL))[0].shape == (1, 3, 2, 4)


def test_a_process_that_ends_is_a_sentence_and_the_next_one_works():
    worker = ops.Worker()
    result, error = worker.attempt(os._exit, 3)
    assert result is None and "terminated abruptly" in error
    assert worker.attempt(int, "no number") == (
        None,
        "ValueError: invalid literal for int() with base 10: 'no number'",
    )
    assert worker.attempt(abs, -3) == (3, "")
    worker.close()


# what is said


@pytest.mark.parametrize(
    "test, sentence", [("assert True", ""), ("assert False", "1 failed"), ("__import__('pytest').skip()", "1 skipped")]
)
def test_only_tests_that_pass_are_green(tmp_path, test, sentence):
    file = tmp_path / "test_it.py"
    file.write_text(f"def test_it():\n    {test}\n")
    found = ops.obstacle((str(file),))
    assert sentence in found and bool(found) == bool(sentence)


def test_tests_that_are_not_there_are_not_green():
    assert "no tests ran" in ops.obstacle(("tests/test_of_nothing.py",))


def test_a_red_test_means_no_number(machine, monkeypatch, capsys):
    red = OP["mlstm forward"].tests
    monkeypatch.setattr(ops, "obstacle", lambda tests: "1 failed" if tests == red else "")
    ops.main([])
    sections = dict(text.split(":", 1) for text in capsys.readouterr().out.split("\n\nmlstm ")[1:])
    for op in ("forward", "forward + backward"):
        assert "No speed without correct results: 1 failed" in sections[op]
        assert "|" not in sections[op] and "2.0000" not in sections[op]
    assert "| 7B-1-token | modeling_xlstm | 2.0000 | 1.00 | 0.50 |" in sections["step"]


def test_nothing_measured_is_an_error(machine, monkeypatch):
    monkeypatch.setattr(ops, "obstacle", lambda tests: "1 failed")
    with pytest.raises(SystemExit, match="Nothing was measured."):
        ops.main([])


def test_a_missing_peer_is_a_sentence(machine, monkeypatch, capsys):
    monkeypatch.setattr(ops, "find_spec", lambda package: None if package == "fla" else package)
    ops.main(["--op", "mlstm forward"])
    printed = capsys.readouterr().out
    assert printed.count("Not measured: fla, which is not installed.") == 1
    assert "simple_gla" not in printed and "| 7B | sdpa | 3.0000 | 1.50 |" in printed


def test_a_peer_that_fails_is_a_sentence(machine, monkeypatch, capsys):
    def attempt(self, function, *args):
        return (None, "RuntimeError: no") if "sdpa" in args else fake_measurement(self, function, *args)

    monkeypatch.setattr(ops.Worker, "attempt", attempt)
    ops.main(["--op", "mlstm forward", "--shape", "7B"])
    assert "| 7B | sdpa |  |  |  |  |  | RuntimeError: no |" in capsys.readouterr().out


def test_peers_and_shapes_can_be_chosen(machine, capsys):
    ops.main(["--op", "mlstm forward", "--shape", "1M", "--peers", "mlstm_kernels", "sdpa"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 1M")]
    kernels = ["limit_chunk-64", "xl_chunk-128", "xl_chunk-256", "xl_siging-128"]
    assert [line[1] for line in lines] == ["modeling_xlstm", *kernels, "sdpa"]
    ops.main(["--op", "mlstm forward"])
    assert "1M" not in capsys.readouterr().out


def test_a_table_survives_its_file(machine, tmp_path):
    file = tmp_path / "ops.csv"
    ops.main(["--csv", str(file)])
    rows = ops.read(file)
    assert len(rows) == sum(len(op.implementations) * sum(not s.optional for s in op.shapes) for op in ops.OPS)
    assert {"bytes", "FLOPs", "of copy", "of matmul", "extra GiB", "chunk", *ops.TEXTS, *ops.SHOWN} <= rows[0].keys()
    ops.write(rows_of_all_ops(), file)
    assert ops.read(file) == rows_of_all_ops()


@pytest.mark.parametrize("suffix, start", [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_table_is_drawn_without_a_gpu(tmp_path, suffix, start):
    table, plot = tmp_path / "ops.csv", tmp_path / f"ops.{suffix}"
    ops.write(rows_of_all_ops(), table)
    ops.main(["--from-csv", str(table), "--plot", str(plot)])
    assert plot.read_bytes().startswith(start)


@pytest.mark.parametrize("arguments", [["--from-csv", "ops.csv"], ["--plot", "ops.jpeg"]])
def test_what_cannot_be_drawn_is_refused_in_a_sentence(arguments, capsys):
    with pytest.raises(SystemExit):
        ops.main(arguments)
    assert "Drawing needs matplotlib and --plot with a file that ends in .svg or .png" in capsys.readouterr().err


def test_without_a_gpu_the_command_ends_in_a_sentence():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.ops"],
        cwd=ops.ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and not run.stdout
    assert run.stderr == "Ops are measured on a CUDA GPU, and PyTorch finds none here.\n"


# whole models


class Here:
    """In place of a process of its own."""

    def attempt(self, function, *args):
        return function(*args), ""

    def close(self):
        pass


@pytest.fixture
def tiny(monkeypatch, capsys):
    """Runs sections with tiny models on a CPU, in this process; returns the rows of all tables, and what is printed."""
    monkeypatch.setattr(generation, "DEVICE", "cpu")
    monkeypatch.setattr(generation, "Worker", Here)
    monkeypatch.setattr(generation.transformers.logging, "set_verbosity_error", lambda: None)

    def run(*sections):
        generation.main([*sections, "--tiny"])
        printed = capsys.readouterr().out
        rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
        return [row for row in rows if row[0] != "model"], printed

    return run


PEERS_ON_CPU = {
    "generate": [generation.OURS, generation.EAGER, generation.NATIVE, generation.LLAMA],
    "first": [generation.OURS, generation.NATIVE],
    "prefill": [generation.OURS, generation.NATIVE, generation.LLAMA],
    "long": [generation.OURS],
}


@pytest.mark.parametrize("section", PEERS_ON_CPU)
def test_each_peer_has_two_rows_in_a_table(section, tiny):
    rows, printed = tiny(section)
    here = [peer for peer in PEERS_ON_CPU[section] if not generation.missing(generation.PEERS[peer])]
    assert [row[0] for row in rows] == [peer for peer in here for _ in range(2)]
    assert printed.startswith(f"{generation.platform.machine()}, bfloat16, torch ")
    missing = set(generation.SECTIONS[section].peers) - set(here)
    assert printed.count("Not measured: ") == len(missing) and all(
        f"Not measured: {peer}, " in printed for peer in missing
    )


def test_prompts_take_turns_and_lookup_is_compared_with_plain_generation(tiny):
    rows, _ = tiny("position", "lookup")
    assert [row[1] for row in rows[:2]] == ["8", "64"] and rows[0][-1] == "1.000"
    assert [row[2] for row in rows[2:]] == ["0", "10", "5"] * 2
    assert all(row[-1] == "8 of 8" for row in rows[2:5])
    assert [row[4:6] for row in (rows[2], rows[5])] == [["1.00", "0.00"]] * 2


def test_a_model_is_measured_in_a_process_of_its_own(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not generation.table("position", generation.SECTIONS["position"], generation.TINY)
    assert capsys.readouterr().out.count("| modeling_xlstm | ") == 2


def test_models_that_fail_are_sentences_and_ours_an_error(tiny, monkeypatch, capsys):
    def attempt(self, function, name, sizes):
        return (None, "RuntimeError: no") if name != generation.LLAMA else (function(name, sizes), "")

    monkeypatch.setattr(Here, "attempt", attempt)
    monkeypatch.setattr(generation, "missing", lambda peer: "")
    with pytest.raises(SystemExit, match="^prefill: RuntimeError: no$"):
        tiny("prefill")
    printed = capsys.readouterr().out
    assert f"Not measured: {generation.NATIVE}, RuntimeError: no\n" in printed
    (first, _) = (line for line in printed.splitlines() if line.startswith("| Llama | "))
    assert first.endswith(" |  |")  # nothing of ours to compare with


def test_another_text_than_plain_is_an_error(tiny, monkeypatch):
    row = {"after": "a text", "drafted": 5, "tokens/s": 1.0, "of plain": 1.0, "accepted a pass": 0.0}
    row |= {"as plain": "7 of 8", "wrong": True}
    monkeypatch.setattr(Here, "attempt", lambda self, *args: ([row], ""))
    with pytest.raises(SystemExit, match="lookup: another text than plain after a text"):
        tiny("lookup")


def test_models_need_a_gpu_and_sections_a_name(monkeypatch, capsys):
    monkeypatch.setattr(generation, "DEVICE", "cpu")
    with pytest.raises(SystemExit, match="measured on a CUDA GPU, and PyTorch finds none here; --tiny needs none."):
        generation.main([])
    with pytest.raises(SystemExit):
        generation.main(["--tiny", "speed"])
    assert "Sections are generate, first, prefill, long, position, lookup, got speed." in capsys.readouterr().err


@pytest.fixture
def tiny_training(monkeypatch, capsys):
    """Runs sections with tiny models on a CPU, in this process; returns the rows of all tables."""
    monkeypatch.setattr(training, "DEVICE", "cpu")
    monkeypatch.setattr(training, "Worker", Here)

    def run(*sections):
        training.main([*sections, "--tiny"])
        lines = capsys.readouterr().out.splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
        return [row for row in rows if row[0] != "model"]

    return run


def test_each_model_takes_steps_on_each_batch(tiny_training):
    rows = tiny_training("step", "stack")
    section, batches = training.SECTIONS["step"], ("2 x 64", "1 x 128")
    expected = [(peer, batch) for batch in batches for peer in section.peers]
    expected += [(peer, "2 x 64") for peer in training.SECTIONS["stack"].peers]
    assert [tuple(row[:2]) for row in rows] == expected
    assert all(float(row[3]) > 0 for row in rows)
    assert [row[-1] for row in rows if row[0] in (training.OURS, training.ONLY_MLSTM)] == 3 * ["1.00"]


def test_a_model_that_does_not_train_is_a_sentence_and_ours_an_error(tiny_training, monkeypatch):
    monkeypatch.setattr(Here, "attempt", lambda self, *args: (None, "RuntimeError: no"))
    with pytest.raises(SystemExit) as stop:
        tiny_training("step")
    ours = (training.OURS, training.ALONE)
    assert str(stop.value).splitlines() == [f"{name}: RuntimeError: no" for name in ours] * 2


def test_training_is_measured_on_a_gpu_only(monkeypatch, capsys):
    monkeypatch.setattr(training, "DEVICE", "cpu")
    with pytest.raises(SystemExit, match="measured on a CUDA GPU, and PyTorch finds none here; --tiny needs none."):
        training.main([])
    with pytest.raises(SystemExit):
        training.main(["--tiny", "speed"])
    assert "Sections are step, compiled, stack, got speed." in capsys.readouterr().err


# command lines


def test_a_benchmark_is_run_by_its_name_with_its_own_options(monkeypatch):
    called = []
    monkeypatch.setattr(cpu_benchmark, "main", called.append)
    by_name.main(["cpu", "--rounds", "1"])
    assert called == [["--rounds", "1"]]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("", "the following arguments are required: NAME"),
        ("speed", "invalid choice: 'speed'"),
        ("cpu --rounds 0", "must be an integer of at least 1, got 0"),
        ("cpu --rounds many", "must be an integer of at least 1, got many"),
        ("cpu --csv nowhere/cpu.csv", "must be a file that can be written in a directory that exists, got nowhere/"),
        ("ops --plot benchmarks", "must be a file that can be written in a directory that exists, got benchmarks"),
        ("kernels --set scores", "must be FIELD=A,B,... with integers, got scores"),
        ("kernels --shape 1 2 3 4 0", "must be an integer of at least 1, got 0"),
        ("resources 64", "must be pairs of head sizes, got 1 numbers"),
        ("resources 64 0", "must be an integer of at least 1, got 0"),
        ("quality languages --seeds 0", "must be an integer of at least 1, got 0"),
        ("quality languages --steps 10", "must be an integer of at least 11, got 10"),
        ("quality languages --learning-rate nan", "must be above 0 and at most 1, got nan"),
        (
            "quality text --data tests",
            "output of checkpoints/prepare_data.py, got tests, which holds no data.json.",
        ),
        ("quantization --data README.md", "got README.md, which holds no held_out.npy."),
        ("quantization --data tests --windows 0", "must be an integer of at least 2, got 0"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(argv, sentence, monkeypatch, capsys):
    monkeypatch.chdir(ops.ROOT)
    with pytest.raises(SystemExit) as stop:
        by_name.main(argv.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert err.startswith("python -m benchmarks") and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("kernels", "Kernels are measured on a CUDA GPU, and PyTorch finds none here."),
        ("ops --from-csv nowhere.csv --plot ops.svg", "got nowhere.csv: No such file or directory."),
        ("ops --from-csv README.md --plot ops.svg", "got README.md: it lacks rows or columns."),
        ("quantization --data data --device cuda", "--device cuda must have a CUDA GPU, and PyTorch finds none here."),
        ("quantization --data data", "The held-out text in data cannot be read: "),
    ],
)
def test_what_cannot_be_measured_is_one_sentence_and_exit_code_1(argv, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(quantization, "obstacle", lambda tests: "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("README.md", "data/held_out.npy", "data/tokenizer.json"):
        (tmp_path / name).write_text("nothing of use", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        by_name.main(argv.split())
    assert sentence in str(stop.value.code) and "\n" not in str(stop.value.code)


@pytest.mark.parametrize(
    ("module", "argv", "package", "sentence"),
    [
        (cpu_benchmark, [], "xlstm", "got no xlstm: it is not installed."),
        (quantization, ["--data", "."], "torchao", "got no torchao: it is not installed."),
        (kernels, [], "triton", "Kernels are compiled by triton, which is not installed."),
        (resources, [], "triton", "one of them is not here."),
    ],
)
def test_a_missing_package_is_one_sentence(module, argv, package, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else find_spec(name))
    monkeypatch.setattr(quantization, "check_data", lambda *args: None)
    with pytest.raises(SystemExit, match=sentence):
        module.main(argv)


def test_an_interrupt_is_no_stack_trace():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run(interrupted)
    assert stop.value.code == 130


def test_a_wrong_number_of_sizes_of_a_kernel_is_refused(monkeypatch):
    x = torch.zeros(1, 16, 1, 16)
    monkeypatch.setattr(kernels, "inputs", lambda *shape: [x] * 6)
    with pytest.raises(ValueError, match=r"scores must have values like \(.*\), got 64."):
        kernels.measure(1, 16, 1, 16, 16, {"scores": 64})
