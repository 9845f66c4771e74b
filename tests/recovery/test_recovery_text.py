"""The sequences that recovery trains on."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tiny_recovery import chat_tokenizer

from prunus import calibration_from_texts, load_calibration
from prunus.errors import CalibrationError
from prunus.recovery.options import TextOptions
from prunus.recovery.text import load_sequences

MANY = [f"Document {n} has {n * n} words, or so it says." for n in range(40)]


@pytest.mark.parametrize("texts", [MANY, " ".join(MANY)], ids=["documents", "one text"])
def test_as_many_sequences_as_there_are(texts):
    tokenizer = chat_tokenizer()
    fewer = calibration_from_texts(texts, tokenizer, samples=10_000, seq_len=32, fewer=True)
    exactly = calibration_from_texts(texts, tokenizer, samples=len(fewer), seq_len=32)
    assert torch.equal(fewer.input_ids, exactly.input_ids)
    with pytest.raises(CalibrationError, match=f"at most {len(fewer)}"):
        calibration_from_texts(texts, tokenizer, samples=len(fewer) + 1, seq_len=32)
    with pytest.raises(CalibrationError, match="too short"):
        calibration_from_texts("a few words", tokenizer, samples=3, seq_len=32, fewer=True)


def test_what_is_held_out_is_not_trained_on(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in MANY), encoding="utf-8")
    train, held_out = load_sequences(TextOptions(str(path), seq_len=16, held_out=5), chat_tokenizer(), None, 4)
    whole = load_calibration(str(path), chat_tokenizer(), samples=len(train) + 5, seq_len=16)
    assert torch.equal(torch.cat([train.input_ids, held_out.input_ids]), whole.input_ids)
    assert len(held_out) == 5
    assert train.provenance.part == "fitted"
    few, _ = load_sequences(TextOptions(str(path), seq_len=16, held_out=5), chat_tokenizer(), 8, 4)
    assert len(few) == 8, "no more than the steps need"


def test_conversations_from_parquet_are_those_from_json_lines(tmp_path):
    records = [{"messages": [{"role": "user", "content": text}]} for text in MANY]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "chat.parquet")
    lines = []
    for name in ("chat.jsonl", "chat.parquet"):
        options = TextOptions(str(tmp_path / name), seq_len=16, held_out=2, chat_column="messages")
        train, held_out = load_sequences(options, chat_tokenizer(), None, 4)
        # Each file is shuffled in its own way; all is drawn but an incomplete last sequence.
        text = chat_tokenizer().decode(torch.cat([train.input_ids, held_out.input_ids]).flatten().tolist())
        lines.append({part for part in text.split("<eos>") if part.endswith("\n")})
    assert len(lines[0] & lines[1]) >= len(MANY) - 2
    assert lines[0] <= {f"[user] {text}\n" for text in MANY}
    (tmp_path / "chat.txt").write_text("no columns")
    with pytest.raises(CalibrationError, match="neither"):
        load_sequences(TextOptions(str(tmp_path / "chat.txt"), chat_column="messages"), chat_tokenizer(), None, 4)
