"""The picture of a comparison: quality over the removed share, and what each method costs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

__all__ = ["DENSE", "plot_comparison"]

#: the method of the row of the model before the cut
DENSE = "dense"


def plot_comparison(comparison: pd.DataFrame, path: str | Path) -> None:
    """Draw perplexity over the removed share, and the time and peak memory of each method.

    Args:
        comparison: what `compare` returns.
        path: the PNG to write.
    """
    methods = [name for name in comparison["method"].unique() if name != DENSE]
    dense = float(comparison.loc[comparison["method"] == DENSE, "perplexity"].iloc[0])
    # Here, so that other commands do not wait for it. Figure without pyplot: no global state, no need for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    curve, time, memory = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    for (name, compensated), rows in comparison[comparison["method"] != DENSE].groupby(
        ["method", "compensated"], sort=False
    ):
        rows = rows.sort_values("ratio")
        curve.plot(
            [0.0, *rows["ratio"] * 100],
            [dense, *rows["perplexity"]],
            marker="o",
            linestyle="--" if compensated else "-",
            color=f"C{methods.index(name)}",
            label=f"{name}, compensated" if compensated else name,
        )
    curve.axhline(dense, color="grey", linewidth=1, linestyle=":")
    curve.set(yscale="log", xlabel="removed (%)", ylabel="perplexity", title="Quality")
    curve.legend()
    firsts = comparison[comparison["method"] != DENSE].drop_duplicates("method")
    time.barh(firsts["method"], firsts["seconds"].fillna(0))
    time.set(xlabel="seconds", title="Time to score")
    memory.barh(firsts["method"], firsts["peak_bytes"].fillna(0) / 2**30)
    memory.set(xlabel="GiB", title="Peak memory while scoring")
    for axes in (time, memory):
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)
