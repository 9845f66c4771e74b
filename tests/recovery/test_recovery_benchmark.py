"""The benchmark measures the folders that the commands make."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
from tiny_recovery import SHORT

import prunus
from prunus.calibration.embedded import embedded_documents
from prunus.cli import main

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "recovery.py"


def test_rows_and_the_share_of_the_gap(pruned, dense, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("recovery_benchmark", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(embedded_documents()[-8:]), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    task = {"goal": "open a jar", "sol1": "turn the lid", "sol2": "sing", "label": 0}
    (tmp_path / "tasks" / "piqa.jsonl").write_text(json.dumps(task) + "\n")
    words = ["--model", dense, "--pruned", pruned, "--text", "default", "--eval-text", text, "--minutes", "1"]
    words += ["--eval-seq-len", "48", "--windows", "20", "--tasks", tmp_path / "tasks", "--out", tmp_path / "out"]
    more = [*SHORT[2:], "--max-steps", "30", "--learning-rate", "5e-3"]
    monkeypatch.setattr(sys, "argv", ["recovery.py", *map(str, words), "--", *more])
    # In this process: a new one would import everything again.
    monkeypatch.setattr(module, "command", lambda *words: main([str(word) for word in words]))
    module.main()
    result = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert set(result["rows"]) == {"dense", "pruned", "recovered"}
    for name, folder in (("dense", dense), ("pruned", pruned), ("recovered", tmp_path / "out" / "recovered")):
        model, tokenizer = prunus.load_model(folder)
        found = prunus.perplexity(model, tokenizer, text.read_text(), seq_len=48, max_windows=20, progress=False)
        assert result["rows"][name]["perplexity"] == pytest.approx(found.perplexity, rel=1e-6)
        assert result["rows"][name]["zero_shot"][0]["task"] == "piqa"
    logs = {name: math.log(row["perplexity"]) for name, row in result["rows"].items()}
    closed = (logs["pruned"] - logs["recovered"]) / (logs["pruned"] - logs["dense"])
    assert result["gap_closed"] == pytest.approx(closed)
    assert closed > 0.2
    assert f"{closed:.1%} of the gap" in " ".join(capsys.readouterr().out.split())
