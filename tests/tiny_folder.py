"""A tiny model folder and text, and commands on them as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_families import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prunus.cli import main

TEXT = "".join(f"Line {i}: the quick brown fox jumps over the lazy dog, {i * i} times.\n" for i in range(400))
#: calibration sequences of that text
SIZES = ["--samples", "6", "--seq-len", "24"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, `<pad>` and `<eos>`: 258 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def save_tiny_folder(path: Path, model_type: str, variant: str | None = None, **fields: Any) -> Path:
    """A model of a family, see `make_model`, with the byte tokenizer."""
    make_model(model_type, variant, vocab_size=260, **fields).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def run(capsys: Any, *words: object) -> Any:
    """What a command prints, `out` and `err`; it must succeed."""
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured


def run_json(capsys: Any, *words: object) -> Any:
    """What a command with `--json` prints."""
    return json.loads(run(capsys, *words, "--json").out)


def fails(capsys: Any, *words: object) -> str:
    """The message of a command that must fail with one line."""
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert status == 1
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err
