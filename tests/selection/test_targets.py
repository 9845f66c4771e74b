"""Shares of other quantities than parameters: reached and not overshot, by the plan that a slow search finds."""

from __future__ import annotations

import json
from itertools import product

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import PLAIN, UNMEASURED, plain_recipe, plain_scoring
from strategies import geometries, profiles, tables
from tiny_folder import SIZES, fails, run, run_json, save_tiny_folder

import prunus
from prunus.errors import BudgetError, OptionError, PlanError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.selection.constraints import Constraints
from prunus.selection.latency_profile import LatencyProfile, PhaseTimes, ProfiledShape
from prunus.selection.nearness import NEAR
from prunus.selection.plan import Plan
from prunus.selection.select import check_reachable, reachable, select
from prunus.selection.table import build_table, load_table, normalised_importance, with_costs
from prunus.selection.targets import TargetOptions


@st.composite
def targets(draw, geometry: Geometry) -> TargetOptions:
    """Any target that is not parameters."""
    name = draw(st.sampled_from(["flops", "kv_cache", "latency"]))
    if name == "latency":
        return TargetOptions(name, profile=draw(profiles(geometry)), phase=draw(st.sampled_from(["prefill", "decode"])))
    return TargetOptions(name, context=draw(st.integers(1, 9)))


@st.composite
def jobs(draw, shape: str = "ragged"):
    """A model, its table, the costs of a target, constraints, and a ratio that can be reached."""
    whole = st.integers(0, 1000).map(float)
    geometry = draw(
        geometries().filter(lambda g: shape != "uniform" or all(w[axis] for w in g.widths for axis in AXES))
    )
    costs = draw(targets(geometry)).costs(geometry)
    constraints = Constraints(shape=shape, axes=draw(st.sampled_from([AXES, AXES, ("attention",)])))
    if shape == "uniform" and len({w["mlp"] for w in geometry.widths}) > 1:
        constraints = Constraints(shape=shape, axes=AXES)
    share = reachable(geometry, constraints, costs) / costs.total if costs.total else 0.0
    ratio = draw(st.floats(0, 1)) * share * (1 - 1e-9)
    return geometry, draw(tables(geometry, whole)), costs, constraints, ratio


def score_of(row, costs) -> float:
    """Worth over price, of a row of the table at parameters."""
    return row.score * row.cost / costs.group[row.layer_idx][row.group_type]


@given(job=jobs())
def test_groups_go_one_by_one_until_the_share_is_reached(job):
    geometry, table, costs, constraints, ratio = job
    may_go = [
        row
        for row in table.itertuples()
        if row.group_type in constraints.axes and costs.group[row.layer_idx][row.group_type]
    ]
    waiting = sorted(may_go, key=lambda row: (score_of(row, costs), row.layer_idx, row.group_type, row.group_idx))
    kept = [{axis: set(range(widths[axis])) for axis in AXES} for widths in geometry.widths]

    def removed() -> float:
        return costs.total - costs.left([type(geometry.widths[0])(*(len(layer[a]) for a in AXES)) for layer in kept])

    target, before = ratio * costs.total, 0.0
    while target and removed() < target * (1 - 1e-12):
        row, before = waiting.pop(0), removed()
        kept[row.layer_idx][row.group_type].discard(row.group_idx)
    plan = select(table, geometry, ratio, constraints, costs)
    assert plan == Plan.from_kept(geometry, kept)
    assert before < target or not target, "one group less would not have been enough"
    for layer_idx, (widths, after) in enumerate(zip(geometry.widths, plan.kept_widths, strict=True)):
        assert all(after[a] == widths[a] for a in AXES if not costs.group[layer_idx][a]), "what saves nothing stays"


@given(job=jobs("depth"))
def test_whole_layers_go_by_worth_over_cost(job):
    geometry, table, costs, constraints, ratio = job
    units = []
    for layer_idx, widths in enumerate(geometry.widths):
        axes = [axis for axis in constraints.axes if widths[axis]]
        price_of = sum(widths[axis] * costs.group[layer_idx][axis] for axis in axes)
        if price_of:
            rows = table[(table.layer_idx == layer_idx) & table.group_type.isin(axes)]
            units.append((sum(r.score * r.cost for r in rows.itertuples()) / price_of, layer_idx, axes))
    kept = [{axis: range(widths[axis]) for axis in AXES} for widths in geometry.widths]
    saved, target = 0.0, ratio * costs.total
    for _, layer_idx, axes in sorted(units):
        cost = sum(costs.saved(layer_idx, axis, geometry.widths[layer_idx][axis], 0) for axis in axes)
        over = saved + cost - target
        if saved >= target or (over > NEAR * costs.total and over > target - saved):
            break
        for axis in axes:
            kept[layer_idx][axis] = range(0)
        saved += cost
    assert select(table, geometry, ratio, constraints, costs, last=False) == Plan.from_kept(geometry, kept)


@given(job=jobs("uniform"))
def test_equal_widths_lose_the_least_that_the_share_allows(job):
    geometry, table, costs, constraints, ratio = job
    plan = select(table, geometry, ratio, constraints, costs, last=False)
    assert len(set(plan.kept_widths)) == 1
    narrowest = {axis: min(layer[axis] for layer in geometry.widths) for axis in AXES}

    def lost(widths) -> float:
        total = 0.0
        for keep, axis in zip(widths, AXES, strict=True):
            for _, rows in table[table.group_type == axis].groupby("layer_idx"):
                sums_of = [r.score * r.cost for r in sorted(rows.itertuples(), key=lambda r: (r.score, r.group_idx))]
                total += sum(sums_of[: len(sums_of) - keep])
        return total

    def saved(widths) -> float:
        return costs.total - costs.left([type(geometry.widths[0])(*widths)] * len(geometry.widths))

    target, every = ratio * costs.total, []
    best: dict[int, int] = {}  # for each number of attention groups the most channels that do
    for widths in product(range(1, narrowest["attention"] + 1), range(1, narrowest["mlp"] + 1)):
        if "mlp" in constraints.axes or widths[1] == narrowest["mlp"]:
            every.append(widths)
        if saved(widths) >= target * (1 - 1e-12):
            best[widths[0]] = widths[1]
    allowed = [pair for pair in best.items() if "mlp" in constraints.axes or pair[1] == narrowest["mlp"]]
    allowed = [pair for pair in allowed if saved(pair) - target <= NEAR * costs.total * (1 + 1e-9)]
    chosen = plan.kept_widths[0]
    if not allowed:  # all would be far too much: the nearest
        off = abs(saved((chosen.num_key_value_heads, chosen.intermediate_size)) - target)
        assert off <= min(abs(saved(widths) - target) for widths in every) * (1 + 1e-9)
        return
    assert lost((chosen.num_key_value_heads, chosen.intermediate_size)) <= min(map(lost, allowed)) * (1 + 1e-9)


@given(data=st.data())
def test_prices_come_and_go_and_worth_stays(data):
    geometry = data.draw(geometries())
    table = data.draw(tables(geometry))
    costs = data.draw(targets(geometry)).costs(geometry)
    priced = with_costs(table, costs)
    keys = ["layer_idx", "group_type", "group_idx"]
    old, new = (normalised_importance(t.set_index(keys)).sort_index() for t in (table, priced))
    pd.testing.assert_series_equal(old, new, check_names=False)
    for row in priced.itertuples():
        assert row.cost == costs.group[row.layer_idx][row.group_type]
    assert priced["score"].is_monotonic_increasing
    assert with_costs(priced, costs) is priced
    back = with_costs(priced, TargetOptions().costs(geometry))
    pd.testing.assert_frame_equal(
        back.sort_values(keys, ignore_index=True), table.sort_values(keys, ignore_index=True), check_dtype=False
    )


# --- a model of four layers ---


@pytest.fixture
def table(geometry):
    generator = torch.Generator().manual_seed(0)
    return build_table(
        geometry, [{a: torch.rand(w[a], generator=generator).double() for a in AXES} for w in geometry.widths]
    )


def test_messages_name_the_quantity(table, geometry):
    for target, name in (
        (TargetOptions("flops", context=64), "FLOPs per token at a context of 64"),
        (TargetOptions("kv_cache"), "KV-cache bytes at a context of 2,048"),
    ):
        costs = target.costs(geometry)
        with pytest.raises(OptionError, match=f"`ratio` is 1.2; it is a share of all {name} and must"):
            select(table, geometry, 1.2, None, costs)
        with pytest.raises(BudgetError, match=rf"of [\d,]+ {name}, but only [\d,]+ can go"):
            check_reachable(geometry, 0.99, Constraints(min_keep_attention=2), costs)
    with pytest.raises(BudgetError, match="the largest reachable ratio is 0"):
        check_reachable(geometry, 0.1, Constraints(axes=("mlp",)), costs)


def test_depth_for_the_cache_takes_mlps_along(table, geometry):
    costs = TargetOptions("kv_cache").costs(geometry)
    plan = select(table, geometry, 0.5, Constraints(shape="depth"), costs)
    assert len(plan.surviving_layers) == 2
    assert {plan.kept_widths[i] for i in plan.surviving_layers} == set(geometry.widths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "speed"}, "target 'speed' is unknown; choose one of params, flops, kv_cache, latency"),
        ({"name": "latency"}, "`target` latency needs measured times: make them with `prunus profile"),
        ({"name": "flops", "context": 0}, "`context` is 0"),
        ({"phase": "warm-up"}, "`phase` 'warm-up' is unknown"),
    ],
)
def test_targets_that_cannot_be(options, message):
    with pytest.raises(OptionError, match=message):
        TargetOptions(**options)


def a_profile(geometry, head: float = 0.0) -> LatencyProfile:
    """Attention that takes long whether it has one group or three; MLPs whose time is in proportion."""
    times = PhaseTimes(head, ((1, 9e-6), (3, 10e-6)), ((20, 20e-6),))
    return LatencyProfile(
        "tiny", ProfiledShape.of(geometry), "cpu", "x86_64 Linux", 1, "float32", "2", "5", 8, 4, 1, 1, times, times
    )


def test_a_target_is_its_dictionary_again(geometry):
    for target in (
        TargetOptions(),
        TargetOptions("flops", context=5),
        TargetOptions("latency", profile=a_profile(geometry), phase="prefill"),
    ):
        assert TargetOptions.from_dict(json.loads(json.dumps(target.to_dict()))) == target
    with pytest.raises(OptionError, match="goes with target latency, not with target flops"):
        TargetOptions("flops", profile=a_profile(geometry))
    with pytest.raises(PlanError, match="malformed target"):
        TargetOptions.from_dict({"target": "none"})


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("name", ["flops", "kv_cache", "latency"])
def test_rounds_reach_the_share(llama, geometry, name, rounds):
    target = TargetOptions(name, profile=a_profile(geometry) if name == "latency" else None)
    scoring = plain_scoring(method="random", random_seed=1)
    result = prunus.prune(llama, 0.3, recipe=plain_recipe(scoring, target=target, rounds=rounds), progress=False)
    costs = target.costs(geometry)
    left = costs.left(result.plan.kept_widths)
    dearest = max(costs.saved(0, axis, n, n - 1) for axis in AXES for n in range(1, geometry.widths[0][axis] + 1))
    assert 0.7 * costs.total - dearest <= left <= 0.7 * costs.total
    assert result.score.about["target"]["before"] == costs.total
    assert result.score.about["target"]["after"] == left
    assert result.score.target == target
    if name == "kv_cache":
        assert {layer.intermediate_size for layer in result.plan.kept_widths} == {20}
    # The table leads to the plan again.
    assert select(result.score.table, geometry, 0.3, None, costs) == result.plan


# --- as typed ---


def test_prune_and_plan_for_the_cache(capsys, tmp_path, folder, text):
    out, common = tmp_path / "small", ["--calibration", text, *SIZES]
    words = [
        "prune",
        folder,
        "--out",
        out,
        "--ratio",
        "0.3",
        "--target",
        "kv_cache",
        "--set",
        "target.context=32",
        *common,
    ]
    printed = run(capsys, *words, *PLAIN, *UNMEASURED).out
    assert "KV-cache bytes" in printed
    metrics = json.loads((out / "prunus" / "metrics.json").read_text())
    # Three layers of three groups: keys and values of eight numbers, two bytes each.
    assert metrics["target"] == {
        "target": "kv_cache",
        "context": 32,
        "quantity": "KV-cache bytes at a context of 32",
        "before": 9 * 2 * 8 * 2 * 32,
        "after": 6 * 2 * 8 * 2 * 32,
    }
    assert "0.3 of all KV-cache bytes at a context of 32" in (out / "README.md").read_text()
    table = load_table(out / "prunus" / "groups.csv")
    assert set(table[table.group_type == "attention"]["cost"]) == {2 * 8 * 2 * 32}
    assert set(table[table.group_type == "mlp"]["cost"]) == {0}
    # A plan from the result's own table is for the same quantity, and for another one where that is asked for.
    plan = tmp_path / "plan.json"
    run(capsys, "plan", out / "prunus", "--ratio", "0.3", "--out", plan)
    assert plan.read_text() == (out / "prunus" / "plan.json").read_text()
    again = ["plan", out / "prunus", "--ratio", "0.3", "--recipe", "original", "--out", plan, "--overwrite"]
    assert run_json(capsys, *again)["quantity"] == "KV-cache bytes at a context of 32"
    assert run_json(capsys, *again, "--set", "target.name=params")["quantity"] == "parameters"
    run(capsys, "score", folder, "--out", tmp_path / "scores", *PLAIN, *common)
    for target in ("params", "flops"):
        run(capsys, "plan", out / "prunus", "--ratio", "0.2", "--target", target, "--out", plan, "--overwrite")
        run(capsys, "plan", tmp_path / "scores", "--ratio", "0.2", "--target", target, "--out", tmp_path / target)
        assert plan.read_text() == (tmp_path / target).read_text()
    facts = run_json(capsys, "plan", tmp_path / "scores", *words[4:10], "--out", plan, "--overwrite")
    assert (facts["quantity_before"], facts["quantity_after"]) == (9 * 1024, 6 * 1024)
    assert plan.read_text() == (out / "prunus" / "plan.json").read_text()


def test_wrong_ratios_are_refused_by_the_name_of_the_quantity(capsys, tmp_path, folder):
    words = ["prune", folder, "--out", tmp_path / "no", "--method", "magnitude", *PLAIN]
    message = fails(capsys, *words, "--target", "flops", "--ratio", "1.2")
    assert "--ratio is 1.2; it is a share of all FLOPs and must lie in" in message
    message = fails(capsys, *words, "--target", "kv_cache", "--ratio", "0.9", "--set", "selection.min_keep_attention=1")
    assert "KV-cache bytes at a context of 2,048, but only" in message
    assert not (tmp_path / "no").exists()


def test_profile_and_prune_for_latency(capsys, tmp_path, folder, text):
    file, runs = tmp_path / "profile.json", ["--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "2"]
    printed = run(capsys, "profile", folder, "--out", file, *runs).out
    assert "all else" in printed
    assert "exists; choose another --out" in fails(capsys, "profile", folder, "--out", file, *runs)
    out, common = (
        tmp_path / "small",
        ["--calibration", text, *SIZES, *UNMEASURED, "--ratio", "0.2"],
    )
    words = ["prune", folder, "--out", out, "--target", "latency", "--set", "target.phase=prefill", *common]
    run(capsys, *words, "--set", f"target.profile={file}")
    metrics = json.loads((out / "prunus" / "metrics.json").read_text())
    assert metrics["target"]["after"] <= 0.8 * metrics["target"]["before"]
    assert metrics["target"]["profile"] == json.loads(file.read_text())
    plan = Plan.load(out / "prunus" / "plan.json")
    geometry = Geometry.of(prunus.load_model(str(folder))[0])
    assert metrics["target"]["after"] == LatencyProfile.load(file).costs(geometry, "prefill").left(plan.kept_widths)
    other = save_tiny_folder(tmp_path / "other", "llama", "gqa", num_hidden_layers=3, hidden_size=96)
    words[1], words[3] = other, tmp_path / "no"
    assert "with hidden_size 48, the model has 96" in fails(capsys, *words, "--set", f"target.profile={file}")
    assert "the latency profile" in fails(capsys, *words, "--set", f"target.profile={tmp_path / 'none.json'}")


def test_compare_for_flops(capsys, tmp_path, folder, text):
    out = tmp_path / "comparison"
    words = ["compare", folder, "--methods", "random,magnitude", "--ratios", "0.1,0.3", "--out", out]
    run(
        capsys,
        *words,
        "--recipes",
        "original",
        "--set",
        "target.name=flops",
        "--set",
        "target.context=64",
        "--calibration",
        text,
        *SIZES,
        "--set",
        "evaluation.held_out=2",
    )
    costs = TargetOptions("flops", context=64).costs(Geometry.of(prunus.load_model(str(folder))[0]))
    for name, ratio in product(("random", "magnitude"), (0.1, 0.3)):
        plan = Plan.load(out / "plans" / f"{name}-{ratio:g}-seed0.json")
        assert 0 <= (1 - ratio) * costs.total - costs.left(plan.kept_widths) <= costs.group[0]["attention"]
    recipes = json.loads((out / "comparison.json").read_text())["recipes"]
    assert recipes["random"]["target"] == {"target": "flops", "context": 64}
