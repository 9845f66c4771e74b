"""Hybrid importance: the formula written out in loops, over the tables of real methods."""

from __future__ import annotations

import pytest
from plain import plain_scoring
from tiny_families import make_model, random_tokens

from prunus.calibration import calibration_from_tokens
from prunus.errors import OptionError
from prunus.scoring.hybrid import check_weights, mix
from prunus.scoring.score import score


@pytest.fixture(scope="module")
def scores():
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(4, 12))
    return {
        name: score(model, calibration, plain_scoring(method=name), progress=False)
        for name in ("taylor", "gate_fisher", "wanda")
    }


def rows_of(table):
    return {(row.layer_idx, row.group_type, row.group_idx): row for row in table.itertuples()}


def test_weights_of_parts_with_mean_one(scores):
    tables = {name: scored.table for name, scored in scores.items()}
    mixed = rows_of(mix(tables, [("taylor", 3.0), ("wanda", 1.0)]))
    taylor, wanda = rows_of(tables["taylor"]), rows_of(tables["wanda"])
    mean = sum(row.importance / row.cost for row in taylor.values()) / len(taylor)
    for key, row in mixed.items():
        alike = [other for place, other in wanda.items() if place[:2] == key[:2]]
        share = wanda[key].importance / (sum(other.importance for other in alike) / len(alike))
        expected = 0.75 * taylor[key].importance / taylor[key].cost / mean + 0.25 * share
        assert row.score == pytest.approx(expected, rel=1e-9)
        assert row.importance == pytest.approx(expected * row.cost, rel=1e-9)


def test_one_comparable_part_keeps_its_ranking(scores):
    table = scores["gate_fisher"].table
    mixed = mix({"gate_fisher": table}, [("gate_fisher", 5.0)])
    keys = ["layer_idx", "group_type", "group_idx"]
    assert mixed[keys].equals(table[keys])
    assert mixed["score"].mean() == pytest.approx(1.0)


def test_scoring_by_a_hybrid(scores):
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(4, 12))
    options = plain_scoring(method="hybrid", hybrid=(("gate_fisher", 0.5), ("wanda", 0.5)))
    found = score(model, calibration, options, progress=False)
    expected = mix({name: scores[name].table for name in ("gate_fisher", "wanda")}, options.hybrid)
    assert found.table["score"].tolist() == pytest.approx(expected["score"].tolist(), rel=1e-6)
    assert set(found.statistics[0].layers[0]) >= {"gate_square.mlp", "activations.up_proj.abs_sum"}
    assert found.about["scoring"]["hybrid"] == options.hybrid


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "`hybrid` names the methods none"),
        ([("taylor", 1.0), ("taylor", 2.0)], "name each once"),
        ([("tailor", 1.0)], "`method` 'tailor' is unknown"),
        ([("hybrid", 1.0)], "'hybrid' is made of other methods and cannot be a part"),
        ([("taylor", 0.0)], "`hybrid.taylor` is 0"),
        ([("taylor", float("nan"))], "is nan; it must be a positive"),
    ],
)
def test_weights_that_cannot_be(weights, message):
    with pytest.raises(OptionError, match=message):
        check_weights(weights)
