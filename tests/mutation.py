"""Breaks the maths, the masks and the cache in one place at a time, and asks whether the tests notice.

A mutant is a module with one small change in its source. A forked child of a process that has imported everything but
the package reads it in place of the module, and runs the tests that are chosen for the module until one fails: then the
mutant is killed. Of each line one is tried, always the same; with `--all` all are.

Those that survive for a reason stand in mutation_survivors.txt. The status is 1 if fewer than 95 % are killed, if
another one survives, or if what stands there is killed or is no mutant any more.
"""

# ruff: noqa: T201  (a command-line tool prints)

import ast
import builtins
import gc
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

from tqdm import tqdm


TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "modeling_xlstm"
SURVIVORS = TESTS / "mutation_survivors.txt"
A_LINE = 1  # mutants tried of each line
LEAST = 0.95  # of the mutants, to be killed


class Target(NamedTuple):
    """A module; its functions and classes that are broken (or all), and those that never are, as they matter on a GPU
    only; and the tests that are to notice, the fastest and most telling first, in a few seconds altogether."""

    file: str
    tests: tuple[str, ...]
    only: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


def of(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}.py::{name}" for name in names)


OPS = of(
    "test_ops",
    "test_padding_may_hold_anything",
    "test_autocast_does_not_reach_into_the_op",
    "test_autocast_does_not_reach_into_the_gradients",
    "test_boundaries_may_be_made_in_inference_mode",
    "test_inputs_need_not_be_contiguous",
    "test_fake_kernels_have_the_strides_of_the_real_ones",
    "test_a_loss_may_read_a_single_output",
)
WITHOUT_NUMBERS = of("test_modeling", "test_a_model_without_numbers_says_what_shapes_come_out[post_up]")
COMPILED_OPS = of(
    "test_ops",
    "test_the_compiled_op_is_the_eager_one[packed-mlstm]",
    "test_the_compiled_op_is_the_eager_one[packed-slstm]",
)
MLSTM = of(
    "test_mlstm",
    "test_recurrent_is_the_parallel_form_of_the_paper",
    "test_sigmoid_input_gate_is_the_exponential_one_of_its_logarithm",
    "test_chunkwise_is_recurrent_for_any_length_and_chunk_size[65-16-exp]",
    "test_chunkwise_is_recurrent_for_any_length_and_chunk_size[65-16-sigmoid]",
    "test_steps_are_recurrent",
    "test_chunkwise_is_recurrent_for_extreme_gates",
    "test_chunkwise_is_recurrent_where_the_stabiliser_is_beyond_the_bounds_of_the_floor",
    "test_what_a_gate_that_is_no_number_reaches_is_no_number_either",
    "test_packed_sequences_are_separate_sequences",
    "test_padded_sequences_are_separate_sequences",
    "test_padded_positions_get_no_gradient_and_read_the_held_state",
    "test_a_sequence_in_two_parts_is_the_whole",
    "test_a_closed_forget_gate_forgets_everything_before_it_exactly",
    "test_a_step_in_place_is_the_step_and_overwrites_the_state",
    "test_a_soft_cap_bounds_both_gates_before_all_else",
    "test_no_state_is_a_state_of_zeros",
    "test_extreme_gates_stay_finite_in_every_dtype",
    "test_gradients_of_steps_stay_finite_where_the_stabiliser_is_low",
    "test_h_has_the_dtype_of_v_and_the_state_is_at_least_float32",
    "test_nothing_is_modified_in_place",
    "test_unneeded_gradients_are_left_out",
    "test_expanded_gradients_and_inputs_are_fine",
    "test_incoming_gradients_need_not_be_contiguous",
    "test_the_work_of_chunks_grows_with_the_length_and_not_with_its_square",
    "test_int64_boundaries_do_as_well",
)
MLSTM_ERRORS = of(
    "test_mlstm",
    "test_bad_input_is_refused_in_a_sentence",
    "test_bad_masks_of_a_step_are_refused_in_a_sentence",
    "test_bad_sequences_are_refused_in_a_sentence",
    "test_chunks_hold_a_token_at_least",
    "test_a_sequence_holds_a_token_at_least",
    "test_packed_sequences_start_from_a_state_each",
)
MLSTM_LATE = of(
    "test_mlstm",
    "test_low_precision_inputs_cost_only_their_own_rounding",
    "test_float32_chunkwise_errs_like_float32_recurrent[63-None-exp]",
    "test_the_op_keeps_the_promises_of_a_custom_op[one chunk of one head]",
    "test_the_op_keeps_the_promises_of_a_custom_op[packed]",
)
SLSTM = of(
    "test_slstm",
    "test_the_scan_is_the_recurrence_of_the_paper",
    "test_scan_is_recurrent_for_any_length",
    "test_steps_are_recurrent",
    "test_scan_is_recurrent_for_extreme_gates",
    "test_packed_sequences_are_separate_sequences",
    "test_padded_sequences_are_separate_sequences",
    "test_padded_positions_get_no_gradient_and_repeat_h",
    "test_fresh_rows_do_not_disturb_continued_ones",
    "test_scan_without_gradients_is_the_scan_with_them",
    "test_no_state_is_a_state_of_zeros",
    "test_a_sequence_in_two_parts_is_the_whole",
    "test_extreme_gates_stay_finite_in_every_dtype",
    "test_h_has_the_dtype_of_the_gates_and_the_state_is_at_least_float32",
    "test_nothing_is_modified_in_place",
    "test_unneeded_gradients_are_left_out",
    "test_expanded_gradients_and_inputs_are_fine",
    "test_incoming_gradients_need_not_be_contiguous",
    "test_activations_are_kept_only_where_there_is_something_to_differentiate",
    "test_int64_boundaries_do_as_well",
)
SLSTM_ERRORS = of(
    "test_slstm",
    "test_bad_input_is_refused_in_a_sentence",
    "test_bad_masks_of_a_step_are_refused_in_a_sentence",
    "test_bad_sequences_are_refused_in_a_sentence",
    "test_a_sequence_holds_a_token_at_least",
    "test_packed_sequences_start_from_a_state_each",
)
SLSTM_LATE = of(
    "test_slstm",
    "test_low_precision_inputs_cost_only_their_own_rounding",
    "test_float32_scan_errs_like_float32_recurrent[63]",
    "test_gradients_have_the_dtypes_that_their_op_promises",
    "test_the_op_keeps_the_promises_of_a_custom_op",
)
ERRORS = of(
    "test_errors",
    "test_a_bad_input_is_refused",
    "test_a_mask_must_fit_the_past_and_the_new_tokens",
    "test_a_layer_refuses_the_state_of_another_kind",
    "test_a_layer_refuses_what_does_not_fit",
    "test_layers_are_built_and_continued_only_as_they_can",
    "test_the_state_of_another_batch_is_refused_and_left_as_it_was",
    "test_packed_sequences_do_not_continue_a_cache",
    "test_a_cache_is_given_once",
    "test_boundaries_are_checked_once_for_all_layers_and_again_once_they_change",
    "test_boundaries_are_checked_once_by_layers_alone_and_whenever_their_version_is_not_known",
    "test_packed_texts_may_be_read_in_inference_mode",
    "test_packed_positions_are_refused_while_a_compiler_traces",
    "test_boundaries_become_int32",
    "test_a_single_number_that_is_not_finite_is_seen",
    "test_packed_sequences_with_padding_are_refused",
    "test_boundaries_of_another_name_are_not_overlooked",
    "test_an_additive_mask_is_refused",
    "test_logits_that_are_not_finite_are_refused_outside_training",
    "test_generate_refuses_a_mask_that_does_not_fit",
    "test_generate_goes_on_only_with_a_mask_over_all_or_over_what_is_given",
)
MODELS = of(
    "test_modeling",
    "test_padding_changes_neither_logits_nor_state",
    "test_packed_sequences_equal_separate_ones",
    "test_no_position_sees_what_follows_nor_does_padding[pre_up_slstm]",
    "test_a_padded_batch_is_continued_as_if_there_were_no_padding",
    "test_padding_given_token_by_token_leaves_the_state",
    "test_a_row_of_padding_only_keeps_an_empty_state",
    "test_a_mask_may_have_any_dtype",
    "test_an_empty_sequence_among_packed_ones_changes_nothing",
    "test_positions_of_a_single_sequence_change_nothing",
    "test_positions_of_a_padded_text_are_not_taken_for_boundaries",
    "test_positions_of_all_rows_may_be_given_once_beside_padding",
    "test_embeddings_at_padded_positions_may_be_anything",
    "test_ids_may_be_int32",
    "test_embeddings_may_be_given_in_place_of_ids",
    "test_logits_to_keep_selects_positions",
)
COMPILED_MODELS = of(
    "test_modeling",
    "test_logits_of_some_positions_compile_to_one_graph",
    "test_a_padded_prefill_compiles_to_one_graph[pre_up_slstm]",
    "test_packed_sequences_compile_to_one_graph[post_up]",
)
CACHED = of(
    "test_modeling",
    "test_calling_a_layer_leaves_its_state_argument_unchanged",
    "test_prefill_and_decode_compile_to_one_graph_each_and_are_not_recompiled[post_up_slstm]",
)
DETACHED = of("test_stateful_training", "test_a_detached_state_ends_the_gradient[post_up]")
STEPS = of("test_cache", "test_a_token_with_gradients_does_not_overwrite_states_without")
TRAINING = of(
    "test_training",
    "test_gradient_checkpointing_recomputes_the_same_gradients[post_up-False]",
    "test_checkpointing_keeps_the_gradient_of_the_states_or_refuses[post_up]",
    "test_gradients_flow_through_the_states_of_a_cache[post_up-(7, 1, 1, 31)-eval]",
    "test_gradients_flow_through_the_states_of_a_cache[pre_up-(7, 1, 1, 31)-eval]",
)
LAYERS = of(
    "test_modeling",
    "test_a_head_may_have_a_single_key",
    "test_a_layer_by_itself_skips_padding_and_separates_packed_sequences",
    "test_a_layer_by_itself_carries_a_differentiable_state[MLSTMPreUpLayer-16]",
    "test_packed_sequences_may_each_start_from_a_state",
    "test_calling_a_layer_leaves_its_state_argument_unchanged",
    "test_every_variant_decodes_and_skips_padding_as_in_one_pass",
    "test_the_last_block_may_leave_out_what_is_not_kept",
    "test_half_precision_logits_are_close_and_states_are_float32",
    "test_a_float64_model_computes_and_remembers_in_float64",
    "test_initial_values_of_the_first_papers_blocks",
    "test_a_convolution_has_a_state_of_its_own_memory_in_float32",
    "test_autocast_does_not_reach_into_a_step_that_overwrites_the_state",
)
GATES = of(
    "test_gate_activations",
    "test_they_lead_the_cells_to_their_states",
    "test_a_text_in_parts_has_the_gates_of_the_whole",
    "test_at_padding_they_are_closed_and_nothing_is_forgotten",
    "test_packed_texts_have_the_gates_of_separate_ones",
    "test_packed_sequences_of_a_layer_go_on_from_states_of_their_own",
    "test_they_are_float32_in_a_half_precision_model",
    "test_autocast_does_not_reach_into_those_of_an_slstm",
)
CACHE = of(
    "test_cache",
    "test_shapes_of_states_follow_from_the_configuration",
    "test_of_several_processes_each_has_the_states_of_its_heads",
    "test_states_may_live_in_memory_that_is_given_each_at_a_line_of_its_own",
    "test_states_are_float32_in_a_half_precision_model",
    "test_states_stay_at_their_addresses_outside_autograd",
    "test_a_cache_made_in_inference_mode_works_after_it",
    "test_a_token_with_gradients_does_not_overwrite_states_without",
    "test_a_cache_that_is_differentiated_through_is_not_overwritten",
    "test_a_token_outside_autograd_overwrites_no_state_that_a_loss_is_of",
    "test_an_empty_cache_says_so",
    "test_a_cache_has_a_previous_state_once_its_last_layer_has_one",
    "test_a_filled_cache_says_what_it_has_seen",
    "test_reset_equals_a_fresh_cache",
    "test_a_reset_keeps_the_addresses_where_autograd_is_on",
    "test_what_was_checked_of_an_empty_cache_does_not_hold_of_a_filled_one",
    "test_after_a_reset_the_batch_may_be_another",
    "test_states_put_into_a_cache_that_was_reset_are_used",
    "test_cropped_to_nothing_it_is_empty_again",
    "test_a_cache_filled_in_inference_mode_serves_outside_of_it",
    "test_a_cache_that_a_failing_forward_pass_left_half_way_is_refused_until_it_is_reset",
    "test_the_cache_of_another_model_is_refused_by_what_differs",
    "test_what_a_model_does_not_have_may_differ",
    "test_a_state_that_does_not_fit_is_refused_before_anything_is_computed",
    "test_rows_are_reordered_repeated_and_selected",
    "test_rows_and_numbers_that_there_are_not_are_refused_and_the_cache_left_as_it_was",
    "test_a_change_that_is_stopped_half_way_leaves_a_cache_that_is_refused",
    "test_batch_operations_on_an_empty_cache_do_nothing",
    "test_a_pass_that_is_stopped_anywhere_leaves_a_cache_that_is_refused",
    "test_tokens_that_are_taken_back_in_part_leave_a_cache_that_is_refused",
    "test_a_block_leaves_the_state_of_a_cache_as_it_is",
    "test_states_of_several_rows_at_one_address_are_replaced",
    "test_copies_and_pickles_hold_nothing_recorded",
    "test_recording_can_be_ended",
    "test_prompt_lookup_and_drafts_leave_a_cache_that_records_only_if_it_did",
    "test_a_copy_is_independent",
    "test_a_cache_moves_to_another_device",
    "test_a_cropped_cache_records_again",
    "test_crop_counts_padding_as_tokens",
    "test_taking_tokens_back_leaves_no_gradients",
    "test_a_cache_of_a_single_layer_knows_whether_it_records",
    "test_crop_of_nothing_only_forgets_the_records",
    "test_crop_refuses_what_is_not_recorded",
    "test_reordering_ends_what_can_be_taken_back",
    "test_a_fork_holds_each_row_n_times_and_leaves_the_original",
    "test_forks_of_a_fork_and_of_a_cache_that_was_reset_are_forks",
    "test_a_fork_passes_gradients_to_the_prompt",
    "test_a_fork_is_of_at_least_one",
    "test_a_fork_takes_back_what_it_has_recorded_itself_and_the_original_what_it_has",
    "test_crop_equals_never_having_seen_the_tokens[pre_up_slstm]",
    "test_crop_equals_never_having_seen_the_tokens[sigmoid]",
)
STATE_FILE = of(
    "test_state_file",
    "test_a_saved_cache_loads_and_continues_exactly",
    "test_the_state_of_a_double_precision_model_is_saved_in_double_precision",
    "test_a_cache_under_autograd_and_one_whose_states_share_memory_can_be_saved",
    "test_states_in_another_order_of_memory_can_be_saved",
    "test_a_loaded_cache_can_be_forked_and_takes_back_what_it_has_recorded_itself",
    "test_a_state_is_refused_by_all_models_but_its_own",
    "test_a_state_is_refused_with_another_tokenizer_and_where_only_one_side_has_one",
    "test_what_is_not_the_state_of_the_model_is_not_saved",
)

TARGETS: tuple[Target, ...] = (
    Target("mlstm_torch.py", MLSTM + OPS + MLSTM_LATE),
    Target("slstm_torch.py", SLSTM + OPS + SLSTM_LATE),
    Target("mlstm.py", MLSTM + MLSTM_ERRORS + OPS + MLSTM_LATE, never=("mlstm_steps_", "mlstm_steps_gated_")),
    Target("slstm.py", SLSTM + SLSTM_ERRORS + OPS + SLSTM_LATE, never=("_under_autocast", "_resolve")),
    Target(
        "checks.py", MLSTM_ERRORS + SLSTM_ERRORS + ERRORS + OPS + WITHOUT_NUMBERS + COMPILED_OPS,
        never=("product_dtype", "rising"),
    ),
    Target("inputs_xlstm.py", ERRORS + MODELS + TRAINING + COMPILED_MODELS),
    Target(
        "layers_xlstm.py", LAYERS + MODELS + GATES + ERRORS + STEPS,
        only=(
            "check_layer_input", "last", "unpack_state", "CausalConv1d", "_convolved", "_gather", "GateActivations.at",
            "_MLSTMMixer._cell", "_MLSTMMixer._is_step_", "_MLSTMMixer._step_", "SLSTMLayer._activations",
        ),
        never=("CausalConv1d._starts",),
    ),
    Target(
        "cache_xlstm.py", CACHE + STATE_FILE + TRAINING + DETACHED + CACHED,
        never=("_keep_address", "XLSTMCache.turn"),
    ),
)  # fmt: skip


# What is broken

OPERATORS: dict[type, tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip
OTHER_FUNCTIONS = {
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "all": "any", "any": "all",
    "reversed": "list", "zeros": "ones", "zeros_like": "ones_like", "new_zeros": "new_ones",
}  # fmt: skip
# What returns something like what it is given may be left out.
FUNCTIONS = ("exp", "tanh", "sigmoid", "logsigmoid", "silu", "nan_to_num")
METHODS = (
    "abs", "sign", "clamp", "clamp_", "clone", "contiguous", "flip", "to", "tril", "tril_", "cumsum", "cumprod",
    "exp_", "mul_", "div_", "sub_", "add_", "addcmul_", "baddbmm_", "masked_fill", "masked_fill_", "detach", "expand",
)  # fmt: skip
SWAPPED = ("sub", "addcmul", "bmm", "range")
# Arguments that change nothing where all tensors are on one device, or that say what is so anyway.
IDLE = ("device", "non_blocking", "strict")


class Mutant(NamedTuple):
    """A module with another source. `old` and `new` are the lines where that differs, from `line` on."""

    file: str
    function: str
    line: int
    old: str
    new: str
    before: bytes
    text: str
    after: bytes

    @property
    def key(self) -> str:
        """What it is called, wherever the line is."""
        return f"{self.file}:{self.function}: {self.old} => {self.new}"

    def source(self) -> bytes:
        return self.before + self.text.encode() + self.after


class Source:
    """The changes of a source text."""

    def __init__(self, source: bytes):
        self.source = source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: Any) -> tuple[int, int]:
        start, end = self.starts[node.lineno - 1], self.starts[node.end_lineno - 1]
        return start + node.col_offset, end + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()

    def around(self, line: int) -> range:
        """The lines of the function or method that a line is in, or all lines."""
        for node in ast.walk(ast.parse(self.source)):  # what is outside comes before what is inside
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if first <= line <= node.end_lineno:
                    return range(first, node.end_lineno + 1)
        return range(1, len(self.starts))

    def mutants(self, file: str, target: Target | None = None) -> Iterator[Mutant]:
        seen: dict[str, list[int]] = {}  # where the lines of a key are
        for function, start, end, text in self.changes(ast.parse(self.source), ""):
            names = {function, function.split(".")[0]}
            if target is not None and (names & set(target.never) or (target.only and not names & set(target.only))):
                continue
            line = self.source.count(b"\n", 0, start) + 1
            first, last = self.starts[line - 1], self.starts[self.source.count(b"\n", 0, end) + 1]
            old = self.source[first:last]
            new = self.source[first:start] + text.encode() + self.source[end:last]
            around = self.source[:start], text, self.source[end:]
            mutant = Mutant(file, function, line, _flat(old), _flat(new), *around)
            places = seen.setdefault(mutant.key, [])
            if first not in places:  # or else the line has become this in another way
                places.append(first)
                yield mutant._replace(new=mutant.new + f"  # {len(places)}" * (len(places) > 1))

    def changes(self, node: ast.AST, function: str, bound: dict[str, int] | None = None) -> Iterator[tuple]:
        """(function, start, end, text) of all changes in a node. `bound` are lines where names are bound first."""
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.Assert | ast.JoinedStr):
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.Assign) and self.text(node).startswith("__all__"):
            return
        if isinstance(node, ast.If) and "triton" in self.text(node.test).lower():
            for part in node.orelse:
                yield from self.changes(part, function, bound)
            return  # kernels have tests of their own, elsewhere
        if isinstance(node, ast.keyword) and node.arg in IDLE:
            return
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            function = f"{function}.{node.name}" if function else node.name
        if isinstance(node, ast.FunctionDef):
            bound = _bound(node)
        for start, end, text in self.own_changes(node, bound or {}):
            yield function or "module", start, end, text
        for name, child in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for part in child if isinstance(child, list) else [child]:
                    if isinstance(part, ast.AST):
                        yield from self.changes(part, function, bound)

    def own_changes(self, node: ast.AST, bound: dict[str, int]) -> Iterator[tuple[int, int, str]]:
        """(start, end, text) of the changes of this node, without those of its parts."""

        def becomes(text: str, place: ast.AST = node) -> tuple[int, int, str]:
            return *self.span(place), text

        match node:
            case ast.Compare(left, operators, others):
                for operator, before, after in zip(operators, [left, *others], others, strict=False):
                    yield from self.operator(operator, before, after)
            case ast.BinOp(left, operator, right):
                yield from self.operator(operator, left, right)
            case ast.BoolOp(operator, values):
                for before, after in pairwise(values):
                    yield from self.operator(operator, before, after)
                for i in range(len(values)):
                    rest = f" {OPERATORS[type(operator)][0]} ".join(
                        f"({self.text(value)})" for j, value in enumerate(values) if j != i
                    )
                    yield becomes(f"({rest})")
            case ast.UnaryOp(_, operand):
                yield becomes(f"({self.text(operand)})")
            case ast.Constant(bool(value)):
                yield becomes(str(not value))
            case ast.Constant(int(value)):
                yield becomes(str(value + 1))
            case ast.Constant(float(value)):
                yield becomes(str(2 * value if value else 1.0))
            case ast.Attribute(_, "inf" | "nan"):
                yield becomes("0.0")
            case ast.If(test) | ast.IfExp(test):
                yield becomes("True", test)
                yield becomes("False", test)
            case ast.While(test):
                yield becomes("False", test)
            case ast.comprehension(ifs=tests):
                for test in tests:
                    yield becomes("True", test)
                    yield becomes("False", test)
            case ast.With(items):
                for item in items:
                    if item.optional_vars is None:
                        yield becomes('__import__("contextlib").nullcontext()', item.context_expr)
            case ast.Slice(lower, upper):
                for end in (lower, upper):
                    if end is not None and not isinstance(end, ast.Constant | ast.UnaryOp):
                        yield becomes(f"({self.text(end)}) + 1", end)
            case ast.Return(ast.Tuple([first, *_]) as result) if not isinstance(first, ast.Starred):
                yield becomes(self.text(first), result)
            case ast.AugAssign(target, operator):
                yield from self.operator(operator, target, node.value)
                yield becomes("pass")
            case ast.Expr(ast.Call()):
                yield becomes("pass")
            case ast.Assign(targets):
                names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
                stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
                created = any(isinstance(target, ast.Attribute) for target in targets) and "self" in bound
                if bound and not created and all(bound[name] < node.lineno for name in stored):
                    yield becomes("pass")
            case ast.Call():
                yield from self.calls(node)

    def operator(self, operator: ast.AST, before: ast.AST, after: ast.AST) -> Iterator[tuple[int, int, str]]:
        old, new = OPERATORS.get(type(operator), ("", ""))
        if old:
            start = self.source.index(old.encode(), self.span(before)[1], self.span(after)[0])
            yield start, start + len(old), new

    def calls(self, node: ast.Call) -> Iterator[tuple[int, int, str]]:
        """A call of another function, or without it, or with other arguments."""
        (start, end), function, args = self.span(node), node.func, node.args
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        is_method = isinstance(function, ast.Attribute) and self.text(function.value) not in ("torch", "F", "math")
        if name in OTHER_FUNCTIONS:
            after = self.span(function)[1]
            yield after - len(name), after, OTHER_FUNCTIONS[name]
        if isinstance(function, ast.Attribute) and is_method and name in METHODS and "device" not in self.text(node):
            yield start, end, f"({self.text(function.value)})"
        if not is_method and name in FUNCTIONS:
            yield start, end, f"({self.text(args[0])})"
        if name == "where":
            yield start, end, f"({self.text(args[-2])})"
            yield start, end, f"({self.text(args[-1])})"
        if name == "range":
            stop = args[min(1, len(args) - 1)]
            yield *self.span(stop), f"{self.text(stop)} - 1"
        pair = args[:2]
        if name in ("cat", "stack") and isinstance(args[0], ast.Tuple):
            pair = args[0].elts[:2]
        elif isinstance(function, ast.Attribute) or hasattr(builtins, name):
            pair = pair if name in SWAPPED else []
        if len(pair) == 2 and not any(isinstance(x, ast.Starred) for x in pair):
            (first, second), (start, _), (_, end) = map(self.text, pair), self.span(pair[0]), self.span(pair[1])
            between = self.source[self.span(pair[0])[1] : self.span(pair[1])[0]].decode()
            yield start, end, second + between + first
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in IDLE:
                start, end = self.span(keyword)
                rest = self.source[end:].lstrip()
                if rest.startswith(b","):  # or else the argument is the last
                    end = len(self.source) - len(rest) + 1
                yield start, end, ""


def _flat(source: bytes) -> str:
    return " ".join(source.decode().split())


def _bound(function: ast.FunctionDef) -> dict[str, int]:
    """The lines where the names of a function are bound first."""
    lines: dict[str, int] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            lines[node.arg] = function.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines[node.id] = min(node.lineno, lines.get(node.id, node.lineno))
    return lines


def mutants_of(target: Target) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    source = Source((PACKAGE / target.file).read_bytes())
    return sorted(source.mutants(target.file, target), key=lambda mutant: mutant.line)


def sample(mutants: list[Mutant], a_line: int) -> list[Mutant]:
    """Of each line so many, the same ones wherever the line is."""
    by_line: dict[int, list[Mutant]] = {}
    for mutant in sorted(mutants, key=lambda mutant: hashlib.sha256(mutant.key.encode()).digest()):
        by_line.setdefault(mutant.line, []).append(mutant)
    return [mutant for line in sorted(by_line) for mutant in by_line[line][:a_line]]


# What notices it


class Mutated(SourceFileLoader):
    """Finds one module of the package, and gives it another source."""

    def __init__(self, file: str, source: bytes):
        name = f"{PACKAGE.name}.{Path(file).stem}"
        super().__init__(name, str(PACKAGE / file))
        self.source = source

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def run_pytest(*args: str, plugins: Iterable[Any] = ()) -> int:
    import pytest

    return int(pytest.main(["-q", "-x", "--tb=no", "-p", "no:cacheprovider", *args], plugins=[*plugins]))


class Entered:
    """Notes which functions of a file each test enters, by the first line of their code. What is only compiled is not
    entered."""

    def __init__(self, file: str):
        self.path = str(PACKAGE / file)
        self.lines: dict[str, set[int]] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        lines = self.lines[nodeid] = set()

        def trace(frame: Any, event: str, arg: Any) -> None:
            if frame.f_code.co_filename == self.path:
                lines.add(frame.f_code.co_firstlineno)

        sys.settrace(trace)

    def pytest_runtest_logfinish(self) -> None:
        sys.settrace(None)


class Chosen:
    """Leaves out all tests but some, runs these in their order, and writes to a file which one fails."""

    def __init__(self, tests: list[str], file: IO[bytes]):
        self.place = {test: i for i, test in enumerate(tests)}
        self.file = file

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((x for x in items if x.nodeid in self.place), key=lambda x: self.place[x.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            os.write(self.file.fileno(), report.nodeid.encode())


def fork(work: Callable[[], int]) -> int:
    """The process that does `work`, silently, and has its result as its status."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        status = work()
    finally:
        os._exit(status)


def answer_of(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of its own."""
    reading, writing = os.pipe()

    def answer() -> int:
        os.close(reading)
        with open(writing, "w") as pipe:
            json.dump(work(), pipe)
        return 0

    pid = fork(answer)
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit(f"A process that was to break nothing ended with status {status}.")
    return json.loads(text)


def import_all_but_the_package(tests: Iterable[str]) -> None:
    """Everything that the tests import, apart from what is in this repository, so that a child starts at once."""
    here = {path.stem for folder in (ROOT, TESTS) for path in folder.iterdir()}

    def collect() -> tuple[int, list[str]]:
        status = run_pytest("--collect-only", *tests)
        names = [name for name, module in sys.modules.items() if getattr(module, "__spec__", None) is not None]
        return status, [name for name in names if name.split(".")[0] not in here]

    status, names = answer_of(collect)
    if status:
        raise SystemExit(f"The tests must be found before anything is broken, got status {status} of pytest.")
    for name in names:
        if importlib.util.find_spec(name.split(".")[0]) is not None:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is never touched again is never copied


def entered_by_tests(target: Target) -> dict[str, set[int]]:
    """The first lines of the functions of a module that each of its tests enters."""

    def work() -> tuple[int, dict[str, list[int]]]:
        entered = Entered(target.file)
        status = run_pytest(*target.tests, plugins=[entered])
        return status, {test: sorted(lines) for test, lines in entered.lines.items()}

    status, lines = answer_of(work)
    if status:
        raise SystemExit(
            f"The tests of {target.file} must pass before it is broken, got status {status}: "
            f"pytest {' '.join(target.tests)}"
        )
    return {test: set(entered) for test, entered in lines.items()}


def outcomes(
    target: Target, mutants: list[Mutant], entered: dict[str, set[int]], jobs: int, limit: float
) -> Iterator[tuple[Mutant, str]]:
    """Each mutant and whether it was "killed", "survived" or met the "timeout", in seconds, as they end.

    Only tests that enter the function around it may notice it. What killed the last one is run first.
    """
    source = Source((PACKAGE / target.file).read_bytes())
    order = list(entered)
    waiting = mutants[::-1]
    running: dict[int, tuple[Mutant, float, IO[bytes]]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            around = source.around(mutant.line)
            tests = [test for test in order if not entered[test].isdisjoint(around)]
            if not tests:
                yield mutant, "survived"
                continue
            killer = TemporaryFile(buffering=0)  # noqa: SIM115  (it is closed when the child has ended)
            chosen = Chosen(tests, killer)

            def work(mutant=mutant, chosen=chosen) -> int:
                sys.meta_path.insert(0, Mutated(mutant.file, mutant.source()))
                return run_pytest(*target.tests, plugins=[chosen])

            running[fork(work)] = mutant, time.monotonic() + limit, killer
        for pid, (mutant, end, failed) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and time.monotonic() < end:
                continue
            if not ended:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            del running[pid]
            with failed:
                failed.seek(0)
                order.sort(key=failed.read().decode().__ne__)
            yield mutant, "timeout" if not ended else "killed" if status else "survived"
        time.sleep(0.01)


def known_survivors() -> dict[str, str]:
    """The reason for each mutant that may survive."""
    reasons, reason = {}, ""
    for line in SURVIVORS.read_text().splitlines():
        if line.startswith("# "):
            reason = line[2:]
        elif line:
            reasons[line] = reason
    return reasons


def main() -> int:
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--list", action="store_true", help="name the mutants, and try none")
    parser.add_argument("--only", metavar="FILE[:LINE]", help="of one module, or one line of it")
    parser.add_argument("--jobs", type=int, default=1, help="how many are tried at once")
    parser.add_argument("--all", action="store_true", help="all of each line")
    options = parser.parse_args()
    file, _, line = (options.only or "").partition(":")
    chosen = {}
    for target in TARGETS:
        mutants = [x for x in mutants_of(target) if (not file or file == x.file) and (not line or int(line) == x.line)]
        chosen[target] = mutants if options.all or line else sample(mutants, A_LINE)
    if options.list:
        for mutant in chain.from_iterable(chosen.values()):
            print(f"{mutant.file}:{mutant.line}: {mutant.function}: {mutant.old} => {mutant.new}")
        return 0
    return judge({target: mutants for target, mutants in chosen.items() if mutants}, options.jobs)


def judge(chosen: dict[Target, list[Mutant]], jobs: int) -> int:
    """Tries the mutants, and prints a table. Returns the status of the process."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    # a process with several threads cannot be forked
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    import_all_but_the_package({test.split("::")[0] for target in chosen for test in target.tests})
    known, table, wrong = known_survivors(), [], []
    for target, mutants in chosen.items():
        start = time.monotonic()
        entered = entered_by_tests(target)
        limit = 20 + 4 * (time.monotonic() - start)
        counts: Counter[str] = Counter()
        results = outcomes(target, mutants, entered, jobs, limit)
        for mutant, outcome in tqdm(results, target.file, len(mutants), disable=None):
            counts[outcome] += 1
            if outcome == "survived" and mutant.key not in known:
                wrong.append(f"survived, for no known reason: {mutant.file}:{mutant.line}: {mutant.key}")
            elif outcome != "survived" and mutant.key in known:
                wrong.append(f"{outcome}, though it is said to survive: {mutant.file}:{mutant.line}: {mutant.key}")
        table.append((target.file, len(mutants), counts["killed"], counts["timeout"], counts["survived"]))
    existing = {mutant.key for target in TARGETS for mutant in mutants_of(target)}
    wrong += [f"no mutant any more: {key}" for key in known if key not in existing]
    total = ("altogether", *(sum(column) for column in list(zip(*table, strict=True))[1:]))
    print(f"{'file':24} {'tried':>8} {'killed':>8} {'timeout':>8} {'survived':>8}")
    for name, *numbers in (*table, total):
        print(f"{name:24}", *(f"{number:>8}" for number in numbers))
    print(*wrong, sep="\n")
    killed = 1 - total[-1] / total[1]
    print(f"{killed:.1%} of {total[1]} mutants killed, {len(wrong)} not as expected")
    return int(killed < LEAST or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
