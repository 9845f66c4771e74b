"""A tiny dense model that has learned something, the same pruned, and commands on them."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_families import make_model
from tiny_recovery import ALONE, SHORT, chat_tokenizer, last_wins

from prunus.cli import main


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    """A Llama of three layers, trained by `prunus recover` itself on the text alone, from random weights."""
    place = tmp_path_factory.mktemp("models")
    make_model("llama", "gqa", num_hidden_layers=3, vocab_size=260).save_pretrained(place / "random")
    chat_tokenizer().save_pretrained(place / "random")
    learn = ["--train", "full", *ALONE, "--learning-rate", "1e-2", "--max-steps", "150"]
    learn += ["--set", "recovery.checkpoints=1"]
    assert main(["recover", str(place / "random"), "--out", str(place / "dense"), *SHORT, *learn]) == 0
    gc.freeze()  # training loads further libraries, and looks for garbage after each run
    return place / "dense"


@pytest.fixture(scope="session")
def pruned(dense) -> Path:
    """The dense model without a quarter of its parameters, its layers of unequal widths."""
    place = dense.with_name("pruned")
    sizes = ["--calibration", "default", "--samples", "8", "--seq-len", "32", "--set", "evaluation.held_out=0"]
    plain = ["--method", "taylor", "--set", "repair=null", "--rounds", "1", "--ratio", "0.25"]
    assert main(["prune", str(dense), "--out", str(place), *sizes, *plain]) == 0
    return place


@pytest.fixture
def recover(capsys) -> Callable[..., Any]:
    """`recover(folder, "--out", …)`: what the command says with --json; it must succeed."""

    def run(*words: Any) -> Any:
        capsys.readouterr()
        status = main(["recover", *last_wins(words), "--json"])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return json.loads(captured.out)

    return run


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """`refused(folder, "--out", …)`: the message of a command that must fail with one line."""

    def run(*words: Any) -> str:
        capsys.readouterr()
        status = main(["recover", *last_wins(words)])
        captured = capsys.readouterr()
        assert status == 1, captured.err
        assert captured.out == ""
        assert "Traceback" not in captured.err
        return captured.err

    return run
