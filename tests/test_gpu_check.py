"""The check for a GPU, on tiny models on the CPU: every part of it runs, and what it says fits together."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import torch
from forked import Ended, forked

ROOT = Path(__file__).parents[1]


def gpu_check(*words: str) -> Ended:
    """The program, as it is run from the command line."""

    def work() -> None:
        os.chdir(ROOT)
        sys.argv = ["benchmarks/gpu_check.py", *words]
        sys.path.insert(0, "benchmarks")
        runpy.run_path("benchmarks/gpu_check.py", run_name="__main__")

    return forked(work)


def test_small_on_a_cpu(tmp_path, monkeypatch):
    out = tmp_path / "report.json"
    ended = gpu_check("--device", "cpu", "--small", "--out", str(out))
    assert ended.status == 0, ended.err[-3000:]
    report = json.loads(out.read_text())
    rows = {(row["pass"], row["engine"]): row for row in report["methods"]}
    base = rows["forward+backward", "by hand"]
    assert {
        (name, engine) for name in ("taylor", "gate_fisher", "wanda") for engine in ("resident", "streamed")
    } <= set(rows)
    for row in rows.values():
        assert row["time_ratio"] == row["seconds"] / base["seconds"]
    assert [row["engine"] for row in report["large"]].count("streamed") == 2
    (recipe,) = report["recipe"]
    assert recipe["parameters_after"] < recipe["parameters_before"]
    assert recipe["seconds"] >= recipe["seconds_to_prune"] - 0.1
    assert [row["train"] for row in report["recovery"]] == ["full", "lora"]
    for row in report["recovery"]:
        assert row["tokens"] > 0
        assert row["before"] > 0
    assert "**recovery**" in ended.out
    # A device that is not there is refused before a model is made.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = gpu_check()
    assert refused.status == 2
    assert "--device cpu --small" in refused.err
