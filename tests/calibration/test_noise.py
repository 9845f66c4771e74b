"""Random tokens among those of a text: how many, where, and the same ones again."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import plain_recipe, plain_scoring
from tiny_families import make_model, random_tokens

from prunus.calibration import Batch, calibration_from_tokens
from prunus.calibration.noise import clean_sequences, with_noise
from prunus.errors import OptionError
from prunus.model.geometry import Geometry
from prunus.pipeline.prune import prune
from prunus.repair.block_repair import RepairOptions, repair_
from prunus.scoring.score import score, score_together
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan

VOCABULARY = 1000
#: what version 0.1 made of four sequences of six tokens from 100 on, with a share of a half and 100 token ids
EARLIER = [
    [100, 101, 102, 103, 104, 105],
    [44, 107, 33, 109, 63, 79],
    [112, 113, 114, 115, 116, 117],
    [56, 99, 120, 121, 56, 123],
]


def half(geometry):
    """Keep every other group."""
    return Plan.from_kept(geometry, [{"attention": [0, 2], "mlp": range(0, 20, 2)}] * 2)


def batches_of(count, size, seq_len=8, *, padded=False, begin_token=None):
    """Batches of tokens that are never drawn, each sequence of one of its own."""
    mask = (torch.arange(seq_len) < seq_len - 2).long().expand(size, seq_len) if padded else None
    ids = VOCABULARY + torch.arange(count * size)[:, None].expand(-1, seq_len)
    return [Batch(each.clone(), mask, begin_token=begin_token) for each in ids.split(size)]


def by_hand(ids, share, vocabulary, seed, begun=0):
    """Sequence by sequence: every second one draws a token and a chance for each of its places."""
    generator, result = torch.Generator().manual_seed(seed), ids.clone()
    for number in range(1, len(ids), 2):
        wrong = torch.randint(vocabulary, (ids.shape[1],), generator=generator)
        chance = torch.rand(ids.shape[1], generator=generator)
        for place in range(begun, ids.shape[1]):
            if chance[place] < share:
                result[number, place] = wrong[place]
    return result


@given(
    count=st.integers(1, 12), size=st.integers(1, 13), share=st.sampled_from([0.3, 1.0]), seed=st.integers(0, 2**63 - 1)
)
def test_every_second_sequence_whatever_the_batches(count, size, share, seed):
    ids = torch.cat([batch.input_ids for batch in batches_of(count, 1)])
    found = with_noise([Batch(part, None) for part in ids.split(size)], share, VOCABULARY, seed)
    assert [len(batch.input_ids) for batch in found] == [len(part) for part in ids.split(size)]
    noised = torch.cat([batch.input_ids for batch in found])
    assert torch.equal(noised, by_hand(ids, share, VOCABULARY, seed))
    clean = list(clean_sequences(count, share))
    assert torch.equal(noised[clean], ids[clean])
    assert clean == list(range(0, count, 2))
    assert torch.equal(ids, torch.cat([batch.input_ids for batch in batches_of(count, 1)])), "the caller's stay"


def test_at_batch_size_1_it_is_what_it_always_was():
    """Results of earlier versions at batch size 1 can be had again: the same tokens at the same places."""
    ids = torch.arange(24).view(4, 6) + 100
    found = torch.cat([batch.input_ids for batch in with_noise([Batch(row, None) for row in ids.split(1)], 0.5, 100)])
    assert found.tolist() == EARLIER


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_about_the_share_that_is_asked_for_from_all_of_the_vocabulary(share):
    ids = with_noise(batches_of(1, 200, 500), share, VOCABULARY)[0].input_ids[1::2]
    drawn = ids[ids < VOCABULARY]
    assert drawn.numel() / ids.numel() == pytest.approx(share, rel=0.02)
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == VOCABULARY - 1
    assert len(drawn.unique()) > 0.98 * VOCABULARY


def test_the_begin_token_stays_and_no_other_first_token_does():
    batches = batches_of(3, 2, begin_token=900)
    for batch in batches:
        batch.input_ids[:, 0] = 900
    ids = torch.cat([batch.input_ids for batch in batches])
    noised = torch.cat([batch.input_ids for batch in with_noise(batches, 1.0, 900)])
    assert torch.equal(noised, by_hand(ids, 1.0, 900, 0, begun=1))
    assert (noised[:, 0] == 900).all()
    unknown = [replace(batch, begin_token=None) for batch in batches]
    noised = torch.cat([batch.input_ids for batch in with_noise(unknown, 1.0, 900)])
    assert torch.equal(noised, by_hand(ids, 1.0, 900, 0))


def test_the_seed_decides():
    first, again, other = (with_noise(batches_of(2, 3), 0.5, VOCABULARY, seed)[1].input_ids for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_padding_in_front_does_not_hide_the_begin_token():
    (batch,) = batches_of(1, 4)
    mask = torch.ones_like(batch.input_ids)
    for row, padding in enumerate((0, 3, 1, 2)):
        mask[row, :padding] = 0
        batch.input_ids[row, padding] = 7
    (noised,) = with_noise([Batch(batch.input_ids, mask, begin_token=7)], 1.0, VOCABULARY)
    assert [int(noised.input_ids[row, padding]) for row, padding in enumerate((0, 3, 1, 2))] == [7] * 4
    assert noised.attention_mask is mask


def test_a_single_sequence_stays_clean_and_so_does_everything_without_a_share():
    only = batches_of(1, 1)
    assert torch.equal(with_noise(only, 1.0, VOCABULARY)[0].input_ids, only[0].input_ids)
    many = batches_of(4, 1)
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


@pytest.mark.parametrize("seed", [3, 2**63 - 1])
def test_the_seed_of_the_run_is_that_of_the_noise(seed):
    """Scores and repair with a seed are those of sequences noised with it beforehand."""
    model, ids = make_model("llama", "gqa"), random_tokens(8, 12)
    by_run, by_zero = (by_hand(ids, 0.4, 96, number) for number in (seed % 2**63, 0))
    assert not torch.equal(by_run, by_zero) or seed % 2**63 == 0
    options = plain_scoring(method="gate_fisher", noise=0.4, random_seed=seed)
    found = score(model, calibration_from_tokens(ids), options, progress=False).table
    plain = replace(options, noise=0.0)
    pd.testing.assert_frame_equal(found, score(model, calibration_from_tokens(by_run), plain, progress=False).table)
    plan = half(Geometry.of(model))
    pruned, expected = apply_plan(model, plan), apply_plan(model, plan)
    repair = RepairOptions(noise=0.4, fit_logits=False)
    repair_(pruned, model, plan, [Batch(ids, None)], repair, seed=seed, progress=False)
    repair_(expected, model, plan, [Batch(by_run, None)], replace(repair, noise=0), progress=False)
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in pruned.state_dict().items())


@pytest.mark.parametrize("drawn", [False, True], ids=["of the scores", "of the text"])
def test_a_whole_run_hands_its_seed_on_to_the_repair(drawn):
    """By hand, from the plan and the sequences noised with the seed: the one given, or that of the drawn sequences."""
    model, ids = make_model("llama", "gqa"), random_tokens(8, 12)
    repair = RepairOptions(noise=0.4, fit_logits=False)
    calibration = calibration_from_tokens(ids)
    if drawn:
        calibration = replace(calibration, provenance=replace(calibration.provenance, seed=5))
    scoring = plain_scoring(method="gate_fisher", random_seed=None if drawn else 5)
    result = prune(model, 0.3, calibration, plain_recipe(scoring, repair=repair), progress=False)
    expected = apply_plan(model, result.plan)
    noised = [Batch(row, None) for row in by_hand(ids, 0.4, 96, 5).split(1)]
    repair_(expected, model, result.plan, noised, replace(repair, noise=0), progress=False)
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in result.model.state_dict().items())


def test_a_share_that_is_none():
    with pytest.raises(OptionError, match=r"`noise` is -0\.1"):
        plain_scoring(noise=-0.1)
