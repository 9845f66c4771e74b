"""Factors and precisions that an ordering hardly shows, by value: each is a number somebody could leave out."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from plain import plain_recipe, plain_scoring
from tiny_families import make_model, random_tokens

import prunus
from prunus.calibration import Batch, calibration_from_tokens
from prunus.calibration.noise import with_noise
from prunus.errors import PlanError
from prunus.importance import METHODS, LayerEvidence, MethodOptions, score_groups
from prunus.importance.registry import method, statistics_for
from prunus.model.families import AXES, FAMILIES
from prunus.model.geometry import Geometry
from prunus.repair.block_repair import Cut, RepairOptions, repair_, repair_together_
from prunus.repair.temperature import fit_temperature_
from prunus.selection.constraints import Constraints
from prunus.selection.plan import Plan
from prunus.selection.table import build_table
from prunus.selection.targets import TargetOptions
from prunus.statistics.base import ProjectionCall
from prunus.statistics.gates import GateGradients
from prunus.surgery import apply_plan
from prunus.sweep import sweep


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "gqa")


# --- importances ---


def test_second_order_taylor_takes_half_of_the_second_order(model):
    given = {"first_order": {"attention": [1.0, 2, 3], "mlp": range(20)}, "second_order": {}}
    given["second_order"] = {"attention": [100.0, 10, 1], "mlp": range(0, 2000, 100)}
    statistics = {
        f"{order}.{axis}": torch.tensor(list(values), dtype=torch.float64)
        for order, axes in given.items()
        for axis, values in axes.items()
    }
    layer = LayerEvidence(Geometry.of(model), 0, {}, statistics, AXES)
    found = METHODS["taylor_2nd"].importance(layer, MethodOptions())
    assert found["attention"].tolist() == [1 + 50, 2 + 5, 3 + 0.5]
    assert found["mlp"].tolist() == [i + 50 * i for i in range(20)]


def test_chance_is_uniform_per_parameter():
    """Then groups of both axes go in equal shares; an attention group costs 16 times what a channel does here."""
    model = make_model("llama", "gqa", num_hidden_layers=4, intermediate_size=60)
    geometry = Geometry.of(model)
    assert geometry.group_parameters["attention"] == 16 * geometry.group_parameters["mlp"]
    scores = {axis: [] for axis in AXES}
    for seed in range(20):
        table = build_table(geometry, score_groups(model, METHODS["random"], None, MethodOptions(random_seed=seed)))
        for axis in AXES:
            scores[axis] += table.loc[table.group_type == axis, "score"].tolist()
    for values in scores.values():
        drawn = torch.tensor(values)
        assert 0 <= drawn.min() < drawn.max() < 1
        # 240 draws at least: mean 1/2 and deviation 1/√12, to three standard errors.
        assert float(drawn.mean()) == pytest.approx(0.5, abs=0.06)
        assert float(drawn.std()) == pytest.approx(12**-0.5, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_of_a_model_in_half_precision_are_summed_exactly(model, dtype):
    """Σ_t h·g over a thousand tokens: a large term first, then many that half precision would not add to it."""
    geometry, generator = Geometry.of(model), torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(2, 1000, 20, generator=generator).to(dtype) for _ in range(2))
    x[:, 0], gradient[:, 0] = 30.0, 30.0
    down = FAMILIES["llama"].block("mlp").output
    gates = GateGradients()
    targets = torch.full((2,), 999.0)
    gates.on_input_gradient(
        ProjectionCall(geometry, 0, down, model.model.layers[0].mlp.down_proj, None, targets, x, gradient)
    )
    found = gates.finish_layer(geometry, 0, model.model.layers[0], 2)["gate_square.mlp"]
    expected = (x.double() * gradient.double()).sum(dim=1).square().mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("axis", AXES)
def test_effects_through_a_norm_in_half_precision_are_those_of_its_own_numbers(axis):
    model = make_model("gemma2").bfloat16()
    geometry, layer = Geometry.of(model), model.model.layers[0]
    block = geometry.family.block(axis)
    projection, norm = layer.get_submodule(block.output.path), layer.get_submodule(block.post_norm)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, projection.in_features, generator=generator).bfloat16()
    gradient = torch.randn(2, 50, 48, generator=generator).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        gates = GateGradients()
        call = ProjectionCall(
            geometry, 0, block.output, projection.to(dtype), None, torch.ones(2), x.to(dtype), gradient.to(dtype)
        )
        gates.on_stream_gradient(replace(call, norm=norm.to(dtype)))
        found.append(gates.finish_layer(geometry, 0, layer, 2)[f"gate_square.{axis}"])
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("hessian", ["mean_loss", "empirical_fisher", "sampled_fisher"])
@pytest.mark.parametrize("name", ["gate_fisher", "taylor_2nd"])
def test_padding_is_in_no_fisher(model, name, hessian, side):
    """Sequences of unequal length, filled up, against each by itself: sums and numbers of tokens are its own."""
    options = MethodOptions(hessian=hessian)
    wanted = lambda: statistics_for([METHODS[name]], options)  # noqa: E731
    lengths = (12, 3, 7, 5)
    ids, mask = random_tokens(4, 12), torch.zeros(4, 12, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, 12 - length if side == "left" else 0 : None if side == "left" else length] = 1
    if hessian == "sampled_fisher":
        # What is drawn depends on the place of a token: the same draws for any content of the padding.
        other = torch.where(mask.bool(), ids, random_tokens(4, 12, seed=9))
        found = [sweep(model, [Batch(tokens, mask)], wanted(), progress=False).layers for tokens in (ids, other)]
    else:
        rows = [Batch(tokens[keep.bool()][None], None) for tokens, keep in zip(ids, mask, strict=True)]
        found = [sweep(model, batches, wanted(), progress=False).layers for batches in ([Batch(ids, mask)], rows)]
    for padded, alone in zip(*found, strict=True):
        for key, values in alone.items():
            torch.testing.assert_close(padded[key], values, rtol=1e-3, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


# --- repair ---


def test_the_temperature_is_fitted_on_text_without_noise(model):
    """Text that the model writes itself: with random tokens in half of it, a lower factor would fit best."""
    geometry = Geometry.of(model)
    plan = Plan.from_kept(
        geometry, [{"attention": range(3), "mlp": range(19)}, {"attention": range(3), "mlp": range(20)}]
    )
    ids = random_tokens(12, 16)
    with torch.no_grad():
        for place in range(1, 16):
            ids[:, place] = model(ids[:, :place]).logits[:, -1].argmax(-1)
    batches = [Batch(part, None) for part in ids.split(3)]
    options = RepairOptions(noise=1.0)
    (repaired,) = repair_together_([Cut(apply_plan(model, plan), plan)], model, batches, options, progress=False)
    bare = Cut(apply_plan(model, plan), plan)
    repair_together_([bare], model, batches, replace(options, fit_logits=False), progress=False)
    state = {name: tensor.clone() for name, tensor in bare.pruned.state_dict().items()}
    clean = fit_temperature_(bare.pruned, [Batch(ids[::2], None)])
    bare.pruned.load_state_dict(state)
    mixed = fit_temperature_(bare.pruned, with_noise(batches, 1.0, 96))
    assert mixed < 0.9 * clean
    assert repaired.temperature == pytest.approx(clean, rel=1e-6)


def half(geometry):
    """Keep every other group."""
    return Plan.from_kept(geometry, [{"attention": [0, 2], "mlp": range(0, 20, 2)}] * len(geometry.widths))


@pytest.mark.parametrize("fault", ["no inputs", "infinite targets"])
@torch.no_grad()
def test_where_least_squares_cannot_help_the_weights_stay_bit_for_bit(fault, caplog):
    """Equations without a solution, or with one that is no number, change nothing, and the block is named."""
    model = make_model("llama", "gqa")
    if fault == "no inputs":
        axis, path = "attention", "model.layers.1.self_attn.o_proj"
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    else:
        axis, path = "mlp", "model.layers.1.mlp.down_proj"
        model.get_submodule(path).weight[0] = 3e38
    plan = half(Geometry.of(model))
    pruned, sliced = apply_plan(model, plan), apply_plan(model, plan)
    options = RepairOptions(fit_logits=False)
    with caplog.at_level(logging.WARNING):
        repair_(pruned, model, plan, [Batch(random_tokens(6, 12), None)], options, progress=False)
    assert torch.equal(pruned.get_submodule(path).weight, sliced.get_submodule(path).weight)
    others = [name for name in pruned.state_dict() if "o_proj" in name or "down_proj" in name]
    changed = [n for n in others if not torch.equal(pruned.state_dict()[n], sliced.state_dict()[n])]
    assert sorted(changed) == sorted(name for name in others if name != f"{path}.weight"), "the others are repaired"
    assert [message.partition(",")[0] for message in caplog.messages] == ["layer 1"]
    assert f"layer 1, {axis}: kept as sliced" in caplog.messages[0]


# --- plans and rounds ---


@pytest.mark.parametrize("kept", [1, 2])
def test_a_part_of_an_indivisible_block_is_no_plan(kept):
    """OLMo 2's norms run over the queries of all heads: without some, the others would be something else."""
    model = make_model("olmo2")
    geometry = Geometry.of(model)
    for whole in (0, 3):
        plan = Plan.from_kept(geometry, [{"attention": range(whole), "mlp": range(5)}] * 2)
        assert apply_plan(model, plan).num_parameters() == geometry.parameters_left(plan.kept_widths)
    layers = [{"attention": range(3), "mlp": range(20)}, {"attention": range(kept), "mlp": range(20)}]
    plan = Plan.from_kept(geometry, layers)
    for refuses in (lambda: plan.check_fits(geometry), lambda: apply_plan(model, plan)):
        with pytest.raises(PlanError, match=f"layer 1: the plan keeps {kept} of 3 attention groups, but in OLMo 2"):
            refuses()


def test_later_rounds_are_at_the_costs_of_the_layers_that_are_left(monkeypatch):
    """Layers with and without a sliding window cost differently; after the first has gone, numbers are one less.

    A method of a user's own may say that a group does harm. Divided by another layer's cost, the harm of the layer that
    is next to go looks smaller than that of one that is gone, and the plan would bring that one back.
    """
    monkeypatch.setattr("prunus.importance.registry.METHODS", dict(METHODS))
    model = make_model("gemma2", "gqa-tied", num_hidden_layers=4)
    for layer, harm in zip(model.model.layers, (4.0, 1.0, 3.0, 1.0), strict=True):
        layer.mlp.down_proj.weight.data[0, 0] = harm

    @method("harm")
    def harm(layer: LayerEvidence, options: MethodOptions):
        """Harm: written into a weight of the layer, for its attention; that of the worst layer's MLP as well."""
        size = -float(layer.weights["mlp.down_proj.weight"][0, 0])
        widths = layer.geometry.widths[layer.layer_idx]
        mlp = size if size <= -4 else 0.0
        return {
            "attention": torch.full((widths["attention"],), 160 * size, dtype=torch.float64),
            "mlp": torch.full((widths["mlp"],), mlp, dtype=torch.float64),
        }

    target = TargetOptions("kv_cache", context=100)
    costs = target.costs(Geometry.of(model))
    assert [layer["attention"] for layer in costs.group] == [160, 3200, 160, 3200]
    result = prunus.prune(
        model,
        0.0235,
        calibration_from_tokens(random_tokens(4, 12)),
        plain_recipe(plain_scoring(method="harm"), Constraints(shape="depth"), target, rounds=2),
        progress=False,
    )
    assert result.plan.surviving_layers == (1, 2, 3)


# --- what is said ---


def test_the_warning_about_raw_scores_comes_once(model, caplog):
    calibration = calibration_from_tokens(random_tokens(8, 12))
    for scoring, times in (
        (plain_scoring(method="wanda"), 1),
        (plain_scoring(method="wanda", normalize="layer_sum"), 0),
        (plain_scoring(method="hybrid"), 0),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prunus.prune(model, 0.3, calibration, plain_recipe(scoring, rounds=3), progress=False)
        assert sum("not on one scale" in message for message in caplog.messages) == times
