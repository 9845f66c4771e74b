"""Random tokens among those of a text: how many, where, and the same ones again."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import plain_scoring
from tiny_families import make_model, random_tokens

from prunus.calibration import Batch, calibration_from_tokens
from prunus.calibration.noise import clean_batches, with_noise
from prunus.errors import OptionError
from prunus.scoring.score import score, score_together

VOCABULARY = 1000


def batches_of(count, size, seq_len=8, *, padded=False):
    """Batches of tokens that are never drawn, each sequence of one of its own."""
    mask = (torch.arange(seq_len) < seq_len - 2).long().expand(size, seq_len) if padded else None
    ids = VOCABULARY + torch.arange(count * size)[:, None].expand(-1, seq_len)
    return [Batch(each.clone(), mask) for each in ids.split(size)]


@given(count=st.integers(2, 9), size=st.integers(1, 4), padded=st.booleans())
def test_every_second_batch_and_no_other(count, size, padded):
    batches = batches_of(count, size, padded=padded)
    found = with_noise(batches, 1.0, VOCABULARY)
    assert len(found) == count
    for number, (before, after) in enumerate(zip(batches, found, strict=True)):
        assert after.attention_mask is before.attention_mask
        changed = after.input_ids < VOCABULARY
        assert changed.all() if number not in clean_batches(count, 1.0) else after is before
    for before, same in zip(batches, batches_of(count, size, padded=padded), strict=True):
        assert torch.equal(before.input_ids, same.input_ids), "what the caller has stays as it is"


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_about_the_share_that_is_asked_for_from_all_of_the_vocabulary(share):
    ids = with_noise(batches_of(2, 100, 500), share, VOCABULARY)[1].input_ids
    drawn = ids[ids < VOCABULARY]
    assert drawn.numel() / ids.numel() == pytest.approx(share, rel=0.02)
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == VOCABULARY - 1
    assert len(drawn.unique()) > 0.98 * VOCABULARY


def test_a_token_that_all_sequences_begin_with_stays():
    batches = batches_of(3, 2)
    for batch in batches:
        batch.input_ids[:, 0] = 7
    (noised,) = with_noise(batches, 1.0, VOCABULARY)[1:2]
    assert (noised.input_ids[:, 0] == 7).all()
    assert (noised.input_ids[:, 1:] < VOCABULARY).all()


def test_the_seed_decides():
    first, again, other = (with_noise(batches_of(2, 3), 0.5, VOCABULARY, seed)[1].input_ids for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("padded", [False, True])
def test_one_batch_is_parted(padded):
    found = with_noise(batches_of(1, 5, padded=padded), 1.0, VOCABULARY)
    assert [len(batch.input_ids) for batch in found] == [3, 2]
    assert torch.equal(found[0].input_ids, batches_of(1, 5)[0].input_ids[:3])
    assert (found[1].input_ids < VOCABULARY).all()
    assert [batch.attention_mask is not None for batch in found] == [padded, padded]


def test_a_single_sequence_stays_clean_and_so_does_everything_without_a_share():
    only = batches_of(1, 1)
    assert torch.equal(with_noise(only, 1.0, VOCABULARY)[0].input_ids, only[0].input_ids)
    many = batches_of(4, 2)
    assert all(after is before for before, after in zip(many, with_noise(many, 0.0, VOCABULARY), strict=True))


@pytest.mark.parametrize("method", ["gate_fisher", "taylor_2nd", "wanda"])
def test_scores_with_noise_are_those_of_noised_sequences(method):
    torch.manual_seed(0)
    model, ids = make_model("llama", "gqa"), random_tokens(8, 12)
    options = plain_scoring(method=method, normalize="layer_sum")
    noised = torch.cat([batch.input_ids for batch in with_noise([Batch(part, None) for part in ids.split(2)], 0.4, 96)])
    assert 0 < int((noised != ids).sum()) < ids.numel() // 2
    expected = score(model, calibration_from_tokens(noised), options, batch_size=2, progress=False).table
    both = [replace(options, noise=0.4), options]
    found, clean = score_together(model, calibration_from_tokens(ids), both, batch_size=2, progress=False)
    pd.testing.assert_frame_equal(found.table, expected)
    pd.testing.assert_frame_equal(
        clean.table, score(model, calibration_from_tokens(ids), options, batch_size=2, progress=False).table
    )


def test_a_share_that_is_none():
    with pytest.raises(OptionError, match=r"noise is -0\.1"):
        plain_scoring(noise=-0.1)
