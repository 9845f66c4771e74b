"""Every family with experts: cut models against routers that see only the kept experts, token by token.

Families come from the registry; a new one needs a tiny model and its rule of routing in tests/tiny_mixtures.py.
"""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import case_id, count_parameters, logits, padded_batches, random_tokens
from tiny_folder import byte_tokenizer
from tiny_mixtures import (
    CHOSEN,
    EXPERTS,
    MIXED_CASES,
    layers_with_experts,
    shared_mixture,
    token_by_token,
)
from transformers import AutoModelForCausalLM

from prunus.calibration import Batch
from prunus.checkpoint import load_model, open_model, save_checkpoint
from prunus.importance import METHODS, MethodOptions, score_groups
from prunus.importance.registry import statistics_for
from prunus.model.families import FAMILIES
from prunus.model.geometry import Geometry
from prunus.model.group import Group
from prunus.model.widths import layer_widths_of
from prunus.repair.block_repair import RepairOptions, repair_
from prunus.selection.plan import Plan
from prunus.selection.select import select
from prunus.selection.table import build_table
from prunus.selection.targets import TargetOptions
from prunus.surgery import apply_plan
from prunus.sweep import ENGINES, sweep

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
BATCHES = [Batch(random_tokens(4, 24, seed), None) for seed in (5, 6)]
#: the experts that stay, of six, in each layer
KEPT = {0: (0, 2, 5), 1: (1, 2, 3)}


@pytest.fixture(params=MIXED_CASES, ids=case_id)
def mixture(request):
    return shared_mixture(*request.param)


def half_plan(model) -> Plan:
    """Half of the experts of every layer that has some."""
    geometry = Geometry.of(model)
    return Plan.from_kept(
        geometry,
        [
            {
                axis: KEPT[layer_idx] if axis == "expert" and widths[axis] else range(widths[axis])
                for axis in geometry.axes
            }
            for layer_idx, widths in enumerate(geometry.widths)
        ],
    )


def test_every_tensor_of_a_layer_is_described(mixture):
    family, geometry = FAMILIES[mixture.config.model_type], Geometry.of(mixture)
    assert geometry.experts_per_token == CHOSEN
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry
    for layer_idx, layer in enumerate(mixture.model.layers):
        described = set()
        for block in geometry.blocks(layer_idx):
            described |= {f"{p.path}.{kind}" for p in block.projections for kind in ("weight", "bias")}
            described |= {stack.path for stack in block.stacks}
            described |= {f"{path}.weight" for path in (*block.norms, *block.untouched)}
        assert layer.state_dict().keys() <= described
        assert bool(geometry.widths[layer_idx].num_experts) == (layer_idx in dict(layers_with_experts(mixture)))
    assert family.axes == geometry.axes
    everything = sum(parameter.numel() for parameter in mixture.model.layers[1].parameters())
    owned = sum(
        geometry.widths[1][axis] * geometry.group_parameters[axis] + geometry.leaves_with_block(1, axis)
        for axis in geometry.axes
    )
    assert owned == everything


def test_what_leaves_with_an_expert(mixture):
    """Its parts hold as many parameters as it costs, and the parts of all experts are all of those tensors."""
    geometry, layer = Geometry.of(mixture), mixture.model.layers[1]
    block = geometry.block(1, "expert")
    tensors = {stack.path: dict(layer.state_dict())[stack.path] for stack in block.stacks}
    parameters = dict(layer.named_parameters())
    sizes = {path: tensor.numel() // EXPERTS for path, tensor in tensors.items()}
    parts = list(Group(geometry, 1, "expert", 3, frozenset(), sizes).parts())
    assert {part.tensor for part in parts} == {f"model.layers.1.{path}" for path in tensors}
    assert all((part.start, part.stop) == (3, 4) for part in parts)
    counted = [part for part in parts if part.tensor.removeprefix("model.layers.1.") in parameters]
    assert sum(part.parameters for part in counted) == geometry.group_parameters["expert"]


def test_keeping_everything_changes_no_bit(mixture):
    same = apply_plan(mixture, Plan.keep_all(Geometry.of(mixture)))
    assert type(same) is type(mixture)
    assert torch.equal(logits(same, random_tokens()), logits(mixture, random_tokens()))
    assert all(torch.equal(same.state_dict()[name], tensor) for name, tensor in mixture.state_dict().items())


def test_a_cut_model_is_the_whole_one_with_routers_that_see_only_what_stays(mixture):
    plan, geometry = half_plan(mixture), Geometry.of(mixture)
    pruned = apply_plan(mixture, plan)
    tokens = random_tokens(1, 9)
    torch.testing.assert_close(logits(mixture, tokens), logits(token_by_token(mixture), tokens), **CLOSE)
    masked = {layer_idx: KEPT[layer_idx] for layer_idx, _ in layers_with_experts(mixture)}
    expected = logits(token_by_token(mixture, masked), tokens)
    torch.testing.assert_close(logits(pruned, tokens), expected, **CLOSE)
    assert not torch.allclose(logits(mixture, tokens), expected, atol=1e-2), "the cut must matter"
    assert count_parameters(pruned) == geometry.parameters_left(plan.kept_widths)
    assert Geometry.of(pruned).widths == plan.kept_widths == layer_widths_of(pruned.config)
    active = Geometry.of(pruned).active_parameters
    assert active == geometry.active_parameters_left(plan.kept_widths) == geometry.active_parameters
    of_experts = ("experts.", "gate.", "router.")
    each_token = sum(
        parameter.numel() * CHOSEN // EXPERTS if name.startswith(of_experts) else parameter.numel()
        for _, block in layers_with_experts(mixture)
        for name, parameter in block.named_parameters()
    )
    blocks = sum(count_parameters(block) for _, block in layers_with_experts(mixture))
    assert active == count_parameters(mixture) - blocks + each_token
    assert Plan.from_dict(json.loads(plan.to_json()), geometry) == plan
    assert all(parameter.is_contiguous() for parameter in pruned.parameters())


def test_cut_twice_is_cut_once(mixture, tmp_path):
    """Experts of the second plan have the numbers that they have in the model that it cuts."""
    save_checkpoint(mixture, byte_tokenizer(), tmp_path / "whole", card="", extras={})
    for model in (mixture, open_model(tmp_path / "whole")[0]):
        once = apply_plan(model, half_plan(model))
        geometry = Geometry.of(once)
        later = [
            {axis: (0, 2) if axis == "expert" and widths[axis] else range(widths[axis]) for axis in geometry.axes}
            for widths in geometry.widths
        ]
        twice = apply_plan(once, Plan.from_kept(geometry, later))
        masked = {layer_idx: (KEPT[layer_idx][0], KEPT[layer_idx][2]) for layer_idx, _ in layers_with_experts(mixture)}
        expected = logits(token_by_token(mixture, masked), random_tokens(1, 9))
        torch.testing.assert_close(logits(twice, random_tokens(1, 9)), expected, **CLOSE)


def test_saved_and_loaded_by_the_stock_class(mixture, tmp_path):
    """From memory and layer by layer from disk: the same files, which transformers loads without prunus."""
    tokenizer = byte_tokenizer()
    save_checkpoint(mixture, tokenizer, tmp_path / "whole", card="", extras={})
    plan, tokens = half_plan(mixture), random_tokens()
    resident = apply_plan(load_model(tmp_path / "whole")[0], plan)
    dense = open_model(tmp_path / "whole")[0]
    opened = apply_plan(dense, plan)
    # They can be as large as all experts of a layer.
    assert opened.get_input_embeddings().weight.data_ptr() == dense.get_input_embeddings().weight.data_ptr()
    torch.testing.assert_close(logits(opened, tokens), logits(resident, tokens), rtol=0, atol=0)
    for name, model in {"resident": resident, "opened": opened}.items():
        # So small that layers are parted over several files.
        save_checkpoint(model, tokenizer, tmp_path / name, card="", extras={}, max_shard_size=20_000)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(loaded) is type(mixture)
        assert torch.equal(logits(loaded, tokens), logits(resident, tokens))
    files = [
        {k: v for f in (tmp_path / n).glob("*.safetensors") for k, v in load_file(f).items()}
        for n in ("resident", "opened")
    ]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    count = FAMILIES[mixture.config.model_type].mixture.count
    assert json.loads((tmp_path / "opened" / "config.json").read_text())[count] == 3


# --- importances, token by token ---


def slow_importances(model, batches) -> dict[str, dict[int, torch.Tensor]]:
    """reap and frequency by loops over the tokens that are no padding."""
    found = {name: {} for name in ("reap", "frequency")}
    sums, counts, current = {}, {}, {}

    def note(layer_idx, number, expert, weight, output):
        if current["mask"][number]:
            key = layer_idx, expert
            sums[key] = sums.get(key, 0.0) + float(weight) * float(output.double().square().sum()) ** 0.5
            counts[key] = counts.get(key, 0) + 1

    oracle = token_by_token(model, note=note)
    for batch in batches:
        current["mask"] = batch.attention_mask.flatten().bool()
        logits(oracle, batch.input_ids, attention_mask=batch.attention_mask)
    for layer_idx, _ in layers_with_experts(model):
        each = [(layer_idx, expert) for expert in range(EXPERTS)]
        total = sum(counts.get(key, 0) for key in each)
        found["reap"][layer_idx] = torch.tensor([sums.get(key, 0.0) / max(counts.get(key, 0), 1) for key in each])
        found["frequency"][layer_idx] = torch.tensor([counts.get(key, 0) / total for key in each])
    return found


def sequences(batches):
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            yield ids[mask.bool()]


def losses(model, ids):
    log_probabilities = torch.log_softmax(model(ids[None]).logits[0].float(), dim=-1)
    return torch.stack([-log_probabilities[t, ids[t + 1]] for t in range(len(ids) - 1)])


def slow_gates(model, batches) -> dict[int, torch.Tensor]:
    """Mean square of the gradient by a gate on what each expert adds, one sequence at a time."""
    totals, rows = {}, list(sequences(batches))
    for ids in rows:
        gates = {layer_idx: torch.ones(EXPERTS, requires_grad=True) for layer_idx, _ in layers_with_experts(model)}
        loss = losses(token_by_token(model, gates=gates), ids).sum()
        for layer_idx, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            totals[layer_idx] = totals.get(layer_idx, 0.0) + gradient.double() ** 2 / len(rows)
    return totals


def slow_taylor(model, batches) -> dict[int, torch.Tensor]:
    """Σ |θ · ḡ| over all that leaves with an expert, by autograd, one sequence at a time."""
    rows, sums = list(sequences(batches)), {}
    for ids in rows:
        oracle = token_by_token(model).requires_grad_(True)
        losses(oracle, ids).mean().backward()
        for name, parameter in oracle.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, 0.0) + parameter.grad.double() / len(rows)
    found = {}
    for layer_idx, _ in layers_with_experts(model):
        total = torch.zeros(EXPERTS, dtype=torch.float64)
        for stack in Geometry.of(model).block(layer_idx, "expert").stacks:
            name = f"model.layers.{layer_idx}.{stack.path}"
            if name in sums:
                parts = (sums[name] * dict(model.named_parameters())[name].double()).abs()
                total += parts.movedim(stack.dim, 0).reshape(EXPERTS, -1).sum(dim=1)
        found[layer_idx] = total
    return found


@cache
def slow(model) -> dict[str, dict[int, torch.Tensor]]:
    """What each method should find, for both engines."""
    batches = padded_batches()
    gates, weights = slow_gates(model, batches), slow_taylor(model, batches)
    return {**slow_importances(model, batches), "gate_fisher": gates, "taylor": weights}


@pytest.mark.parametrize("engine", ENGINES)
def test_importances(mixture, engine):
    batches = padded_batches()
    methods = [METHODS[name] for name in ("reap", "frequency", "gate_fisher", "taylor")]
    statistics = sweep(mixture, batches, statistics_for(methods, MethodOptions()), engine=engine, progress=False)
    expected = slow(mixture)
    for method in methods:
        found = score_groups(mixture, method, statistics)
        for layer_idx, values in expected[method.name].items():
            torch.testing.assert_close(
                found[layer_idx]["expert"],
                values.double(),
                rtol=1e-3,
                atol=1e-9,
                msg=lambda m, n=method.name: f"{n}: {m}",
            )


def test_from_text_to_plan(mixture):
    """Half of the experts, by the target that says so; the least important ones go, and all layers keep as many."""
    geometry, target = Geometry.of(mixture), TargetOptions("experts")
    wanted = statistics_for([METHODS["reap"]], MethodOptions())
    importance = score_groups(mixture, METHODS["reap"], sweep(mixture, BATCHES, wanted, progress=False))
    plan = select(build_table(geometry, importance), geometry, 0.5, costs=target.costs(geometry))
    for layer_idx, kept in enumerate(plan.layers):
        if geometry.widths[layer_idx].num_experts:
            values = importance[layer_idx]["expert"]
            assert set(kept.expert) == set(values.argsort(descending=True, stable=True)[:3].tolist())
        assert kept.widths.num_key_value_heads == geometry.widths[layer_idx].num_key_value_heads


def test_repair_counts_all_batches(mixture):
    """One batch of four sequences, or four of one: the same weights, but for rounding."""
    plan, (batch, *_) = half_plan(mixture), BATCHES
    options, found = RepairOptions(noise=0.0, fit_logits=False), []
    for batches in ([batch], [Batch(ids[None], None) for ids in batch.input_ids]):
        repaired = apply_plan(mixture, plan)
        records = repair_(repaired, mixture, plan, batches, options, progress=False)
        found.append((logits(repaired, random_tokens()), [record.tokens for record in records]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-2, atol=1e-2)
    assert found[0][1] == found[1][1]


def test_repair_brings_the_experts_back_towards_the_whole_model(mixture):
    plan, batches = half_plan(mixture), BATCHES
    options = RepairOptions(noise=0.0, damping=1e-3, fit_logits=False)
    plain, repaired = apply_plan(mixture, plan), apply_plan(mixture, plan)
    records = repair_(repaired, mixture, plan, batches, options, progress=False)
    assert all(record.error_after < record.error_before for record in records if record.axis == "expert")
    assert {record.axis for record in records} >= {"attention", "expert"}

    def far(model):
        return sum(float((logits(model, b.input_ids) - logits(mixture, b.input_ids)).square().sum()) for b in batches)

    assert far(repaired) < 0.9 * far(plain)
