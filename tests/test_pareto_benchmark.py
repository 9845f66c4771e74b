"""The comparison of pruned and quantised files: what its table and picture make of rows that were measured."""

from __future__ import annotations

import math

import pytest


@pytest.fixture
def pareto(benchmark):
    return benchmark("pareto")


def row(model, kind, megabytes, losses, prefill, decode):
    speeds = {
        name: {"ratio": ratio, "tokens_per_second": 100 * ratio}
        for name, ratio in (("prefill", prefill), ("decode", decode))
    }
    perplexity = math.exp(sum(losses) / len(losses))
    return {
        "model": model,
        "type": kind,
        "bytes": megabytes * 10**6,
        "losses": losses,
        "perplexity": perplexity,
        **speeds,
    }


ROWS = [
    row("dense", "F16", 200, [3.0, 3.2], 1.0, 1.0),
    # smaller and faster to decode than the pruned model below, and better; slower in prefill
    row("dense", "Q8_0", 100, [3.0, 3.3], 0.9, 1.8),
    row("20 % removed", "F16", 160, [3.5, 3.5], 1.2, 1.2),
    row("20 % removed, recovered", "Q8_0", 80, [3.4, 3.2], 1.1, 2.0),
]


def test_a_row_is_unbeaten_where_no_better_model_is_as_small_or_as_fast(pareto):
    unbeaten = {(row["model"], row["type"]): row["unbeaten"] for row in pareto.compared(ROWS)}
    assert unbeaten == {
        ("dense", "F16"): ["size", "prefill", "decode"],
        ("dense", "Q8_0"): ["size", "decode"],
        ("20 % removed", "F16"): ["prefill"],
        ("20 % removed, recovered", "Q8_0"): ["size", "prefill", "decode"],
    }


def test_the_table_has_multiples_and_the_error_of_paired_windows(pareto):
    line = next(line for line in pareto.table(ROWS).splitlines() if "recovered" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # differences of the windows: 0.4 and 0.0, mean 0.2, standard error 0.2
    assert cells[3:] == ["80.00", f"{math.exp(3.3):.2f}", f"{math.exp(0.2):.2f}", "20.00", "1.10", "2.00"]


def test_the_picture_has_a_mark_for_each_treatment_and_label_for_each_row(pareto):
    svg = pareto.picture(ROWS)
    assert svg.startswith("<svg")
    for word in ("recovered", "pruned", "Q8_0", "20 %", "prefill", "file, MB"):
        assert f">{word}" in svg
