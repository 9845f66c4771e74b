"""Several sources of calibration text: which share each has, and that each sequence keeps its source."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import random_tokens
from tiny_folder import byte_tokenizer

from prunus.calibration import Provenance, calibration_from_tokens, load_calibration
from prunus.calibration.sources import Source, mixed, read_sources, sequences_of
from prunus.errors import CalibrationError, OptionError


def parts(*numbers: int):
    """Sources whose sequences hold the number of the source and their own."""
    each = [torch.tensor([[number, index, 7, 7] for index in range(count)]) for number, count in enumerate(numbers)]
    return [calibration_from_tokens(ids, source=f"source {number}") for number, ids in enumerate(each)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("c4", [("c4", 1.0)]),
        (["a.jsonl:2", "b.txt", "self:0.5"], [("a.jsonl", 2.0), ("b.txt", 1.0), ("self", 0.5)]),
        (
            ["owner/name:config:train", "owner/other:config:3"],
            [("owner/name:config:train", 1), ("owner/other:config", 3)],
        ),
        (r"C:\texts\a.txt", [(r"C:\texts\a.txt", 1.0)]),
    ],
)
def test_what_is_written_for_sources(words, found):
    assert read_sources(words) == [Source(*each) for each in found]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no calibration source"),
        (["a.txt:0", "self"], "'a.txt:0' has the weight 0"),
        (["owner/name:2023"], "has the weight 2023; the largest is 1,000. .* with a split, owner/name:2023:train"),
        (["a.txt", "self", "a.txt:2"], "'a.txt' is there twice; write a.txt:2"),
        (["mixture:3", "c4:2"], "'c4' is there twice, as a part of 'mixture'; give one of them"),
        (["c4", "mixture", "c4:2"], "'c4' is there twice"),
    ],
)
def test_sources_that_are_refused(words, message):
    with pytest.raises(OptionError, match=message):
        read_sources(words)


@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=5), samples=st.integers(1, 300))
def test_shares_are_those_of_the_weights_and_add_up(weights, samples):
    sources = [Source(str(number), weight) for number, weight in enumerate(weights)]
    if samples < len(sources):
        with pytest.raises(OptionError, match="cannot be of"):
            sequences_of(sources, samples)
        return
    numbers = sequences_of(sources, samples)
    assert sum(numbers) == samples
    assert min(numbers) >= 1
    for number, weight in zip(numbers, weights, strict=True):
        assert number == 1 or abs(number - samples * weight / sum(weights)) < len(weights)
    assert sequences_of([Source("a", 2), Source("b"), Source("c")], 8) == [4, 2, 2]


@given(numbers=st.lists(st.integers(1, 12), min_size=2, max_size=4), data=st.data())
def test_any_first_part_has_the_shares_of_the_whole(numbers, data):
    whole = mixed(parts(*numbers))
    assert Counter(whole.sources.tolist()) == Counter(dict(enumerate(numbers)))
    assert torch.equal(whole.sources, whole.input_ids[:, 0])
    length = data.draw(st.integers(1, len(whole)))
    found = Counter(whole.first(length).sources.tolist())
    for number, count in enumerate(numbers):
        assert abs(found[number] - count * length / len(whole)) < len(numbers)


def test_batches_are_of_one_source_each():
    whole = mixed(parts(5, 3))
    batches = list(whole.batches(2))
    assert [(batch.source, len(batch.input_ids)) for batch in batches] == [(0, 2), (0, 2), (0, 1), (1, 2), (1, 1)]
    for batch in batches:
        assert set(batch.input_ids[:, 0].tolist()) == {batch.source}
    rows = [row.tolist() for batch in batches for row in batch.input_ids]
    assert rows == [row.tolist() for part in parts(5, 3) for row in part.input_ids]


def test_provenance_of_each_source_follows_its_part():
    fitted, held_out = mixed(parts(6, 2)).split(4)
    assert (fitted.provenance.kind, fitted.provenance.source) == ("mixture", "source 0 + source 1")
    for part in (fitted, held_out):
        each = part.each_source()
        assert [source.provenance for source in each] == list(part.provenance.sources)
        assert [len(source) for source in each] == [3, 1]
        for source in each:
            alone = calibration_from_tokens(source.input_ids)
            assert (source.provenance.sha256, source.provenance.tokens) == (alone.provenance.sha256, 4 * len(source))
        assert Provenance.from_dict(part.provenance.to_dict()) == part.provenance
    assert fitted.provenance.sources[1].part == "fitted"
    # One source by itself says nothing of others, so that its record is what it was.
    assert "sources" not in parts(3)[0].provenance.to_dict()
    assert mixed(parts(3)).each_source()[0].sources is None


def test_sources_are_loaded_as_they_are_alone(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("abcdefgh" * 200)
    options = {"seq_len": 16, "seed": 3}
    whole = load_calibration([f"{text}:3", str(other)], byte_tokenizer(), samples=8, **options)
    for source, (path, number) in zip(whole.each_source(), ((text, 6), (other, 2)), strict=True):
        alone = load_calibration(str(path), byte_tokenizer(), samples=number, **options)
        assert torch.equal(source.input_ids, alone.input_ids)
        assert source.provenance == alone.provenance
    alone = load_calibration(str(text), byte_tokenizer(), samples=8, **options)
    again = load_calibration([str(text)], byte_tokenizer(), samples=8, **options)
    assert (again.provenance, again.sources) == (alone.provenance, None)
    with pytest.raises(CalibrationError, match=r"other.txt has 100 sequences"):
        load_calibration([str(text), str(other)], byte_tokenizer(), samples=400, **options)


def test_ready_tokens_have_no_source():
    assert [batch.source for batch in calibration_from_tokens(random_tokens(3, 6)).batches(2)] == [0, 0]
