"""The benchmark measures the folders that the commands make."""

from __future__ import annotations

import json
import math
import sys

import pytest
from tiny_recovery import SHORT

import prunus
from prunus.calibration.embedded import embedded_documents
from prunus.cli import main


def test_a_curve_is_found_again_and_marked_where_it_goes_on(benchmark):
    module = benchmark("recovery_curve")

    def closed(tokens):
        return 1 - (1 + tokens / 50_000) ** -0.3

    found = module.fit([(tokens, closed(tokens)) for tokens in (0, 20_000, 90_000, 400_000)])
    assert (found.b, found.c) == (pytest.approx(0.3, rel=0.02), pytest.approx(50_000, rel=0.05))
    assert found.points == 3
    assert found.at(1e8)["gap_closed"] == pytest.approx(closed(1e8), abs=0.01)
    assert [found.at(tokens)["extrapolation"] for tokens in (1e5, 400_000, 400_001)] == [False, False, True]
    worse = module.fit([(10, -0.2), (20, -0.1)])
    assert worse.closed(15) < 0
    assert module.fit([(0, 0.0), (10, 0.2), (10, 0.3)]) is None


def test_points_of_a_run(benchmark):
    module = benchmark("recovery_curve")
    facts = {
        "held_out_loss": {"before": 5.0, "dense": 3.0, "after": 4.0},
        "options": {"batch_size": 4},
        "text": {"seq_len": 25},
        "seconds": 120.0,
        "steps": 8,
        "tokens": 800,
        "history": [{"step": 2, "held_out_loss": 4.6}, {"step": 8, "held_out_loss": 4.0}],
    }
    assert module.points_of_run(facts) == [
        {"tokens": 200, "minutes": 0.5, "gap_closed": pytest.approx(0.2)},
        {"tokens": 800, "minutes": 2.0, "gap_closed": pytest.approx(0.5)},
    ]
    without_teacher = {**facts, "held_out_loss": {**facts["held_out_loss"], "dense": None}}
    assert module.points_of_run(without_teacher) == []


def test_rows_and_the_share_of_the_gap(benchmark, pruned, dense, tmp_path, monkeypatch, capsys):
    module = benchmark("recovery")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(embedded_documents()[-8:]), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    task = {"goal": "open a jar", "sol1": "turn the lid", "sol2": "sing", "label": 0}
    (tmp_path / "tasks" / "piqa.jsonl").write_text(json.dumps(task) + "\n")
    words = ["--model", dense, "--pruned", pruned, "--text", "default", "--eval-text", text, "--minutes", "1"]
    words += ["--eval-seq-len", "48", "--windows", "20", "--tasks", tmp_path / "tasks", "--out", tmp_path / "out"]
    words += ["--tokens", "1000", "1e8"]
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
    curve, facts = result["curve"], result["recovery"]
    assert curve["through"] == "points of one run, held-out sequences"
    assert [point["tokens"] for point in curve["logged"]["recovered"]] == [
        entry["step"] * 4 * 32 for entry in facts["history"]
    ]
    assert curve["logged"]["recovered"][-1]["gap_closed"] == pytest.approx(facts["gap_closed"], abs=0.02)
    assert [point["extrapolation"] for point in curve["at"]] == [False, True]
    assert f"{closed:.1%} of the gap" in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_was_pruned_by_another_ratio_is_not_used_again(benchmark, tmp_path, monkeypatch):
    module, asked = benchmark("recovery"), []

    class Enough(Exception):
        pass

    def command(*words):
        asked.append([str(word) for word in words])
        if words[0] == "recover":
            raise Enough
        folder = words[words.index("--out") + 1]
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(module, "command", command)
    monkeypatch.setattr(module, "locate", lambda name: name)
    for ratio in ("0.2", "0.4", "0.2"):
        words = ["--text", "default", "--eval-text", "default", "--ratio", ratio, "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["recovery.py", *words])
        with pytest.raises(Enough):
            module.main()
    assert [words[words.index("--ratio") + 1] for words in asked if words[0] == "prune"] == ["0.2", "0.4"]
    trained = [words[1] for words in asked if words[0] == "recover"]
    assert trained[0] == trained[2] != trained[1]


@pytest.mark.slow
def test_several_lengths_and_training_between_cuts(benchmark, pruned, dense, tmp_path, monkeypatch, capsys):
    module = benchmark("recovery")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(embedded_documents()[-8:]), encoding="utf-8")
    words = ["--model", dense, "--pruned", pruned, "--ratio", "0.25", "--text", "default", "--eval-text", text]
    words += ["--minutes", "0.02", "0.01", "--progressive", "--samples", "8", "--calibration-seq-len", "32"]
    words += ["--eval-seq-len", "48", "--windows", "5", "--out", tmp_path / "out", "--name", "many"]
    monkeypatch.setattr(sys, "argv", ["recovery.py", *map(str, words), "--", *SHORT[2:]])
    monkeypatch.setattr(module, "command", lambda *words: main([str(word) for word in words]))
    module.main()
    result = json.loads((tmp_path / "out" / "many.json").read_text())
    names = [f"{way}, {minutes} min" for minutes in ("0.01", "0.02") for way in ("recovered", "progressive")]
    assert [*result["rows"]] == ["dense", "pruned", *names]
    assert [run["name"] for run in result["runs"]] == names
    assert len(result["runs"][1]["recovery"]["rounds"]) == 2
    seconds = sum(each["seconds"] for each in result["runs"][1]["recovery"]["rounds"])
    assert 0 < seconds < 6
    assert result["recovery"] == result["runs"][2]["recovery"], "the longest in one shot"
    assert result["curve"]["through"] == "ends of runs, evaluation text"
    assert "extrapolation" in capsys.readouterr().out
