"""The picture of the README is what the command makes of the committed plans."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.keep_picture import main
from prunus.model.families import AXES
from prunus.selection.plan import Plan

ROOT = Path(__file__).parents[2]
PLANS = {
    f"{percent} % removed": ROOT / f"benchmarks/results/default-recipe/plan-{percent}.json" for percent in (20, 40)
}


def bars(svg: str) -> list[tuple[int, str, int]]:
    """Layer, axis and share in percent of every bar, as the picture says them to those who do not see it."""
    labels = [element.get("aria-label", "") for element in ElementTree.fromstring(svg).iter()]
    found = [re.fullmatch(r"(?:decoder )?layer: (\d+); kept: (\d+)%; axis: (.*)", label) for label in labels]
    return [(int(bar[1]), bar[3], int(bar[2])) for bar in found if bar]


def test_the_picture_shows_the_plans(tmp_path):
    main([*(f"{title}={path}" for title, path in PLANS.items()), "--out", str(tmp_path / "kept.svg")])
    drawn, committed = (
        path.read_text(encoding="utf-8") for path in (tmp_path / "kept.svg", ROOT / "docs" / "kept.svg")
    )
    names = {"attention": "attention groups", "mlp": "MLP channels"}
    expected = [
        (layer_idx, names[axis], round(100 * len(kept[axis]) / before[axis]))
        for plan in map(Plan.load, PLANS.values())
        for layer_idx, (before, kept) in enumerate(zip(plan.widths, plan.layers, strict=True))
        for axis in AXES
    ]
    assert sorted(bars(drawn)) == sorted(expected)
    assert sorted(bars(committed)) == sorted(expected), "docs/kept.svg is of other plans: run `make picture`"
    assert all(title in committed for title in PLANS)
