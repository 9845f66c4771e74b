"""The sequences that recovery trains on."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tiny_folder import run_json
from tiny_recovery import chat_tokenizer

from prunus import calibration_from_texts, load_calibration, load_model
from prunus.errors import CalibrationError, OptionError
from prunus.recovery.job import RecoveryJob
from prunus.recovery.options import TextOptions
from prunus.recovery.run import _command
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


def test_text_of_the_dense_model_beside_a_given_one(pruned, dense, tmp_path, recover):
    (tmp_path / "notes.txt").write_text(" ".join(MANY), encoding="utf-8")
    # The last `--text` of a line would win in `recover`.
    texts = ["--set", f"text.source=[{tmp_path / 'notes.txt'}:3, self]", "--seq-len", "16", "--set", "text.held_out=4"]
    words = [pruned, "--teacher", dense, *texts, "--max-steps", "2", "--batch-size", "4", "--seed", "3"]
    facts = recover(*words, "--out", tmp_path / "out")
    model, tokenizer = load_model(dense)
    names = [f"{tmp_path / 'notes.txt'}:3", "self"]
    expected = load_calibration(names, tokenizer, samples=12, seq_len=16, seed=3, model=model, progress=False)
    train, held_out = expected.split(4)
    assert facts["text"]["sha256"] == train.provenance.sha256
    assert facts["held_out"]["sha256"] == held_out.provenance.sha256
    assert [source["samples"] for source in expected.provenance.to_dict()["sources"]] == [9, 3]
    (kept,) = tmp_path.glob("self-text-*.jsonl")
    written = kept.read_bytes()
    # Found again by another run, which goes on with the same tokens.
    again = recover(*words, "--out", tmp_path / "again")
    assert again["history"] == facts["history"]
    assert kept.read_bytes() == written
    recipe = (tmp_path / "out" / "prunus" / "recovery.yaml").read_text()
    assert "- self" in recipe
    # The pruned model would write other text.
    other, _ = load_model(pruned)
    by_other = load_calibration("self", tokenizer, samples=3, seq_len=16, seed=3, model=other, progress=False)
    assert by_other.provenance.sha256 != expected.each_source()[1].provenance.sha256


def test_text_without_an_end_needs_a_number(pruned, dense, tmp_path, refused, capsys):
    words = [pruned, "--teacher", dense, "--text", "self", "--seq-len", "32", "--out", tmp_path / "out"]
    assert "by --samples" in refused(*words, "--max-minutes", "1")
    assert not list(tmp_path.iterdir())
    ahead = run_json(capsys, "recover", *words, "--max-minutes", "1", "--samples", "30", "--dry-run")
    assert ahead["stages"]["writing text"] > 0
    assert (
        "writing text"
        not in run_json(
            capsys,
            "recover",
            pruned,
            "--teacher",
            dense,
            "--text",
            "default",
            *words[-4:],
            "--max-steps",
            "1",
            "--dry-run",
        )["stages"]
    )
    assert not list(tmp_path.iterdir()), "a forecast writes nothing"


def test_each_text_is_named_in_the_command_of_a_card():
    job = RecoveryJob("small", None, TextOptions(("a b.txt:2", "self")))
    assert _command(job, "out") == "prunus recover small --out out --text 'a b.txt:2' --text self"
    with pytest.raises(OptionError, match="twice"):
        TextOptions(("self", "self:2"))
