"""Task files out of LLM-Adapters' test items: read by `prunus eval` as the questions that they were."""

from __future__ import annotations

import json
import sys

from prunus.evaluation.zero_shot import load_tasks

ARC = "An astronomer sees a planet turn faster. What follows?"
STEM = "The best way to save money is to"
SITUATION = "Tracy didn't go home that evening."


def asked(question, choices, right, names=None):
    listed = " ".join(f"Answer{number}: {choice}" for number, choice in enumerate(choices, 1))
    names = names or "/".join(f"answer{number}" for number in range(1, len(choices) + 1))
    instruction = f"Please choose the correct answer to the question: {question}\n\n{listed}\n\nAnswer format: {names}"
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {right}", "answer": right}


ROWS = {
    "ARC-Challenge": [
        asked(ARC, ["Years grow longer.", "Days grow shorter.", "It is heavier."], "answer2"),
        asked(ARC, ["one of five", "two", "three", "four", "five"], "answer5"),
        # What cannot be taken apart: an answer that nobody offered, a choice with the mark of a choice in it, and none.
        asked(ARC, ["yes", "no"], "answer3"),
        asked(ARC, ["yes", "no, Answer1: yes"], "answer1"),
        asked(ARC, ["yes", ""], "answer1"),
    ],
    "openbookqa": [asked(STEM, ["call more", "eat at home", "buy", "sell"], "answer1")],
    "social_i_qa": [
        asked(f"{SITUATION} What does Tracy need before this?", ["a new plan", "to see Riley", "a place"], "answer3"),
        asked("What does Tracy need before this?", ["no", "situation", "here"], "answer1"),
    ],
}


def test_what_is_read_is_what_was_asked(benchmark, tmp_path, monkeypatch, capsys):
    for folder, rows in ROWS.items():
        (tmp_path / "clone" / "dataset" / folder).mkdir(parents=True)
        (tmp_path / "clone" / "dataset" / folder / "test.json").write_text(json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["task_files.py", str(tmp_path / "clone"), "--out", str(tmp_path / "zeroshot")])
    benchmark("task_files").main()
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "arc_challenge: 2 items, 3 left out",
        "openbookqa: 1 items, 0 left out",
        "social_iqa: 1 items, 1 left out",
    ]
    tasks = {task.name: task.items for task in load_tasks([tmp_path / "zeroshot"])}
    assert {name: [item.gold for item in items] for name, items in tasks.items()} == {
        "arc_challenge": [1, 4],
        "openbookqa": [0],
        "social_iqa": [2],
    }
    shown = {name: [pair for item in items for pair in item.choices] for name, items in tasks.items()}
    assert shown["arc_challenge"][:3] == [
        (f"Question: {ARC}\nAnswer:", f" {choice}")
        for choice in ("Years grow longer.", "Days grow shorter.", "It is heavier.")
    ]
    assert [len(item.choices) for item in tasks["arc_challenge"]] == [3, 5]
    assert shown["openbookqa"] == [(STEM, f" {choice}") for choice in ("call more", "eat at home", "buy", "sell")]
    # The situation stands in front of the question in LLM-Adapters, and apart from it in the data set.
    asked_of_tracy = f"Q: {SITUATION} What does Tracy need before this?\nA:"
    assert shown["social_iqa"] == [
        (asked_of_tracy, f" {choice}") for choice in ("a new plan", "to see Riley", "a place")
    ]
