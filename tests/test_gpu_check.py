"""The check for a GPU, on tiny models on the CPU: every part of it runs, and what it says fits together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def test_small_on_a_cpu(tmp_path):
    out = tmp_path / "report.json"
    words = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
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
    assert "**recovery**" in done.stdout
    # A device that is not there is refused before a model is made.
    refused = subprocess.run(
        words[:2],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert refused.returncode == 2
    assert "--device cpu --small" in refused.stderr
