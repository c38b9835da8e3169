"""`generate` in all its modes gives what a model without cache gives, in one go or over the turns of a conversation."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import KINDS, TWO_KINDS, VOCAB, assert_near, random_ids, tiny_config, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CompileConfig, PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer, pipeline
from transformers.generation.streamers import BaseStreamer

from modeling_xlstm import XLSTMCache, generation_xlstm
from modeling_xlstm.backends import READS_ON_IN_PIECES


def letters_tokenizer():
    """A tokenizer whose every token but 0 and 1 is one printable character."""
    letters = [chr(i) for i in range(32, 127)] + ["é", "ü"]
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, **dict(zip(letters, range(2, VOCAB), strict=True))}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<s>", pad_token="<pad>", padding_side="left"
    )


# A text that held the padding token would be taken for padded where it is given without a mask.
NEVER = [0, 1]
STARTS_OVER = "this version of Transformers starts over to read in pieces, which the model refuses"


def greedy(model, ids, tokens, **kwargs):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, suppress_tokens=NEVER, **kwargs)


def left_padded(texts):
    """A batch of texts of different lengths, and its mask."""
    T = max(map(len, texts))
    ids = torch.stack([torch.cat((torch.ones(T - len(text), dtype=torch.long), text)) for text in texts])
    mask = torch.stack([torch.cat((torch.zeros(T - len(t), dtype=torch.long), torch.ones_like(t))) for t in texts])
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_full_passes(kind):
    model, ids = tiny_model(kind), random_ids(2, 7)
    expected = ids
    with torch.no_grad():
        for _ in range(40):
            logits = model(expected).logits[:, -1:]
            logits[..., NEVER] = -torch.inf
            expected = torch.cat((expected, logits.argmax(-1)), 1)
    assert len(expected.unique()) > 20  # not a text that repeats itself
    assert torch.equal(greedy(model, ids, 40), expected)
    assert torch.equal(greedy(model, ids, 40, use_cache=False), expected)


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_sampling_draws_the_same_with_and_without_cache(kind):
    model, ids = tiny_model(kind), random_ids(2, 7)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "num_return_sequences": 3}
        texts.append(model.generate(ids, max_new_tokens=20, use_cache=use_cache, **options))
    assert texts[0].shape == (6, 27)
    assert torch.equal(*texts)
    assert len(texts[0].unique(dim=0)) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_finds_the_same_with_and_without_cache(kind):
    model, ids = tiny_model(kind), random_ids(2, 7)
    options = {"num_beams": 4, "num_return_sequences": 2}
    with_cache, without = (greedy(model, ids, 12, use_cache=use_cache, **options) for use_cache in (True, False))
    assert with_cache.shape == (4, 19)
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache[::2], greedy(model, ids, 12))


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_beam_search_of_a_padded_batch_is_that_of_each_text(kind):
    model, texts = tiny_model(kind), [random_ids(1, length, seed=length)[0] for length in (4, 11)]
    ids, mask = left_padded(texts)
    together = greedy(model, ids, 12, attention_mask=mask, num_beams=3)
    for text, row in zip(texts, together, strict=True):
        alone = greedy(model, text[None], 12, num_beams=3)
        assert torch.equal(row[-12:], alone[0, -12:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_generates_what_each_text_generates_alone(kind):
    model, texts = tiny_model(kind), [random_ids(1, length, seed=length)[0] for length in (1, 5, 19)]
    ids, mask = left_padded(texts)
    left = greedy(model, ids, 20, attention_mask=mask)[:, -20:]
    inferred = greedy(model, ids, 20)[:, -20:]  # from the padding token
    right_ids = torch.stack([row.roll(-int(pad)) for row, pad in zip(ids, (1 - mask).sum(1), strict=True)])
    right = greedy(model, right_ids, 20, attention_mask=mask.flip(1))[:, -20:]
    for i, text in enumerate(texts):
        alone = greedy(model, text[None], 20)[0, -20:]
        assert torch.equal(left[i], alone)
        assert torch.equal(inferred[i], alone)
        assert torch.equal(right[i], alone)


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_embeddings_generate_what_their_ids_generate(kind):
    model, texts = tiny_model(kind), [random_ids(1, length, seed=length)[0] for length in (5, 19)]
    ids, mask = left_padded(texts)
    embeds = model.get_input_embeddings()(ids)
    expected = greedy(model, ids, 15, attention_mask=mask)[:, -15:]
    assert torch.equal(greedy(model, None, 15, inputs_embeds=embeds, attention_mask=mask), expected)
    beams = {"num_beams": 3, "attention_mask": mask}
    expected = greedy(model, ids, 15, **beams)[:, -15:]
    assert torch.equal(greedy(model, None, 15, inputs_embeds=embeds, **beams), expected)


@pytest.mark.parametrize("size", [1, 7, 20, 100])
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_prompt_read_in_pieces_generates_the_same(kind, size):
    model, texts = tiny_model(kind), [random_ids(1, length, seed=length)[0] for length in (9, 33)]
    ids, mask = left_padded(texts)
    expected = greedy(model, ids, 10, attention_mask=mask)
    assert torch.equal(greedy(model, ids, 10, attention_mask=mask, prefill_chunk_size=size), expected)
    assert torch.equal(greedy(model, ids[1:], 10, prefill_chunk_size=size), expected[1:])


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_any_named_cache_is_the_recurrent_one(implementation):
    model, ids = tiny_model("pre_up_slstm"), random_ids(2, 7)
    output = greedy(model, ids, 10, cache_implementation=implementation, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, XLSTMCache)
    assert torch.equal(output.sequences, greedy(model, ids, 10))


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_scores_logits_and_hidden_states_are_those_of_a_full_pass(kind):
    model, ids = tiny_model(kind), random_ids(2, 7)
    wanted = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    output = greedy(model, ids, 6, return_dict_in_generate=True, **wanted)
    full = model(output.sequences[:, :-1], output_hidden_states=True)
    assert_near(torch.stack(output.scores, 1)[..., 2:], full.logits[:, 6:, 2:])
    assert_near(torch.stack(output.logits, 1), full.logits[:, 6:])
    assert len(output.hidden_states) == 6
    for layer in range(model.config.num_hidden_layers + 1):
        pieces = torch.cat([step[layer] for step in output.hidden_states], 1)
        assert_near(pieces, full.hidden_states[layer])


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_steps_are_compiled_on_a_cpu_where_that_is_asked_for(kind):
    model, ids = tiny_model(kind), random_ids(2, 7)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 1, 0
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    asked = CompileConfig(backend="eager", mode=None)
    text = greedy(model, ids, 6, attention_mask=mask, compile_config=asked)
    assert not asked._compile_all_devices
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(text, greedy(model, ids, 6, attention_mask=mask))


def test_the_end_of_text_stops_each_row():
    model, ids = tiny_model("pre_up_slstm"), random_ids(3, 7)
    free = greedy(model, ids, 20)
    stopped = greedy(model, ids, 20, eos_token_id=int(free[1, 10]))
    length = stopped.shape[1]
    assert (stopped[1, 11:] == 1).all()
    for row, expected in zip(stopped, free, strict=True):
        kept = row != 1
        assert torch.equal(row[kept], expected[:length][kept])


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_every_token_in_order():
    model, ids, streamer = tiny_model("pre_up_slstm"), random_ids(1, 7), Collect()
    output = greedy(model, ids, 15, streamer=streamer)
    assert streamer.tokens == output[0].tolist()
    assert streamer.ended


def test_text_streamers_print_and_yield_the_text(capsys):
    model, ids, tokenizer = tiny_model("pre_up_slstm"), random_ids(1, 7), letters_tokenizer()
    text = tokenizer.decode(greedy(model, ids, 30)[0, 7:])
    greedy(model, ids, 30, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=greedy, args=(model, ids, 30), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == text


class ReaderGoneError(Exception):
    pass


class Leaves(Collect):
    """A streamer whose reader goes away after some tokens, as that of a server does."""

    def put(self, value):
        super().put(value)
        if len(self.tokens) > 12:
            raise ReaderGoneError


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_text_given_up_in_the_middle_leaves_nothing_to_the_next(kind):
    model, ids, other = tiny_model(kind), random_ids(1, 7), random_ids(1, 7, seed=1)
    expected = greedy(tiny_model(kind), other, 15)
    with pytest.raises(ReaderGoneError):
        greedy(model, ids, 30, streamer=Leaves())
    assert torch.equal(greedy(model, other, 15), expected)


def test_a_reader_may_stop_a_text_in_the_middle():
    model, ids, tokenizer, stop = tiny_model("pre_up_slstm"), random_ids(1, 7), letters_tokenizer(), threading.Event()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"streamer": streamer, "stopping_criteria": [lambda ids, scores: torch.tensor([stop.is_set()])]}
    thread = threading.Thread(target=greedy, args=(model, ids, 100_000), kwargs=options)
    thread.start()
    pieces = [next(streamer) for _ in range(6)]
    stop.set()
    text = "".join((*pieces, *streamer))
    thread.join()
    assert 6 <= len(text) < 10_000
    assert text == tokenizer.decode(greedy(model, ids, len(text))[0, 7:])


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_threads_generate_from_one_model_at_once(kind):
    model, start = tiny_model(kind), threading.Barrier(3, timeout=60)
    prompts = [random_ids(1, 5), random_ids(1, 5, seed=1), random_ids(2, 19, seed=2)]
    expected = [greedy(model, ids, 20) for ids in prompts]

    def write(ids):
        start.wait()
        return [greedy(model, ids, 20) for _ in range(3)]

    with ThreadPoolExecutor(3) as threads:
        texts = list(threads.map(write, prompts))
    for each, alone in zip(texts, expected, strict=True):
        assert all(torch.equal(text, alone) for text in each)


def test_a_stop_string_ends_the_text():
    model, ids, tokenizer = tiny_model("pre_up_slstm"), random_ids(1, 7), letters_tokenizer()
    free = greedy(model, ids, 20)
    stop = tokenizer.decode(free[0, 11:13])
    stopped = greedy(model, ids, 20, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(stopped, free[:, :13])


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_the_text_generation_pipeline_completes_texts_of_different_lengths(kind):
    model, tokenizer = tiny_model(kind), letters_tokenizer()
    prompts = ["Once upon", "A", "The state of an xLSTM is "]
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 10, "do_sample": False, "suppress_tokens": NEVER, "return_full_text": False}
    expected = [
        tokenizer.decode(greedy(model, torch.tensor([tokenizer(prompt)["input_ids"]]), 10)[0, -10:])
        for prompt in prompts
    ]
    for batch_size in (1, 3):
        outputs = generate(prompts, batch_size=batch_size, **options)
        assert [output[0]["generated_text"] for output in outputs] == expected


def test_the_text_generation_pipeline_continues_a_chat():
    model, tokenizer = tiny_model("pre_up_slstm"), letters_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }};{% endfor %}"
    chat = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Why?"}]
    ids = torch.tensor([tokenizer("Be brief;Why?;")["input_ids"]])
    expected = tokenizer.decode(greedy(model, ids, 10)[0, -10:])
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 10, "do_sample": False, "suppress_tokens": NEVER}
    [output] = generate(chat, **options)
    assert output["generated_text"] == [*chat, {"role": "assistant", "content": expected}]
    outputs = generate([chat, chat[1:]], batch_size=2, **options)
    assert outputs[0] == [output]
    assert outputs[1][0]["generated_text"][:1] == chat[1:]


def test_the_text_generation_pipeline_samples_several_texts_of_each_prompt():
    model, tokenizer = tiny_model("pre_up_slstm"), letters_tokenizer()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 10, "do_sample": True, "suppress_tokens": NEVER}
    texts = generate(["Once upon", "A"], batch_size=2, num_return_sequences=3, **options)
    assert [len(of_prompt) for of_prompt in texts] == [3, 3]
    for prompt, of_prompt in zip(("Once upon", "A"), texts, strict=True):
        assert len({text["generated_text"] for text in of_prompt}) == 3
        assert all(len(text["generated_text"]) == len(prompt) + 10 for text in of_prompt)
        assert all(text["generated_text"].startswith(prompt) for text in of_prompt)


def test_continuous_batching_is_refused():
    with pytest.raises(NotImplementedError, match="pages the keys and values of attention, of which an xLSTM has none"):
        tiny_model().generate_batch([[2, 3], [4]], max_new_tokens=2)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_lookup_writes_the_same_text(kind):
    model = tiny_model(kind)
    ids = random_ids(1, 8).repeat(1, 3)
    assert torch.equal(greedy(model, ids, 40, prompt_lookup_num_tokens=4), greedy(model, ids, 40))


@pytest.mark.parametrize(
    "assistance",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model()}],
    ids=["prompt lookup", "assistant"],
)
def test_assistance_starts_from_the_first_token(assistance):
    model, ids = tiny_model(), random_ids(1, 12)
    cache = model(ids[:, :5]).past_key_values
    with pytest.raises(ValueError, match="must start from the first token, got past_key_values that has seen 5"):
        greedy(model, ids, 4, past_key_values=cache, **assistance)


class CountingModel:
    """Counts the forward passes of a model, and its draft tokens."""

    def __init__(self, model):
        self.lengths = []
        self.handle = model.register_forward_pre_hook(self.hook, with_kwargs=True)

    def hook(self, module, args, kwargs):
        self.lengths.append(kwargs["input_ids"].shape[1])


@pytest.mark.parametrize("same", [True, False], ids=["drafts all accepted", "drafts mostly refused"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_assistant_speeds_up_the_same_text(kind, same):
    model, ids = tiny_model(kind), random_ids(1, 8)
    assistant = tiny_model(kind if same else "post_up", hidden_size=32 if same else 16)
    assistant.generation_config.assistant_confidence_threshold = 0  # drafts are as long as they may
    expected = greedy(model, ids, 30)
    passes = CountingModel(model)
    assert torch.equal(greedy(model, ids, 30, assistant_model=assistant), expected)
    if same:
        assert len(passes.lengths) < 10
    assert max(passes.lengths[1:]) > 1


class NeverCalled(BaseStreamer):
    def put(self, value):
        raise AssertionError("something was generated")

    def end(self):
        raise AssertionError("something was generated")


@pytest.mark.parametrize("tokenizers", [{}, {"tokenizer": letters_tokenizer()}], ids=["none", "one"])
def test_a_draft_with_another_vocabulary_is_refused_before_anything_is_generated(tokenizers):
    model, assistant = tiny_model(), tiny_model(vocab_size=VOCAB + 1)
    passes = CountingModel(model), CountingModel(assistant)
    with pytest.raises(
        ValueError,
        match=r"^assistant_model must have the vocabulary of the model, 99 tokens, got one of 100; to translate "
        r"between two vocabularies, give tokenizer and assistant_tokenizer too\.$",
    ):
        greedy(model, random_ids(1, 8), 5, assistant_model=assistant, streamer=NeverCalled(), **tokenizers)
    assert [counted.lengths for counted in passes] == [[], []]


def test_a_draft_with_another_vocabulary_is_translated_where_both_tokenizers_are_given():
    tokenizer, other = letters_tokenizer(), letters_tokenizer()
    other.add_tokens(["th"])
    model, assistant = tiny_model(), tiny_model(vocab_size=VOCAB + 1)
    ids = tokenizer("the other thing", return_tensors="pt").input_ids
    drafts = CountingModel(assistant)
    options = {"assistant_model": assistant, "tokenizer": tokenizer, "assistant_tokenizer": other}
    assert torch.equal(greedy(model, ids, 20, **options), greedy(model, ids, 20))
    assert drafts.lengths


TURNS = (9, 1, 14)


def converse(model, turns, masks=None, give="full ids", **options):
    """All ids after turns of a user and of the model, with the cache returned from turn to turn."""
    text, mask = turns[0][:, :0], turns[0][:, :0]
    cache = None
    for i, turn in enumerate(turns):
        text = torch.cat((text, turn), 1)
        mask = torch.cat((mask, torch.ones_like(turn) if masks is None else masks[i]), 1)
        kwargs = {"past_key_values": cache, "return_dict_in_generate": True, **options}
        if give == "new ids" and cache is not None:
            new = text[:, cache.get_seq_length() :]
            output = greedy(model, new, 8, attention_mask=mask, **kwargs)
            new_tokens = output.sequences[:, new.shape[1] :]
        else:
            output = greedy(model, text, 8, attention_mask=mask, **kwargs)
            new_tokens = output.sequences[:, text.shape[1] :]
        text = torch.cat((text, new_tokens), 1)
        mask = torch.cat((mask, torch.ones_like(new_tokens)), 1)
        cache = output.past_key_values
        assert cache.get_seq_length() == text.shape[1] - 1
    return text, mask


def from_scratch(model, turns):
    text = turns[0][:, :0]
    for turn in turns:
        text = greedy(model, torch.cat((text, turn), 1), 8, use_cache=False)
    return text


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}], ids=["at once", "in pieces"])
@pytest.mark.parametrize("give", ["full ids", "new ids"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_with_the_returned_cache_is_the_one_from_scratch(kind, give, options):
    if options and not READS_ON_IN_PIECES:
        pytest.skip(STARTS_OVER)
    model = tiny_model(kind)
    turns = [random_ids(2, length, seed=length) for length in TURNS]
    text, _ = converse(model, turns, give=give, **options)
    assert torch.equal(text, from_scratch(model, turns))


def test_reading_on_in_pieces_is_refused_where_transformers_would_start_over(monkeypatch):
    monkeypatch.setattr(generation_xlstm, "READS_ON_IN_PIECES", False)
    model, turns = tiny_model(), [random_ids(1, 9), random_ids(1, 6)]
    with pytest.raises(NotImplementedError, match=r"that has seen tokens needs Transformers 5\.21 or later, got"):
        converse(model, turns, prefill_chunk_size=4)


@pytest.mark.parametrize("pad", [1, 40], ids=["pad", "a word as pad"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_have_ended_read_no_padding(kind, pad):
    """Each row continues as its own ids and mask do from scratch, in the batch and by itself."""
    model, ids, turn = tiny_model(kind), random_ids(3, 8), random_ids(3, 4, seed=1)
    plain = greedy(model, ids, 12)
    ends = [plain[0, 10].item(), plain[1, 14].item()]  # which the first two rows write as third and seventh, or before
    options = {"eos_token_id": ends, "pad_token_id": pad, "return_dict_in_generate": True}
    output = greedy(model, ids, 12, **options)
    text, cache = output.sequences, output.past_key_values
    ended = torch.isin(text[:, 8:], torch.tensor(ends)).cumsum(1) > 0
    mask = torch.cat((torch.ones_like(ids), ~ended.roll(1, 1) | (torch.arange(text.shape[1] - 8) == 0)), 1).long()
    assert (mask.sum(1) < text.shape[1]).any()
    whole, mask = torch.cat((text, turn), 1), torch.cat((mask, torch.ones_like(turn)), 1)
    expected = greedy(model, whole, 8, attention_mask=mask)
    row = copy.deepcopy(cache)
    row.batch_select_indices(torch.tensor([0]))
    assert torch.equal(greedy(model, whole, 8, attention_mask=mask, past_key_values=cache), expected)
    assert torch.equal(greedy(model, whole[:1], 8, attention_mask=mask[:1], past_key_values=row), expected[:1])


@pytest.mark.parametrize("give", ["full ids", "new ids"])
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_padded_batch_of_conversations_is_each_one_from_scratch(kind, give):
    model = tiny_model(kind)
    turns, masks = [], []
    for length in TURNS:
        ids, mask = left_padded([random_ids(1, length, seed=length)[0], random_ids(1, 1 + length // 3, seed=50)[0]])
        turns.append(ids)
        masks.append(mask)
    text, mask = converse(model, turns, masks, give=give)
    for i in range(2):
        alone = from_scratch(model, [turn[i, m[i].bool()][None] for turn, m in zip(turns, masks, strict=True)])
        assert torch.equal(text[i, mask[i].bool()], alone[0])


def test_the_cache_may_be_called_cache_params_in_generate():
    model, ids = tiny_model("pre_up_slstm"), random_ids(2, 12)
    cache = XLSTMCache(model.config)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
    assert torch.equal(greedy(model, ids, 5, cache_params=cache), greedy(model, ids, 5))
    assert cache.get_seq_length() == 16


@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_prompt_read_once_serves_several_continuations(kind):
    model, prompt = tiny_model(kind), random_ids(1, 20)
    with torch.no_grad():
        cache = model(prompt).past_key_values
    cache.batch_repeat_interleave(3)
    questions = random_ids(3, 4, seed=1)
    texts = torch.cat((prompt.expand(3, -1), questions), 1)
    assert torch.equal(greedy(model, texts, 10, past_key_values=cache), greedy(model, texts, 10))


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params"])
def test_a_state_has_the_names_that_versions_of_transformers_have_for_it(name):
    model, ids = tiny_model(), random_ids(2, 9)
    cache = getattr(model(ids[:, :6]), name)
    assert cache.get_seq_length() == 6
    torch.testing.assert_close(model(ids[:, 6:], **{name: cache.fork(1)}).logits, model(ids).logits[:, 6:])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    output = model.generate(ids, **{name: cache}, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert cache.get_seq_length() == 13


def test_a_step_without_a_state_is_refused():
    """As a version of Transformers that calls it otherwise would make it."""
    model, ids = tiny_model(), random_ids(1, 9)
    with pytest.raises(RuntimeError, match="^generate must hand on the state as .*, got none from Transformers 5"):
        model.prepare_inputs_for_generation(ids, next_sequence_length=1, state=XLSTMCache(model.config))


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_a_forked_prompt_is_read_once_and_continued_as_each_alone(kind):
    model, prompts, questions = tiny_model(kind), random_ids(2, 20), random_ids(6, 4, seed=1)
    cache = XLSTMCache(model.config)
    passes = CountingModel(model)
    model(input_ids=prompts, past_key_values=cache)
    texts = torch.cat((prompts.repeat_interleave(3, 0), questions), 1)
    together = greedy(model, texts, 10, past_key_values=cache.fork(3))
    assert passes.lengths == [20, 4] + 9 * [1]
    passes.handle.remove()
    for text, row in zip(texts, together, strict=True):
        assert torch.equal(row, greedy(model, text[None], 10)[0])
    assert cache.get_seq_length() == 20


@torch.no_grad()
@pytest.mark.parametrize("kind", TWO_KINDS)
def test_samples_from_a_forked_prompt_are_those_of_the_whole_text(kind):
    model, prompts = tiny_model(kind), random_ids(2, 20)
    cache = model(prompts[:, :-1]).past_key_values
    options = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3, "max_new_tokens": 10}
    texts = []
    for past in (None, cache.fork(3), cache.fork(3)):
        torch.manual_seed(7)
        texts.append(model.generate(prompts, past_key_values=past, **options))
    assert torch.equal(texts[1], texts[0]) and torch.equal(texts[2], texts[0])
    assert len(texts[0].unique(dim=0)) == 6


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("length", [5, 19, 20])
def test_new_ids_without_a_mask_over_all_are_refused(length, options):
    if "prefill_chunk_size" in options and not READS_ON_IN_PIECES:
        pytest.skip(STARTS_OVER)
    model = tiny_model("pre_up_slstm")
    with torch.no_grad():
        cache = model(random_ids(2, 20)).past_key_values
    message = (
        "give the ids of the whole conversation, or the new ids with an attention_mask over all of it; "
        f"got 20 tokens in past_key_values and {length} ids and mask columns"
    )
    with pytest.raises(ValueError, match=message):
        greedy(model, random_ids(2, length), 5, past_key_values=cache, **options)


def test_a_bfloat16_model_generates_with_a_float32_state():
    model, ids = tiny_model("pre_up_slstm").bfloat16(), random_ids(2, 7)
    output = greedy(model, ids, 10, return_dict_in_generate=True)
    assert output.sequences.shape == (2, 17)
    assert {t.dtype for layer in output.past_key_values.layers for t in layer.state.cell} == {torch.float32}


def test_generation_starts_from_the_beginning_token_without_a_prompt():
    model = tiny_model("pre_up_slstm")
    assert torch.equal(greedy(model, None, 6), greedy(model, torch.tensor([[0]]), 6))
    assert tiny_config().bos_token_id == 0
