"""Mutation testing by hand: faults that somebody could make, and the tests that have to notice.

Each of `MUTATIONS` changes one place of a temporary copy of the package and runs the named tests on it. Mutations that
they let pass are listed at the end, and the exit status is 1. Old text that is not there exactly once, a file or test
that does not exist, and tests that fail without any mutation are errors. Files and tests are found by name, wherever
they are. `make mutations`, or `python tests/mutations.py WORD…` for those with one of the words.

Tests run in forked processes, so that torch and transformers are imported once.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Attributes:
        file: name of a module of the package, wherever it is.
        old: text that one file of this name has, exactly once.
        new: what stands in its place.
        tests: names of test files, or `file::test`.
        fault: what it does.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    fault: str


NUMBERS, STATISTICS, NOISE = "test_scales_of_numbers.py", "test_statistics.py", "test_noise.py"
MUTATIONS = (
    # training
    Mutation(
        "pace.py",
        "return self._by_clock(steps, ahead=1.0) >= 1",
        "return bool(self.max_seconds and self.share(steps, ahead=1.0) >= 1)",
        ("test_pace.py",),
        "a run with two limits leaves its last step out",
    ),
    Mutation(
        "recovery/text.py",
        '_left(fitted, measured, source, "that are held out")',
        "fitted",
        ("test_recovery_text.py",),
        "training on what is held out",
    ),
    Mutation(
        "selection/costs.py",
        "(groups > 0) * 2 * geometry.experts_per_token",
        "(groups > 0) * geometry.experts_per_token",
        ("test_costs.py::test_flops_of_a_mixture_whose_layers_go",),
        "half of the FLOPs of experts",
    ),
    Mutation(
        "selection/fit.py",
        "if smallest > limit:",
        "if smallest > limit + 1:",
        ("test_fit.py",),
        "a size that cannot be reached is tried",
    ),
    # text that the model writes
    Mutation(
        "decoding_attention.py",
        'scale=options.get("scaling")',
        "scale=None",
        ("test_decoding_attention.py",),
        "scores of new tokens without the family's own scale",
    ),
    Mutation(
        "decoding_attention.py",
        "grouped = query.reshape(batch, groups, heads // groups, size)",
        "grouped = query.reshape(batch, heads // groups, groups, size).transpose(1, 2)",
        ("test_decoding_attention.py",),
        "a new token's query heads see the keys of other groups",
    ),
    Mutation(
        "decoding_attention.py",
        "attn_mask=attention_mask",
        "attn_mask=None",
        ("test_decoding_attention.py",),
        "a new token sees what is hidden",
    ),
    # experts
    Mutation(
        "routing.py",
        "call.weights[tokens, places].double() * norms",
        "norms",
        ("test_mixtures.py::test_importances",),
        "reap without the router's weight of an expert",
    ),
    Mutation(
        "routing.py",
        "contributions = contributions[call.mask.flatten()[tokens]]",
        "pass",
        ("test_mixtures.py::test_importances",),
        "padding counts for experts",
    ),
    Mutation(
        "gates.py",
        "shares = call.weights.double() * call.gradient.double()",
        "shares = call.gradient.double()",
        ("test_mixtures.py::test_importances",),
        "gates of experts without the router's weight",
    ),
    Mutation(
        "gradients.py",
        "(delta[tokens] * call.weights[tokens, places, None].float())",
        "delta[tokens]",
        ("test_mixtures.py::test_importances",),
        "gradients of an expert as if its output were not weighed",
    ),
    Mutation(
        "expert_repair.py",
        "parts[tokens, places, None] * error[tokens]",
        "error[tokens]",
        ("test_expert_repair.py",),
        "every expert of a token takes back the whole error of all experts",
    ),
    Mutation(
        "surgery.py",
        "tensor.index_select(stack.dim, geometry",
        "tensor.index_select(0, geometry",
        ("test_mixtures.py::test_a_cut_model_is_the_whole_one_with_routers_that_see_only_what_stays",),
        "experts along another dimension than the first are not found",
    ),
    Mutation(
        "constraints.py",
        'self.experts_needed if axis == "expert" else 0',
        "0",
        ("test_experts.py::test_as_many_stay_as_each_token_goes_to",),
        "fewer experts stay than each token goes to",
    ),
    Mutation(
        "routing.py",
        "chosen, weights = call.tokens(call.chosen), call.tokens(call.weights).double()",
        "chosen, weights = call.chosen, call.weights.double()",
        ("test_mixtures.py::test_importances",),
        "padding is counted among the tokens of experts",
    ),
    Mutation(
        "reap.py",
        ' / layer.statistics["routing.tokens"].clamp(min=1)',
        "",
        ("test_mixtures.py::test_importances",),
        "reap sums over the tokens of an expert",
    ),
    Mutation(
        "frequency.py",
        'layer.statistics["routing.tokens"]',
        'layer.statistics["routing.weight"]',
        ("test_mixtures.py::test_importances",),
        "frequency adds up the router's weights",
    ),
    Mutation(
        "routing.py",
        "sum(not count for counts in per_layer for count in counts)",
        "sum(not any(counts) for counts in per_layer)",
        ("test_prune_experts.py::test_tokens_of_all_sources_add_up",),
        "layers without tokens are counted, not experts",
    ),
    Mutation(
        "routing.py",
        "sum(counts) for counts in zip(*layers, strict=True)",
        "counts[0] for counts in zip(*layers, strict=True)",
        ("test_prune_experts.py::test_tokens_of_all_sources_add_up",),
        "only the first source of text counts for experts",
    ),
    Mutation(
        "routing.py",
        "1 - stay / max(sum(counts), 1)",
        "stay / max(sum(counts), 1)",
        ("test_prune_experts.py::test_what_a_cut_does_to_routing",),
        "the share of tokens whose experts stay, as that of those whose experts went",
    ),
    Mutation(
        "routing.py",
        "sorted(counts[expert] for expert in kept.expert)",
        "sorted(counts)[: len(kept.expert)]",
        ("test_prune_experts.py::test_what_a_cut_does_to_routing",),
        "tokens of other experts than those that stay",
    ),
    Mutation(
        "routing.py",
        "if reached < kept < len(counts):",
        "if reached < kept:",
        ("test_prune_experts.py::test_keeping_experts_that_nothing_is_known_of_is_refused",),
        "idle experts are no reason to stop where all stay",
    ),
    Mutation(
        "scoring/score.py",
        'check_enough_reached(self.about.get("routing"), chosen)',
        "pass",
        ("test_prune_experts.py::test_text_that_reaches_too_few_experts",),
        "experts are kept by chance",
    ),
    Mutation(
        "score.py",
        'warn_of_idle_experts(scores[0].about.get("routing"))',
        "pass",
        ("test_prune_experts.py::test_text_that_reaches_too_few_experts",),
        "nobody is told of idle experts",
    ),
    Mutation(
        "geometry.py",
        "max(0, layer.num_experts - self.experts_per_token)",
        "layer.num_experts",
        ("test_mixtures.py::test_a_cut_model_is_the_whole_one_with_routers_that_see_only_what_stays",),
        "active parameters without any expert",
    ),
    Mutation(
        "expert_repair.py",
        "x[tokens]).float() * weights[tokens, places, None]\n            last",
        "x[tokens]).float()\n            last",
        ("test_expert_repair.py",),
        "equations of an expert without the router's weight in its inputs",
    ),
    Mutation(
        "expert_repair.py",
        "* error[tokens], source)",
        "* error[tokens])",
        ("test_expert_repair.py::test_each_expert_is_solved_from_its_own_tokens_and_its_part_of_the_error",),
        "experts are solved as if all text were of one source",
    ),
    Mutation(
        "expert_repair.py",
        "self.tokens += torch.bincount",
        "self.tokens = torch.bincount",
        ("test_expert_repair.py::test_batches_add_up",),
        "only the tokens of the last batch are told",
    ),
    Mutation(
        "block_repair.py",
        "self._expert_sums = self._expert_sums or ExpertSums(",
        "self._expert_sums = ExpertSums(",
        ("test_mixtures.py::test_repair_counts_all_batches",),
        "experts are solved from the last batch alone",
    ),
    Mutation(
        "surgery.py",
        "read[name] = [cut_on_the_way[name][entry] for entry in entries[name]]",
        "read[name] = entries[name]",
        ("test_mixtures.py::test_cut_twice_is_cut_once",),
        "a second cut takes experts by the numbers of the whole model",
    ),
    Mutation(
        "save.py",
        "if mixture and other and other in config:",
        "if False:",
        ("test_mixtures.py::test_saved_and_loaded_by_the_stock_class",),
        "the number of experts only under the name that transformers 5 has for it",
    ),
    Mutation(
        "saved_dtype.py",
        "return values if torch.equal(as_held, values) else as_held",
        "return as_held",
        ("test_saved_dtype.py",),
        "weights that no rounding changes are copied",
    ),
    # experts in MXFP4 and FP8 blocks
    Mutation(
        "block_formats.py",
        "numbers.repeat(16), numbers.repeat_interleave(16)",
        "numbers.repeat_interleave(16), numbers.repeat(16)",
        ("test_stored_blocks.py::test_layers_are_decoded_as_the_formats_say",),
        "the high half of a byte comes first",
    ),
    Mutation(
        "block_formats.py",
        "BYTES, BIAS = 16, 127",
        "BYTES, BIAS = 16, 128",
        ("test_stored_blocks.py::test_layers_are_decoded_as_the_formats_say",),
        "scales of MXFP4 are half of what they are",
    ),
    Mutation(
        "block_formats.py",
        "tuple(-(-size // block)",
        "tuple(size // block",
        ("test_stored_blocks.py::test_blocks_at_the_edge_may_be_smaller",),
        "blocks at the edge have no scales",
    ),
    Mutation(
        "block_formats.py",
        "rows, columns = self._block",
        "columns, rows = self._block",
        ("test_stored_blocks.py::test_layers_are_decoded_as_the_formats_say",),
        "rows and columns of FP8 blocks exchanged",
    ),
    Mutation(
        "stored_blocks.py",
        "wanted = (kept[place[0]], place[1])",
        "wanted = (place[0], place[1])",
        ("test_stored_blocks.py::test_kept_experts_are_saved_bit_for_bit",),
        "blocks of the first experts are saved, whichever stay",
    ),
    Mutation(
        "stored_blocks.py",
        "self.weights.read_raw(name, list(kept))",
        "self.weights.read_raw(name, list(range(len(kept))))",
        ("test_stored_blocks.py::test_kept_experts_are_saved_bit_for_bit",),
        "stacked blocks of the first experts are saved, whichever stay",
    ),
    Mutation(
        "stored_blocks.py",
        "tuple(kept[e] for e in layer.expert)",
        "tuple(layer.expert)",
        ("test_stored_blocks.py::test_cut_again_and_kept_whole",),
        "blocks of a second cut by the numbers of the first",
    ),
    # importance and statistics
    Mutation(
        "gates.py",
        "(call.x.float() * call.gradient.float())",
        "(call.x * call.gradient)",
        (f"{NUMBERS}::test_gates_of_a_model_in_half_precision_are_summed_exactly",),
        "gate products in bf16",
    ),
    Mutation(
        "gates.py",
        "squares = gates.square().sum(dim=0)",
        "squares = gates.sum(dim=0).square()",
        (f"{STATISTICS}::test_gate_gradients",),
        "squared sum instead of sum of squares over the sequences of a batch",
    ),
    Mutation(
        "gates.py",
        "total / rms(square) / groups**0.5",
        "total / rms(square)",
        ("test_oracles.py",),
        "groups that go together get the whole square each",
    ),
    Mutation(
        "taylor_2nd.py",
        "0.5 * layer",
        "1.0 * layer",
        (f"{NUMBERS}::test_second_order_taylor_takes_half_of_the_second_order",),
        "taylor_2nd without its ½",
    ),
    Mutation(
        "random.py",
        "uniform * layer.geometry.group_parameters[axis]",
        "uniform",
        (f"{NUMBERS}::test_chance_is_uniform_per_parameter",),
        "the random control without its cost factor",
    ),
    Mutation(
        "gradients.py",
        "reduced = scale**2 *",
        "reduced = scale *",
        (f"{STATISTICS}::test_weight_gradients",),
        "squares scaled as if they were gradients",
    ),
    Mutation(
        "gradients.py",
        "delta = delta / targets.to(delta.dtype).clamp(min=1)[:, None, None]",
        "delta = delta / targets.to(delta.dtype).max()",
        (f"{STATISTICS}::test_weight_gradients",),
        "sequences of unequal length divided by the longest",
    ),
    Mutation(
        "gradients.py",
        ".abs_().div_(sequences)",
        ".div_(sequences)",
        (f"{STATISTICS}::test_weight_gradients",),
        "first order without the absolute value",
    ),
    Mutation(
        "activations.py",
        "x = call.tokens(call.x).float()",
        "x = call.x.flatten(0, 1).float()",
        (f"{STATISTICS}::test_moments",),
        "padding counted in the activations",
    ),
    Mutation(
        "prepared.py",
        "targets = (labels != IGNORE_INDEX).sum(dim=1)",
        "targets = torch.full((len(labels),), labels.shape[1] - 1)",
        (f"{NUMBERS}::test_padding_is_in_no_fisher",),
        "padding counted in the mean loss of a Fisher",
    ),
    Mutation(
        "loss.py",
        "~(real[:, :-1] & real[:, 1:])",
        "~real[:, :-1]",
        (f"{NUMBERS}::test_padding_is_in_no_fisher",),
        "padding as a token to predict, in every Fisher",
    ),
    Mutation(
        "loss.py",
        "labels[:, :-1] = input_ids[:, 1:]",
        "labels[:, :-1] = input_ids[:, :-1]",
        (f"{STATISTICS}::test_weight_gradients",),
        "each token predicts itself",
    ),
    Mutation(
        "objective.py",
        "gradient.masked_fill_(~counted[..., None], 0.0)",
        "pass",
        (f"{NUMBERS}::test_padding_is_in_no_fisher", f"{STATISTICS}::test_weight_gradients"),
        "gradients where nothing is predicted",
    ),
    Mutation(
        "objective.py",
        "thresholds[..., None].to(below.device) * below[..., -1:]",
        "thresholds[:1, :, None].to(below.device) * below[..., -1:]",
        ("test_batch_size.py::test_scores_of_every_method",),
        "all sequences of a batch share their draws",
    ),
    Mutation(
        "hybrid.py",
        'values = part["importance"] / (mean or 1.0)',
        'values = part["importance"]',
        ("test_hybrid.py",),
        "parts of a mixture on scales of their own",
    ),
    # noise and batches
    Mutation(
        "noise.py",
        "if number not in clean:",
        "if number in clean:",
        (NOISE,),
        "the other half of the sequences is noised",
    ),
    Mutation("noise.py", "number += 1", "pass", (NOISE,), "sequences are not counted"),
    Mutation("noise.py", "manual_seed(seed % 2**63)", "manual_seed(0)", (NOISE,), "noise with a fixed seed"),
    Mutation(
        "noise.py",
        "replaced &= ~stays",
        "pass",
        (f"{NOISE}::test_the_begin_token_stays_and_no_other_first_token_does",),
        "noise over the begin token",
    ),
    Mutation(
        "score.py",
        "sources, seed = calibration.each_source(), options.random_seed or 0",
        "sources, seed = calibration.each_source(), 0",
        (f"{NOISE}::test_the_seed_of_the_run_is_that_of_the_noise",),
        "score noise without the seed of the run",
    ),
    Mutation(
        "cutting.py",
        "                    seed=repair_seed(calibration, recipe),\n",
        "",
        (f"{NOISE}::test_a_whole_run_hands_its_seed_on_to_the_repair",),
        "repair noise without the seed of the run",
    ),
    Mutation(
        "compare.py",
        "batches, repair, seed=draws, progress",
        "batches, repair, progress",
        ("test_comparison.py::test_recipes_of_several_rounds_repairs_and_seeds",),
        "compare repairs with another seed than prune",
    ),
    Mutation(
        "comparison_record.py",
        "{**made_from, 'facts': self._facts}",
        "made_from",
        ("test_comparison.py::test_rows_made_from_other_inputs_are_measured_again",),
        "rows of another model or text are taken for a comparison's own",
    ),
    # repair
    Mutation(
        "block_repair.py",
        "batches, among=clean, residual=self._walk.hidden",
        "batches, residual=self._walk.hidden",
        (f"{NUMBERS}::test_the_temperature_is_fitted_on_text_without_noise",),
        "the temperature is fitted on noised sequences, too",
    ),
    Mutation(
        "block_repair.py",
        "if solution.error < before:",
        "if True:",
        (f"{NUMBERS}::test_where_least_squares_cannot_help_the_weights_stay_bit_for_bit",),
        "a solution that does not lower the error is taken",
    ),
    Mutation(
        "block_repair.py",
        "self._options.residual / self._scale",
        "self._options.residual",
        ("test_block_repair.py::test_every_block_gets_the_solution_that_a_walk_by_hand_finds",),
        "the residual is not divided by what the model multiplies it with",
    ),
    Mutation(
        "block_repair.py",
        "x, target = x[mask.to(x.device)], target[mask.to(x.device)]",
        "pass",
        ("test_block_repair.py::test_padding_does_not_count",),
        "padding counted in the repair",
    ),
    Mutation(
        "least_squares.py",
        "cross + ridge * old.T",
        "cross",
        ("test_block_repair.py::test_solve_ridge_is_the_least_squares_solution_of_the_augmented_system",),
        "a ridge towards zero instead of the old weights",
    ),
    Mutation(
        "least_squares.py",
        "ridge * (new * (old - new))",
        "ridge * (new * (new - old))",
        ("test_least_squares.py::test_parts_and_the_shape_of_memory_change_nothing",),
        "the sign of the ridge's share of the error",
    ),
    Mutation(
        "least_squares.py",
        "- on_diagonal.sum()",
        "+ on_diagonal.sum()",
        ("test_least_squares.py::test_parts_and_the_shape_of_memory_change_nothing",),
        "blocks on the diagonal counted three times",
    ),
    Mutation(
        "temperature.py",
        "factor * (norm.weight.float() + family.norm_offset) - family.norm_offset",
        "factor * norm.weight.float()",
        ("test_temperature.py",),
        "Gemma's norms add one to their weights",
    ),
    Mutation(
        "block_walk.py",
        "self.hidden[number] + self._scale * output",
        "self.hidden[number] + output",
        ("test_block_repair.py::test_every_block_gets_the_solution_that_a_walk_by_hand_finds",),
        "the residual multiplier is forgotten",
    ),
    # selection, plans, costs
    Mutation(
        "cutting.py",
        "costs.of_layers(plan.surviving_layers)",
        "costs",
        (f"{NUMBERS}::test_later_rounds_are_at_the_costs_of_the_layers_that_are_left",),
        "the costs of surviving layers dropped in later rounds",
    ),
    Mutation(
        "plan.py",
        "if block.indivisible and 0 < kept < found[block.axis]:",
        "if False:",
        (f"{NUMBERS}::test_a_part_of_an_indivisible_block_is_no_plan",),
        "the indivisible check of Plan.check_fits removed",
    ),
    Mutation(
        "plan.py",
        "{axis: [before[axis][group] for group in kept[axis]] for axis in ALL_AXES}",
        "{axis: kept[axis] for axis in ALL_AXES}",
        ("test_rounds.py::test_a_plan_after_another",),
        "composed plans in the numbering of the later one",
    ),
    Mutation(
        "costs.py",
        "(groups > 0) * geometry.leaves_with_block(layer_idx, axis)",
        "0 * groups",
        ("test_costs.py::test_parameters_are_those_of_the_model",),
        "the norms of a block stay when it goes",
    ),
    Mutation(
        "costs.py",
        "min(context, window - 1)",
        "min(context, window)",
        ("test_costs.py::test_cache_bytes_are_those_of_a_real_cache",),
        "a sliding window's cache holds one token less than the window",
    ),
    Mutation(
        "select.py",
        "means = np.maximum.accumulate(",
        "means = np.asarray(",
        ("test_selection.py::test_bundles_of_equal_groups_keep_their_order",),
        "a bundle may overtake the one before",
    ),
    Mutation(
        "nearness.py",
        "above - target > max(NEAR * total, target - below)",
        "False",
        ("test_nearness.py::test_whole_layers_come_as_near_as_they_can",),
        "shapes and bundles pass the ratio by far",
    ),
    Mutation(
        "table.py",
        'return table["score"] * table["cost"].where(table["cost"] > 0, 1)',
        'return table["score"] * table["cost"]',
        ("test_targets.py::test_prices_come_and_go_and_worth_stays",),
        "what costs nothing is worth nothing",
    ),
    Mutation(
        "rounds.py",
        'spread = max(float(gone["score"].max() - gone["score"].min()), abs(float(left["score"].min())), 1e-300)',
        "spread = 0.0",
        ("test_rounds.py",),
        "groups that are gone tie with those that are left",
    ),
    # surgery, latency
    Mutation(
        "surgery.py",
        'if parameter == "weight" and projection.inputs in SPACE_AXIS:',
        'if parameter == "weight" and projection.inputs == "channel":',
        ("test_surgery.py",),
        "o_proj keeps its columns",
    ),
    Mutation(
        "dimensions.py",
        "return self.num_key_value_groups * self.head_dim",
        "return self.head_dim",
        ("test_groups.py",),
        "an attention group is one query head",
    ),
    Mutation(
        "profiling.py",
        'geometry.family.block("mlp").begins',
        'geometry.family.block("mlp").norms[0]',
        ("test_latency.py::test_the_marks_stand_where_the_blocks_begin",),
        "all time of OLMo 2 is attention's",
    ),
    Mutation(
        "latency_profile.py",
        "for phase, axis in product(PHASES, AXES):\n            widest",
        'for phase, axis in product(("prefill",), AXES):\n            widest',
        ("test_latency.py::test_every_phase_reaches_up_to_the_width_of_the_model",),
        "a decode table that ends below the model's width",
    ),
    Mutation(
        "charts.py",
        "if (numbers <= 0).any():",
        "if False:",
        ("test_page.py::test_all_groups_have_a_place_in_the_charts",),
        "the histogram keeps only scores above zero",
    ),
    # models that are read layer by layer
    Mutation(
        "compact.py",
        "None if bias is None else bias[part]",
        "None",
        ("test_compact.py::test_a_head_and_its_gradient",),
        "the head's bias is forgotten",
    ),
    Mutation(
        "compact.py",
        "for part in _parts(columns, rows):",
        "for part in [slice(0, 64)]:",
        ("test_compact.py::test_a_head_and_its_gradient",),
        "of the gradient by hidden states only the first piece is made",
    ),
    Mutation(
        "compact.py",
        "promote_types(values.dtype, dtype) == dtype",
        "promote_types(values.dtype, dtype) != values.dtype",
        ("test_compact.py::test_what_is_held_compactly",),
        "bfloat16 stays where float16 is computed with",
    ),
    Mutation(
        "layers.py",
        "self._prepare(then)",
        "self._prepare(layer_idx)",
        ("test_opened.py::test_one_layer_is_read_and_of_it_one_tensor_at_a_time",),
        "the system is told of the layer that is there already",
    ),
    Mutation(
        "tensor_file.py",
        "first = self._start + start + entry * each",
        "first = start + entry * each",
        ("test_weights.py::test_the_system_is_told_which_bytes_will_be_read",),
        "the header is left out of the places of tensors",
    ),
    Mutation(
        "estimate.py",
        "weights = outside + largest * w + converted + ahead",
        "weights = outside + largest * w + ahead",
        ("test_estimate.py",),
        "the tensor that is converted takes no memory",
    ),
    # GGUF
    Mutation(
        "gguf_slice.py",
        "if first < max(used, 2):",
        "if first < 2:",
        ("test_gguf_slice.py::test_more_experts_stay_than_a_token_goes_to",),
        "a GGUF file with fewer experts than each token goes to",
    ),
    Mutation(
        "gguf_plan.py",
        "layer: plan.layers[layer][axis]",
        "layer: range(len(plan.layers[layer][axis]))",
        ("test_gguf_slice.py::test_a_plan_of_experts_cuts_those_that_it_names",),
        "a plan on a GGUF file keeps the first experts",
    ),
    Mutation(
        "gguf_plan.py",
        "if plan.widths[layer][axis]",
        "if True",
        ("test_gguf_slice.py::test_a_plan_of_experts_cuts_those_that_it_names",),
        "experts of dense layers are asked of a GGUF file",
    ),
    Mutation(
        "gguf_slice.py",
        "begin = expert * self._per_expert",
        "begin = (self.experts.index(expert)) * self._per_expert",
        ("test_gguf_slice.py::test_kept_experts_are_copied_byte_for_byte",),
        "the first experts are kept, whichever were named",
    ),
    Mutation(
        "gguf_slice.py",
        'r"ffn_gate_inp\\.(weight|bias)|exp_probs_b(\\.bias)?"',
        'r"ffn_gate_inp\\.(weight|bias)"',
        ("test_gguf_slice.py::test_kept_experts_are_copied_byte_for_byte",),
        "a router's correction biases are those of all experts",
    ),
    Mutation(
        "gguf_slice.py",
        "sum(layer < dense for layer in layers)",
        "dense",
        ("test_gguf_slice.py::test_layers_are_removed_and_numbered_anew",),
        "as many leading dense layers as before one of them was removed",
    ),
    Mutation(
        "gguf_tensors.py",
        "tensor.float() + geometry.family.norm_offset",
        "tensor.float()",
        ("test_gguf.py::test_equal_layers_go_out_as_the_stock_architecture",),
        "Gemma's norms without their one",
    ),
    Mutation(
        "llama_cpp.py",
        "number % self.period != 0 for number in range(1, layers + 1)",
        "number % self.period != 0 for number in range(layers)",
        ("test_gguf.py::test_kinds_of_layers_are_written_where_a_removed_layer_shifts_them",),
        "llama.cpp's layers are counted from the wrong one",
    ),
)


def find_one(folder: Path, name: str, text: str) -> Path:
    """The one file of this name below a folder that holds a text exactly once.

    Raises:
        LookupError: there is none, or more than one.
    """
    named = [path for path in folder.rglob(Path(name).name) if path.as_posix().endswith("/" + name)]
    counts = {path: path.read_text(encoding="utf-8").count(text) for path in named}
    found = [path for path, count in counts.items() if count == 1]
    if len(found) != 1:
        times = ", ".join(f"{path.relative_to(folder)} {count} times" for path, count in counts.items())
        raise LookupError(
            f"{text!r} must be in one file {name}, once; it is in {times or 'none, as there is no such file'}"
        )
    return found[0]


def find_test(folder: Path, test: str) -> str:
    """A test, given by the name of its file alone, as pytest takes it.

    Raises:
        LookupError: there is no such test, or more than one.
    """
    name, mark, function = test.partition("::")
    return f"{find_one(folder, name, f'def {function}(' if function else 'from __future__')}{mark}{function}"


def check(mutations: Sequence[Mutation]) -> None:
    """Raise SystemExit with all that is not where a mutation says it is."""
    wrong = []
    for mutation in mutations:
        try:
            find_one(ROOT / "src", mutation.file, mutation.old)
            for test in mutation.tests:
                find_test(ROOT / "tests", test)
        except LookupError as error:
            wrong.append(f"{mutation.fault}: {error}")
    if wrong:
        raise SystemExit("\n".join(wrong))


def run_tests(copy: Path, tests: Sequence[str], *options: str) -> int:
    """Run tests of the copy in a process of their own: pytest's exit status."""
    child = os.fork()
    if not child:
        os.chdir(copy)
        with open(copy / "output.txt", "w", encoding="utf-8") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        import pytest

        places = [find_test(copy / "tests", test) for test in tests]
        status = pytest.main(
            [
                *options,
                "-q",
                "--hypothesis-profile=unshrunk",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                "--rootdir",
                str(copy),
                *places,
            ]
        )
        sys.stdout.flush()
        os._exit(int(status))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(words: Sequence[str]) -> int:
    """Apply and test the mutations, and print which are caught.

    Args:
        words: only mutations that have one of them; all if there are none.
    """
    chosen = [m for m in MUTATIONS if not words or any(word in f"{m.file} {m.old} {m.fault}" for word in words)]
    check(chosen)
    # What the tests need and no mutation touches is imported once. Prunus itself is not.
    import hypothesis  # noqa: F401
    import pandas  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as temporary:
        copy = Path(temporary) / "prunus"
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        start = time.perf_counter()
        if run_tests(copy, list(dict.fromkeys(test for m in chosen for test in m.tests))):
            print((copy / "output.txt").read_text(encoding="utf-8"))
            raise SystemExit("the tests fail without any mutation")
        print(f"{len(chosen)} mutations; without one, all their tests pass ({time.perf_counter() - start:.0f} s)")
        for number, mutation in enumerate(chosen, 1):
            start = time.perf_counter()
            file = find_one(copy / "src", mutation.file, mutation.old)
            whole = file.read_text(encoding="utf-8")
            file.write_text(whole.replace(mutation.old, mutation.new), encoding="utf-8")
            status = run_tests(copy, mutation.tests, "-x")
            file.write_text(whole, encoding="utf-8")
            # 1: a test failed. Others say that pytest itself had no chance, which catches nothing.
            result = {0: "SURVIVES", 1: "caught"}.get(status, f"ERROR {status}")
            if status != 1:
                survivors.append(mutation)
            seconds = time.perf_counter() - start
            print(f"{number:3} {result:9} {mutation.file:20} {mutation.fault} ({seconds:.0f} s)", flush=True)
            if status > 1:
                print((copy / "output.txt").read_text(encoding="utf-8")[-2000:])
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations are caught")
    for mutation in survivors:
        print(f"not caught: {mutation.file}: {mutation.fault}: {mutation.old!r} → {mutation.new!r}")
    return int(bool(survivors))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
