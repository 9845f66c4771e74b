"""`prunus eval` by files and keys, and the memory that commands which load a model may use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_folder import TEXT, fails, save_tiny_folder

from prunus.cli import main
from prunus.evaluation.eval_options import EvalOptions
from prunus.evaluation.job import EVALUATION
from prunus.evaluation.speed_options import SpeedOptions
from prunus.sweep.engine import ModelOptions


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model and a text."""
    place = tmp_path_factory.mktemp("evaluation")
    save_tiny_folder(place / "model", "llama", "gqa", num_hidden_layers=2, max_position_embeddings=96)
    (place / "one.txt").write_text(TEXT)
    return place


def facts(capsys, *words):
    assert main(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_field_of_every_option_class_is_a_key_with_a_meaning():
    classes = {"evaluation.": EvalOptions, "speed.": SpeedOptions, "run.": ModelOptions}
    expected = {"model", "compare"}
    expected |= {prefix + field.name for prefix, cls in classes.items() for field in dataclasses.fields(cls)}
    assert set(EVALUATION.keys) == expected
    assert all(key.meaning and key.allowed != "a value" for key in EVALUATION.keys.values())


def test_a_file_keys_and_options_say_the_same(capsys, place):
    options = ["--eval-text", place / "one.txt", "--seq-len", "32", "--windows", "2", "--prompt", "the"]
    by_options = facts(capsys, place / "model", *options)
    assert len(by_options["perplexities"]) == len(by_options["samples"]) == 1
    recipe = place / "eval.yaml"
    recipe.write_text(
        f"model: {place / 'model'}\nevaluation:\n  text: {place / 'one.txt'}\n  seq_len: 16\n  prompt: [the]\n"
    )
    settings = ["--set", "evaluation.seq_len=32", "--set", "evaluation.windows=2"]
    assert facts(capsys, "--recipe", recipe, *settings) == by_options
    earlier = ["--text", place / "one.txt", "--seq-len", "32", "--max-windows", "2", "--prompt", "the", "--samples"]
    assert facts(capsys, place / "model", *earlier) == by_options


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ("evaluation:\n  window: 2\n", "line 2: unknown key 'evaluation.window'; did you mean evaluation.windows?"),
        ("evaluation:\n  text: [[1]]\n", "line 2: evaluation.text is [[1]]; it must be a list, each text"),
        ("made_by: {prunus: '1'}\n", "line 1: unknown key 'made_by'"),
    ],
)
def test_what_is_wrong_with_a_file(capsys, tmp_path, recipe, named):
    path = tmp_path / "eval.yaml"
    path.write_text(recipe)
    assert named in fails(capsys, "eval", "m", "--recipe", path)


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "MODEL", "--prompt", "the"],
        ["bench", "MODEL", "MODEL", "--prompt-tokens", "8", "--new-tokens", "2"],
        ["export", "MODEL", "--to", "gguf", "--out", "OUT"],
    ],
    ids=" ".join,
)
def test_more_memory_than_is_allowed_is_refused_before_weights_are_read(capsys, place, tmp_path, words, monkeypatch):
    for module in ("sweep.engine", "evaluation.speed", "export.gguf_file"):
        monkeypatch.setattr(f"prunus.{module}.load_model", lambda *_, **__: pytest.fail("weights were read"))
    given = [{"MODEL": str(place / "model"), "OUT": str(tmp_path / "out.gguf")}.get(word, word) for word in words]
    assert "the smallest --max-memory that would do is" in fails(capsys, *given, "--max-memory", "1MB")
    assert not list(tmp_path.iterdir())
