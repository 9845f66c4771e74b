"""`prunus eval` as a user types it: what it prints, and what it keeps in a result folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from plain import plain_recipe, plain_scoring
from test_zero_shot import RECORDS
from tiny_folder import TEXT, save_tiny_folder

import prunus
from prunus.cli import main
from prunus.evaluation.memory import PeakMemory
from prunus.evaluation.zero_shot import load_task, zero_shot
from prunus.pipeline.options import EvaluationOptions


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A dense model, a pruned one, two texts and a folder of tasks."""
    place = tmp_path_factory.mktemp("evaluation")
    save_tiny_folder(place / "dense", "llama", "gqa", num_hidden_layers=3, max_position_embeddings=96)
    (place / "one.txt").write_text(TEXT)
    (place / "two.txt").write_text(TEXT[::-1])
    (place / "tasks").mkdir()
    for name, records in RECORDS.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (place / "tasks" / f"{name}_test.jsonl").write_text(lines)
    prunus.prune_checkpoint(
        str(place / "dense"),
        place / "small",
        0.2,
        plain_recipe(plain_scoring(method="magnitude")),
        evaluation=EvaluationOptions(held_out=0),
        progress=False,
    )
    return place


def run(capsys, *words) -> str:
    words = [str(word) for word in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prunus", *words])  # what is kept is what was typed
        status = main()
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def test_everything_beside_the_dense_model_and_in_the_card(capsys, place, monkeypatch):
    # Each peak takes a process of its own, and that seconds to start; test_speed.py measures some.
    monkeypatch.setattr("prunus.evaluation.speed.peak_memory", lambda *_, **__: PeakMemory(2**30, 2**29))
    small = place / "small"
    assert "## Evaluation" not in (small / "README.md").read_text()
    short = ["--windows", "2", "--json", "--seq-len"]
    words = ["eval", small, "--compare", place / "dense", "--text", place / "one.txt", place / "two.txt", *short, "32"]
    more = [
        "--tasks",
        place / "tasks",
        "--items",
        "2",
        "--generate",
        "--speed",
        "--set",
        "speed.prompt_tokens=8",
        "--set",
        "speed.new_tokens=4",
    ]
    facts = json.loads(run(capsys, *words, *more, "--set", "speed.repeats=1", "--update-card"))

    model, tokenizer = prunus.load_model(small)
    dense, _ = prunus.load_model(place / "dense")
    for name, record, live in (("small", facts, model), ("dense", facts["dense"], dense)):
        assert (record["model"], record["parameters"]) == (name, live.num_parameters())
        assert [entry["text"] for entry in record["perplexities"]] == ["one.txt", "two.txt"]
        for entry, text in zip(record["perplexities"], (TEXT, TEXT[::-1]), strict=True):
            again = prunus.perplexity(live, tokenizer, text, seq_len=32, max_windows=2, progress=False)
            assert entry["perplexity"] == again.perplexity
        tasks = [load_task(place / "tasks" / f"{entry['task']}_test.jsonl") for entry in record["zero_shot"]]
        results = [zero_shot(live, tokenizer, task, limit=2, batch_size=1, progress=False) for task in tasks]
        assert record["zero_shot"] == [result.to_dict() for result in results]
        assert len(tasks) == len(RECORDS)
        assert len(record["samples"]) == 4
    assert facts["perplexity"] == facts["perplexities"][0]["perplexity"]
    assert [one["model"] for one in facts["speed"]["results"]] == ["dense", "small"]

    card = ModelCard.load(small / "README.md")
    values = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert values["two.txt", "perplexity of the base model"] == facts["dense"]["perplexities"][1]["perplexity"]
    for entry in facts["zero_shot"]:
        assert values[entry["task"], "acc"] == entry["accuracy"]
        if entry["task"] != "winogrande":
            assert values[entry["task"], "acc_norm"] == entry["accuracy_norm"]
    assert ("winogrande", "acc_norm") not in values
    assert card.data.metrics == ["accuracy", "perplexity"]
    assert "tokens/s" in card.text
    report = (small / "report.html").read_text()
    assert "Speed and memory" in report
    assert "prunus eval small --compare dense --text one.txt two.txt" in report

    # A second evaluation of one text replaces its figures; the others stay.
    again = json.loads(run(capsys, "eval", small, "--text", place / "one.txt", *short, "16", "--update-card"))
    kept = json.loads((small / "prunus" / "evaluation.json").read_text())
    figures = {entry["text"]: entry["perplexity"] for entry in kept["perplexities"]}
    assert figures == {"one.txt": again["perplexity"], "two.txt": facts["perplexities"][1]["perplexity"]}
    assert [entry["text"] for entry in kept["dense"]["perplexities"]] == ["two.txt"]
    assert kept["zero_shot"] == facts["zero_shot"]
    assert kept["speed"] == facts["speed"]
    assert len(kept["commands"]) == 2

    # What is compared with is on the card only if it is what the model was cut from.
    beside = [place / "other", "--text", place / "one.txt", *short, "16", "--update-card"]
    shutil.copytree(place / "dense", place / "other")
    run(capsys, "eval", small, "--compare", *beside)
    card = ModelCard.load(small / "README.md")
    (row,) = [line for line in card.text.splitlines() if line.startswith("| one.txt |")]
    assert row.split("|")[3].strip() in ("", "–", "-", "not measured")
    kept = json.loads((small / "prunus" / "evaluation.json").read_text())
    assert [entry["text"] for entry in kept["others"]["other"]["perplexities"]] == ["one.txt"]
    assert [entry["text"] for entry in kept["dense"]["perplexities"]] == ["two.txt"], "not measured again, so not lost"
    values = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert values["two.txt", "perplexity of the base model"] == facts["dense"]["perplexities"][1]["perplexity"]
    assert ("one.txt", "perplexity of the base model") not in values, "measured again, alone and by other windows"


def test_a_table_for_people(capsys, place):
    words = ["eval", place / "dense", "--tasks", place / "tasks" / "piqa_test.jsonl", "--prompt", "[b]Hi[/i]"]
    shown = run(capsys, *words)
    assert "piqa acc, 2 items" in shown
    assert "[b]Hi[/i]" in shown  # no markup
    assert "perplexity" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--update-card"], "is no result of `prunus prune` or `prunus apply`"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--tasks", "missing"], "cannot read the task file missing: there is no such file or folder"),
        (["--items", "0"], "items is 0"),
        (["--compare", "missing"], "missing"),
        (["--speed", "--set", "speed.repeats=0"], "--set speed.repeats is 0"),
    ],
)
def test_wrong_values_are_named(capsys, place, words, message):
    assert main(["eval", str(place / "dense"), *words]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_speed_without_memory_loads_no_model_again(capsys, place, monkeypatch):
    monkeypatch.setattr("prunus.evaluation.speed.peak_memory", lambda *args, **options: pytest.fail("loaded again"))
    short = ("prompt_tokens=4", "new_tokens=2", "repeats=1", "memory=false")
    settings = [word for setting in short for word in ("--set", f"speed.{setting}")]
    facts = json.loads(run(capsys, "eval", str(place / "small"), "--json", "--speed", *settings))
    assert [one["memory"] for one in facts["speed"]["results"]] == [None]
