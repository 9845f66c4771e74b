"""The benchmark of kinds of text on a tiny model: its figures are those of prune, and rows that are there stay."""

from __future__ import annotations

import json
import math
import sys

import pytest
from tiny_folder import TEXT

import prunus
from prunus.errors import OptionError
from prunus.pipeline.prune import prune
from prunus.recovery import RecoveryOptions, TextOptions, recover_checkpoint


@pytest.fixture
def kinds(benchmark):
    return benchmark("kinds")


def test_rows_and_table(kinds, folder, text, tmp_path, monkeypatch, capsys):
    documents = [f"{number}: {TEXT[200 * number : 200 * number + 150]}" for number in range(50)]
    lines = [json.dumps({"text": document}) for document in documents]
    (tmp_path / "web.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    words = [
        *("--model", folder, "--calibration", f"web={tmp_path / 'web.jsonl'}", "--kind", f"story={text}"),
        *("--kind", "code=python"),
        *("--samples", "8", "--seq-len", "24", "--eval-seq-len", "32", "--windows", "3", "--batch-size", "1"),
        *("--ratios", "0.2,0.4", "--seeds", "1", "--recipes", "fast", "fast,scoring.method=magnitude", "--out", out),
    ]
    monkeypatch.setattr(sys, "argv", ["kinds.py", *map(str, words)])
    kinds.main()
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [(row["recipe"], row["ratio"]) for row in rows] == [
        ("dense", 0.0),
        *(("fast", ratio) for ratio in (0.2, 0.4)),
        *(("fast,scoring.method=magnitude", ratio) for ratio in (0.2, 0.4)),
    ]

    # What recipes are calibrated on and what is measured on have no document in common.
    parts = [(out / f"web-{part}.jsonl").read_text().split("\n")[:-1] for part in ("calibration", "held-out")]
    assert parts == [lines[:40], lines[40:]]

    model, tokenizer = prunus.load_model(folder)
    drawn = prunus.load_calibration(str(out / "web-calibration.jsonl"), tokenizer, samples=8, seq_len=24, seed=1)
    smaller = prune(model, 0.4, drawn, prunus.Recipe.fast(), progress=False).model
    story = [
        prunus.perplexity(each, tokenizer, TEXT, seq_len=32, max_windows=3, progress=False).perplexity
        for each in (model, smaller)
    ]
    row, dense = rows[2], rows[0]["perplexity"]
    assert (dense["story"], row["perplexity"]["story"]) == pytest.approx(tuple(story), rel=1e-6)
    assert row["relative"]["story"] == pytest.approx(story[1] / story[0], rel=1e-6)
    ratios = [row["perplexity"][name] / dense[name] for name in ("web", "story", "code")]
    assert row["mean"] == pytest.approx(math.prod(ratios) ** (1 / 3))
    table = (out / "table.md").read_text()
    assert f"| fast | web | 40 % | 1 | {' | '.join(f'{ratio:,.2f}' for ratio in [*ratios, row['mean']])} |" in table

    # Rows that are there are not made again; those of another recipe are added.
    monkeypatch.setattr(sys, "argv", ["kinds.py", *map(str, words), "--recipes", "fast", "fast,repair.noise=0"])
    kinds.main()
    again = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert again[: len(rows)] == rows
    assert [row["recipe"] for row in again[len(rows) :]] == ["fast,repair.noise=0"] * 2
    assert again[-1]["perplexity"] != row["perplexity"]


def test_a_table_is_of_what_was_asked_for(kinds, folder, tmp_path, monkeypatch, capsys):
    """Rows of other sizes and lines that a kill cut short do not show, and documents may hold any end of a line."""
    documents = [f"{number}: {TEXT[100 * number : 100 * number + 90]}\u2028and so on" for number in range(40)]
    lines = [json.dumps({"text": document}, ensure_ascii=False) for document in documents]
    (tmp_path / "web.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = [
        *("kinds.py", "--model", folder, "--calibration", f"web={tmp_path / 'web.jsonl'}", "--out", tmp_path / "out"),
        *("--seq-len", "24", "--eval-seq-len", "32", "--windows", "3", "--ratios", "0.4", "--seeds", "1"),
        *("--recipes", "fast"),
    ]

    def table(samples: int, *more: str) -> str:
        monkeypatch.setattr(sys, "argv", [*map(str, words), "--samples", str(samples), *more])
        kinds.main()
        return capsys.readouterr().out

    first = table(8)
    assert len((tmp_path / "out" / "web-calibration.jsonl").read_text(encoding="utf-8").split("\n")) == 33
    assert table(4) != first
    rows = tmp_path / "out" / "rows.jsonl"
    before = rows.read_text()
    rows.write_text(before + before[:50])
    assert table(8) == first
    assert rows.read_text() == before
    for recipe in ("fast,calibration.samples=4", "fast,recovery.tokens=9", "fast,run.dtype=float32"):
        with pytest.raises(SystemExit, match="recipes differ in scoring, selection, repair, rounds, target; not in"):
            table(8, "--recipes", recipe)
    (tmp_path / "trained.yaml").write_text("recovery: {tokens: 1000}")
    with pytest.raises(SystemExit, match="its training is not done here"):
        table(8, "--recipes", str(tmp_path / "trained.yaml"))


def test_what_is_made_once_is_of_the_same_words(benchmark, tmp_path):
    made_once = benchmark("rows").made_once
    place = tmp_path / "model"
    assert made_once(place, ["prune", 0.2], place.mkdir)
    assert not made_once(place, ["prune", "0.2"], place.mkdir)
    with pytest.raises(SystemExit, match=r"was made by prune 0\.2, not by prune 0\.4"):
        made_once(place, ["prune", 0.4], place.mkdir)
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="made by something unknown"):
        made_once(tmp_path / "other", ["prune", 0.2], place.mkdir)


def test_a_model_is_trained_on_what_it_was_calibrated_on(kinds, folder, tmp_path, monkeypatch):
    """The row beside the pruned model's is that of `prunus recover` on the calibration part."""
    pytest.importorskip("peft")
    documents = [{"text": f"{number}: {TEXT[150 * number : 150 * number + 150]}"} for number in range(80)]
    (tmp_path / "web.jsonl").write_text("\n".join(map(json.dumps, documents)))
    out = tmp_path / "out"
    words = [
        *("--model", folder, "--calibration", f"web={tmp_path / 'web.jsonl'}", "--samples", "8", "--seq-len", "24"),
        *("--eval-seq-len", "32", "--windows", "3", "--batch-size", "1", "--ratios", "0.4", "--seeds", "1"),
        *("--recipes", "fast", "--recover", "5", "--out", out),
    ]
    monkeypatch.setattr(sys, "argv", ["kinds.py", *map(str, words)])
    kinds.main()
    _, pruned, trained = (json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines())
    assert (pruned["recipe"], trained["recipe"]) == ("fast", "fast, 5 steps of recovery")

    text = str(out / "web-calibration.jsonl")
    prunus.prune_checkpoint(
        str(folder),
        tmp_path / "pruned",
        ratio=0.4,
        recipe=prunus.Recipe.fast(),
        calibration=prunus.CalibrationOptions(source=(text,), samples=8, seq_len=24, seed=1),
        evaluation=prunus.EvaluationOptions(held_out=0),
    )
    assert prunus.Plan.load(tmp_path / "pruned" / "prunus" / "plan.json").fingerprint == pruned["plan"]
    texts, options = TextOptions(text, seq_len=24, seed=1), RecoveryOptions(max_steps=5)
    recover_checkpoint(
        str(tmp_path / "pruned"), tmp_path / "trained", texts, options, teacher=str(folder), progress=False
    )
    model, tokenizer = prunus.load_model(tmp_path / "trained")
    windows = prunus.load_calibration(str(out / "web-held-out.jsonl"), tokenizer, samples=3, seq_len=32)
    measured = prunus.perplexity_of_windows(model, windows.input_ids, progress=False).perplexity
    assert trained["perplexity"]["web"] == pytest.approx(measured, rel=1e-4)
    assert measured != pytest.approx(pruned["perplexity"]["web"], rel=1e-3)

    # A row that is missing beside one that is there is made.
    monkeypatch.setattr(sys, "argv", ["kinds.py", *map(str, words), "--recover", "2"])
    kinds.main()
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["recipe"] for row in rows[2:]] == ["fast, 5 steps of recovery", "fast, 2 steps of recovery"]
    monkeypatch.setattr(sys, "argv", ["kinds.py", *map(str, words), "--recover", "0"])
    with pytest.raises(OptionError, match="`max_steps` is 0"):
        kinds.main()
