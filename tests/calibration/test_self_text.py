"""Text of the model's own in the repair: which sequences there are, and that a recipe repairs on them."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from plain import plain_recipe, plain_scoring
from tiny_families import make_model, random_tokens
from tiny_folder import save_tiny_folder

import prunus
from prunus.calibration import calibration_from_tokens, self_text
from prunus.calibration.sampled import sample_from_model
from prunus.calibration.self_text import text_for_repair
from prunus.checkpoint import open_model
from prunus.errors import OptionError, StatisticsError
from prunus.repair.block_repair import RepairOptions, repair_
from prunus.surgery import apply_plan


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "gqa")


@pytest.fixture(scope="module")
def calibration():
    return calibration_from_tokens(random_tokens(8, 12), source="web")


def rows(ids):
    return sorted(map(tuple, ids.tolist()))


@pytest.mark.parametrize(("share", "number"), [(0.5, 4), (0.3, 2), (1, 8)])
def test_a_share_is_written_by_the_model(model, calibration, share, number):
    options = RepairOptions(self_text=share)
    mixed = text_for_repair(model, calibration, options.self_text, seed=3, progress=False)
    written = sample_from_model(model, samples=number, seq_len=12, seed=3, progress=False)
    given = calibration.input_ids[: 8 - number]
    assert rows(mixed.input_ids) == rows(torch.cat([given, written]))
    assert mixed.provenance.source == f"{8 - number} sequences of web, {number} sampled from the model"
    again = text_for_repair(model, calibration, options.self_text, seed=3, progress=False)
    assert torch.equal(mixed.input_ids, again.input_ids)
    assert not torch.equal(
        mixed.input_ids, text_for_repair(model, calibration, options.self_text, progress=False).input_ids
    )


def test_what_the_model_writes_begins_as_the_given_sequences_do(model):
    ids = random_tokens(8, 12)
    ids[:, 0] = 3
    mixed = text_for_repair(model, calibration_from_tokens(ids), 0.5, seed=3, progress=False)
    written = sample_from_model(model, samples=4, seq_len=12, seed=3, begin=3, progress=False)
    assert (written[:, 0] == 3).all()
    assert rows(mixed.input_ids) == rows(torch.cat([ids[:4], written]))


def test_the_first_part_has_both_kinds(model):
    given = calibration_from_tokens(random_tokens(32, 6))
    mixed = text_for_repair(model, given, 0.5, progress=False)
    known = set(rows(given.input_ids))
    assert 2 <= sum(row in known for row in rows(mixed.input_ids[:8])) <= 6


def test_padding_stays_with_its_sequence(model):
    ids = random_tokens(4, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, 4:] = 0
    mixed = text_for_repair(model, calibration_from_tokens(ids, mask), 0.5, progress=False)
    found = {
        tuple(row.tolist()): kept.tolist() for row, kept in zip(mixed.input_ids, mixed.attention_mask, strict=True)
    }
    assert [found[tuple(row.tolist())] for row in ids[:2]] == mask[:2].tolist()
    assert sum(sum(kept) for kept in found.values()) == int(mask[:2].sum()) + 2 * 6


@pytest.mark.parametrize("share", [0, 0.1])
def test_nothing_is_written(model, calibration, share):
    assert text_for_repair(model, calibration, share) is calibration


def test_a_model_on_disk_writes_nothing_and_says_so(tmp_path, calibration, caplog):
    save_tiny_folder(tmp_path / "model", "llama")
    opened, _ = open_model(tmp_path / "model")
    with caplog.at_level(logging.INFO):
        assert text_for_repair(opened, calibration, 0.5) is calibration
    assert "writes no text" in caplog.text


def test_text_is_kept_for_a_run_that_goes_on(model, calibration, tmp_path, monkeypatch):
    options = RepairOptions()
    first = text_for_repair(model, calibration, options.self_text, work=tmp_path / "text", progress=False)
    monkeypatch.setattr(self_text, "sample_from_model", None)
    again = text_for_repair(model, calibration, options.self_text, work=tmp_path / "text", progress=False)
    assert torch.equal(first.input_ids, again.input_ids)
    with pytest.raises(StatisticsError, match="seed"):
        text_for_repair(model, calibration, options.self_text, seed=1, work=tmp_path / "text", progress=False)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(OptionError, match="self_text"):
        RepairOptions(self_text=share)


def test_a_recipe_repairs_on_this_text(model, calibration):
    scoring, repair = plain_scoring(method="taylor", random_seed=7), RepairOptions()
    result = prunus.prune(model, 0.2, calibration, plain_recipe(scoring, repair=repair), progress=False)
    text = text_for_repair(model, calibration, repair.self_text, seed=7, progress=False)
    by_hand = apply_plan(model, result.plan)
    repair_(by_hand, model, result.plan, list(text.batches(1)), repair, seed=7, progress=False)
    for name, tensor in by_hand.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name
    assert result.score.about["repair_text"] == text.provenance.to_dict()
    # The scores are of the given text alone.
    assert result.score.about["calibration"] == calibration.provenance.to_dict()
    plain = prunus.prune(
        model, 0.2, calibration, plain_recipe(scoring, repair=replace(repair, self_text=0)), progress=False
    )
    assert plain.plan == result.plan
    assert any(
        not torch.equal(tensor, result.model.state_dict()[name]) for name, tensor in plain.model.state_dict().items()
    )
