"""The global table: normalisations against plain numpy, exact CSV, and refusal of anything malformed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import any_scores, exact_scores, geometries, tables

from prunus.errors import NonFiniteError, OptionError, PlanError
from prunus.model.families import AXES
from prunus.selection.table import (
    COLUMNS,
    NORMALIZATIONS,
    build_table,
    check_table,
    load_table,
    normalize,
    rank_table,
    save_table,
)


@pytest.fixture
def importance(geometry):
    """Random importances of every group, of another size in each layer."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            axis: torch.rand(widths[axis], generator=generator, dtype=torch.float64) * 10**layer_idx + 0.01
            for axis in AXES
        }
        for layer_idx, widths in enumerate(geometry.widths)
    ]


@pytest.fixture
def table(geometry, importance):
    return build_table(geometry, importance)


# --- building ---


def test_one_row_per_group(table, geometry, importance):
    assert tuple(table.columns) == COLUMNS
    assert len(table) == sum(widths[axis] for widths in geometry.widths for axis in AXES)
    for row in table.itertuples():
        assert row.importance == float(importance[row.layer_idx][row.group_type][row.group_idx])
        assert row.cost == geometry.group_parameters[row.group_type]
        assert row.score == row.importance / row.cost
    assert table["score"].is_monotonic_increasing
    assert list(table.index) == list(range(len(table)))
    assert check_table(table) is table


def test_ties_are_ordered_by_layer_axis_and_group(geometry):
    equal = [
        {axis: torch.full((widths[axis],), float(geometry.group_parameters[axis])) for axis in AXES}
        for widths in geometry.widths
    ]
    table = build_table(geometry, equal)
    assert set(table["score"]) == {1.0}
    keys = list(zip(table["layer_idx"], table["group_type"], table["group_idx"], strict=True))
    assert keys == sorted(keys)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_importances_name_the_layer(geometry, importance, value):
    importance[2]["mlp"][5] = value
    with pytest.raises(NonFiniteError, match=r"layer 2, mlp: 1 of 20 importances"):
        build_table(geometry, importance)


def test_importances_of_another_model(geometry, importance):
    importance[1]["attention"] = importance[1]["attention"][:-1]
    with pytest.raises(PlanError, match="layer 1, attention"):
        build_table(geometry, importance)


# --- normalisation ---


def oracle(groups: pd.DataFrame, normalization: str) -> np.ndarray:
    """Each normalisation in numpy, one layer and axis at a time."""
    importance, cost = groups["importance"].to_numpy(), groups["cost"].to_numpy()
    result = np.empty(len(groups))
    if normalization == "none":
        return importance
    for layer_idx, axis in {(row.layer_idx, row.group_type) for row in groups.itertuples()}:
        here = ((groups["layer_idx"] == layer_idx) & (groups["group_type"] == axis)).to_numpy()
        values, number = importance[here], here.sum()
        if normalization == "layer_sum":
            share = values / values.sum() if values.sum() else values * 0
            result[here] = share * number * cost[here]
        elif normalization == "layer_mean":
            result[here] = values / values.mean() if values.mean() else values * 0
    return result


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_normalisations(geometry, importance, normalization):
    table = build_table(geometry, importance, normalization)
    by_group = table.sort_values(["layer_idx", "group_type", "group_idx"], ignore_index=True)
    np.testing.assert_allclose(by_group["score"] * by_group["cost"], oracle(by_group, normalization), rtol=1e-12)
    assert table["score"].is_monotonic_increasing
    raw = build_table(geometry, importance).sort_values(["layer_idx", "group_type", "group_idx"], ignore_index=True)
    pd.testing.assert_series_equal(by_group["importance"], raw["importance"]), "importance itself stays as it is"


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@given(data=st.data())
def test_normalisations_of_anything(normalization, data):
    geometry = data.draw(geometries())
    values = data.draw(st.sampled_from([exact_scores, st.just(0.0), st.floats(1e-3, 1e3)]))
    table = data.draw(tables(geometry, values, normalization=normalization))
    assert np.isfinite(table["score"]).all()
    check_table(table)
    by_group = table.sort_values(["layer_idx", "group_type", "group_idx"], ignore_index=True)
    np.testing.assert_allclose(
        by_group["score"] * by_group["cost"], oracle(by_group, normalization), rtol=1e-9, atol=1e-6
    )
    # Within a layer and axis no normalisation changes the order of groups.
    for _, rows in table.groupby(["layer_idx", "group_type"]):
        assert rows["importance"].is_monotonic_increasing


@pytest.mark.parametrize("normalization", [n for n in NORMALIZATIONS if n != "none"])
def test_layers_become_comparable(geometry, importance, normalization):
    """A layer a thousand times as important throughout gets the same scores."""
    scores = build_table(geometry, importance, normalization)
    importance[0] = {axis: values * 1024 for axis, values in importance[0].items()}
    scaled = build_table(geometry, importance, normalization)
    keys = ["layer_idx", "group_type", "group_idx"]
    for column in ("score",):
        np.testing.assert_allclose(
            scaled.sort_values(keys)[column], scores.sort_values(keys)[column], rtol=1e-9, atol=1e-12
        )


def test_layer_sum_gives_every_layer_and_axis_mean_score_one(geometry, importance):
    table = build_table(geometry, importance, "layer_sum")
    np.testing.assert_allclose(table.groupby(["layer_idx", "group_type"])["score"].mean(), 1.0)


def test_unknown_normalisation(table):
    with pytest.raises(OptionError, match="'layer_max' is unknown; choose one of none"):
        normalize(table, "layer_max")  # type: ignore[arg-type]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@given(data=st.data())
def test_the_order_depends_on_nothing_but_the_groups(normalization, data):
    """Ranked anew from rows in any order, with ties, a table is the same."""
    geometry = data.draw(geometries())
    table = data.draw(tables(geometry, exact_scores))
    order = data.draw(st.permutations(range(len(table))))
    shuffled = table.iloc[order].reset_index(drop=True)
    pd.testing.assert_frame_equal(rank_table(shuffled, normalization), rank_table(table, normalization))


# --- as CSV ---


@given(data=st.data())
def test_csv_keeps_every_digit(data, tmp_path_factory):
    geometry = data.draw(geometries())
    table = data.draw(tables(geometry, st.one_of(any_scores, st.floats(0, 1e300))))
    path = tmp_path_factory.mktemp("csv") / "groups.csv"
    save_table(table, path)
    again = load_table(path)
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert [p.name for p in path.parent.iterdir()] == ["groups.csv"]


def test_csv_keeps_every_digit_of_awkward_numbers(geometry, tmp_path):
    """Random mantissas over many orders of magnitude, which a quick parser misses in the last digit."""
    generator = torch.Generator().manual_seed(0)

    def draw(groups: int) -> torch.Tensor:
        mantissa, exponent = (torch.rand(groups, generator=generator, dtype=torch.float64) for _ in range(2))
        return mantissa * 10 ** (200 * (exponent - 0.5))

    for _ in range(10):
        table = build_table(geometry, [{axis: draw(widths[axis]) for axis in AXES} for widths in geometry.widths])
        save_table(table, tmp_path / "groups.csv")
        pd.testing.assert_frame_equal(load_table(tmp_path / "groups.csv"), table, check_exact=True)


def test_additional_columns_and_any_order_of_rows_are_welcome(table, tmp_path):
    more = table.assign(note="checked by hand").sample(frac=1, random_state=0)
    save_table(more, tmp_path / "groups.csv")
    again = load_table(tmp_path / "groups.csv")
    assert "note" in again.columns
    assert len(again) == len(table)


DAMAGE = {
    "a column is missing": (lambda t: t.drop(columns="cost"), "no column cost"),
    "no rows": (lambda t: t.iloc[:0], "no rows"),
    "a layer that is not a number": (lambda t: t.assign(layer_idx="first"), "column layer_idx.*whole numbers"),
    "a negative layer": (lambda t: t.assign(layer_idx=-1), "column layer_idx.*non-negative"),
    "half a group": (lambda t: t.assign(group_idx=t.group_idx + 0.5), "column group_idx.*whole numbers"),
    "a group that gives something": (lambda t: t.assign(cost=-1), "column cost must hold non-negative numbers"),
    "a cost that is not there": (lambda t: t.assign(cost=t.cost.where(t.index > 0)), "column cost"),
    "an importance that is not there": (lambda t: t.assign(importance=t.importance.where(t.index > 3)), "importance"),
    "an infinite score": (lambda t: t.assign(score=np.inf), "column score.*finite"),
    "importance that is true or false": (lambda t: t.assign(importance=t.importance > 0), "column importance"),
    "a score in words": (lambda t: t.assign(score="high"), "column score"),
    "another axis": (lambda t: t.assign(group_type=t.group_type.replace("mlp", "experts")), "'experts' is not one of"),
    "an axis that is not there": (lambda t: t.assign(group_type=np.nan), "group_type 'nan'"),
    "a group twice": (lambda t: pd.concat([t, t.iloc[[7]]]), "twice"),
    "a group left out": (lambda t: t[~((t.layer_idx == 2) & (t.group_idx == 0))], "layer 2 attention lacks groups"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_malformed_tables(table, tmp_path, damage, message):
    damaged = damage(table)
    with pytest.raises(PlanError, match=message):
        check_table(damaged)
    damaged.to_csv(tmp_path / "groups.csv", index=False)
    with pytest.raises(PlanError, match=r"groups\.csv"):
        load_table(tmp_path / "groups.csv")


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"\xff\xfe\x00", b"a,b\n1,2,3\n4,5,6,7\n", b'"', b"PK\x03\x04", ",".join(COLUMNS).encode()],
    ids=["empty", "blank", "binary", "ragged", "quote", "zip", "header only"],
)
def test_files_that_are_no_tables(tmp_path, content):
    (tmp_path / "groups.csv").write_bytes(content)
    with pytest.raises(PlanError, match=r"groups\.csv"):
        load_table(tmp_path / "groups.csv")


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "nothing.csv", tmp_path):
        with pytest.raises(PlanError, match="cannot read the table"):
            load_table(path)


@given(data=st.data())
def test_a_damaged_file_is_refused_or_a_table(data, tmp_path_factory):
    """Bytes overwritten anywhere: an error of ours that names the file, or a table that passes every check."""
    table = data.draw(tables(data.draw(geometries())))
    content = bytearray(table.to_csv(index=False).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        if not content:
            break
    path = tmp_path_factory.mktemp("damaged") / "groups.csv"
    path.write_bytes(bytes(content))
    try:
        loaded = load_table(path)
    except PlanError as error:
        message = str(error)
    else:
        check_table(loaded)
        return
    assert str(path) in message
