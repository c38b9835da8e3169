"""What `benchmarks/quality.py` trains with: automata, windows, sizes; and what it says, with tiny models on a CPU."""

import json
import math
import re
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from benchmarks import quality


class Here:
    """In place of the executor: the process of the test."""

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except RuntimeError as error:
            future.set_exception(error)
        return future


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(quality, "DEVICE", "cpu")
    monkeypatch.setattr(quality, "ProcessPoolExecutor", Here)


@pytest.fixture
def data(tmp_path):
    """A text as `prepare_data.py` writes it: each token is the one before and one."""
    np.save(tmp_path / "train.npy", (np.arange(500) % 40).astype(np.uint16))
    np.save(tmp_path / "held_out.npy", (np.arange(50) % 40).astype(np.uint16))
    (tmp_path / "data.json").write_text(json.dumps({"held_out": {"bytes": 98}}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(i): i for i in range(40)}}}))
    return tmp_path


def rows(printed):
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return [line for line in lines if line[0] != "learned"]


# languages


def run(table, symbols):
    state, states = 0, []
    for symbol in symbols:
        state = table[state][symbol].item()
        states.append(state)
    return states


def test_automata_are_those_of_their_languages():
    symbols = torch.randint(2, (50,)).tolist()
    assert run(quality.parity(), symbols) == [sum(symbols[: i + 1]) % 2 for i in range(50)]
    digits = torch.randint(5, (50,)).tolist()
    assert run(quality.counting(), digits) == [sum(digits[: i + 1]) % 5 for i in range(50)]
    values, value, symbols = [], 0, torch.randint(14, (50,)).tolist()
    for symbol in symbols:
        operator, digit = divmod(symbol, 5)
        value = [value + digit, value - digit, value * (digit + 1)][operator] % 5
        values.append(value)
    assert run(quality.arithmetic(), symbols) == values


@pytest.mark.parametrize("language", quality.LANGUAGES_BY_NAME)
def test_words_are_what_the_automaton_reads(language):
    table = quality.LANGUAGES_BY_NAME[language]()
    symbols, states = quality.words(table, 3, 20, torch.Generator().manual_seed(0))
    for word, expected in zip(symbols, states, strict=True):
        assert run(table, word.tolist()) == expected.tolist()
    assert len(set(symbols.flatten().tolist())) == table.shape[1]


@pytest.mark.parametrize("language", quality.LANGUAGES_BY_NAME)
def test_no_symbol_makes_a_model_forget(language):
    """So that all that came before matters: each symbol permutes the states."""
    table = quality.LANGUAGES_BY_NAME[language]()
    assert all(sorted(column) == list(range(len(table))) for column in table.t().tolist())


# text


def test_each_token_but_the_first_is_predicted_once():
    tokens, size = torch.arange(103), quality.TINY._replace(batch=3, length=10)
    windows = list(quality.all_windows(tokens, size))
    assert all(torch.equal(targets, ids + 1) for ids, targets in windows)
    assert torch.cat([targets.flatten() for _, targets in windows]).tolist() == list(range(1, 103))
    assert {ids.shape for ids, _ in windows} == {(3, 10), (1, 10), (1, 2)}


def test_all_models_read_the_same_windows_and_another_seed_reads_others(here):
    tokens, size = torch.arange(500), quality.TINY
    first, again, other = (list(quality.random_windows(tokens, size, seed)) for seed in (0, 0, 1))
    assert len(first) == size.steps
    for (ids, targets), (same_ids, _), (other_ids, _) in zip(first, again, other, strict=True):
        assert torch.equal(targets, ids + 1) and torch.equal(ids, same_ids)
        assert not torch.equal(ids, other_ids)


@pytest.mark.parametrize("section", ["text", "small"])
def test_models_have_one_size(section):
    with torch.device("meta"):
        of_section = quality.SECTIONS[section]
        sizes = [quality.ON_TEXT[name](of_section.size, 4096).num_parameters() for name in of_section.models]
    assert max(sizes) < 1.04 * min(sizes)
    assert section == "text" or 2 * max(sizes) < 16e6  # bytes in bfloat16


def test_a_model_that_knows_nothing_needs_the_bits_of_a_guess(here, data, monkeypatch):
    monkeypatch.setattr(quality, "train", lambda *args, **options: {})
    model = quality.model_7b(quality.TINY, 40)
    model.lm_head.weight.data.zero_()
    monkeypatch.setitem(quality.ON_TEXT, "xLSTM-7B", lambda size, vocab: model)
    row = quality.learn_text(quality.TINY, "xLSTM-7B", 0, data, "")
    assert row["bits per byte"] == pytest.approx(49 * math.log2(40) / 98)


def test_a_model_learns_the_text(here, data):
    size = quality.TINY._replace(steps=100, learning_rate=1e-2)
    row = quality.learn_text(size, "xLSTM-7B", 0, data, "")
    assert row["bits per byte"] < 0.2 * 49 * math.log2(40) / 98  # of a guess


def test_a_model_learns_a_language(here, monkeypatch):
    monkeypatch.setattr(quality, "TEST", 32)
    size = quality.TINY._replace(steps=60, batch=8, learning_rate=1e-2)
    monkeypatch.setitem(quality.LANGUAGES_BY_NAME, "the last symbol", lambda: torch.arange(4).expand(4, 4))
    row = quality.learn_language(size, "xLSTM-7B", 0, None, "the last symbol")
    assert row["up to 40"] > 95 and row["after 40"] > 95  # percent


# what is said


def test_tiny_models_learn_and_are_a_table(here, data, capsys):
    quality.main(["text", "languages", "--tiny", "--data", str(data), "--seeds", "2", "--models", "xLSTM-7B", "Llama"])
    printed = rows(capsys.readouterr().out)
    expected = [("held-out text", name) for name in ("xLSTM-7B", "Llama")]
    expected += [(language, name) for language in quality.LANGUAGES_BY_NAME for name in ("xLSTM-7B", "Llama")]
    assert [(row[0], row[1]) for row in printed] == expected
    for row in printed:
        mean, _, least, _, most = row[3].replace("(", "( ").replace(")", " )").split()[:5]
        assert float(least) <= float(mean) <= float(most)


def test_a_run_that_fails_is_told_and_an_error(here, monkeypatch, capsys):
    def fail(size, vocab):
        raise RuntimeError("no")

    monkeypatch.setitem(quality.ON_LANGUAGES, "Llama", fail)
    with pytest.raises(SystemExit, match="^Some runs did not come to an end.$"):
        quality.main(["languages", "--tiny", "--seeds", "1", "--models", "Llama"])
    out = capsys.readouterr()
    assert "parity, Llama, seed 0: RuntimeError: no" in out.err
    assert [row[0] for row in rows(out.out)] == list(quality.LANGUAGES_BY_NAME)
    assert not any(character.isdigit() for row in rows(out.out) for cell in row[2:] for character in cell)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["text", "--tiny"], "--data must be the output of checkpoints/prepare_data.py, got None."),
        (["languages", "--tiny", "--models", "GPT"], "Models are .*, got GPT."),
        (["speed"], "invalid choice: 'speed'"),
    ],
)
def test_what_cannot_be_trained_is_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        quality.main(arguments)
    assert re.search(sentence, capsys.readouterr().err)


def test_models_of_this_size_need_a_gpu(here):
    with pytest.raises(SystemExit, match="trained on a CUDA GPU, and PyTorch finds none here; --tiny needs none."):
        quality.main(["languages"])
