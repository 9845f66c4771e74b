"""Charts as data: a Vega-Lite specification, and the same as a table for those who do not see or cannot run it.

Altair checks the specification. Colours are not given here: the page takes them from the reader's light or dark mode.
Choices (which axis, which plan) are form fields that Vega binds, and so work by keyboard.

Source: https://altair-viz.github.io/, https://vega.github.io/vega-lite/docs/
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from prunus.model.families import Axis
from prunus.results.result_content import ComparisonContent
from prunus.selection.plan import Plan

__all__ = [
    "Chart",
    "Rows",
    "accuracy_chart",
    "comparison_chart",
    "keep_chart",
    "recovery_chart",
    "score_charts",
    "seconds_chart",
]

#: axis → how a reader calls it
TITLES: dict[Axis, str] = {"attention": "attention groups", "mlp": "MLP channels", "expert": "experts"}
BINS = 50
#: the place of what a logarithmic scale has none for
AT_MOST_ZERO = "zero or less"
MEASURES = ("score", "importance")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LAYERS = alt.Axis(labelOverlap=True, labelAngle=0)


@dataclass(frozen=True)
class Rows:
    """A table: titles of its columns, and cells as text. The first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: for the page's anchors.
        title: above it.
        description: what it shows, in a sentence.
        spec: Vega-Lite.
        table: the same as a table.
    """

    name: str
    title: str
    description: str
    spec: Mapping[str, Any]
    table: Rows


def keep_chart(plans: Mapping[str, Plan]) -> Chart:
    """The share of each layer's groups that stays, per axis.

    Args:
        plans: by name; with more than one, the reader chooses.
    """
    values, rows = [], []
    axes = next(iter(plans.values())).axes
    titles, every = [TITLES[axis] for axis in axes], "both" if len(axes) == 2 else "all"
    for name, plan in plans.items():
        for layer_idx, (before, kept) in enumerate(zip(plan.widths, plan.layers, strict=True)):
            for axis in axes:
                groups, left = before[axis], len(kept[axis])
                values.append(
                    {
                        "plan": name,
                        "layer": layer_idx,
                        "axis": TITLES[axis],
                        "share": left / groups if groups else None,
                        "groups": f"{left:,} of {groups:,}",
                    }
                )
            cells = [f"{len(kept[axis]):,} of {before[axis]:,}" for axis in axes]
            rows.append([*([name] if len(plans) > 1 else []), str(layer_idx), *cells])
    chart = _bars(values).add_params(_choice("keep_axis", "show", [every, *titles]))
    chart = chart.transform_filter(f"keep_axis == '{every}' || datum.axis == keep_axis").encode(
        alt.X("layer:O", title="decoder layer", axis=LAYERS),
        alt.XOffset("axis:N", scale=alt.Scale(domain=titles)),
        alt.Y("share:Q", title="kept", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format=".0%")),
        _colour("axis", titles),
        tooltip=["layer:O", "axis:N", alt.Tooltip("share:Q", title="kept", format=".1%"), "groups:N"],
    )
    if len(plans) > 1:
        choice = _choice("keep_plan", "plan", list(plans), kind=alt.binding_select)
        chart = chart.add_params(choice).transform_filter("datum.plan == keep_plan")
    columns = [*(["plan"] if len(plans) > 1 else []), "layer", *(f"{TITLES[axis]} kept" for axis in axes)]
    what = f"Bars of the share of {' and of '.join(titles)} that stay, for every decoder layer."
    return Chart("keep", "What stays of each layer", what, _spec(chart, 260), Rows(columns, rows))


def score_charts(table: pd.DataFrame, plan: Plan) -> list[Chart]:
    """How importances and scores are spread over all groups, kept and removed, and over the layers.

    Scales are logarithmic; groups of zero or less have a place of their own, before all others. After several rounds
    those of earlier ones stand there, see `prunus.pipeline.rounds.carry_over`.

    Args:
        table: one row per group, see `prunus.selection.table`.
        plan: which of them stay.
    """
    kept = {
        (layer, axis, group) for layer, groups in enumerate(plan.layers) for axis in plan.axes for group in groups[axis]
    }
    places = zip(table["layer_idx"], table["group_type"], table["group_idx"], strict=True)
    table = table.assign(state=np.where([place in kept for place in places], "kept", "removed"))
    axes = [axis for axis in plan.axes if (table["group_type"] == axis).any()] or list(plan.axes)
    return [_histogram(table, axes), _by_layer(table, axes)]


def _histogram(table: pd.DataFrame, axes: Sequence[Axis]) -> Chart:
    values: list[dict[str, Any]] = []
    rows = []
    for axis in axes:
        of_axis = table[table["group_type"] == axis]
        for measure in MEASURES:
            values += _bins(axis, measure, of_axis)
            for state, part in of_axis.groupby("state"):
                lowest, *_, highest = quantiles = [f"{part[measure].quantile(q):.3g}" for q in (0, 0.25, 0.5, 0.75, 1)]
                zero = int((part[measure] <= 0).sum())
                middle = quantiles[1:-1]
                rows.append(
                    [TITLES[axis], measure, str(state), f"{len(part):,}", f"{zero:,}", lowest, *middle, highest]
                )
    label = f"datum.label == '{AT_MOST_ZERO}' ? '≤ 0' : format(+datum.label, '.1e')"
    chart = (
        _bars(values)
        .add_params(
            _choice("spread_axis", "groups", [TITLES[axis] for axis in reversed(axes)]),
            _choice("spread_measure", "quantity", MEASURES),
        )
        .transform_filter("datum.axis == spread_axis && datum.measure == spread_measure")
        .encode(
            alt.X(
                "place:O",
                sort=None,
                scale=alt.Scale(padding=0),
                title="score or importance from here on, in equal ratios",
                axis=alt.Axis(labelExpr=label, labelOverlap=True, labelAngle=0, ticks=False),
            ),
            alt.Y("bottom:Q", title="groups"),
            alt.Y2("top"),
            _colour("state", ["kept", "removed"]),
            tooltip=[
                "state:N",
                alt.Tooltip("groups:Q", format=","),
                alt.Tooltip("low:Q", title="from", format=".3e"),
                alt.Tooltip("high:Q", title="to", format=".3e"),
            ],
        )
    )
    columns = ["groups of", "quantity", "", "number", "zero or less", "lowest", "quarter", "median", "three quarters"]
    what = "Histogram of the scores or importances of all groups, those that stay and those that were removed."
    return Chart(
        "spread", "Importance and score of all groups", what, _spec(chart, 260), Rows([*columns, "highest"], rows)
    )


def _bins(axis: Axis, measure: str, groups: pd.DataFrame) -> list[dict[str, Any]]:
    """Bars of a histogram, those that stay below, those removed on top of them; their groups add up to all.

    What is zero or less comes first, by itself; the rest in steps of equal ratio, those without groups too.
    """
    numbers = groups[measure].to_numpy(float)
    states = {state: numbers[(groups["state"] == state).to_numpy()] for state in ("kept", "removed")}
    bars: list[tuple[str, float | None, float | None, dict[str, int]]] = []
    if (numbers <= 0).any():
        bars.append((AT_MOST_ZERO, None, None, {state: int((of <= 0).sum()) for state, of in states.items()}))
    if (numbers > 0).any():
        edges = _log_edges(numbers[numbers > 0])
        counts = {state: np.histogram(of[of > 0], edges)[0] for state, of in states.items()}
        for number, (low, high) in enumerate(pairwise(edges.tolist())):
            bars.append((repr(low), low, high, {state: int(of[number]) for state, of in counts.items()}))
    values = []
    for place, low, high, of_states in bars:
        top = 0
        for state, count in of_states.items():
            if count or state == "kept":
                span = {"place": place, "low": _rounded(low), "high": _rounded(high), "bottom": top, "top": top + count}
                values.append({"axis": TITLES[axis], "measure": measure, "state": state, "groups": count, **span})
                top += count
    return values


def _rounded(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")


def _log_edges(numbers: np.ndarray) -> np.ndarray:
    low, high = float(numbers.min()), float(numbers.max())
    edges = np.geomspace(low, high, BINS + 1) if high > low else np.array([low * 0.9, low * 1.1])
    edges[-1] = max(edges[-1], high)  # rounding must not lose the largest
    edges[0] = min(edges[0], low)
    return edges


def _by_layer(table: pd.DataFrame, axes: Sequence[Axis]) -> Chart:
    names = ("q5", "q25", "q50", "q75", "q95")
    values, rows, floors = [], [], {}
    for (axis, measure), of_axis in ((key, table[table["group_type"] == key[0]]) for key in product(axes, MEASURES)):
        quantiles = {
            int(layer): [float(f"{part[measure].quantile(q):.4g}") for q in QUANTILES]
            for layer, part in of_axis.groupby("layer_idx")
        }
        positive = [value for of_layer in quantiles.values() for value in of_layer if value > 0]
        floor = 10.0 ** (np.floor(np.log10(min(positive, default=1.0))) - 1)
        if any(value <= 0 for of_layer in quantiles.values() for value in of_layer):
            floors[TITLES[axis] + measure] = floor
        for layer, of_layer in quantiles.items():
            exact = dict(zip(names, of_layer, strict=True))
            drawn = {f"y{name}": value if value > 0 else floor for name, value in exact.items()}
            values.append({"layer": layer, "axis": TITLES[axis], "measure": measure, **exact, **drawn})
            if measure == "score":
                rows.append([str(layer), TITLES[axis], *(f"{quantile:.3g}" for quantile in of_layer)])
    rows.sort(key=lambda row: int(row[0]))
    at_floor = f"datum.value <= ({json.dumps(floors)}[layer_axis + layer_measure] || 0)"
    ticks = alt.Axis(labelExpr=f"{at_floor} ? '≤ 0' : format(datum.value, '.0e')", tickCount=5)

    def y(quantile: str) -> alt.Y:
        return alt.Y(f"y{quantile}:Q", scale=alt.Scale(type="log"), title="", axis=ticks)

    tooltip = ["layer:O", *(alt.Tooltip(f"q{q * 100:g}:Q", title=f"{q:.0%} below", format=".3e") for q in QUANTILES)]
    of_layer = alt.Chart().encode(alt.X("layer:O", title="decoder layer", axis=LAYERS), tooltip=tooltip)
    chart = (
        alt.layer(
            of_layer.mark_rule().encode(y("q5"), alt.Y2("yq95")),
            of_layer.mark_bar(width={"band": 0.6}).encode(y("q25"), alt.Y2("yq75")),
            of_layer.mark_tick(width={"band": 0.8}, thickness=2).encode(y("q50")),
            data=alt.Data(values=values),
        )
        .add_params(
            _choice("layer_axis", "groups", [TITLES[axis] for axis in reversed(axes)]),
            _choice("layer_measure", "quantity", MEASURES),
        )
        .transform_filter("datum.axis == layer_axis && datum.measure == layer_measure")
    )
    columns = ["layer", "groups of", *(f"{q:.0%} of scores below" for q in QUANTILES)]
    what = (
        "For every decoder layer the middle half of its groups as a bar, with the median, and nine tenths as a line; "
        "what is zero or less is drawn on the lower edge."
    )
    return Chart("layers", "Importance and score by layer", what, _spec(chart, 260), Rows(columns, rows))


def accuracy_chart(rows: Sequence[tuple[str, float | None, float]]) -> Chart:
    """Accuracies before and after.

    Args:
        rows: task with metric, the base model's accuracy (None if not measured) and the pruned one's.
    """
    values = [
        {"task": task, "model": model, "accuracy": accuracy}
        for task, before, after in rows
        for model, accuracy in (("base model", before), ("pruned", after))
        if accuracy is not None
    ]
    chart = _bars(values).encode(
        alt.X("accuracy:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format=".0%", tickCount=5)),
        alt.Y("task:N", title=None, sort=None, axis=alt.Axis(labelLimit=140)),
        alt.YOffset("model:N", scale=alt.Scale(domain=["base model", "pruned"])),
        _colour("model", ["base model", "pruned"]),
        tooltip=["task:N", "model:N", alt.Tooltip("accuracy:Q", format=".1%")],
    )
    cells = [[task, "" if before is None else f"{before:.1%}", f"{after:.1%}"] for task, before, after in rows]
    what = "Bars of the accuracy of the base model and of the pruned one on every task."
    return Chart(
        "accuracy",
        "Accuracy",
        what,
        _spec(chart, 40 + 44 * len(rows)),
        Rows(["task", "base model", "pruned"], cells),
    )


def recovery_chart(points: Sequence[Mapping[str, Any]]) -> Chart:
    """Held-out loss over tokens of training, a line per round.

    Args:
        points: of prunus/recovery.json: `round`, `tokens`, `seconds` and `held_out_loss`.
    """
    names = ("round", "tokens", "seconds", "held_out_loss")
    values = [{name: point[name] for name in names} for point in points]
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_line(point=True)
        .encode(
            alt.X("tokens:Q", axis=alt.Axis(tickCount=5)),
            alt.Y("held_out_loss:Q", title="held-out loss", scale=alt.Scale(zero=False)),
            alt.Detail("round:N"),
            tooltip=["round:N", "tokens:Q", "seconds:Q", "held_out_loss:Q"],
        )
    )
    cells = [
        [str(one["round"]), f"{one['tokens']:,}", f"{one['seconds']:,.0f}", f"{one['held_out_loss']:.4f}"]
        for one in values
    ]
    what = "Lines of the loss on held-out sequences, in nats per token, over the tokens trained on, one per round."
    table = Rows(["round", "tokens", "seconds", "held-out loss"], cells)
    return Chart("recovery", "Training", what, _spec(chart, 240), table)


def comparison_chart(comparison: ComparisonContent) -> Chart:
    """Perplexity over the removed share, a line per recipe, each from the dense model on."""
    beside = {comparison.title(row): comparison.dense_beside(row) for row in comparison.results}
    kinds = list(beside)
    drawn = [(comparison.title(row), row) for row in comparison.results if row.perplexity is not None]
    drawn += beside.items()
    values = [
        {"kind": kind, "removed": row.ratio, "perplexity": row.perplexity, "parameters": row.parameters}
        for kind, row in drawn
    ]
    chosen = alt.condition("comparison_kind == 'all' || datum.kind == comparison_kind", alt.value(1), alt.value(0.15))
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_line(point={"size": 60})
        .add_params(_choice("comparison_kind", "stress", ["all", *kinds], kind=alt.binding_select))
        .encode(
            alt.X("removed:Q", title=comparison.share_removed, axis=alt.Axis(format=".0%", tickCount=5)),
            alt.Y(
                "perplexity:Q",
                scale=alt.Scale(type="log", nice=False),
                title="perplexity, logarithmic",
                axis=alt.Axis(format="~s", tickCount=6),
            ),
            _colour("kind", kinds),
            opacity=chosen,
            tooltip=[
                alt.Tooltip("kind:N", title="recipe"),
                alt.Tooltip("removed:Q", format=".0%"),
                alt.Tooltip("perplexity:Q", format=",.2f"),
                alt.Tooltip("parameters:Q", format=","),
            ],
        )
    )
    table = [
        [
            comparison.title(row),
            percent(row.ratio),
            f"{row.parameters:,}",
            *map(_figure, (row.perplexity, row.relative)),
        ]
        for row in comparison.rows
    ]
    columns = ["recipe", "removed", "parameters", "perplexity", "times dense"]
    what = f"Lines of perplexity over the {comparison.share_removed}, one for every recipe."
    return Chart("comparison", "Perplexity by recipe and share removed", what, _spec(chart, 320), Rows(columns, table))


def percent(ratio: float) -> str:
    """A share as it was asked for: in percent, with as many digits as it has."""
    return f"{100 * ratio:.6g}%"


def _figure(figure: float | None) -> str:
    return "infinite" if figure is None else f"{figure:,.2f}"


def seconds_chart(comparison: ComparisonContent) -> Chart | None:
    """Seconds and peak memory of each result; None if no time was taken."""
    values: list[dict[str, Any]] = [
        {
            "result": f"{comparison.title(row)} {percent(row.ratio)}",
            "seconds": row.seconds,
            "peak": "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f} MiB",
        }
        for row in comparison.results
        if row.seconds is not None
    ]
    if not values:
        return None
    chart = _bars(values).encode(
        alt.X("seconds:Q", axis=alt.Axis(tickCount=5)),
        alt.Y("result:N", title=None, sort=None, axis=alt.Axis(labelLimit=150)),
        tooltip=["result:N", "seconds:Q", alt.Tooltip("peak:N", title="peak memory")],
    )
    table = [[value["result"], f"{value['seconds']:,}", value["peak"]] for value in values]
    what = "Bars of the seconds that each result took."
    return Chart(
        "seconds",
        "Time and memory",
        what,
        _spec(chart, 40 + 22 * len(values)),
        Rows(["result", "seconds", "peak memory"], table),
    )


def _bars(values: Sequence[Mapping[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.Data(values=values)).mark_bar()


def _spec(chart: alt.Chart | alt.LayerChart, height: int) -> dict[str, Any]:
    """As wide as its place in the page."""
    fit = alt.AutoSizeParams(type="fit", contains="padding")
    return chart.properties(width="container", height=height, autosize=fit).to_dict()


def _choice(name: str, title: str, options: Sequence[str], *, kind: Any = alt.binding_radio) -> alt.Parameter:
    """A parameter that the reader chooses; its name is unique in the page, as its form fields are grouped by it."""
    return alt.param(name, value=options[0], bind=kind(options=list(options), name=f"{title}: "))


def _colour(field: str, domain: Sequence[str]) -> alt.Color:
    legend = alt.Legend(orient="top", title=None, columns=2, labelLimit=300)
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=list(domain)), legend=legend)
