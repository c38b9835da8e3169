"""Steps of `generate` replayed as CUDA graphs write what the steps themselves write."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from models import KINDS, TWO_KINDS, random_ids, tiny_model
from torch.utils._pytree import tree_leaves

from modeling_xlstm import XLSTMCache, graphs_xlstm
from modeling_xlstm.backends import CACHE
from modeling_xlstm.graphs_xlstm import ACTIVE, StepGraphs, graphs_of
from modeling_xlstm.linear import is_hooked


GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
OBSTACLE = StepGraphs.obstacle
NEVER = [0, 1]


class NoStream:
    def __init__(self, *_):
        pass

    def wait_stream(self, _):
        pass


class ComputedAgain:
    """In place of a CUDA graph: what was captured is computed again, to where it was."""

    def replay(self):
        for kept, new in zip(tensors_of(self.outputs), tensors_of(self.run()), strict=True):
            kept.copy_(new)


def tensors_of(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Without a GPU, all but the graphs themselves is tested."""
    if GPU:
        return
    record = StepGraphs._record

    def recorded(self, run):
        graph, outputs = record(self, run)
        graph.run, graph.outputs = run, outputs
        return graph, outputs

    def obstacle(model):
        return next((f"{name} is hooked" for name, module in model.named_modules() if is_hooked(module)), None)

    monkeypatch.setattr(StepGraphs, "_record", recorded)
    monkeypatch.setattr(StepGraphs, "obstacle", staticmethod(obstacle))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", ComputedAgain)
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    for name in ("graph", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **options: nullcontext())


def model_of(kind="post_up", **fields):
    return tiny_model(kind, **fields).to(DEVICE)


def ids_of(*size, **kwargs):
    return random_ids(*size, **kwargs).to(DEVICE)


def write(model, ids, tokens=30, **kwargs):
    options = {"do_sample": False, "suppress_tokens": NEVER, **kwargs}
    return model.generate(ids, max_new_tokens=tokens, **options)


def eager(model, ids, tokens=30, **kwargs):
    return write(model, ids, tokens, disable_compile=True, **kwargs)


def captured(model):
    return set(graphs_of(model).steps)


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_write_the_same_text(kind):
    model, ids = model_of(kind), ids_of(3, 7)
    expected = eager(model, ids)
    assert not captured(model)
    assert torch.equal(write(model, ids), expected)
    assert captured(model) == {(3, 1, False), (3, 8, True)}
    assert torch.equal(write(model, ids), expected)
    assert torch.equal(write(model, ids[:2]), expected[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_any_length_are_replayed(kind):
    model = model_of(kind)
    for length, bucket in ((1, 1), (16, 16), (17, 32), (100, 128), (600, 640)):
        ids = ids_of(2, length)
        assert torch.equal(write(model, ids, 5), eager(model, ids, 5))
        assert (2, bucket, bucket > 1) in captured(model)
    ids = ids_of(2, 1025)  # too long
    assert torch.equal(write(model, ids, 5), eager(model, ids, 5))
    assert max(T for _, T, _ in captured(model)) == 640


def test_hidden_states_that_were_asked_for_once_do_not_end_replay():
    model, ids = model_of(), ids_of(2, 7)
    with torch.no_grad():
        model(ids, output_hidden_states=True)
    write(model, ids)
    assert captured(model)
    output = write(model, ids, 5, output_hidden_states=True, return_dict_in_generate=True)
    assert [len(step) for step in output.hidden_states] == 5 * [model.config.num_hidden_layers + 1]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_goes_on_with_a_look_at_its_gates(kind):
    model, ids = model_of(kind), ids_of(2, 7)
    expected = eager(model, ids, 6)
    output = write(model, ids, 5, return_dict_in_generate=True)
    read = output.past_key_values.get_seq_length()
    seen = model(output.sequences[:, read:], past_key_values=output.past_key_values, output_gates=True)
    assert torch.equal(seen.logits[:, -1].argmax(-1), expected[:, -1])
    whole = model(output.sequences, output_gates=True).gates
    for layer, layer_whole in zip(seen.gates, whole, strict=True):
        for gate, gate_whole in zip(layer, layer_whole, strict=True):
            torch.testing.assert_close(gate, gate_whole[:, read:], atol=1e-4, rtol=1e-4)
    assert torch.equal(write(model, ids, 6), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_mixed_lengths_writes_what_its_texts_do(kind):
    model, lengths = model_of(kind), (1, 5, 19)
    texts = [ids_of(1, length, seed=length)[0] for length in lengths]
    ids = torch.stack([torch.cat((text.new_ones(19 - len(text)), text)) for text in texts])
    mask = torch.stack([torch.arange(19, device=DEVICE) >= 19 - length for length in lengths]).long()
    together = write(model, ids, attention_mask=mask)[:, -30:]
    for text, row in zip(texts, together, strict=True):
        assert torch.equal(write(model, text[None])[0, -30:], row)


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_sampling_and_beams_are_the_same(kind):
    model, ids = model_of(kind), ids_of(2, 7)
    for options in ({"do_sample": True, "num_return_sequences": 3}, {"num_beams": 4}):
        torch.manual_seed(7)
        expected = eager(model, ids, **options)
        torch.manual_seed(7)
        assert torch.equal(write(model, ids, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_lookup_and_drafts_write_the_same_text(kind):
    model, ids = model_of(kind), ids_of(1, 8).repeat(1, 3)
    draft = model_of("post_up", hidden_size=16)
    expected = eager(model, ids)
    assert torch.equal(write(model, ids, prompt_lookup_num_tokens=5), expected)
    assert any(T > 1 for _, T, _ in captured(model))
    assert torch.equal(write(model, ids, assistant_model=draft), expected)
    assert torch.equal(write(model, ids, assistant_model=model_of(kind)), expected)


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_caches_take_turns(kind):
    model, ids = model_of(kind), ids_of(2, 9)
    text = eager(model, ids, 20)
    caches = [write(model, row[None], 4, return_dict_in_generate=True).past_key_values for row in ids]
    rows = [text[i : i + 1, :13] for i in range(2)]
    for length in (17, 21, 25, 29):
        for i, cache in enumerate(caches):
            rows[i] = write(model, rows[i], 4, past_key_values=cache)
            assert torch.equal(rows[i], text[i : i + 1, :length])
            assert cache.get_seq_length() == length - 1


@pytest.mark.parametrize("own_streams", [False, True], ids=["", "own_streams"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_threads_share_a_model(num_beams, own_streams):
    model, ids = model_of("post_up_slstm"), ids_of(4, 9)
    expected = [eager(model, row[None], 40, num_beams=num_beams) for row in ids]
    if GPU:
        torch.cuda.synchronize()

    def text_of(row):
        with torch.cuda.stream(torch.cuda.Stream()) if own_streams else nullcontext():
            return write(model, row[None], 40, num_beams=num_beams).cpu()

    with ThreadPoolExecutor(4) as threads:
        for text, other in zip(threads.map(text_of, ids), expected, strict=True):
            assert torch.equal(text, other.cpu())


def test_beams_are_not_reordered_while_another_thread_moves_states():
    model, ids = model_of(), ids_of(2, 9)
    cache = write(model, ids, 4, return_dict_in_generate=True).past_key_values
    other = threading.Thread(target=write, args=(model, ids, 4))
    with cache.turn():
        other.start()
        other.join(0.3)
        assert other.is_alive()
    other.join()


def test_a_cache_does_not_keep_the_graphs_of_a_model_that_is_gone():
    model, ids = model_of(), ids_of(2, 9)
    cache = write(model, ids, 4, return_dict_in_generate=True).past_key_values
    graphs = weakref.ref(graphs_of(model))
    if not GPU:
        graphs().clear()  # what stands in for a graph knows the model
    del model
    gc.collect()
    assert graphs() is None
    cache.reorder_cache(torch.tensor([1, 0], device=DEVICE))


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_graphs_that_were_not_used_for_long_are_dropped(kind, monkeypatch):
    monkeypatch.setattr(graphs_xlstm, "KEPT", 2)
    model, ids = model_of(kind), ids_of(2, 40)
    for prompt in (ids[:1, :9], ids[:, :20], ids, ids[:1, :4].repeat(1, 4), ids[:, :9]):
        lookup = {"prompt_lookup_num_tokens": 3} if len(prompt) == 1 else {}
        assert torch.equal(write(model, prompt, **lookup), eager(model, prompt))
        assert len(captured(model)) <= 2
    graphs = graphs_of(model)
    assert {(B, T, True) for B, T in graphs.redos} <= captured(model)


def test_other_weights_are_seen():
    model, ids = model_of(), ids_of(2, 7)
    write(model, ids)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))
    assert torch.equal(write(model, ids), eager(model, ids))
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    assert torch.equal(write(model, ids), eager(model, ids))
    model.set_backend("torch")
    assert torch.equal(write(model, ids), eager(model, ids))


def test_another_configuration_is_seen():
    model, ids = model_of(mlstm_block="post_up", output_logit_soft_cap=30.0), ids_of(2, 7)
    write(model, ids)
    steps = dict(graphs_of(model).steps)
    write(model, ids)
    assert steps == graphs_of(model).steps
    for change in (
        lambda: setattr(model.config, "output_logit_soft_cap", 0.1),
        lambda: setattr(model.config, "gate_soft_cap", 0.5),
        lambda: setattr(model.model.layers[0].mixer_norm, "eps", 10.0),
    ):
        change()
        actual = write(model, ids, output_logits=True, return_dict_in_generate=True).logits
        expected = eager(model, ids, output_logits=True, return_dict_in_generate=True).logits
        for logits, others in zip(actual, expected, strict=True):
            torch.testing.assert_close(logits, others, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_rows_that_have_ended_read_no_padding(kind):
    model, ids, turn = model_of(kind), ids_of(2, 9), ids_of(2, 4, seed=1)
    end = eager(model, ids, 12)[0, 12].item()
    output = write(model, ids, 12, eos_token_id=end, pad_token_id=40, return_dict_in_generate=True)
    mask = torch.ones_like(output.sequences)
    for row, text in enumerate(output.sequences[:, 9:].tolist()):
        if end in text:
            mask[row, 9 + text.index(end) + 1 :] = 0
    assert not mask.all()
    assert (2, 1, True) in captured(model)
    whole, mask = torch.cat((output.sequences, turn), 1), torch.cat((mask, torch.ones_like(turn)), 1)
    expected = eager(model, whole, 8, attention_mask=mask)
    assert torch.equal(write(model, whole, 8, attention_mask=mask, past_key_values=output.past_key_values), expected)


def test_a_hook_is_called_at_every_step():
    model, ids, calls = model_of(), ids_of(1, 7), []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    write(model, ids, 10)
    assert len(calls) == 10
    assert not captured(model)


def test_a_returned_cache_goes_on_outside_of_generate():
    model, ids = model_of("pre_up_slstm"), ids_of(2, 9)
    output = write(model, ids, 8, return_dict_in_generate=True)
    cache, text = output.past_key_values, output.sequences
    write(model, ids[:, :4], 5)  # moves the cache out
    with torch.no_grad():
        logits = model(text[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(text).logits[:, -1:], atol=1e-4, rtol=1e-4)


def test_a_pass_that_fails_while_it_is_captured_leaves_the_states(monkeypatch):
    model, ids = model_of(), ids_of(2, 9)
    output = eager(model, ids, 4, return_dict_in_generate=True)
    cache, expected = output.past_key_values, eager(model, ids, 12)
    logits = type(model).logits

    def fail(self, x):
        raise MemoryError

    monkeypatch.setattr(type(model), "logits", fail)
    with pytest.raises(MemoryError):
        write(model, output.sequences, 8, past_key_values=cache)
    monkeypatch.setattr(type(model), "logits", logits)
    assert torch.equal(write(model, output.sequences, 8, past_key_values=cache), expected)


def test_states_take_their_own_size_whatever_was_before():
    model, ids = model_of(), ids_of(8, 9)
    write(model, ids)
    cache = write(model, ids[:1], 4, return_dict_in_generate=True).past_key_values
    state = cache.layers[0].state.cell.C
    assert state.untyped_storage().nbytes() <= cache.numbers(1) * state.itemsize


def test_what_was_read_from_the_start_can_be_taken_back_to_nothing():
    model, ids = model_of(), ids_of(1, 9)
    cache = XLSTMCache(model.config)
    cache.activate_past_recording()
    write(model, ids, 4, past_key_values=cache)
    write(model, ids_of(8, 9), 4)  # a larger memory
    cache.crop(-12)
    assert all(layer.is_empty for layer in cache.layers)
    assert torch.equal(write(model, ids, 4, past_key_values=cache), eager(model, ids, 4))


def test_a_model_on_a_cpu_is_not_captured():
    assert OBSTACLE(tiny_model().to("cpu").eval()) == "it is on cpu"


def test_padding_is_told_to_the_pass_that_reads_a_prompt_even_of_one_token():
    model, ids, mask = tiny_model(), random_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, -1] = 0
    options = {"next_sequence_length": 1, "attention_mask": mask, CACHE: XLSTMCache(model.config)}
    token = ACTIVE.set(graphs_of(model))
    try:
        prompt = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **options)
        step = model.prepare_inputs_for_generation(ids, **options)
    finally:
        ACTIVE.reset(token)
    assert prompt["attention_mask"].tolist() == [[1], [0]]
    assert "attention_mask" not in step


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_texts_end_where_they_end_without_graphs(kind):
    model, ids = model_of(kind), ids_of(3, 9)
    ends = eager(model, ids, 12)[:, 13].unique().tolist()  # what some row writes as its fifth token
    options = {"eos_token_id": ends, "pad_token_id": 1}
    expected = eager(model, ids, 12, **options)
    assert torch.equal(write(model, ids, 12, **options), expected)
    output = write(model, ids, 12, return_dict_in_generate=True, **options)  # whose state is not a token further
    assert torch.equal(output.sequences, expected)
    assert output.past_key_values.get_seq_length() == expected.shape[1] - 1
