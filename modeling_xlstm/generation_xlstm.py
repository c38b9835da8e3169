"""`generate` of a recurrent model: what it checks, how its steps are made fast, and which rows of a batch read on.

Dims: `B` batch `T` time.
"""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation import GenerationMixin, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import logging

from .backends import CACHE, OTHER_NAMES, READS_ON_IN_PIECES
from .cache_xlstm import XLSTMCache
from .distribution_xlstm import SEED, check_alike, random_state
from .graphs_xlstm import ACTIVE, graphs_of, quiet
from .inputs_xlstm import check_cache, only_cache, padding_mask
from .linear_packed import pack, packing


logger = logging.get_logger(__name__)

NO_CONTINUOUS_BATCHING = (
    "Continuous batching pages the keys and values of attention, of which an xLSTM has none; generate takes a batch."
)


DECODING = (CACHE, "use_cache", "output_hidden_states")  # what a step of `generate` is told besides a token


class Endings(StoppingCriteriaList):
    """Stopping criteria of a batch that know which rows had ended before the newest token: in these it is padding."""

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        self.before: Tensor | None = None  # [B] bool
        self.now: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = super().__call__(input_ids, scores, **kwargs)
        self.before, self.now = self.now, ended if self.now is None else self.now | ended
        return ended

    def unended(self, input_ids: Tensor) -> Tensor:
        """A mask `[B, 1]` of the newest tokens."""
        if self.before is None:
            return torch.ones_like(input_ids[:, :1], dtype=torch.bool)
        return ~self.before[:, None]


class XLSTMGenerationMixin(GenerationMixin):
    """`generate` of an `XLSTMForCausalLM`, which this is a base of."""

    model: Any
    config: Any
    dtype: Any
    device: Any
    text_group: Any

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        assistant = generation_mode_kwargs.get("assistant_model")
        if assistant is not None and not {"tokenizer", "assistant_tokenizer"} <= generation_mode_kwargs.keys():
            ours, theirs = (model.config.get_text_config().vocab_size for model in (self, assistant))
            if ours != theirs:
                raise ValueError(
                    f"assistant_model must have the vocabulary of the model, {ours} tokens, got one of {theirs}; to "
                    "translate between two vocabularies, give tokenizer and assistant_tokenizer too."
                )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, max_length):
        if generation_config.cache_implementation not in (None, "dynamic", "static"):
            raise ValueError(
                "The state of an xLSTM has a constant size: cache_implementation must be None, 'dynamic' or 'static' "
                f"(all the same), got {generation_config.cache_implementation!r}."
            )
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        in_pieces = generation_config.prefill_chunk_size is not None
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if in_pieces and mask is not None and (mask[:, -1] == 0).any():
            raise ValueError("prefill_chunk_size needs padding on the left, got an attention_mask that ends with 0.")
        if (cache := model_kwargs.get(CACHE)) is not None:
            check_cache(cache, self.model, None, self.dtype, self.device)
            seen = cache.get_seq_length()
            if seen and generation_config.use_cache is False:
                raise ValueError(
                    f"past_key_values that has seen {seen} tokens continues a text only with use_cache=True, got False."
                )
            if in_pieces and seen and not READS_ON_IN_PIECES:
                raise NotImplementedError(
                    "prefill_chunk_size with a past_key_values that has seen tokens needs Transformers 5.21 or later, "
                    f"got {transformers.__version__}."
                )
            if embeds is not None and (
                embeds.shape[1] <= seen or (mask is not None and embeds.shape[1] != mask.shape[1])
            ):
                raise ValueError(
                    f"inputs_embeds must hold the whole conversation, with the {seen} tokens that past_key_values "
                    f"has seen, got {embeds.shape[1]}."
                )
            # newer versions of Transformers drop a mask of ones, and note its length
            length = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
            if length is not None and length <= seen:
                raise ValueError(
                    "To continue, give the ids of the whole conversation, or the new ids with an attention_mask over "
                    f"all of it; got {seen} tokens in past_key_values and {length} ids and mask columns."
                )
            if seen and generation_mode == GenerationMode.ASSISTED_GENERATION:
                raise ValueError(
                    "Prompt lookup and assisted generation must start from the first token, got past_key_values that "
                    f"has seen {seen}: they would read these again."
                )
            if seen and cache.batch_size != rows:
                raise ValueError(
                    f"past_key_values must have a row for each of {rows} sequences, beams included, got "
                    f"{cache.batch_size}; batch_repeat_interleave repeats rows."
                )
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = XLSTMCache(self.config)
            if generation_config.is_assistant:  # whose drafts are taken back where the main model differs
                model_kwargs[CACHE].activate_past_recording()

        if generation_config.do_sample and self.text_group is not None:
            check_alike(self.text_group, SEED, random_state(self.device))

        compiles = generation_config.compile_config is not None  # by itself
        as_it_is = CACHE not in model_kwargs or generation_config.disable_compile or compiles
        pack(not as_it_is)
        if not as_it_is:
            self._prepare_graphs(rows)

    def _prepare_graphs(self: Any, rows: int) -> None:
        """Has the steps of this `generate` replayed, where they can be."""
        graphs = graphs_of(self)
        obstacle = graphs.obstacle(self)
        if obstacle is not None:
            logger.info(f"The steps of generate are not replayed as CUDA graphs: {obstacle}.")
            return
        graphs.prepare(rows)
        ACTIVE.set(graphs)

    def generate(self, *args: Any, **kwargs: Any):
        """As in Transformers; on a GPU steps are replayed as CUDA graphs, and on a CPU weights in bfloat16 are copied
        into the order that they are multiplied in, up to 2 GiB of them, for the time of the call.

        Neither with `disable_compile=True`. With a `compile_config` steps are compiled by `torch.compile` instead, on a
        CPU too, which needs a C++ compiler.
        """
        if kwargs.get("output_gates"):
            raise ValueError("output_gates is for a forward pass, of which generate makes many, got True.")
        inputs = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        given = next((x for x in inputs if isinstance(x, Tensor) and x.dim() > 1), None)
        cache = only_cache(**{name: kwargs.pop(name, None) for name in (CACHE, *OTHER_NAMES)})
        if cache is not None:
            kwargs[CACHE] = cache
        if given is not None:
            seen = cache if isinstance(cache, XLSTMCache) else None
            padding_mask(kwargs.get("attention_mask"), given.shape[0], given.shape[1], seen)
            if self.text_group is not None:
                check_alike(self.text_group, "text", given, kwargs.get("attention_mask"))
        with quiet(), packing():
            try:
                return super().generate(*args, **kwargs)  # type: ignore[misc]
            finally:
                if (graphs := ACTIVE.get()) is not None:
                    graphs.vacate()

    def _sample(self, input_ids: Any, logits_processor: Any, stopping_criteria: Any, *args: Any, **kwargs: Any):
        # only then are rows that have ended padded
        if len(input_ids) > 1 and any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
            stopping_criteria = kwargs["endings"] = Endings(stopping_criteria)
        return super()._sample(input_ids, logits_processor, stopping_criteria, *args, **kwargs)  # type: ignore[misc]

    def _assisted_decoding(self, *args: Any, **kwargs: Any):
        """As in Transformers, and nothing is recorded in a cache afterwards, unless it was before."""
        cache = kwargs[CACHE]
        was_recording = cache.is_recording
        try:
            return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]
        finally:
            if not was_recording:
                cache.deactivate_past_recording()

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Steps are compiled by `torch.compile` only where that is asked for: they are replayed as graphs."""
        asked = generation_config.compile_config
        if asked is None:
            return False
        generation_config.compile_config = copy.copy(asked)
        generation_config.compile_config._compile_all_devices = True  # on a CPU too, where it pays as well
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        """Raises NotImplementedError: there is nothing to page."""
        raise NotImplementedError(NO_CONTINUOUS_BATCHING)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The padding mask as it is: there is no attention to mask."""
        return attention_mask

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        endings: Endings | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in Transformers, with padding moved to the left: the next token is read at the last position."""
        if kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration"):
            # what was generated is no padding until a row has ended, and this is done for every token
            kept = {name: x for name, x in kwargs.items() if name in DECODING}
            if kept.get(CACHE) is None:
                raise RuntimeError(
                    f"generate must hand on the state as {CACHE}, got none from Transformers "
                    f"{transformers.__version__}, which this version of modeling_xlstm may not know yet."
                )
            if endings is not None:
                kept["attention_mask"] = endings.unended(input_ids)
            return {"input_ids": input_ids[:, -1:].contiguous(), "logits_to_keep": 1, **kept}
        kwargs["inputs_embeds"] = inputs_embeds
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc, arg-type]
        mask = inputs.get("attention_mask")
        if mask is None:
            return inputs
        name = "input_ids" if inputs.get("inputs_embeds") is None else "inputs_embeds"
        x = inputs[name]
        mask = mask[:, -x.shape[1] :]
        if (mask != 0).all():
            return {**inputs, "attention_mask": None}
        order = torch.argsort(mask != 0, dim=1, stable=True)
        rows = torch.arange(len(x), device=x.device)[:, None]
        return {**inputs, name: x[rows, order], "attention_mask": mask.gather(1, order)}
