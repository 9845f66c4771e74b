"""Folders whose tokenizer is a SentencePiece model alone, as Llama 2's."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tiny_families import make_model
from tiny_folder import TEXT

from prunus.checkpoint import load_model
from prunus.errors import CheckpointError


@pytest.fixture(scope="module")
def trained() -> bytes:
    """A byte-pair model with bytes for what it does not know, trained as Llama 2's was."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()[:200]),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    make_model("llama", vocab_size=340).save_pretrained(tmp_path)
    fields = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    return tmp_path


def test_the_tokens_are_those_of_sentencepiece(folder, trained):
    (folder / "tokenizer.model").write_bytes(trained)
    _, tokenizer = load_model(folder)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=trained)
    for text in ("the quick brown fox", "Line 12: jumps over the lazy dog, 144 times.", "ünïcode 猫"):
        assert tokenizer(text, add_special_tokens=False).input_ids == oracle.encode(text)


def test_a_damaged_model(folder, trained):
    (folder / "tokenizer.model").write_bytes(trained[:1000] + b"\xff" * 50)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is no SentencePiece model, or damaged") as caught:
        load_model(folder)
    assert "tiktoken" not in str(caught.value)
