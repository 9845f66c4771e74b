"""Names that are not UTF-8: figures of a text of such a name are kept, and shown as text."""

from __future__ import annotations

import json
import os

from hostile_text import UNSEEN
from plain import PLAIN
from tiny_folder import run, save_tiny_folder


def test_an_evaluation_text_of_any_name_ends_in_the_card(capsys, tmp_path):
    model = save_tiny_folder(tmp_path / "model", "llama", "gqa")
    out = tmp_path / "small_[red]"
    quick = ["--ratio", "0.1", *PLAIN, "--method", "magnitude", "--set", "evaluation.held_out=0"]
    run(capsys, "prune", model, "--out", out, *quick)
    text = tmp_path / os.fsdecode(b"te\x1b[31mxt|# a\n.txt")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    said = run(capsys, "eval", out, "--text", text, "--seq-len", "32", "--windows", "2", "--update-card")
    assert UNSEEN.search(said.out + said.err) is None
    assert "te\\x1b[31mxt" in said.out
    kept = json.loads((out / "prunus" / "evaluation.json").read_text())
    assert [entry["text"] for entry in kept["perplexities"]] == [text.name]
    for name in ("README.md", "report.html"):
        assert UNSEEN.search((out / name).read_text(encoding="utf-8")) is None
