"""Text of kinds of work out of public sources: whole documents, and only those of the kind."""

from __future__ import annotations

import json
import sys

import pytest

LONG = "Once upon a time. " * 80


def written(benchmark, monkeypatch, kind, source, out):
    monkeypatch.setattr(sys, "argv", ["text_files.py", kind, str(source), str(out)])
    benchmark("text_files").main()
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def turns(*said, **more):
    return [{"from": who, "value": text, "language": "en", **more} for who, text in said]


def test_pages_of_the_documentation(benchmark, monkeypatch, tmp_path):
    for place in ("library/json.rst.txt", "tutorial/classes.rst.txt", "whatsnew/3.11.rst.txt", "license.rst.txt"):
        path = tmp_path / "_sources" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"page {place}", encoding="utf-8")
    rows = written(benchmark, monkeypatch, "docs", tmp_path / "_sources", tmp_path / "docs.jsonl")
    assert {row["text"] for row in rows} == {"page library/json.rst.txt", "page tutorial/classes.rst.txt"}


def test_tales_are_parted_and_their_lines_joined(benchmark, monkeypatch, tmp_path):
    first = f"A TALE\n\n\n{LONG}\nof\nold.\n\nIt went on.\n\n\nAnother scene."
    book = tmp_path / "book.txt"
    book.write_text(f"CONTENTS\n\n  A Tale\n\n\n\n\n{first}\n\n\n\n\n\nANOTHER TALE\n\n{LONG}\n", encoding="utf-8")
    rows = written(benchmark, monkeypatch, "stories", book, tmp_path / "stories.jsonl")
    whole = f"A TALE\n\n{LONG}of old.\n\nIt went on.\n\nAnother scene."
    assert {row["text"] for row in rows} == {whole, f"ANOTHER TALE\n\n{LONG}".strip()}


def test_conversations_are_english_and_whole(benchmark, monkeypatch, tmp_path):
    asked, answered = ("human", " Why? "), ("gpt", "Because.")
    conversations = {
        "kept": turns(asked, answered),
        "french": turns(asked, answered, language="fr"),
        "letters": turns(("human", "Warum für?"), answered),
        "unanswered": turns(asked, answered, asked),
        "backwards": turns(answered, asked),
        "empty turn": turns(asked, ("gpt", " ")),
        "empty": [],
    }
    for name, said in conversations.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"conversations": said}), encoding="utf-8")
    (tmp_path / "domains.json").write_text("{}")
    rows = written(benchmark, monkeypatch, "chat", tmp_path, tmp_path / "chat.jsonl")
    kept = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    assert rows == [{"conversations": kept}]


def test_a_source_without_such_text_is_refused(benchmark, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no text of the kind chat"):
        written(benchmark, monkeypatch, "chat", tmp_path, tmp_path / "chat.jsonl")
    assert not (tmp_path / "chat.jsonl").exists()
