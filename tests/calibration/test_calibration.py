import itertools
import json
import math
import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunus.calibration import (
    Calibration,
    Provenance,
    Reading,
    calibration_from_texts,
    calibration_from_tokens,
    load_calibration,
    sampled,
)
from prunus.calibration import files as calibration_files
from prunus.calibration.columns import TextColumn
from prunus.calibration.embedded import embedded_documents
from prunus.calibration.sources import mixed
from prunus.errors import CalibrationError, NonFiniteError, OptionError

EOS, BOS = 256, 257


class CountingTokenizer(PreTrainedTokenizerFast):
    """One token per byte, so that a test can read the text off the ids; counts what it is given."""

    characters = 0

    def __call__(self, text, **options):
        self.characters += sum(map(len, text))
        return super().__call__(text, **options)


def make_tokenizer(eos: bool = True, begin: bool = False) -> CountingTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<begin>"])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", BOS)])
    special = {"eos_token": "<end>", "bos_token": "<begin>"} if eos else {}
    return CountingTokenizer(tokenizer_object=tokenizer, model_max_length=16, **special)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def write_lines(path: Path, documents, column="text") -> Path:
    path.write_text("\n".join(json.dumps({"id": i, column: d}) for i, d in enumerate(documents)), encoding="utf-8")
    return path


# --- packing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lines", "text", "texts", "one text", "self"])
def test_sequences_begin_as_the_tokenizer_begins_a_text(tmp_path, kind):
    """With a token in the place of the last one of as many shorter sequences."""
    documents = [f"document number {i}. " * 5 for i in range(300)]
    (tmp_path / "docs.txt").write_text(" ".join(documents), encoding="utf-8")
    write_lines(tmp_path / "docs.jsonl", documents)
    model = tiny_model()

    def made(tokenizer, seq_len, begin_token=True):
        options = {"samples": 6, "seq_len": seq_len, "seed": 2}
        if kind in ("texts", "one text"):
            given = documents if kind == "texts" else " ".join(documents)
            return calibration_from_texts(given, tokenizer, begin_token=begin_token, **options)
        options["reading"] = Reading(begin_token=begin_token)
        source = {"lines": str(tmp_path / "docs.jsonl"), "text": str(tmp_path / "docs.txt"), "self": "self"}[kind]
        return load_calibration(source, tokenizer, model=model, **options)

    calibration = made(make_tokenizer(begin=True), 33)
    begun = calibration.input_ids
    for part in (calibration, *calibration.split(2), mixed([calibration, calibration])):
        assert {batch.begin_token for batch in part.batches(2)} == {BOS}
    assert begun.shape == (6, 33)
    assert (begun[:, 0] == BOS).all()
    assert BOS not in begun[:, 1:] or kind == "self"
    without, asked_not = made(make_tokenizer(), 33), made(make_tokenizer(begin=True), 33, begin_token=False)
    assert without.begin_token is asked_not.begin_token is None
    assert torch.equal(asked_not.input_ids, without.input_ids)
    if kind != "self":
        assert torch.equal(begun[:, 1:], made(make_tokenizer(), 32).input_ids)


def test_tokens_that_are_given_begin_as_they_are_said_to():
    ids = torch.tensor([[0, 0, 7, 3], [0, 7, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    assert calibration_from_tokens(ids, mask, begin_token=7).begin_token == 7
    assert calibration_from_tokens(ids, mask).begin_token is None
    with pytest.raises(CalibrationError, match="sequence 1 begins with token 4, not with `begin_token` 7"):
        calibration_from_tokens(ids, torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]), begin_token=7)


def test_documents_are_joined_by_eos_without_special_tokens(tmp_path, tokenizer):
    documents = [f"<{i:03d}>" for i in range(40)]
    path = write_lines(tmp_path / "docs.jsonl", documents)
    begins = make_tokenizer(begin=True)  # it would put a special token before every document if it were let
    calibration = load_calibration(str(path), begins, samples=7, seq_len=17, reading=Reading(begin_token=False))
    assert calibration.input_ids.shape == (7, 17)
    assert calibration.input_ids.dtype == torch.int64
    assert calibration.attention_mask is None
    ids = calibration.input_ids.flatten()
    assert BOS not in ids
    parts = text_of(tokenizer, ids).split("<end>")
    assert len(parts) == calibration.provenance.documents == 20
    assert all(part in documents for part in parts)
    assert len(set(parts)) == len(parts)


def test_a_tokenizer_without_eos_joins_with_nothing(tokenizer):
    calibration = calibration_from_texts(["aaaa", "aaaa", "aaaa"], make_tokenizer(eos=False), samples=3, seq_len=4)
    assert text_of(tokenizer, calibration.input_ids.flatten()) == "a" * 12


def test_the_seed_decides_the_order_and_nothing_else_does(tmp_path, tokenizer):
    path = write_lines(tmp_path / "docs.jsonl", [f"document number {i}. " * 5 for i in range(300)])
    first, again, other = (
        load_calibration(str(path), tokenizer, samples=8, seq_len=64, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.provenance == again.provenance
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.provenance.sha256 != other.provenance.sha256


@pytest.mark.slow
def test_another_process_gets_the_same_tokens(tmp_path):
    path = write_lines(tmp_path / "docs.jsonl", [f"document number {i}. " * 5 for i in range(300)])
    code = f"""
from prunus.calibration import load_calibration

class ByteTokenizer:
    eos_token_id = 256
    def __call__(self, texts, **options):
        return {{"input_ids": [list(text.encode()) for text in texts]}}

hashes = [
    load_calibration(source, ByteTokenizer(), samples=4, seq_len=64, seed=7).provenance.sha256
    for source in (None, {str(path)!r})
]
"""
    here: dict[str, list[str]] = {}
    exec(code, here)
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    twin = subprocess.run(
        [sys.executable, "-c", code + "print(*hashes)"], capture_output=True, text=True, env=environment, check=False
    )
    assert twin.stdout.split() == here["hashes"], twin.stderr


def test_one_huge_document_is_not_tokenised_whole(tokenizer):
    calibration_from_texts(["x" * 5_000_000, "y" * 5_000_000], tokenizer, samples=2, seq_len=100)
    assert tokenizer.characters < 10_000


# --- one running text ----------------------------------------------------------------------------------------------


def positions(tokenizer, calibration: Calibration, text: str) -> list[int]:
    found = []
    for ids in calibration.input_ids:
        window = text_of(tokenizer, ids)
        assert text.count(window) == 1
        found.append(text.index(window))
    return found


def running_text(words: int) -> str:
    return " ".join(f"w{i:06d}" for i in range(words))


@pytest.mark.parametrize("whole", [True, False])
def test_windows_of_a_text_file_lie_apart_and_all_over_it(tmp_path, tokenizer, monkeypatch, whole):
    text = running_text(5000)
    path = tmp_path / "book.txt"
    path.write_text(text)
    if not whole:
        monkeypatch.setattr(calibration_files, "_WHOLE_TEXT_BYTES", 1000)
    calibration = load_calibration(str(path), tokenizer, samples=12, seq_len=50)
    found = positions(tokenizer, calibration, text)
    assert found != sorted(found)
    ordered = sorted(found)
    assert all(b - a >= 50 for a, b in itertools.pairwise(ordered))
    assert ordered[-1] - ordered[0] > len(text) / 2
    assert calibration.provenance.documents == 1
    other = load_calibration(str(path), tokenizer, samples=12, seq_len=50, seed=1)
    assert set(positions(tokenizer, other, text)) != set(found)


def test_every_window_of_a_text_can_be_used(tmp_path, tokenizer):
    text = running_text(100)[:640]
    path = tmp_path / "small.md"
    path.write_text(text)
    calibration = load_calibration(str(path), tokenizer, samples=10, seq_len=64)
    assert sorted(positions(tokenizer, calibration, text)) == list(range(0, 640, 64))


def test_a_large_text_file_is_read_in_part(tmp_path, tokenizer):
    path = tmp_path / "large.txt"
    path.write_text(running_text(1_000_000))
    load_calibration(str(path), tokenizer, samples=4, seq_len=64)
    assert tokenizer.characters < 10_000


def test_passages_of_a_very_large_file_lie_apart(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(calibration_files, "_WHOLE_TEXT_BYTES", 0)
    monkeypatch.setattr(calibration_files, "_MOST_SLICES", 10)
    text = running_text(10_000)
    path = tmp_path / "book.txt"
    path.write_text(text)
    calibration = load_calibration(str(path), tokenizer, samples=10, seq_len=50)
    found = sorted(positions(tokenizer, calibration, text))
    assert all(b - a > len(text) / 10 - 1024 for a, b in itertools.pairwise(found))


def test_slices_never_cut_through_a_character(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(calibration_files, "_WHOLE_TEXT_BYTES", 0)
    text = " ".join(chr(0x1F600 + i % 60) + chr(0x4E00 + i) + "é" * (i % 3) for i in range(3000))
    path = tmp_path / "wide.txt"
    path.write_text(text, encoding="utf-8")
    calibration = load_calibration(str(path), tokenizer, samples=8, seq_len=40)
    for ids in calibration.input_ids:
        # One token is one byte here, so a window may begin and end inside a character; the text in between is whole.
        assert text_of(tokenizer, ids).strip("\ufffd") in text


def test_a_long_text_in_memory_gives_windows(tokenizer):
    text = running_text(1000)
    calibration = calibration_from_texts(text, tokenizer, samples=5, seq_len=64, source="mine")
    assert len(set(positions(tokenizer, calibration, text))) == 5
    assert calibration.provenance.source == "mine"
    assert torch.equal(
        calibration.input_ids, calibration_from_texts([text], tokenizer, samples=5, seq_len=64).input_ids
    )


# --- files of documents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_every_line_is_read_once(tmp_path, newline, end):
    # lines shorter and longer than a slice, and blank ones
    documents = [f"{i} " + "x" * (i * 997 % 300 if i % 50 else 20_000) for i in range(500)]
    lines = [json.dumps({"text": d}) for d in documents]
    lines.insert(100, "")
    path = tmp_path / "docs.jsonl"
    path.write_bytes((newline.join(lines) + end).encode())
    read = list(calibration_files.json_documents(path, column=TextColumn("text"), seed=5))
    assert Counter(read) == Counter(documents)
    assert read != documents


def test_a_large_file_of_lines_is_read_in_part(tmp_path, tokenizer):
    path = write_lines(tmp_path / "large.jsonl", ["some words " * 30] * 20_000)
    load_calibration(str(path), tokenizer, samples=4, seq_len=64)
    assert tokenizer.characters < 100_000


def test_a_json_array_is_read_like_lines(tmp_path):
    documents = [f"document {i}" for i in range(50)]
    path = tmp_path / "array.json"
    path.write_text(json.dumps([{"body": d} for d in documents], indent=2))
    read = list(calibration_files.json_documents(path, column=TextColumn("body"), seed=0))
    assert Counter(read) == Counter(documents)
    assert read != documents


def test_parquet_rows_are_read_once_over_all_row_groups(tmp_path, tokenizer):
    documents = [f"document {i}" for i in range(1000)]
    path = tmp_path / "docs.parquet"
    table = pyarrow.table({"meta": [{"a": 1, "b": 2}] * 1000, "body": documents})
    parquet.write_table(table, path, row_group_size=64)
    read = list(calibration_files.parquet_documents(path, column=TextColumn("body"), seed=0))
    assert Counter(read) == Counter(documents)
    assert read != documents
    calibration = load_calibration(str(path), tokenizer, samples=3, seq_len=40, reading=Reading(text_column="body"))
    assert calibration.provenance.kind == "parquet"
    assert calibration.provenance.source == "docs.parquet"


def test_large_row_groups_are_read_in_parts(tmp_path, monkeypatch):
    documents = [f"document {i}" for i in range(1000)]
    path = tmp_path / "docs.parquet"
    parquet.write_table(pyarrow.table({"text": documents}), path)
    monkeypatch.setattr(calibration_files, "_ROW_GROUP_BYTES", 1000)
    assert Counter(calibration_files.parquet_documents(path, column=TextColumn("text"), seed=0)) == Counter(documents)


def test_missing_texts_are_skipped(tmp_path, tokenizer):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": null}\n{"text": ""}\n{"text": "abcd"}\n{"text": "  "}\n')
    calibration = load_calibration(str(path), tokenizer, samples=2, seq_len=2)
    assert text_of(tokenizer, calibration.input_ids.flatten()) == "abcd"
    assert calibration.provenance.documents == 1


def test_broken_characters_are_replaced(tmp_path, tokenizer):
    path = tmp_path / "web.jsonl"
    path.write_text(r'{"text": "ab\ud83dcd"}')
    calibration = load_calibration(str(path), tokenizer, samples=1, seq_len=5)
    assert text_of(tokenizer, calibration.input_ids[0]) == "ab?cd"


# --- provenance ----------------------------------------------------------------------------------------------------


def test_provenance_says_what_was_used_and_no_machine_path(tmp_path, tokenizer):
    path = write_lines(tmp_path / "docs.jsonl", ["some text"] * 50)
    provenance = load_calibration(str(path), tokenizer, samples=4, seq_len=32, seed=9).provenance
    assert (provenance.source, provenance.kind, provenance.seed) == ("docs.jsonl", "jsonl", 9)
    assert (provenance.samples, provenance.seq_len, provenance.tokens) == (4, 32, 128)
    assert str(tmp_path) not in json.dumps(provenance.to_dict())
    assert Provenance.from_dict(json.loads(json.dumps(provenance.to_dict()))) == provenance


def test_provenance_refuses_other_fields():
    with pytest.raises(CalibrationError, match=r"missing .*sha256.*unknown \['colour'\]"):
        Provenance.from_dict({"colour": "red"})


def test_the_hash_follows_ids_shape_and_mask():
    ids = torch.arange(12).view(3, 4)
    mask = torch.ones(3, 4)
    mask[0, 0] = 0
    hashes = {
        calibration_from_tokens(*tokens).provenance.sha256
        for tokens in [(ids,), (ids.view(4, 3),), (ids.flip(0),), (ids, mask)]
    }
    assert len(hashes) == 4


# --- batches and parts ---------------------------------------------------------------------------------------------


def test_batches_hand_out_every_sequence_in_order():
    ids = torch.arange(28).view(7, 4)
    mask = torch.ones_like(ids)
    mask[2, :2] = 0
    batches = list(calibration_from_tokens(ids, mask).batches(3))
    assert [len(batch.input_ids) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch.input_ids for batch in batches]), ids)
    assert torch.equal(torch.cat([batch.attention_mask for batch in batches]), mask)
    assert [batch.tokens for batch in batches] == [10, 12, 4]
    assert all(batch.attention_mask is None for batch in calibration_from_tokens(ids).batches(3))


def test_a_mask_without_padding_is_no_mask():
    assert calibration_from_tokens(torch.arange(8).view(2, 4), torch.ones(2, 4)).attention_mask is None


def test_split_parts_the_sequences():
    whole = calibration_from_tokens(torch.arange(40).view(10, 4))
    rest, held_out = whole.split(3)
    assert torch.equal(rest.input_ids, whole.input_ids[:7])
    assert torch.equal(held_out.input_ids, whole.input_ids[7:])
    assert (held_out.provenance.samples, held_out.provenance.tokens, held_out.provenance.part) == (3, 12, "held_out")
    assert len({part.provenance.sha256 for part in (whole, rest, held_out)}) == 3


@pytest.mark.parametrize(("lengths", "shared"), [((40, 50), 32), ((50, 40), 32), ((20, 60), 20)])
def test_sequences_without_text_of_others(lengths, shared):
    """Windows of one text that overlap by any number of tokens, and the same found by comparing runs one by one."""
    text = torch.randint(0, 9, (3000,), generator=torch.Generator().manual_seed(0))
    ids = text[:2000].view(-1, lengths[0])
    others = torch.stack([text[start : start + lengths[1]] for start in (7, 500, 815, 1211, 2400)])
    runs = {tuple(row[at : at + shared]) for row in others.tolist() for at in range(lengths[1] - shared + 1)}
    left = [row for row in ids.tolist() if not any(tuple(row[at:][:shared]) in runs for at in range(len(row)))]
    found = calibration_from_tokens(ids).without(others)
    assert found.input_ids.tolist() == left
    assert 0 < len(ids) - len(left) < 12
    assert found.provenance.samples == len(left)


def test_what_many_texts_begin_with_tells_nothing():
    """A system prompt before every text, and first words of the texts that some have in common."""
    draw = torch.Generator().manual_seed(0)
    prompt, texts = torch.randint(0, 99, (33,), generator=draw), torch.randint(0, 99, (40, 60), generator=draw)
    texts[:, 0] = torch.arange(40) % 10
    ids = torch.cat([prompt.expand(40, -1), texts], dim=1)
    others = torch.cat([ids[30:], torch.cat([prompt, texts[3, 10:], texts[0, :10]])[None]])
    left = calibration_from_tokens(ids[:30]).without(others)
    assert left.input_ids.tolist() == [*ids[:3].tolist(), *ids[4:30].tolist()]
    few = calibration_from_tokens(ids[:8]).without(others)  # as many as may have a text in common
    assert len(few) == 0


@pytest.mark.parametrize("held_out", [0, 10, -1])
def test_split_needs_two_parts(held_out):
    with pytest.raises(OptionError, match=f"`held_out` is {held_out}, of 10"):
        calibration_from_tokens(torch.arange(40).view(10, 4)).split(held_out)


def test_batch_size_is_checked_at_once():
    with pytest.raises(OptionError, match="`batch_size` is 0"):
        calibration_from_tokens(torch.arange(8).view(2, 4)).batches(0)


# --- sources without a file ----------------------------------------------------------------------------------------


def test_the_embedded_default_works_and_has_no_layout(tokenizer):
    calibration = load_calibration(None, tokenizer, samples=8, seq_len=64)
    assert torch.equal(calibration.input_ids, load_calibration("default", tokenizer, samples=8, seq_len=64).input_ids)
    assert calibration.provenance.kind == "embedded"
    assert f"Python {sys.version_info[0]}.{sys.version_info[1]}" in calibration.provenance.source
    text = "\n".join(embedded_documents())
    assert len(text) > 300_000
    assert not re.search(r"^\s*[*=~-]{3,}\s*$", text, flags=re.MULTILINE)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def test_text_from_the_model_itself(tokenizer):
    model = tiny_model().train()
    first, again, other = (
        load_calibration("self", tokenizer, samples=5, seq_len=12, seed=seed, model=model) for seed in (0, 0, 1)
    )
    assert first.input_ids.shape == (5, 12)
    assert len(set(first.input_ids[:, 0].tolist())) > 2
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.provenance.kind == "model"
    assert model.training


def test_text_from_the_model_has_no_impossible_token():
    logits = torch.full((2000, 4), -1e30)
    logits[:, 1:3] = torch.tensor([0.0, 1.0])
    drawn = sampled.draw_tokens(logits, torch.Generator().manual_seed(0)).flatten()
    assert set(drawn.tolist()) == {1, 2}
    assert abs(float((drawn == 2).float().mean()) - math.e / (1 + math.e)) < 0.04


def test_text_from_the_model_needs_the_model(tokenizer):
    with pytest.raises(CalibrationError, match="give it as the argument `model`"):
        load_calibration("self", tokenizer)


# --- the hub, without a network ------------------------------------------------------------------------------------


class FakeStream:
    def __init__(self, rows):
        self.rows = rows
        self.shuffled = None

    def shuffle(self, seed, buffer_size):
        self.shuffled = seed
        return self

    def __iter__(self):
        return iter(self.rows)


def fake_datasets(monkeypatch, rows):
    """Put a stand-in for `datasets` in place; returns the stream and the calls it got."""
    stream, calls = FakeStream(rows), []

    def load_dataset(*positional, **named):
        calls.append((positional, named))
        return stream

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return stream, calls


def test_c4_is_streamed_and_shuffled(monkeypatch, tokenizer):
    stream, calls = fake_datasets(monkeypatch, [{"text": "abc"}] * 100)
    calibration = load_calibration("c4", tokenizer, samples=4, seq_len=16, seed=3)
    ((positional, named),) = calls
    assert positional == ("allenai/c4", "en")
    assert (named["split"], named["streaming"]) == ("train", True)
    assert stream.shuffled == 3
    assert (calibration.provenance.source, calibration.provenance.kind) == ("c4", "hub")


def test_wikitext_is_one_running_text(monkeypatch, tokenizer):
    text = running_text(1000)
    stream, _ = fake_datasets(monkeypatch, [{"text": part + " "} for part in text.split(" ")])
    text += " "
    calibration = load_calibration("wikitext2", tokenizer, samples=4, seq_len=64)
    assert len(set(positions(tokenizer, calibration, text))) == 4
    assert stream.shuffled is None
    assert EOS not in calibration.input_ids


def test_ptb_sentences_are_one_running_text(monkeypatch, tokenizer):
    fake_datasets(monkeypatch, [{"sentence": f"sentence {i:04d}"} for i in range(100)])
    calibration = load_calibration("ptb", tokenizer, samples=4, seq_len=64)
    assert re.search(r"sentence \d{4} sentence \d{4}", text_of(tokenizer, calibration.input_ids[0]))


def test_a_mixture_is_its_parts(monkeypatch, tokenizer):
    row = {"text": "abc", "content": "def", "prompt": "ghi", "messages": [{"role": "user", "content": "no template"}]}
    _, calls = fake_datasets(monkeypatch, [row] * 100)
    calibration = load_calibration(["mixture:3", "default:2"], tokenizer, samples=25, seq_len=16)
    sets = ["allenai/c4", "wikimedia/wikipedia", "codeparrot/codeparrot-clean-valid", "HuggingFaceH4/ultrachat_200k"]
    assert [positional[0] for positional, _ in calls] == sets
    parts = [(part["source"], part["samples"]) for part in calibration.provenance.to_dict()["sources"]]
    assert parts[:4] == [("c4", 6), ("wikipedia", 3), ("code", 3), ("dialogue", 3)]
    assert parts[4][1] == 10
    texts = [text_of(tokenizer, each.input_ids.flatten()) for each in calibration.each_source()]
    for word, text in zip(("abc", "abc", "def", "ghi"), texts, strict=False):
        assert word in text


def test_dialogue_takes_whole_conversations_where_there_is_a_chat_template(monkeypatch, tmp_path):
    from test_texts_and_lengths import chat_tokenizer

    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    fake_datasets(monkeypatch, [{"prompt": "Hello", "messages": turns}] * 100)
    tokenizer = chat_tokenizer()
    calibration = load_calibration("dialogue", tokenizer, samples=4, seq_len=64)
    assert "Good day" in tokenizer.decode(calibration.input_ids.flatten())
    assert calibration.provenance.kind == "chat"

    # A column that is named is that of a file; those of the short names are known.
    reading = Reading(chat_column="other")
    with pytest.raises(
        CalibrationError, match=r"`chat_column` is 'other', and the columns of c4 and dialogue are known"
    ):
        load_calibration(["c4", "dialogue"], tokenizer, samples=4, seq_len=16, reading=reading)
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"other": turns})] * 100))
    fake_datasets(monkeypatch, [{"text": "abc"}] * 100)
    both = load_calibration([str(tmp_path / "chat.jsonl"), "c4"], tokenizer, samples=4, seq_len=16, reading=reading)
    assert [source.kind for source in both.provenance.sources] == ["chat", "hub"]


def test_any_data_set_by_its_id(monkeypatch, tokenizer):
    _, calls = fake_datasets(monkeypatch, [{"body": "abc"}] * 100)
    reading = Reading(text_column="body")
    load_calibration("owner/name:small:validation", tokenizer, samples=2, seq_len=8, reading=reading)
    ((positional, named),) = calls
    assert positional == ("owner/name", "small")
    assert named["split"] == "validation"


def test_a_data_set_without_the_column_lists_its_columns(monkeypatch, tokenizer):
    fake_datasets(monkeypatch, [{"title": "a", "body": "b"}])
    with pytest.raises(CalibrationError, match=r"no column 'text'. Columns: title, body"):
        load_calibration("owner/name", tokenizer)


def test_no_datasets_package(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install 'datasets>=3'"):
        load_calibration("c4", tokenizer)


def test_no_network(monkeypatch, tokenizer):
    def load_dataset(*_, **__):
        raise ConnectionError("cannot reach the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CalibrationError, match=r"allenai/c4:en:train.*cannot reach the hub.*the source `default`"):
        load_calibration("c4", tokenizer)


# --- errors --------------------------------------------------------------------------------------------------------


def test_too_short_says_how_many_tokens_there_are_and_are_needed(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("x" * 1000)
    with pytest.raises(
        CalibrationError,
        match=r"short.txt.*holds 1,000 tokens.*16 samples with 128 of them each need 2,048.*at most 7 `samples`",
    ):
        load_calibration(str(path), tokenizer, samples=16, seq_len=128)
    with pytest.raises(CalibrationError, match=r"holds 1,000 tokens.*`seq_len` of at most 1000"):
        load_calibration(str(path), tokenizer, samples=16, seq_len=1024)
    lines = write_lines(tmp_path / "short.jsonl", ["x" * 99] * 10)
    with pytest.raises(CalibrationError, match="holds 999 tokens"):
        load_calibration(str(lines), tokenizer, samples=16, seq_len=128)


def test_one_of_several_sources_is_too_short(tmp_path, tokenizer):
    """What the message advises works, and one sequence more does not."""
    (tmp_path / "short.txt").write_text("x" * 1000)
    (tmp_path / "long.txt").write_text("y" * 9000)
    sources = [str(tmp_path / "short.txt"), f"{tmp_path / 'long.txt'}:3"]
    with pytest.raises(CalibrationError, match=r"short.txt has 7 sequences.*share of 40.* is 10.*at most 29 `samples`"):
        load_calibration(sources, tokenizer, samples=40, seq_len=128)
    assert len(load_calibration(sources, tokenizer, samples=29, seq_len=128)) == 29
    with pytest.raises(CalibrationError, match="at most 29 `samples`"):
        load_calibration(sources, tokenizer, samples=30, seq_len=128)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.json"])
def test_empty_files(tmp_path, tokenizer, name):
    path = tmp_path / name
    path.write_text("")
    with pytest.raises(CalibrationError, match="holds 0 tokens"):
        load_calibration(str(path), tokenizer)


def test_missing_file(tmp_path, tokenizer):
    with pytest.raises(CalibrationError, match=r"gone.txt' does not exist"):
        load_calibration(str(tmp_path / "gone.txt"), tokenizer)


def test_unknown_extension(tmp_path, tokenizer):
    path = tmp_path / "text.docx"
    path.write_text("x")
    with pytest.raises(CalibrationError, match=r"extension '.docx'.*\.txt, \.md, \.jsonl, \.json, \.parquet"):
        load_calibration(str(path), tokenizer)


def test_a_folder(tmp_path, tokenizer):
    with pytest.raises(CalibrationError, match="is a folder"):
        load_calibration(str(tmp_path), tokenizer)


def test_an_unknown_name_is_answered_with_the_nearest(tokenizer):
    with pytest.raises(CalibrationError, match="Did you mean 'wikitext2'"):
        load_calibration("wikitext", tokenizer)


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.json", "docs.parquet"])
def test_a_wrong_column_lists_the_columns(tmp_path, tokenizer, name):
    path = tmp_path / name
    rows = [{"id": 1, "body": "text"}]
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows if name.endswith(".json") else rows[0]))
    with pytest.raises(CalibrationError, match=r"no column 'text'. Columns: id, body"):
        load_calibration(str(path), tokenizer)
    with pytest.raises(CalibrationError, match=r"column 'id' holds .*int.*, not text"):
        load_calibration(str(path), tokenizer, reading=Reading(text_column="id"))


def test_a_line_that_is_not_json_is_named(tmp_path, tokenizer):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n' * 6 + "{broken\n")
    with pytest.raises(CalibrationError, match=r"broken\.jsonl, line 7 is not JSON"):
        load_calibration(str(path), tokenizer)
    path.write_text('{"text": "fine"}\n["a list"]\n')
    with pytest.raises(CalibrationError, match="line 2 holds a list"):
        load_calibration(str(path), tokenizer)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_a_text_that_is_not_utf8(tmp_path, tokenizer, monkeypatch, limit):
    monkeypatch.setattr(calibration_files, "_WHOLE_TEXT_BYTES", limit)
    path = tmp_path / "latin.txt"
    path.write_bytes("déjà vu ".encode("latin-1") * 1000)
    with pytest.raises(CalibrationError, match="not UTF-8"):
        load_calibration(str(path), tokenizer, samples=1, seq_len=16)


def test_a_file_that_is_not_parquet(tmp_path, tokenizer):
    path = tmp_path / "fake.parquet"
    path.write_text("this is text")
    with pytest.raises(CalibrationError, match="not a readable parquet file"):
        load_calibration(str(path), tokenizer)


@pytest.mark.parametrize(
    ("options", "message"), [({"samples": 0}, "`samples` is 0"), ({"seq_len": 1}, "`seq_len` is 1")]
)
def test_counts_out_of_range(tokenizer, options, message):
    with pytest.raises(OptionError, match=message):
        load_calibration(None, tokenizer, **options)


def test_texts_that_are_not_text(tokenizer):
    with pytest.raises(CalibrationError, match="text 1 is a int"):
        calibration_from_texts(["a", 5], tokenizer)


def test_a_python_without_its_manual(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "pydoc_data", None)
    with pytest.raises(CalibrationError, match="packaged without"):
        load_calibration(None, tokenizer)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.arange(4), None, "shape"),
        (torch.rand(2, 4), None, "float32"),
        (torch.zeros(0, 4, dtype=torch.int64), None, "shape"),
        (torch.arange(8).view(2, 4), torch.ones(2, 3), "mask has shape"),
        (torch.arange(8).view(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]]), "sequence 1 has 1 token"),
    ],
)
def test_tokens_that_cannot_be_used(ids, mask, message):
    with pytest.raises(CalibrationError, match=message):
        calibration_from_tokens(ids, mask)


@pytest.mark.parametrize("damaged", [float("nan"), float("inf")])
def test_no_token_is_drawn_where_there_is_no_distribution(damaged):
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(3, 5)
    logits[:, 2] = float("-inf")  # as of entries that a model never gives
    assert 2 not in torch.stack([sampled.draw_tokens(logits, generator) for _ in range(50)])
    logits[1, 4] = damaged
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        sampled.draw_tokens(logits, generator)
