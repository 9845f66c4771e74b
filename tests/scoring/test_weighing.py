"""Factors on scores, against a loop over the rows."""

from __future__ import annotations

import pandas as pd
import pytest

from prunus.errors import OptionError
from prunus.scoring.score import ScoringOptions, score
from prunus.scoring.weighing import weigh_scores


@pytest.fixture
def table(llama) -> pd.DataFrame:
    return score(llama, None, ScoringOptions(method="random"), progress=False).table


def test_every_row_is_multiplied_by_the_factor_of_its_axis_and_layer(table):
    factors = {"attention": [2.0, 0.5, 1.0, 3.0], "mlp": [1.0, 4.0, 0.0, 1.0]}
    found = weigh_scores(table, factors)
    expected = [row.score * factors[row.group_type][row.layer_idx] for row in table.itertuples()]
    rows = table.assign(score=expected).sort_values("score")
    assert found["score"].tolist() == rows["score"].tolist() == sorted(expected)
    keys = ["layer_idx", "group_type", "group_idx"]
    pd.testing.assert_frame_equal(found.set_index(keys).sort_index(), rows.set_index(keys).sort_index())


def test_an_axis_without_factors_keeps_its_scores(table):
    found = weigh_scores(table, {"attention": [1e9] * 4})
    assert (found.tail(12)["group_type"] == "attention").all()
    mlp = table[table["group_type"] == "mlp"].reset_index(drop=True)
    pd.testing.assert_frame_equal(found[found["group_type"] == "mlp"].reset_index(drop=True), mlp)


def test_the_attention_weight_is_such_a_factor(llama, table):
    options = ScoringOptions(method="random", attention_weight=2.5)
    found = score(llama, None, options, progress=False)
    pd.testing.assert_frame_equal(found.table, weigh_scores(table, {"attention": [2.5] * 4}))
    assert found.about["scoring"]["attention_weight"] == 2.5


def test_what_cannot_be(llama):
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(OptionError, match="attention weight is"):
            ScoringOptions(attention_weight=weight)
    options = ScoringOptions(method="random", normalize="zscore", attention_weight=2.0)
    with pytest.raises(OptionError, match="choose another normalisation"):
        score(llama, None, options, progress=False)
