"""What the README says of other packages: each "no" of its table is what they do with the versions that are tested.

Transformers' own xLSTM is asked with its own blocks, as it is where the package `xlstm` is not installed.
"""

import inspect
import sys

import pytest
import torch
import transformers.models.xlstm
from huggingface_hub.errors import StrictDataclassFieldValidationError
from models import random_ids
from peers import in_transformers, large, paper
from peft import LoraConfig, get_peft_model
from transformers import BatchEncoding


NEEDS_KERNELS = pytest.mark.skipif(sys.version_info < (3, 11), reason="mlstm_kernels needs Python 3.11")
IDS = random_ids(1, 7)
PADDED = torch.cat((random_ids(1, 3, seed=1), IDS), 1)
PADDING = torch.tensor([[0] * 3 + [1] * 7])


def theirs():
    """Transformers' own, of a width that its cache takes."""
    return in_transformers("own", hidden=128, heads=4).model


def arguments(function) -> set[str]:
    return set(inspect.signature(function).parameters)


@torch.no_grad()
def test_transformers_reads_padding():
    model = theirs()
    logits = model(PADDED, attention_mask=PADDING, use_cache=False).logits[:, 3:]
    assert torch.equal(logits, model(PADDED, use_cache=False).logits[:, 3:])
    assert (logits - model(IDS, use_cache=False).logits).abs().max() > 1


def test_transformers_writes_another_text_for_a_padded_prompt():
    options = {"max_new_tokens": 8, "do_sample": False}
    batch = BatchEncoding({"input_ids": PADDED, "attention_mask": PADDING})
    text = theirs().generate(**batch, **options)[:, PADDED.shape[1] :]
    alone = theirs().generate(IDS, attention_mask=torch.ones_like(IDS), **options)[:, IDS.shape[1] :]
    assert not torch.equal(text, alone)


@pytest.mark.parametrize(
    "boundaries",
    [
        {"cu_seq_lens_q": torch.tensor([0, 7, 14], dtype=torch.int32)},
        {"position_ids": torch.arange(14)[None] % 7},
        {"seq_idx": torch.arange(14, dtype=torch.int32)[None] // 7},
    ],
    ids=lambda boundaries: next(iter(boundaries)),
)
@torch.no_grad()
def test_transformers_lets_packed_documents_see_each_other(boundaries):
    model, packed = theirs(), torch.cat((IDS, IDS), 1)
    logits = model(packed, use_cache=False, **boundaries).logits
    assert torch.equal(logits, model(packed, use_cache=False).logits)
    assert (logits[:, 7:] - model(IDS, use_cache=False).logits).abs().max() > 1


def test_transformers_has_no_slstm():
    model = theirs()
    assert not [name for name in vars(model.config) if "slstm" in name or name == "block_types"]
    assert {type(block).__name__ for block in model.backbone.blocks} == {"xLSTMBlock"}
    assert len({tuple(block.state_dict()) for block in model.backbone.blocks}) == 1


def test_transformers_refuses_sigmoid_input_gates():
    """It knows no kernel that computes them."""
    with pytest.raises(StrictDataclassFieldValidationError, match="chunkwise_kernel"):
        in_transformers("own", chunkwise_kernel="parallel--native_siging_autograd")


def test_transformers_has_no_classifiers():
    classes = transformers.models.xlstm.modeling_xlstm.__all__
    assert set(classes) == {"xLSTMForCausalLM", "xLSTMModel", "xLSTMPreTrainedModel"}


def test_transformers_refuses_beams_and_drafts():
    options = {"max_new_tokens": 5, "do_sample": False}
    with pytest.raises(ValueError, match="cannot use beam search with a cache"):
        theirs().generate(IDS, num_beams=3, **options)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        theirs().generate(IDS, prompt_lookup_num_tokens=3, **options)


@torch.no_grad()
def test_transformers_keeps_a_state_in_the_dtype_of_the_model_and_has_no_way_to_save_fork_or_crop_it():
    cache = theirs().bfloat16()(IDS, use_cache=True).cache_params
    assert {x.dtype for state in cache.rnn_state.values() for x in state} == {torch.bfloat16}
    public = {name for name in dir(cache) if callable(getattr(cache, name)) and name[0] != "_"}
    assert public == {"reset"}


def test_transformers_refuses_adapters_without_target_modules():
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(theirs(), LoraConfig(task_type="CAUSAL_LM"))


def test_transformers_unties_what_its_configuration_ties():
    model = in_transformers("own", tie_word_embeddings=True).model
    assert not torch.equal(model.lm_head.weight, model.backbone.embeddings.weight)


@NEEDS_KERNELS
def test_the_models_of_xlstm_take_neither_masks_nor_boundaries():
    large_model, paper_model = large().model, paper().model
    assert arguments(large_model.forward) == {"x", "state"}
    assert arguments(paper_model.forward) == {"idx"}
    assert arguments(paper_model.step) == {"idx", "state", "kwargs"}


@NEEDS_KERNELS
def test_xlstm_generates_from_one_of_its_models_and_knows_neither_beams_nor_drafts():
    assert not hasattr(paper().model, "generate")
    assert arguments(large().model.generate) == {"prefill_tokens", "max_length", "sampling_type", "state"}


@torch.no_grad()
def test_xlstm_reads_with_mlstm_blocks_of_the_first_paper_no_more_than_a_context():
    ids = random_ids(1, 129)
    assert paper(slstm_at="all").model(ids).shape == (1, 129, 99)
    with pytest.raises(RuntimeError, match="size of tensor"):
        paper().model(ids)


@NEEDS_KERNELS
def test_mlstm_kernels_takes_multiples_of_a_chunk_and_neither_masks_nor_boundaries():
    from mlstm_kernels.torch import get_available_mlstm_kernels, get_mlstm_kernel

    q, gate = torch.randn(1, 2, 65, 8), torch.randn(1, 2, 65)
    kernel = get_mlstm_kernel("chunkwise--native_autograd")
    assert kernel(*(x[:, :, :64] for x in (q, q, q, gate, gate)), chunk_size=64).shape == (1, 2, 64, 8)
    with pytest.raises(AssertionError, match="not divisible by chunk size"):
        kernel(q, q, q, gate, gate, chunk_size=64)
    names = get_available_mlstm_kernels()
    assert "chunkwise--triton_xl_chunk" in names
    for name in names:
        assert not arguments(get_mlstm_kernel(name)) & {"mask", "attention_mask", "cu_seqlens", "seq_idx"}, name
