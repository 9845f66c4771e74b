"""Charts as data: a Vega-Lite specification, and the same as a table for those who do not see or cannot run it.

Colours are not given here: the page takes them from the reader's light or dark mode. Choices (which axis, which plan)
are form fields that Vega binds, and so work by keyboard.

Source: https://vega.github.io/vega-lite/docs/
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import pandas as pd

from prunus.model.families import AXES
from prunus.selection.plan import Plan

__all__ = ["Chart", "Rows", "accuracy_chart", "comparison_chart", "keep_chart", "score_charts", "seconds_chart"]

#: axis → how a reader calls it
TITLES = {"attention": "attention groups", "mlp": "MLP channels"}
BINS = 50
#: the place of what a logarithmic scale has none for
AT_MOST_ZERO = "zero or less"
MEASURES = ("score", "importance")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


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
    for name, plan in plans.items():
        for layer_idx, (before, kept) in enumerate(zip(plan.widths, plan.layers, strict=True)):
            for axis in AXES:
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
            cells = [f"{len(kept[axis]):,} of {before[axis]:,}" for axis in AXES]
            rows.append([*([name] if len(plans) > 1 else []), str(layer_idx), *cells])
    params = [_choice("keep_axis", "show", ["both", *TITLES.values()])]
    if len(plans) > 1:
        params.append(_choice("keep_plan", "plan", list(plans), kind="select"))
    spec = {
        **_frame(260),
        "data": {"values": values},
        "params": params,
        "transform": [
            {"filter": "keep_axis == 'both' || datum.axis == keep_axis"},
            *([{"filter": "datum.plan == keep_plan"}] if len(plans) > 1 else []),
        ],
        "mark": {"type": "bar"},
        "encoding": {
            "x": {"field": "layer", "type": "ordinal", "title": "decoder layer", "axis": _LAYERS},
            "xOffset": {"field": "axis", "type": "nominal", "scale": {"domain": list(TITLES.values())}},
            "y": {
                "field": "share",
                "type": "quantitative",
                "title": "kept",
                "scale": {"domain": [0, 1]},
                "axis": {"format": ".0%"},
            },
            "color": _colour("axis", list(TITLES.values())),
            "tooltip": [
                {"field": "layer", "title": "layer"},
                {"field": "axis"},
                {"field": "share", "title": "kept", "format": ".1%"},
                {"field": "groups", "title": "groups"},
            ],
        },
    }
    columns = [*(["plan"] if len(plans) > 1 else []), "layer", *(f"{TITLES[axis]} kept" for axis in AXES)]
    what = "Bars of the share of attention groups and of MLP channels that stay, for every decoder layer."
    return Chart("keep", "What stays of each layer", what, spec, Rows(columns, rows))


def score_charts(table: pd.DataFrame, plan: Plan) -> list[Chart]:
    """How importances and scores are spread over all groups, kept and removed, and over the layers.

    Scales are logarithmic; groups of zero or less have a place of their own, before all others. After several rounds
    those of earlier ones stand there, see `prunus.rounds.carry_over`.

    Args:
        table: one row per group, see `prunus.selection.table`.
        plan: which of them stay.
    """
    kept = {(layer, axis, group) for layer, groups in enumerate(plan.layers) for axis in AXES for group in groups[axis]}
    places = zip(table["layer_idx"], table["group_type"], table["group_idx"], strict=True)
    table = table.assign(state=np.where([place in kept for place in places], "kept", "removed"))
    return [_histogram(table), _by_layer(table)]


def _histogram(table: pd.DataFrame) -> Chart:
    values: list[dict[str, Any]] = []
    rows = []
    for axis in AXES:
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
    spec = {
        **_frame(260),
        "data": {"values": values},
        "params": [
            _choice("spread_axis", "groups", list(reversed(TITLES.values()))),
            _choice("spread_measure", "quantity", ["score", "importance"]),
        ],
        "transform": [{"filter": "datum.axis == spread_axis && datum.measure == spread_measure"}],
        "mark": {"type": "bar"},
        "encoding": {
            "x": {
                "field": "place",
                "type": "ordinal",
                "sort": None,
                "scale": {"padding": 0},
                "title": "score or importance from here on, in equal ratios",
                "axis": {
                    "labelExpr": f"datum.label == '{AT_MOST_ZERO}' ? '≤ 0' : format(+datum.label, '.1e')",
                    "labelOverlap": True,
                    "labelAngle": 0,
                    "ticks": False,
                },
            },
            "y": {"field": "bottom", "type": "quantitative", "title": "groups"},
            "y2": {"field": "top"},
            "color": _colour("state", ["kept", "removed"]),
            "tooltip": [
                {"field": "state"},
                {"field": "groups", "format": ","},
                {"field": "low", "title": "from", "format": ".3e"},
                {"field": "high", "title": "to", "format": ".3e"},
            ],
        },
    }
    columns = ["groups of", "quantity", "", "number", "zero or less", "lowest", "quarter", "median", "three quarters"]
    what = "Histogram of the scores or importances of all groups, those that stay and those that were removed."
    return Chart("spread", "Importance and score of all groups", what, spec, Rows([*columns, "highest"], rows))


def _bins(axis: str, measure: str, groups: pd.DataFrame) -> list[dict[str, Any]]:
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


def _by_layer(table: pd.DataFrame) -> Chart:
    names = ("q5", "q25", "q50", "q75", "q95")
    values, rows, floors = [], [], {}
    for (axis, measure), of_axis in ((key, table[table["group_type"] == key[0]]) for key in product(AXES, MEASURES)):
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
    x = {"field": "layer", "type": "ordinal", "title": "decoder layer", "axis": _LAYERS}

    def y(field: str) -> dict[str, Any]:
        at_floor = f"datum.value <= ({json.dumps(floors)}[layer_axis + layer_measure] || 0)"
        label = f"{at_floor} ? '≤ 0' : format(datum.value, '.0e')"
        axis = {"labelExpr": label, "tickCount": 5}
        return {"field": f"y{field}", "type": "quantitative", "scale": {"type": "log"}, "title": "", "axis": axis}

    tooltip = [
        {"field": "layer"},
        *({"field": f"q{q * 100:g}", "title": f"{q:.0%} below", "format": ".3e"} for q in QUANTILES),
    ]
    spec = {
        **_frame(260),
        "data": {"values": values},
        "params": [
            _choice("layer_axis", "groups", list(reversed(TITLES.values()))),
            _choice("layer_measure", "quantity", ["score", "importance"]),
        ],
        "transform": [{"filter": "datum.axis == layer_axis && datum.measure == layer_measure"}],
        "encoding": {"x": x, "tooltip": tooltip},
        "layer": [
            {"mark": {"type": "rule"}, "encoding": {"y": y("q5"), "y2": {"field": "yq95"}}},
            {
                "mark": {"type": "bar", "width": {"band": 0.6}},
                "encoding": {"y": y("q25"), "y2": {"field": "yq75"}},
            },
            {"mark": {"type": "tick", "width": {"band": 0.8}, "thickness": 2}, "encoding": {"y": y("q50")}},
        ],
    }
    columns = ["layer", "groups of", *(f"{q:.0%} of scores below" for q in QUANTILES)]
    what = (
        "For every decoder layer the middle half of its groups as a bar, with the median, and nine tenths as a line; "
        "what is zero or less is drawn on the lower edge."
    )
    return Chart("layers", "Importance and score by layer", what, spec, Rows(columns, rows))


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
    spec = {
        **_frame(40 + 44 * len(rows)),
        "data": {"values": values},
        "mark": {"type": "bar"},
        "encoding": {
            "y": {"field": "task", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 140}},
            "yOffset": {"field": "model", "type": "nominal", "scale": {"domain": ["base model", "pruned"]}},
            "x": {
                "field": "accuracy",
                "type": "quantitative",
                "scale": {"domain": [0, 1]},
                "axis": {"format": ".0%", "tickCount": 5},
            },
            "color": _colour("model", ["base model", "pruned"]),
            "tooltip": [{"field": "task"}, {"field": "model"}, {"field": "accuracy", "format": ".1%"}],
        },
    }
    cells = [[task, "" if before is None else f"{before:.1%}", f"{after:.1%}"] for task, before, after in rows]
    what = "Bars of the accuracy of the base model and of the pruned one on every task."
    return Chart("accuracy", "Accuracy", what, spec, Rows(["task", "base model", "pruned"], cells))


def comparison_chart(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Perplexity over the removed share, a line per recipe.

    Args:
        rows: as comparison.json has them, the dense model's among them.
    """
    dense = next(row for row in rows if row_name(row) == "dense")
    others = [row for row in rows if row_name(row) != "dense"]
    kinds = list(dict.fromkeys(row_name(row) for row in others))
    values = [
        {
            "kind": row_name(row),
            "removed": row["ratio"],
            "perplexity": row["perplexity"],
            "parameters": row["parameters"],
        }
        for row in others
        if row["perplexity"] is not None  # infinite ones are null in JSON
    ]
    values += [{"kind": kind, "removed": 0, **_figures(dense)} for kind in kinds]
    spec = {
        **_frame(320),
        "data": {"values": values},
        "params": [_choice("comparison_kind", "stress", ["all", *kinds], kind="select")],
        "mark": {"type": "line", "point": {"size": 60}},
        "encoding": {
            "x": {
                "field": "removed",
                "type": "quantitative",
                "title": "parameters removed",
                "axis": {"format": ".0%", "tickCount": 5},
            },
            "y": {
                "field": "perplexity",
                "type": "quantitative",
                "scale": {"type": "log", "nice": False},
                "title": "perplexity, logarithmic",
                "axis": {"format": "~s", "tickCount": 6},
            },
            "color": _colour("kind", kinds),
            "opacity": {
                "condition": {"test": "comparison_kind == 'all' || datum.kind == comparison_kind", "value": 1},
                "value": 0.15,
            },
            "tooltip": [
                {"field": "kind", "title": "recipe"},
                {"field": "removed", "format": ".0%"},
                {"field": "perplexity", "format": ",.2f"},
                {"field": "parameters", "format": ","},
            ],
        },
    }
    table = [[row_name(row), f"{row['ratio']:.0%}", *_cells(row)] for row in rows]
    columns = ["recipe", "removed", "parameters", "perplexity", "times dense"]
    what = "Lines of perplexity over the share of parameters removed, one for every recipe."
    return Chart("comparison", "Perplexity by recipe and share removed", what, spec, Rows(columns, table))


def row_name(row: Mapping[str, Any]) -> str:
    """What a row of a comparison is called; those of prunus 0.1 have a method, and whether it was repaired."""
    if row.get("recipe") is not None:
        return str(row["recipe"])
    return f"{row['method']}, compensated" if row.get("compensated") else str(row["method"])


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("perplexity", "parameters")}


def _cells(row: Mapping[str, Any]) -> list[str]:
    figures = (row["perplexity"], row["relative"])
    return [f"{row['parameters']:,}", *("infinite" if figure is None else f"{figure:,.2f}" for figure in figures)]


def seconds_chart(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Seconds and peak memory of each result; None if no time was taken."""
    timed = [row for row in rows if row.get("seconds") is not None]
    if not timed:
        return None
    values = [
        {
            "result": f"{row_name(row)} {row['ratio']:.0%}",
            "seconds": row["seconds"],
            "peak": "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB",
        }
        for row in timed
    ]
    spec = {
        **_frame(40 + 22 * len(values)),
        "data": {"values": values},
        "mark": {"type": "bar"},
        "encoding": {
            "y": {"field": "result", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 150}},
            "x": {"field": "seconds", "type": "quantitative", "axis": {"tickCount": 5}},
            "tooltip": [{"field": "result"}, {"field": "seconds"}, {"field": "peak", "title": "peak memory"}],
        },
    }
    table = [[value["result"], f"{value['seconds']:,}", value["peak"]] for value in values]
    what = "Bars of the seconds that each result took."
    return Chart("seconds", "Time and memory", what, spec, Rows(["result", "seconds", "peak memory"], table))


_LAYERS = {"labelOverlap": True, "labelAngle": 0}


def _frame(height: int) -> dict[str, Any]:
    """As wide as its place in the page."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
    }


def _choice(name: str, title: str, options: Sequence[str], *, kind: str = "radio") -> dict[str, Any]:
    """A parameter that the reader chooses; its name is unique in the page, as its form fields are grouped by it."""
    return {
        "name": name,
        "value": options[0],
        "bind": {"input": kind, "options": list(options), "name": f"{title}: "},
    }


def _colour(field: str, domain: Sequence[str]) -> dict[str, Any]:
    return {
        "field": field,
        "type": "nominal",
        "scale": {"domain": list(domain)},
        "legend": {"orient": "top", "title": None, "columns": 2, "labelLimit": 300},
    }
