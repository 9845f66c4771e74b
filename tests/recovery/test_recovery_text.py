"""The sequences that recovery trains on."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tiny_folder import run_json
from tiny_recovery import chat_tokenizer

from prunus import Reading, calibration_from_texts, load_calibration, load_model
from prunus.calibration.sources import mixed
from prunus.errors import CalibrationError, OptionError
from prunus.recovery.options import TextOptions
from prunus.recovery.text import load_sequences

MANY = [f"Document {n} has {n * n} words, {n**7} or {n**11} so it says {n**5}." for n in range(40)]


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
    few, same = load_sequences(TextOptions(str(path), seq_len=16, held_out=5), chat_tokenizer(), 8, 4)
    assert torch.equal(few.input_ids, train.input_ids[:8]), "no more than the steps need"
    assert torch.equal(same.input_ids, held_out.input_ids), "whatever the steps"
    options = TextOptions(str(path), seq_len=16, held_out=5, samples=11)
    some, same = load_sequences(options, chat_tokenizer(), None, 4)
    assert torch.equal(some.input_ids, train.input_ids[:11])
    assert same.provenance == held_out.provenance


def test_what_shares_text_with_a_held_out_sequence_is_not_trained_on(tmp_path, caplog):
    """In the same file, and in another one that holds a part of it."""
    twice, notes = tmp_path / "twice.jsonl", tmp_path / "notes.txt"
    documents = [f"{n} is a number, and {n * n} its square, as {n**5} is its fifth power." for n in range(60)]
    twice.write_text("\n".join(json.dumps({"text": text}) for text in documents * 2), encoding="utf-8")
    notes.write_text(" ".join(documents[::3]), encoding="utf-8")
    options = TextOptions((f"{twice}:2", str(notes)), seq_len=64, held_out=36, samples=60)
    train, held_out = load_sequences(options, chat_tokenizer(), None, 1)

    def runs(ids: torch.Tensor) -> set[tuple[int, ...]]:
        return {tuple(row[place : place + 32]) for row in ids.tolist() for place in range(len(row) - 31)}

    assert len(held_out) == 36
    assert not runs(train.input_ids) & runs(held_out.input_ids)
    assert "share text with those that are held out" in caplog.text
    # Without that there would be such text.
    drawn = load_calibration(str(twice), chat_tokenizer(), samples=999, seq_len=64, reading=Reading(fewer=True))
    fitted, held = drawn.split(24)
    assert torch.equal(held.input_ids, held_out.each_source()[0].input_ids)
    assert runs(fitted.input_ids) & runs(held.input_ids)
    (tmp_path / "again.txt").write_text("the same again, and " * 8, encoding="utf-8")
    with pytest.raises(CalibrationError, match="says the same again and again"):
        load_sequences(TextOptions(str(tmp_path / "again.txt"), seq_len=40, held_out=2), chat_tokenizer(), None, 1)


def test_a_column_of_conversations_is_that_of_the_files_that_have_columns(tmp_path):
    """Beside them text without columns, as what the model writes has none."""
    chat, notes = tmp_path / "chat.jsonl", tmp_path / "notes.txt"
    chat.write_text(
        "\n".join(json.dumps({"messages": [{"role": "user", "content": text.lower()}]}) for text in MANY),
        encoding="utf-8",
    )
    notes.write_text(" ".join(MANY).upper(), encoding="utf-8")
    sources, tokenizer = (str(chat), str(notes)), chat_tokenizer()
    reading = Reading(chat_column="messages")
    both = load_calibration(sources, tokenizer, samples=12, seq_len=16, reading=reading)
    train, held_out = load_sequences(
        TextOptions(sources, seq_len=16, held_out=4, samples=12, chat_column="messages"), tokenizer, None, 1
    )
    for mixture in (both, train, held_out):
        talk, text = (tokenizer.decode(part.input_ids.flatten().tolist()) for part in mixture.each_source())
        assert talk == talk.lower()
        assert text == text.upper()
    assert "[user]" in tokenizer.decode(both.each_source()[0].input_ids.flatten().tolist())


@pytest.mark.parametrize("samples", [None, 6, 20, 40])
def test_runs_of_any_length_hold_out_the_same(tmp_path, monkeypatch, samples):
    """Also those that go through more than are drawn by default."""
    monkeypatch.setattr("prunus.recovery.text.MOST_SAMPLES", 20)
    (tmp_path / "text.txt").write_text(" ".join(str(number) for number in range(1000)))
    text = TextOptions(str(tmp_path / "text.txt"), seq_len=32, held_out=4)
    _, usual = load_sequences(text, chat_tokenizer(), None, 1)
    train_on, held_out = load_sequences(replace(text, samples=samples), chat_tokenizer(), None, 1)
    assert torch.equal(held_out.input_ids, usual.input_ids)
    assert len(train_on) == (samples or 20)
    assert not {tuple(row) for row in train_on.input_ids.tolist()} & {tuple(row) for row in held_out.input_ids.tolist()}


def test_sources_keep_their_shares_and_short_ones_are_gone_through_again(tmp_path, caplog):
    long, short = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
    long.write_text("\n".join(json.dumps({"text": text}) for text in MANY))
    short.write_text("\n".join(json.dumps({"text": text.upper()}) for text in MANY[:8]))
    alone = {}
    for path in (long, short):
        options = TextOptions(str(path), seq_len=16, held_out=2)
        alone[path.stem] = [part.input_ids for part in load_sequences(options, chat_tokenizer(), None, 1)]
    length, few = len(alone["long"][0]), len(alone["short"][0])
    assert length > 3 * few

    # With no limit, one pass over the longer one, which has three quarters.
    options = TextOptions((f"{long}:3", str(short)), seq_len=16, held_out=8)
    train, held_out = load_sequences(options, chat_tokenizer(), None, 4)
    parts = [part.input_ids for part in train.each_source()]
    held = [part.input_ids for part in held_out.each_source()]
    assert [len(part) for part in held] == [6, 2]
    assert torch.equal(torch.cat([parts[0], held[0]]), torch.cat(alone["long"]))
    number = round(len(parts[0]) / 3)
    assert len(parts[1]) in (number - 1, number)
    again = alone["short"][0].repeat(number, 1)[: len(parts[1])]
    assert torch.equal(parts[1], again)
    assert torch.equal(held[1], alone["short"][1])
    (message,) = caplog.messages
    assert message == (
        f"{short} has {few} sequences to train on, and its share of the text is {len(again)}: it is gone through "
        f"{len(again) / few:.1f} times"
    )
    source = train.provenance.sources[1]
    assert (source.samples, source.part) == (len(again), "fitted")

    # A number of steps holds, too.
    train, held_out = load_sequences(options, chat_tokenizer(), 40, 4)
    assert [len(part) for part in train.each_source()] == [30, 10]
    assert torch.equal(held_out.each_source()[0].input_ids, held[0])

    with pytest.raises(OptionError, match="`held_out` is 1; of 2 sources"):
        load_sequences(TextOptions((str(long), str(short)), seq_len=16, held_out=1), chat_tokenizer(), 8, 4)
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": MANY[0]}))
    with pytest.raises(CalibrationError, match=r"one.jsonl holds 2 sequences of 16 tokens, and 3 are needed"):
        load_sequences(
            TextOptions((str(long), str(tmp_path / "one.jsonl")), seq_len=16, held_out=4), chat_tokenizer(), 8, 4
        )


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
    how = {"tokenizer": tokenizer, "seq_len": 16, "seed": 3}
    # The last sequences of the file are held out, and of what is written the one behind those that are trained on.
    notes = load_calibration(str(tmp_path / "notes.txt"), **how, samples=999, reading=Reading(fewer=True)).split(3)
    own = load_calibration("self", **how, samples=3, model=model, progress=False).split(1)
    train, held_out = mixed([notes[0].first(6), own[0]]), mixed([notes[1], own[1]])
    assert facts["text"]["sha256"] == train.provenance.sha256
    assert facts["held_out"]["sha256"] == held_out.provenance.sha256
    assert [source["samples"] for source in facts["text"]["sources"]] == [6, 2]
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
    assert not torch.equal(by_other.input_ids, torch.cat([part.input_ids for part in own]))


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


def test_a_text_that_is_named_twice():
    with pytest.raises(OptionError, match="twice"):
        TextOptions(("self", "self:2"))
