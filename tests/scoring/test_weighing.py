"""The factor on attention, against a loop over the rows."""

from __future__ import annotations

import pandas as pd
import pytest
from plain import plain_scoring

from prunus.errors import OptionError
from prunus.scoring.score import ScoringOptions, score
from prunus.scoring.weighing import weigh_attention


@pytest.fixture
def table(llama) -> pd.DataFrame:
    return score(llama, None, plain_scoring(method="random"), progress=False).table


@pytest.mark.parametrize("factor", [0.5, 2.5, 1e9])
def test_scores_of_attention_are_multiplied_and_ranked_again(table, factor):
    found = weigh_attention(table, factor)
    expected = [row.score * (factor if row.group_type == "attention" else 1) for row in table.itertuples()]
    rows = table.assign(score=expected).sort_values("score")
    assert found["score"].tolist() == rows["score"].tolist() == sorted(expected)
    keys = ["layer_idx", "group_type", "group_idx"]
    pd.testing.assert_frame_equal(found.set_index(keys).sort_index(), rows.set_index(keys).sort_index())
    if factor == 1e9:
        assert (found.tail(12)["group_type"] == "attention").all()


def test_the_option_is_such_a_factor(llama, table):
    found = score(llama, None, plain_scoring(method="random", attention_weight=2.5), progress=False)
    pd.testing.assert_frame_equal(found.table, weigh_attention(table, 2.5))
    assert found.about["scoring"]["attention_weight"] == 2.5


def test_what_cannot_be(table):
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(OptionError, match="`attention_weight` is"):
            ScoringOptions(attention_weight=weight)
    with pytest.raises(OptionError, match="some are negative"):
        weigh_attention(table.assign(score=table["score"] - 1e9), 2.0)
