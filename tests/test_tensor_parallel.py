"""A model that processes share by heads computes what it computes in one process."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import ranks_tensor
import torch
from models import tiny_config, tiny_model
from numerics import difference
from ranks_data import assert_loads, page_commands, run_command, run_printing
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.distributed import DistributedConfig

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM
from modeling_xlstm.checkpoint_xlstm import from_native
from modeling_xlstm.configuration_formats import fields_to
from modeling_xlstm.modeling_xlstm import weight_shapes
from modeling_xlstm.tensor_parallel import split_projections


Outcomes = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of all cases."""
    path = tmp_path_factory.mktemp("checkpoints")
    ranks_tensor.save_all(path)
    return path


@pytest.fixture(scope="module")
def one() -> dict[tuple, Outcomes]:
    return ranks_tensor.one_process()


@pytest.fixture(scope="module", params=(2, 4))
def split(request, folder, tmp_path_factory) -> tuple[int, list[dict], Path]:
    """All cases in several processes."""
    saved = tmp_path_factory.mktemp("saved")
    results = ranks.run(
        ranks_tensor.split_over_all, request.param, tmp_path_factory.mktemp("ranks"), folder, saved, timeout=300
    )
    return request.param, results, saved


@pytest.fixture(scope="module")
def two_ways(folder, tmp_path_factory) -> list[dict]:
    return ranks.run(ranks_tensor.split_two_ways, 4, tmp_path_factory.mktemp("ranks"), folder, timeout=300)


def assert_same(actual: Outcomes, expected: Outcomes, oracle: Outcomes) -> None:
    """To 1e-12 in float64. In float32 to 1e-6, or 4 times what rounding does in one process, as in `numerics`: of all
    logits, gradients, weights and so on together, as some are small."""
    assert actual.keys() == expected.keys()
    allowed: dict[str, float] = {}
    for key, x in expected.items():
        kind, rounding = key.split()[0], difference(x.double(), oracle[key].double())
        allowed[kind] = max(allowed.get(kind, 0.0), 4 * rounding, 1e-6 if x.dtype == torch.float32 else 1e-12)
    for key, x in expected.items():
        if x.dtype == torch.int64:
            assert torch.equal(actual[key], x), key
        else:
            assert difference(actual[key], x) <= allowed[key.split()[0]], key


ALL = [(name, dtype) for name in ranks_tensor.CASES for dtype in ranks_tensor.DTYPES]


@pytest.mark.parametrize("name, dtype", ALL)
def test_processes_that_share_a_model_compute_what_one_does(name, dtype, one, split):
    """Logits of padded rows, gates, states, greedy and beam texts; gradients, losses and weights of three steps."""
    for results in split[1]:
        assert_same(results[name, dtype], one[name, dtype], one[name, torch.float64])


@pytest.mark.parametrize("name", ranks_tensor.CASES)
def test_each_process_has_its_share_of_the_weights(name, split):
    """But for norms and a column of biases."""
    world, results, _ = split
    for result in results:
        assert result[name, torch.float32, "share"] < 1 / world + 0.02


@pytest.mark.parametrize("name, dtype", ALL)
def test_a_shared_model_is_saved_as_one(name, dtype, split):
    _, results, saved = split
    trained = {key[7:]: x for key, x in results[0][name, dtype].items() if key.startswith("weight ")}
    config = XLSTMConfig.from_pretrained(saved / f"{name} {dtype}")
    stored = load_file(saved / f"{name} {dtype}" / "model.safetensors")
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert stored.keys() | tied == weight_shapes(config).keys()
    for key, x in stored.items():
        assert torch.equal(x, trained[key]), key
    model = XLSTMForCausalLM.from_pretrained(saved / f"{name} {dtype}", dtype=dtype)
    for key, x in model.named_parameters():
        assert torch.equal(x, trained[key].to(x.dtype)), key


@pytest.mark.parametrize("name", ranks_tensor.TWO_WAYS)
@pytest.mark.parametrize("dtype", ranks_tensor.DTYPES)
def test_heads_and_rows_can_both_be_split(name, dtype, one, two_ways):
    for rank, results in enumerate(two_ways):
        assert results[name, dtype, "share"] < 0.27
        expected, oracle = (
            {key: _rows(key, x, rank // 2) for key, x in one[name, d].items() if not key.startswith("state ")}
            for d in (dtype, torch.float64)
        )
        assert_same(results[name, dtype], expected, oracle)


def _rows(key: str, x: Tensor, half: int) -> Tensor:
    """Of what has rows, those of one half of the processes."""
    if key == "logits":
        return x.split(ranks_tensor.MASK.view(2, -1).sum(1).tolist())[half]
    return x.chunk(2)[half] if key.split()[0] in ("gates", "text", "beams") else x


def test_distributed_checkpoints_are_read_by_any_number_of_processes_that_share_heads_and_merge(folder, tmp_path):
    saved = tmp_path / "saved"
    results = ranks.run(ranks_tensor.checkpoints, 4, tmp_path, folder, saved, timeout=300)
    for name in ("post_up_biased_tied", "pre_up_slstm_biased"):
        expected = dict(ranks_tensor.whole_model(name, torch.float64).named_parameters())
        merged = XLSTMForCausalLM.from_pretrained(saved / f"{name} merged", dtype=torch.float64)
        found = [x for result in results for key, x in result.items() if key.startswith(f"{name} ")]
        assert len(found) == 20
        for actual in [dict(merged.named_parameters()), *found]:
            assert actual.keys() == expected.keys()
            for key, x in expected.items():
                assert torch.equal(actual[key], x), key
    for result in results:
        assert result["refused"].startswith(f"ValueError: The distributed checkpoint {saved}")
        assert "must hold model.layers.0.mixer." in result["refused"]


def test_a_pipeline_reads_and_generates_what_one_process_does(folder, tmp_path):
    for results in ranks.run(ranks_tensor.stages, 2, tmp_path, folder):
        for name in ("post_up", "pre_up_slstm"):
            model = ranks_tensor.whole_model(name, torch.float32)
            with torch.no_grad():
                logits = model(ranks_tensor.IDS, attention_mask=ranks_tensor.MASK).logits[ranks_tensor.MASK.bool()]
            text = model.generate(ranks_tensor.IDS, attention_mask=ranks_tensor.MASK, max_new_tokens=6, do_sample=False)
            assert torch.equal(results[f"{name} logits"], logits)
            assert torch.equal(results[f"{name} text"], text)
        sentence = "ValueError: A pipeline gives logits in evaluation mode, of ids, embeddings and a mask, got "
        *refused, saved, other = results["sentences"]
        assert refused == [
            f"{sentence}{x}." for x in ("labels", "cu_seq_lens_q", "output_gates", "labels", "training mode")
        ]
        assert saved.startswith("ValueError: A model must not be a pipeline to be saved")
        assert "must be given the same text, got another in process 1" in other


@pytest.fixture(scope="module")
def origins(folder, tmp_path_factory) -> dict[str, Path]:
    """A model in this package's format and in those of Transformers' own xLSTM, and a classifier."""
    path = tmp_path_factory.mktemp("origins")
    model: Any = tiny_model("post_up", num_heads=4)
    model.save_pretrained(path / "native")
    for fmt in ("transformers", "transformers-fused"):
        (path / fmt).mkdir()
        fields = fields_to(model.config, "transformers") | {"dtype": "float32"}
        (path / fmt / "config.json").write_text(json.dumps(fields))
        weights = from_native(model.state_dict(), model.config, fmt, weight_shapes(model.config))
        save_file(weights, path / fmt / "model.safetensors", metadata={"format": "pt"})
    ranks_tensor.tiny_classifier().save_pretrained(path / "classifier")  # type: ignore[operator]
    names = ("native", "transformers", "transformers-fused", "classifier")
    return {name: path / name for name in names}


@pytest.fixture(scope="module")
def loaded(origins, tmp_path_factory) -> list[dict[str, Any]]:
    return ranks.run(ranks_tensor.formats, 2, tmp_path_factory.mktemp("ranks"), origins)


@pytest.mark.parametrize("fmt", ["native", "transformers", "transformers-fused"])
def test_each_process_reads_its_rows_of_any_format(fmt, loaded):
    expected = dict(tiny_model("post_up", num_heads=4).named_parameters())
    for results in loaded:
        for shared in (results[fmt], results[f"{fmt}, parts"]):  # by heads, and by FSDP2
            assert shared.keys() == expected.keys()
            assert all(torch.equal(shared[name], x) for name, x in expected.items())


def test_gates_of_a_shared_model_stay_in_float32(loaded):
    for results in loaded:
        kept = {name for name, dtype in results["dtypes"].items() if dtype == torch.float32}
        assert kept == {f"model.layers.{i}.mixer.gate_proj.{kind}" for i in range(2) for kind in ("weight", "bias")}


def test_a_trained_model_that_is_shared_goes_on_as_one(loaded):
    expected, oracle = ranks_tensor.trained(torch.float32), ranks_tensor.trained(torch.float64)
    for results in loaded:
        assert_same(results["trained"], expected, oracle)


def test_parts_of_a_matrix_are_multiplied_together_as_long_as_they_follow_each_other(loaded):
    """Where one is replaced, the four of its matrix are not."""
    for dtype, when, calls in (
        (torch.float32, "at first", 0), (torch.float64, "moved", 0), (torch.float64, "replaced", 4)
    ):  # fmt: skip
        with torch.no_grad():
            expected = tiny_model("post_up", num_heads=4).to(dtype)(ranks_tensor.IDS).logits
        for results in loaded:
            logits, separate = results["products"][when]
            assert separate == calls
            assert difference(logits, expected) <= (5e-6 if dtype == torch.float32 else 1e-12)


def test_a_shared_classifier_has_the_logits_and_gradients_of_one(loaded):
    expected = ranks_tensor.classifier_outcome()
    for results in loaded:
        assert results["classifier"].keys() == expected.keys()
        for name, x in expected.items():
            assert difference(results["classifier"][name], x) <= 5e-5, name


def test_new_weights_of_a_shared_model_are_the_same_in_all_processes(loaded):
    assert torch.equal(loaded[0]["new head"], loaded[1]["new head"])


def test_the_configuration_of_a_shared_model_makes_no_other_shared(loaded):
    expected = dict(tiny_model("post_up", num_heads=4).named_parameters())
    for results in loaded:
        assert all(torch.equal(results["again"][name], x) for name, x in expected.items())
        assert results["config"].startswith("ValueError: config must not be that of a model which 2 processes share")


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ({"tp_size": 2, "pp_size": 2}, "Processes of a pipeline cannot share heads too, got pp_size=2 and tp_size=2."),
        ({"pp_size": 3}, "pp_size must be at most num_hidden_layers = 2, got 3."),
    ],
)
def test_what_a_pipeline_cannot_be_is_refused(sizes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        XLSTMForCausalLM.maybe_distribute_model(tiny_model("post_up"), DistributedConfig(**sizes), None)


@pytest.fixture(scope="module")
def sentences(origins, tmp_path_factory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("refused")
    names = ("heads", "slstm heads", "nan", "pickled", "two weights")
    folders = {name: path / name for name in names} | {"native": origins["native"]}
    tiny_model("post_up", num_heads=1).save_pretrained(folders["heads"])  # type: ignore[operator]
    tiny_model("post_up_slstm", slstm_num_heads=1).save_pretrained(folders["slstm heads"])  # type: ignore[operator]
    model: Any = tiny_model("post_up")
    model.config.save_pretrained(folders["pickled"])
    torch.save(model.state_dict(), folders["pickled"] / "pytorch_model.bin")
    with torch.no_grad():
        model.model.layers[1].ffn.up_proj.weight[-1, 0] = torch.nan  # of the last process's part
    model.save_pretrained(folders["nan"])
    shutil.copytree(folders["native"], folders["two weights"])
    fields = json.loads((folders["native"] / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folders["two weights"] / "config.json").write_text(json.dumps(fields))
    return ranks.run(ranks_tensor.refusals, 2, tmp_path_factory.mktemp("ranks"), folders, path / "saved")


@pytest.mark.parametrize(
    "what, sentence",
    {
        "heads": "ValueError: num_heads must be a multiple of tp_size = 2, as each process has as many as the others, "
        "got 1.",
        "slstm heads": "ValueError: slstm_num_heads must be a multiple of tp_size = 2",
        "nan": "ValueError: All weights of a checkpoint must be finite, got NaN or infinity in "
        "model.layers.1.ffn.up_proj.up.weight.",
        "nan, parts of weights": "must be finite, got NaN or infinity in model.layers.1.ffn.up_proj.weight.",
        "pickled": "must be of safetensors files, got ",
        "another text": "ValueError: Processes that share a model or a text must be given the same text, got another "
        "in process 1 of them than in process 0.",
        "another mask": "must be given the same text, got another in process 1",
        "another seed": "must be given the same seed, by torch.manual_seed, to draw the same random numbers, got",
        "other rows": "must be given the same rows, got another in process 1",
        "other dropout": "must be given the same seed, by torch.manual_seed, to draw the same random numbers, got",
        "slices": "ValueError: Texts cannot be split over processes that share heads, got a model with tp_size=2.",
        "two weights": "ValueError: Tied embeddings must be one weight in a checkpoint for FSDP2, got two that differ",
        "original format": "ValueError: save_original_format=True needs a model in one process, got one spread over 2",
        "state": "The weights of the model must be in memory in full, not offloaded or sharded, got DTensor",
    }.items(),
)
def test_what_cannot_be_shared_is_refused_in_every_process(what, sentence, sentences):
    for of_one in sentences:
        assert sentence in of_one[what]


def test_processes_that_share_no_heads_read_pickled_weights(sentences):
    assert all(of_one["pickled, parts of weights"] == "nothing" for of_one in sentences)


def test_processes_with_one_seed_draw_the_same_text(sentences):
    assert torch.equal(sentences[0]["sampled"], sentences[1]["sampled"])


def test_quantised_weights_are_not_shared():
    model: Any = tiny_model("post_up")
    model.model.layers[0].ffn.up_proj = type("Linear4bit", (torch.nn.Linear,), {})(32, 176)
    with pytest.raises(
        ValueError, match="must not be quantised to be shared by heads, got a Linear4bit for ffn.up_proj"
    ):
        split_projections(model, 2)


def test_the_commands_of_the_page_share_heads_and_texts(tmp_path):
    heads, text, long = (
        line for line in page_commands("torchrun") if any(x in line for x in ("heads", "prompt", "long"))
    )
    assert_loads(run_command(heads, tmp_path))
    assert_loads(run_command(long, tmp_path))
    printed = run_printing(text, tmp_path)
    assert printed[0].startswith("My lord,") and not printed[1]


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"fsdp_size": 2}], ids=str)
def test_a_process_that_is_left_alone_ends_with_an_error(sizes, origins, tmp_path):
    left, gone = ranks.run(ranks_tensor.left_alone, 2, tmp_path, origins["native"], sizes, timeout=30)
    assert left and gone is None


def test_no_process_has_more_than_its_share_and_a_tensor_while_it_loads(tmp_path):
    """Of a model of 260 MB in float32, whose largest tensor is of 34 MB."""
    model = XLSTMForCausalLM(tiny_config(hidden_size=1024, num_hidden_layers=4, num_heads=4, vocab_size=8192))
    total, largest = (of(x.nbytes for x in model.parameters()) for of in (sum, max))
    model.save_pretrained(tmp_path / "large")
    tiny_model("post_up", num_heads=4).save_pretrained(tmp_path / "post_up")
    for result in ranks.run(ranks_tensor.memory_of_loading, 2, tmp_path, tmp_path):
        assert result["part"] < 0.51 * total
        assert result["peak"] < result["part"] + largest + (8 << 20)


@pytest.mark.parametrize("add_out_norm", [True, False])
@pytest.mark.parametrize(
    "kind, fields",
    [
        ("post_up", {}),
        ("pre_up", {"conv_kernel_size": 0}),
        ("slstm", {"slstm_ffn_proj_factor": 0}),
        ("post_up_slstm", {"use_bias": True}),
        ("pre_up_slstm", {"conv_kernel_size": 0}),
        ("pre_up_slstm", {"slstm_conv_kernel_size": 0, "conv_kernel_size": 0}),
    ],
)
def test_plans_name_modules_that_are_there(kind, fields, add_out_norm):
    """A rule that matches nothing is only warned of, and what no rule names is not split."""
    model: Any = tiny_model(kind, add_out_norm=add_out_norm, **fields)
    split_projections(model, 2)
    names = {re.sub(r"\.\d+\b", ".*", name) for name, _ in model.named_modules()}
    assert model.tp_plan.keys() | model.fsdp_plan.keys() | {name.split(".*")[0] for name in model.pp_plan} <= names
    owners = {re.sub(r"\.\d+\b", ".*", name.rpartition(".")[0]) for name, _ in model.named_parameters()}
    assert all("norm" in name and "head_norm" not in name for name in owners - model.tp_plan.keys())
