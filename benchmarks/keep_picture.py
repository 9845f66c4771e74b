"""Draw what stays of every layer under some plans, as an SVG for a README.

    python benchmarks/keep_picture.py "20 % removed=plan-20.json" "40 % removed=plan-40.json" --out docs/kept.svg

The chart is the report's own (`prunus.report.charts.keep_chart`), without its choices and one below the other; its
ground is white, so that it can be read on a dark page too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vl_convert

from prunus.report.charts import keep_chart
from prunus.selection.plan import Plan

#: the report's colours of its light page
CONFIG = {
    "background": "white",
    "padding": 14,
    "font": "Arial, Helvetica, sans-serif",
    "axis": {"labelColor": "#56606a", "titleColor": "#56606a", "titleFontWeight": "normal", "gridColor": "#e3e7eb"},
    "legend": {"labelColor": "#1a1f24", "labelFontSize": 12},
    "title": {"color": "#1a1f24", "fontSize": 13, "anchor": "start"},
    "view": {"stroke": None},
    "range": {"category": ["#0072b2", "#d55e00"]},
}
WIDTH, HEIGHT = 760, 120


def picture(plans: dict[str, Plan]) -> str:
    """The chart as SVG.

    Args:
        plans: by the title that stands above each.
    """
    spec = keep_chart(plans).spec
    encoding: dict[str, Any] = dict(spec["encoding"])
    # A report is read with the mouse as well.
    del encoding["tooltip"]
    encoding["y"] = {**encoding["y"], "axis": {"format": ".0%", "tickCount": 3}}

    def row(name: str, last: bool) -> dict[str, Any]:
        x = {**encoding["x"], "title": encoding["x"]["title"] if last else None}
        return {
            "title": name,
            "width": WIDTH,
            "height": HEIGHT,
            "transform": [{"filter": {"field": "plan", "equal": name}}],
            "mark": spec["mark"],
            "encoding": {**encoding, "x": x},
        }

    names = list(plans)
    drawn = {
        "$schema": spec["$schema"],
        "config": CONFIG,
        "data": spec["data"],
        "vconcat": [row(name, name == names[-1]) for name in names],
        "spacing": 12,
    }
    return vl_convert.vegalite_to_svg(drawn)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", metavar="TITLE=PLAN", help="a title, and the plan.json below it")
    parser.add_argument("--out", type=Path, required=True, help="the SVG to write")
    args = parser.parse_args(argv)
    titled = [word.partition("=") for word in args.plans]
    args.out.write_text(picture({title: Plan.load(path) for title, _, path in titled}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
