"""`prunus recover --dry-run`: steps and memory of the run, nothing written."""

from __future__ import annotations

import pytest
from tiny_folder import fails, run, run_json

pytest.importorskip("peft")
pytest.importorskip("accelerate")

TRAIN = ["--text", "default", "--seq-len", "16", "--set", "text.held_out=2", "--set", "recovery.batch_size=2"]


def test_what_training_will_take(capsys, tmp_path, folder):
    before = sorted(tmp_path.iterdir())
    words = ["recover", folder, "--teacher", folder, "--out", tmp_path / "out", *TRAIN, "--dry-run"]
    few = run_json(capsys, *words, "--max-steps", "20")
    many = run_json(capsys, *words, "--max-steps", "2000")
    assert [*few["stages"]] == ["loading", "measuring", "training", "saving"]
    assert 10 < many["stages"]["training"] / few["stages"]["training"] < 1000
    timed = run_json(capsys, *words, "--max-minutes", "0.001")
    assert timed["stages"]["training"] == pytest.approx(0.06)
    lora = run_json(capsys, *words, "--max-steps", "20", "--set", "recovery.train=lora")
    assert lora["disk_bytes"] < few["disk_bytes"]
    assert lora["removals"] == []
    assert "training" in run(capsys, *words, "--max-steps", "20").out
    assert "nowhere.txt" in fails(capsys, *("nowhere.txt" if word == "default" else word for word in words))
    assert sorted(tmp_path.iterdir()) == before
