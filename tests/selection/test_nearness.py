"""How near a cut comes to the share that was asked, against all that the same constraints could have given."""

from __future__ import annotations

import logging
import math
import re
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from plain import PLAIN, UNMEASURED, plain_recipe, plain_scoring
from strategies import exact_scores, geometries, tables
from tiny_families import make_model, random_tokens
from tiny_folder import SIZES, fails, run, run_json

import prunus
from prunus.calibration import calibration_from_tokens
from prunus.errors import BudgetError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.model.widths import LayerWidths
from prunus.selection.nearness import NEAR
from prunus.selection.select import Constraints, check_reachable, reachable_parameters, select
from prunus.selection.table import build_table


@pytest.fixture
def table(geometry):
    generator = torch.Generator().manual_seed(0)
    return build_table(
        geometry, [{a: torch.rand(w[a], generator=generator).double() for a in AXES} for w in geometry.widths]
    )


def share_removed(geometry, plan) -> float:
    return 1 - geometry.parameters_left(plan.kept_widths) / geometry.total_parameters


def prefixes(table, geometry, constraints) -> list[tuple[float, int]]:
    """Shares that are gone after each bundle of the ranking, and how many groups the bundle has; slow."""
    bundles = []
    for layer_idx, axis in product(range(len(geometry.widths)), AXES):
        rows = table[(table.layer_idx == layer_idx) & (table.group_type == axis)]
        ranked = sorted(zip(rows.score, rows.group_idx, strict=True))
        align = constraints.align if axis == "mlp" else 1
        place = 0
        while ranked:
            stay = next(n for n in range(len(ranked) - 1, -1, -1) if n % align == 0)
            bundle, ranked = ranked[: len(ranked) - stay], ranked[len(ranked) - stay :]
            cost = len(bundle) * geometry.group_parameters[axis] + (0 if ranked else geometry.block_parameters[axis])
            bundles.append((sum(score for score, _ in bundle) / len(bundle), layer_idx, axis, place, cost, len(bundle)))
            place += 1
    gone, steps = 0, [(0.0, 1)]
    for *_, cost, groups in sorted(bundles):
        gone += cost
        steps.append((gone / geometry.total_parameters, groups))
    return steps


def expected_share(steps, ratio: float) -> float:
    """The first that reaches the ratio; or the one before, if that is nearer and this one more than two points over."""
    if not ratio:
        return 0.0
    number = next(i for i, (share, _) in enumerate(steps) if share >= ratio * (1 - 1e-12))
    (before, _), (share, groups) = steps[number - 1], steps[number]
    return before if groups > 1 and share - ratio > NEAR and ratio - before < share - ratio else share


@given(data=st.data(), align=st.integers(2, 6))
def test_bundles_come_as_near_as_they_can(data, align):
    geometry = data.draw(geometries())
    constraints, table = Constraints(align=align), data.draw(tables(geometry, exact_scores))
    reachable = reachable_parameters(geometry, constraints) / geometry.total_parameters
    ratio = data.draw(st.floats(0, 1)) * reachable * (1 - 1e-9)
    expected = expected_share(prefixes(table, geometry, constraints), ratio)
    if ratio and expected == 0:
        with pytest.raises(BudgetError, match=rf"cannot be removed with align {align}: the least that can go is"):
            select(table, geometry, ratio, constraints)
        plan = select(table, geometry, ratio, constraints, last=False)
    else:
        plan = select(table, geometry, ratio, constraints)
    assert share_removed(geometry, plan) == pytest.approx(expected)


@given(data=st.data(), align=st.integers(1, 6))
def test_equal_widths_come_as_near_as_they_can(data, align):
    geometry = data.draw(geometries().filter(lambda g: all(min(w[a] for w in g.widths) for a in AXES)))
    narrowest = {axis: min(widths[axis] for widths in geometry.widths) for axis in AXES}
    assume(narrowest["mlp"] >= align)
    constraints = Constraints(shape="uniform", align=align)
    ratio = data.draw(st.floats(0, 1)) * reachable_parameters(geometry, constraints) / geometry.total_parameters
    ratio *= 1 - 1e-9
    shares = []
    for attention, channels in product(range(1, narrowest["attention"] + 1), range(1, narrowest["mlp"] + 1)):
        whole = len({w["mlp"] for w in geometry.widths}) == 1 and channels == narrowest["mlp"]
        if channels % align == 0 or whole:
            left = geometry.parameters_left([LayerWidths(attention, channels)] * len(geometry.widths))
            shares.append(1 - left / geometry.total_parameters)
    plan = select(data.draw(tables(geometry)), geometry, ratio, constraints, last=False)
    off = share_removed(geometry, plan) - ratio
    assert -1e-12 <= off <= NEAR + 1e-12 or abs(off) == pytest.approx(min(abs(share - ratio) for share in shares))


@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.2, 0.28, 0.36, 0.5])
def test_whole_layers_come_as_near_as_they_can(table, geometry, ratio):
    layer = (geometry.total_parameters - geometry.parameters_left([LayerWidths(0, 0)] * 4)) / 4
    step = layer / geometry.total_parameters
    nearest = round(ratio / step)
    constraints = Constraints(shape="depth")
    if nearest:
        plan = select(table, geometry, ratio, constraints)
        assert len(plan.surviving_layers) == 4 - nearest
        return
    for refuses in (
        lambda: select(table, geometry, ratio, constraints),
        lambda: check_reachable(geometry, ratio, constraints),
    ):
        with pytest.raises(
            BudgetError, match=f"the least that can go is {math.floor(1000 * step) / 10:.1f} %.*choose shape ragged"
        ):
            refuses()
    assert len(select(table, geometry, ratio, constraints, last=False).surviving_layers) == 4


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        (Constraints(shape="depth"), ["shape depth", "choose shape ragged"]),
        (Constraints(align=16), ["align 16", "choose a smaller align"]),
        (Constraints(shape="uniform", align=16), ["shape uniform, align 16", "shape ragged or choose a smaller align"]),
        (
            Constraints(align=10, min_keep_mlp=10, min_keep_attention=2),
            ["align 10, min-keep of 2 attention groups, min-keep of 10 mlp groups", "lower min-keep"],
        ),
        (Constraints(axes=("attention",)), ["groups as large as this model's", "ask for one of those shares"]),
    ],
)
def test_what_is_far_off_is_said_once_with_its_reason_and_what_would_be_nearer(
    table, geometry, constraints, words, caplog
):
    far = 0
    for ratio in (0.1, 0.14, 0.17, 0.2, 0.23, 0.26, 0.3):
        caplog.clear()
        try:
            plan = select(table, geometry, ratio, constraints)
        except BudgetError:
            continue
        achieved = share_removed(geometry, plan)
        assert len(caplog.messages) == (abs(achieved - ratio) > NEAR)
        for message in caplog.messages:
            far += 1
            shown = f"{math.floor(1000 * achieved) / 10:.1f}"
            assert f"asked to remove {100 * ratio:.1f} % of all parameters, {shown} % go" in message
            assert all(word in message for word in words), message
            below, above = (float(number) for number in re.search(r"shares are (\S+) % and (\S+) %", message).groups())
            assert below < 100 * ratio < above
            assert shown in (f"{below:.1f}", f"{above:.1f}")
            for named in (below, above):
                if named:
                    again = select(table, geometry, named / 100, constraints, last=False)
                    assert share_removed(geometry, again) == pytest.approx(named / 100, abs=1e-3)
        caplog.clear()
        select(table, geometry, ratio, constraints, last=False)
        assert not caplog.messages
    assert far


def test_rounds_say_it_once_and_are_not_stopped_half_way(caplog):
    """A quarter of the model in two rounds: half of that is less than half a layer, and nothing goes in the first."""
    model = make_model("llama", "gqa", num_hidden_layers=4)
    constraints = Constraints(shape="depth")
    recipe = plain_recipe(plain_scoring(method="gate_fisher"), constraints, rounds=3)
    calibration = calibration_from_tokens(random_tokens(4, 12))
    with caplog.at_level(logging.WARNING):
        result = prunus.prune(model, 0.2, calibration, recipe, progress=False)
    assert len(result.plan.surviving_layers) == 3
    assert sum("asked to remove" in message for message in caplog.messages) == (abs(result.achieved_ratio - 0.2) > NEAR)
    assert result.achieved_ratio == pytest.approx(share_removed(Geometry.of(model), result.plan))
    with pytest.raises(BudgetError, match="the least that can go"):
        prunus.prune(model, 0.02, calibration, recipe, progress=False)


def test_the_achieved_share_is_printed_and_kept(capsys, tmp_path, folder, text):
    out = tmp_path / "small"
    words = ["--ratio", "0.25", *PLAIN, "--shape", "depth", "--calibration", text, *SIZES, *UNMEASURED]
    metrics = run_json(capsys, "prune", folder, "--out", out, *words)
    achieved = 1 - metrics["parameters_after"] / metrics["parameters_before"]
    assert metrics["achieved_ratio"] == pytest.approx(achieved)
    assert metrics["ratio"] == 0.25
    facts = run_json(
        capsys, "plan", out / "prunus", "--ratio", "0.25", "--shape", "depth", "--out", tmp_path / "p.json"
    )
    assert facts["achieved_ratio"] == pytest.approx(achieved)
    printed = run(capsys, "prune", folder, "--out", out, *words, "--overwrite").out
    assert f"25.0% asked │ {achieved:.1%}".replace(" ", "") in printed.replace(" ", "")
    message = fails(capsys, "prune", folder, "--out", tmp_path / "no", *words[2:], "--ratio", "0.05")
    assert "5.0 % of all parameters cannot be removed with shape depth" in message
    assert not (tmp_path / "no").exists()
