"""The quality benchmark on a tiny model: its rows are those of prune, and parts that are there are not made again."""

from __future__ import annotations

import json
import sys

import pytest
from tiny_folder import TEXT

import prunus


@pytest.fixture
def quality(benchmark):
    return benchmark("quality")


@pytest.mark.slow
def test_parts_and_table(quality, folder, text, tmp_path, monkeypatch, capsys):
    calibration, out = tmp_path / "calibration.txt", tmp_path / "out"
    calibration.write_text(TEXT.replace("fox", "cat"), encoding="utf-8")
    task = {"goal": "open a jar", "sol1": "turn the lid", "sol2": "sing", "label": 0}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "piqa.jsonl").write_text(json.dumps(task) + "\n")
    words = [
        *("--model", folder, "--calibration", calibration, "--text", text, "--tasks", tmp_path / "tasks"),
        *("--samples", "8", "--seq-len", "24", "--eval-seq-len", "32", "--windows", "3", "--ratios", "0.2"),
        *("--seeds", "0,1", "--parts", "default", "tasks", "methods", "--out", out),
    ]
    monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, words)])
    quality.main()
    rows = {name: json.loads((out / name / "comparison.json").read_text())["rows"] for name in ("default", "tasks")}
    assert [(row["recipe"], row["seed"]) for row in rows["default"]] == [
        (name, seed) for seed in (0, 1) for name in ("dense", "default recipe", "taylor")
    ]
    assert {row["piqa"] for row in rows["tasks"]} <= {0.0, 1.0}

    model, tokenizer = prunus.load_model(folder)
    sources = [str(calibration), "self"]
    drawn = prunus.load_calibration(sources, tokenizer, samples=8, seq_len=24, seed=1, model=model, progress=False)
    for name, recipe in (("default recipe", prunus.Recipe()), ("taylor", prunus.Recipe.original())):
        result = prunus.prune(model, 0.2, drawn, recipe, batch_size=2, progress=False)
        expected = prunus.perplexity(result.model, tokenizer, TEXT, seq_len=32, max_windows=3, progress=False)
        row = next(row for row in rows["default"] if (row["recipe"], row["seed"]) == (name, 1))
        assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)

    table = (out / "table.md").read_text()
    assert f"| default | taylor | 1 | {row['relative']:,.2f} |" in table
    assert capsys.readouterr().out == table
    # Parts that are complete stay as they are.
    times = {path: path.stat().st_mtime_ns for path in out.rglob("comparison.json")}
    quality.main()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("comparison.json")} == times
