"""Closed-form repair against least squares done another way."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import product

import pytest
import torch
from tiny_families import ONE_UNLIKE, case_id, logits, make_model, plan_keeping, random_tokens

from prunus.calibration import Batch
from prunus.calibration.noise import with_noise
from prunus.errors import CalibrationError, OptionError
from prunus.model.families import AXES, FAMILIES
from prunus.model.geometry import Geometry
from prunus.repair.block_repair import Cut, RepairOptions, repair_, repair_together_
from prunus.repair.least_squares import NormalEquations, TokenSums, solve_ridge_
from prunus.repair.temperature import fit_temperature_
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan


def half(geometry: Geometry) -> Plan:
    """Keep every other group of both axes."""
    return plan_keeping(geometry, [{axis: range(0, widths[axis], 2) for axis in AXES} for widths in geometry.widths])


def as_batches(input_ids, size=2):
    return [Batch(ids, None) for ids in input_ids.split(size)]


@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_the_temperature_is_fitted_to_the_repaired_model(case):
    model = make_model(*case)
    plan, batches = half(Geometry.of(model)), as_batches(random_tokens(batch=6, seq_len=16))
    fitted, expected = apply_plan(model, plan), apply_plan(model, plan)
    repair_(fitted, model, plan, batches, progress=False)
    repair_(expected, model, plan, batches, RepairOptions(fit_logits=False), progress=False)
    fit_temperature_(expected, as_batches(torch.cat([batch.input_ids for batch in batches])[::2], 1))  # without noise
    for name, tensor in fitted.state_dict().items():
        # The residual stream was added up block by block: in float32 that is the layer's own sum to rounding.
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0.01, atol=1e-6)


def test_solve_ridge_is_the_least_squares_solution_of_the_augmented_system():
    generator = torch.Generator().manual_seed(0)
    x, target, weight = (torch.randn(*shape, generator=generator) for shape in ((50, 7), (50, 3), (3, 7)))
    damping = 0.1
    gram = x.T @ x
    root = (damping * gram.diagonal().mean()).sqrt()
    stacked = torch.cat([x, root * torch.eye(7)]).double(), torch.cat([target, root * weight.T]).double()
    expected = torch.linalg.lstsq(*stacked).solution.T
    square = float(target.double().square().sum())
    solution = solve_ridge_(NormalEquations(gram, x.T @ target, square), weight, damping)
    torch.testing.assert_close(solution.weight, expected, rtol=1e-5, atol=1e-6)
    error = (x.double() @ expected.T - target.double()).square().sum() / square
    assert solution.error == pytest.approx(float(error), rel=1e-5)
    damped = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(7)
    assert 1 <= solution.condition <= float(torch.linalg.cond(damped)) * 1.0001


@pytest.mark.parametrize("width", [5, 64, 150, 1100])
def test_sums_over_tokens_are_those_of_all_tokens_at_once(width):
    """Also where XᵀX goes in one block, in equal ones and in unequal ones."""
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(30, columns, generator=generator) for columns in (width, 7))
    sums = TokenSums(width, 7, torch.device("cpu"))
    for part, its_target in zip(x.split(8), target.split(8), strict=True):
        sums.add(part, its_target)
    found = sums.equations()
    torch.testing.assert_close(found.gram.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.cross.double(), x.double().T @ target.double(), rtol=1e-5, atol=1e-4)
    assert found.target_square == pytest.approx(float(target.double().square().sum()))
    weight = torch.randn(7, width, generator=generator).double()
    error = (x.double() @ weight.T - target.double()).square().sum() / target.double().square().sum()
    assert found.error(weight) == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
@pytest.mark.parametrize(("residual", "noise"), [(0.0, 0.0), (1.0, 0.0), (1.0, 0.3)])
def test_every_block_gets_the_solution_that_a_walk_by_hand_finds(case, residual, noise):
    model = make_model(*case)
    geometry = Geometry.of(model)
    plan, ids = half(geometry), random_tokens(batch=6, seq_len=16)
    pruned = apply_plan(model, plan)
    oracle = copy.deepcopy(pruned)
    options = RepairOptions(damping=1e-3, residual=residual, noise=noise)
    repair_(pruned, model, plan, as_batches(ids), options, progress=False)
    ids = torch.cat([batch.input_ids for batch in with_noise(as_batches(ids), noise, model.config.vocab_size)])

    def recorded(run, *paths):
        """Inputs and outputs of the modules at these paths in one whole forward pass of a model."""
        seen = {}

        def note(path):
            def hook(module, args, kwargs, output):
                entered = args[0] if args else kwargs["hidden_states"]
                seen[path] = entered, output

            return hook

        handles = [run.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in paths]
        logits(run, ids)
        for handle in handles:
            handle.remove()
        return seen

    # The oracle runs the whole model anew for each block, from what is repaired so far. The residual stream before a
    # block is what enters the decoder layer, or the norm in front of the MLP.
    mlp = geometry.family.block("mlp")
    norm_after, before_mlp = mlp.post_norm is not None, mlp.begins
    outputs = {
        f"model.layers.{i}.{path}": f"model.layers.{i}.{entrance}".rstrip(".")
        for i, (path, entrance) in product(range(2), (("self_attn.o_proj", ""), ("mlp.down_proj", before_mlp)))
    }
    if norm_after:
        residual = 0.0  # no sum of this output and the residual stream is made
    dense = recorded(model, *outputs.keys(), *outputs.values())
    for path, entrance in outputs.items():
        now = recorded(oracle, *outputs.keys(), *outputs.values())
        difference = dense[entrance][0] - now[entrance][0]
        if case[0] == "granite":
            difference = difference / model.config.residual_multiplier
        target = (dense[path][1] + residual * difference).flatten(0, 1).double()
        module = oracle.get_submodule(path)
        if module.bias is not None:
            target = target - module.bias.double()
        x = now[path][0].flatten(0, 1).double()
        root = (options.damping * x.square().sum(0).mean()).sqrt()
        left = torch.cat([x, root * torch.eye(x.shape[1])])
        right = torch.cat([target, root * module.weight.double().T])
        module.weight.data = torch.linalg.lstsq(left, right).solution.T.float()
        torch.testing.assert_close(
            pruned.get_submodule(path).weight, module.weight, rtol=2e-2, atol=2e-3, msg=lambda m, p=path: f"{p}: {m}"
        )


def test_only_output_projections_change_and_the_output_comes_closer():
    model = make_model("llama", "gqa", num_hidden_layers=4)
    plan = half(Geometry.of(model))
    ids, unseen = random_tokens(batch=32, seq_len=24), random_tokens(batch=8, seq_len=24, seed=9)
    pruned = apply_plan(model, plan)
    before = copy.deepcopy(pruned)
    options = RepairOptions(fit_logits=False)
    repairs = repair_(pruned, model, plan, as_batches(ids, 8), options, progress=False)
    changed = {
        name for name, weight in pruned.state_dict().items() if not torch.equal(weight, before.state_dict()[name])
    }
    assert changed == {
        f"model.layers.{i}.{block.output.path}.weight" for i in range(4) for block in FAMILIES["llama"].blocks
    }
    assert all(repair.error_after < repair.error_before for repair in repairs)
    truth = logits(model, unseen)
    assert (logits(pruned, unseen) - truth).square().mean() < (logits(before, unseen) - truth).square().mean()


def test_a_plan_that_keeps_everything_needs_no_repair():
    model = make_model("qwen2")
    plan = Plan.keep_all(Geometry.of(model))
    same = apply_plan(model, plan)
    ids = random_tokens(batch=4)
    repair_(same, model, plan, as_batches(ids), progress=False)
    torch.testing.assert_close(logits(same, ids), logits(model, ids), rtol=1e-3, atol=1e-3)


def test_removed_blocks_and_layers_are_stepped_over():
    model = make_model("llama", "gqa", num_hidden_layers=4)
    geometry = Geometry.of(model)
    kept = [
        {"attention": range(0), "mlp": range(20)},
        {"attention": range(0), "mlp": range(0)},
        {"attention": range(3), "mlp": range(0)},
        {"attention": range(2), "mlp": range(5)},
    ]
    plan = Plan.from_kept(geometry, kept)
    pruned = apply_plan(model, plan)
    repairs = repair_(pruned, model, plan, as_batches(random_tokens(batch=8)), progress=False)
    assert [(repair.layer_idx, repair.axis) for repair in repairs] == [
        (0, "mlp"),
        (2, "attention"),
        (3, "attention"),
        (3, "mlp"),
    ]


def test_padding_does_not_count():
    model = make_model("llama", "gqa")
    plan = half(Geometry.of(model))
    ids = random_tokens(batch=6, seq_len=10)
    padded = torch.cat([ids, torch.zeros(6, 4, dtype=torch.int64)], dim=1)
    mask = torch.cat([torch.ones(6, 10, dtype=torch.int64), torch.zeros(6, 4, dtype=torch.int64)], dim=1)
    plain, masked = apply_plan(model, plan), apply_plan(model, plan)
    options = RepairOptions(noise=0)  # what is drawn depends on the shape
    repair_(plain, model, plan, [Batch(ids, None)], options, progress=False)
    repair_(masked, model, plan, [Batch(padded, mask)], options, progress=False)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(masked.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def cuts_of(model):
    """Plans that keep other groups, blocks and layers."""
    geometry = Geometry.of(model)
    ragged = [{"attention": range(i % 2, 3), "mlp": range(i, 20, 3)} for i in range(4)]
    bare = [{"attention": range(2), "mlp": range(12)} for _ in range(4)]
    bare[1], bare[2] = {"attention": (), "mlp": ()}, {"attention": (), "mlp": range(7)}
    return [half(geometry), Plan.from_kept(geometry, ragged), Plan.from_kept(geometry, bare)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_several_cuts_together_get_the_bits_that_each_gets_alone(dtype):
    model = make_model("llama", "gqa", num_hidden_layers=4).to(dtype)
    batches, plans = as_batches(random_tokens(batch=8, seq_len=16)), cuts_of(model)
    alone = [apply_plan(model, plan) for plan in plans]
    repairs = [repair_(pruned, model, plan, batches, progress=False) for pruned, plan in zip(alone, plans, strict=True)]
    together = [Cut(apply_plan(model, plan), plan) for plan in plans]
    ran = Counter()
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.mlp.gate_proj):
            module.register_forward_hook(lambda module, args, output: ran.update([module]))
    found = repair_together_(together, model, batches, progress=False)
    assert [repaired.repairs for repaired in found] == repairs
    for cut, expected in zip(together, alone, strict=True):
        state = cut.pruned.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())
    assert len(ran) == 8
    assert set(ran.values()) == {len(batches)}, "each block of the dense model ran once for all"


def test_without_sequences_there_is_nothing_to_repair_on():
    model = make_model("llama", "gqa")
    plan = half(Geometry.of(model))
    with pytest.raises(CalibrationError, match="no calibration batches"):
        repair_(apply_plan(model, plan), model, plan, [], progress=False)


def test_options_are_checked():
    with pytest.raises(OptionError, match="`damping` is 0"):
        RepairOptions(damping=0)
    with pytest.raises(OptionError, match="`residual` is 2"):
        RepairOptions(residual=2)
    with pytest.raises(OptionError, match=r"`noise` is 1\.5"):
        RepairOptions(noise=1.5)
