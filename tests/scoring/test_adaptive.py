"""The adaptive method: it chooses what an independent measurement chooses, and its importances add up to losses."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from plain import plain_scoring
from tiny_families import make_model, random_tokens

from prunus.calibration import calibration_from_tokens
from prunus.errors import CalibrationError, OptionError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.scoring.adaptive import PROBE_SHARE, SCALE_SHARES, AdaptiveOptions, split_probe
from prunus.scoring.score import score, score_together
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan

CANDIDATES = ("taylor", "magnitude", "gate_fisher")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return make_model("llama", "gqa")


@pytest.fixture(scope="module")
def calibration():
    return calibration_from_tokens(random_tokens(16, 12))


@torch.no_grad()
def mean_loss(model, ids):
    log_probabilities = torch.log_softmax(model(ids).logits[:, :-1].double(), dim=-1)
    return -float(log_probabilities.gather(-1, ids[:, 1:, None]).mean())


def cut_by_hand(model, table, axis, share):
    """The model without the groups of an axis that come first in a table, until `share` of that axis is gone."""
    geometry = Geometry.of(model)
    rows = table[table["group_type"] == axis]
    count = next(n for n in range(len(rows)) if rows["cost"].head(n).sum() >= share * rows["cost"].sum() - 1e-9)
    gone = {(row.layer_idx, row.group_idx) for row in rows.head(count).itertuples()}
    kept = [
        {a: [g for g in range(w[a]) if a != axis or (i, g) not in gone] for a in AXES}
        for i, w in enumerate(geometry.widths)
    ]
    return apply_plan(model, Plan.from_kept(geometry, kept))


def test_each_axis_gets_the_method_that_costs_least_on_unseen_sequences(model, calibration, capsys):
    options = plain_scoring(method="adaptive", adaptive=AdaptiveOptions(CANDIDATES))
    found = score(model, calibration, options)
    said = capsys.readouterr().err
    seen, probe = split_probe(calibration)
    assert len(probe) == 4
    assert len(seen) == 12
    tables = {
        name: score(
            model,
            seen,
            plain_scoring(method=name, normalize="layer_sum" if name == "magnitude" else "none"),
            progress=False,
        ).table
        for name in CANDIDATES
    }
    dense = mean_loss(model, probe.input_ids)
    for record in found.about["adaptive"]:
        axis = record["axis"]
        rises = {
            name: mean_loss(cut_by_hand(model, table, axis, PROBE_SHARE), probe.input_ids) - dense
            for name, table in tables.items()
        }
        assert record["loss_rise"] == pytest.approx(rises, abs=1e-5)
        assert record["method"] == min(rises, key=rises.get)
        why = ", ".join(f"{name} {rise:.4f}" for name, rise in record["loss_rise"].items())
        assert f"{axis}: chose {record['method']}; removing a quarter by each method raises" in said
        assert f"the held-out loss by {why}\n" in said
        curve = [
            mean_loss(cut_by_hand(model, tables[record["method"]], axis, s), probe.input_ids) - dense
            for s in SCALE_SHARES
        ]
        assert list(record["curve"].values()) == pytest.approx(curve, abs=1e-5)
    assert [record["axis"] for record in found.about["adaptive"]] == list(AXES)


def test_scores_are_losses_per_parameter(model, calibration):
    found = score(
        model,
        calibration,
        plain_scoring(method="adaptive", adaptive=AdaptiveOptions(("gate_fisher",))),
        progress=False,
    )
    seen, _ = split_probe(calibration)
    plain = score(model, seen, plain_scoring(method="gate_fisher"), progress=False).table
    for record in found.about["adaptive"]:
        rows = found.table[found.table["group_type"] == record["axis"]]
        # The method's own order within the axis stays.
        before = plain[plain["group_type"] == record["axis"]]
        places = ["layer_idx", "group_idx"]
        rank = {tuple(row): n for n, row in enumerate(before[places].to_numpy().tolist())}
        scores = {tuple(row[:2]): row[2] for row in rows[[*places, "score"]].to_numpy().tolist()}
        ordered = [scores[place] for place in sorted(scores, key=lambda place: rank[place])]
        assert all(b >= a for a, b in pairwise(ordered))
        assert (np.asarray(ordered) >= 0).all()
        rises = np.maximum.accumulate([0.0, *record["curve"].values()])
        segments = np.diff(rises) / np.diff([0.0, *SCALE_SHARES])
        if (np.diff(segments) >= 0).all():  # where the measured curve is convex nothing had to be levelled
            cut = math.ceil(SCALE_SHARES[-1] * len(rows) - 1e-9)
            assert rows["importance"].head(cut).sum() == pytest.approx(rises[-1], rel=1e-6)


def test_other_methods_beside_it_see_all_sequences(model, calibration):
    together = score_together(
        model, calibration, [plain_scoring(method="adaptive"), plain_scoring(method="taylor")], progress=False
    )
    alone = score(model, calibration, plain_scoring(method="taylor"), progress=False)
    assert together[1].table.equals(alone.table)


def test_ways_of_one_method_are_told_apart(model, calibration):
    ways = [
        plain_scoring(method="hybrid", hybrid=(("taylor", 1.0),)),
        plain_scoring(method="hybrid", hybrid=(("gate_fisher", 1.0),)),
        plain_scoring(method="taylor_2nd"),
        plain_scoring(method="taylor_2nd", hessian="empirical_fisher"),
    ]
    for way, found in zip(ways, score_together(model, calibration, ways, progress=False), strict=True):
        assert found.table.equals(score(model, calibration, way, progress=False).table)


def test_what_it_needs(model, calibration):
    with pytest.raises(CalibrationError, match="method adaptive needs calibration"):
        score(model, None, plain_scoring(method="adaptive", adaptive=AdaptiveOptions(("magnitude",))), progress=False)
    with pytest.raises(OptionError, match="has 7 calibration sequences; it needs at least 8"):
        score(model, calibration_from_tokens(random_tokens(7, 12)), plain_scoring(method="adaptive"), progress=False)
    with pytest.raises(OptionError, match="`candidates` are taylor, taylor"):
        AdaptiveOptions(("taylor", "taylor"))
    with pytest.raises(OptionError, match="'adaptive' is made of other methods"):
        plain_scoring(method="adaptive", adaptive=AdaptiveOptions(("adaptive",)))
