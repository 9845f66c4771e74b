"""The factor on the last norm, against a grid of whole forward passes with scaled hidden states."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_families import ONE_UNLIKE, case_id, make_model, random_tokens

from prunus.calibration import Batch
from prunus.repair.temperature import HIGHEST, LOWEST, fit_temperature_


def losses(model, ids, factor=1.0):
    """Mean token loss, by a whole forward pass; `factor` multiplies what enters the head."""
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0] * factor,))
    try:
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)
    finally:
        handle.remove()


def sure(model, by):
    """The same model with logits `by` times as large (before what its config does to them)."""
    model.get_output_embeddings().weight.data *= by
    return model


@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_the_factor_is_the_best_of_a_fine_grid_and_stands_in_the_norm(case):
    model = sure(make_model(*case, tie_word_embeddings=False), 2.0)
    ids = random_tokens(batch=6, seq_len=16)
    # Text that the model knows a little: its own guesses at every other place.
    with torch.no_grad():
        ids[:, 1::2] = model(ids).logits.argmax(-1)[:, 0:-1:2]
    grid = torch.linspace(LOWEST, HIGHEST, 31)
    for _ in range(2):  # around the best of a coarse grid a fine one
        best = min(grid.tolist(), key=lambda factor: losses(model, ids, factor))
        step = float(grid[1] - grid[0])
        grid = torch.linspace(max(best - step, LOWEST), min(best + step, HIGHEST), 21)
    before = copy.deepcopy(model)
    found = fit_temperature_(model, [Batch(part, None) for part in ids.split(2)])
    assert found == pytest.approx(best, rel=0.02)
    assert losses(model, ids) == pytest.approx(losses(before, ids, found), rel=1e-5)
    changed = [
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    ]
    assert changed == ["model.norm.weight"]


def test_only_so_many_tokens_are_looked_at():
    model, ids = make_model("llama", "gqa"), random_tokens(batch=8, seq_len=16)
    batches = [Batch(part, None) for part in ids.split(1)]
    expected = fit_temperature_(copy.deepcopy(model), batches[::2])
    assert fit_temperature_(copy.deepcopy(model), batches, tokens=64) == expected
    for size in (2, 3, 8):
        parts = [Batch(part, None) for part in ids.split(size)]
        assert fit_temperature_(copy.deepcopy(model), parts, tokens=64) == pytest.approx(expected, rel=1e-3)
        among = fit_temperature_(copy.deepcopy(model), parts, among=range(0, 8, 2))
        assert among == pytest.approx(expected, rel=1e-3)


def test_padding_and_single_tokens_do_not_count():
    model, ids = make_model("llama", "gqa"), random_tokens(batch=2, seq_len=12)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    other = ids.clone()
    other[1, 6:] = 5
    padded = [fit_temperature_(copy.deepcopy(model), [Batch(tokens, mask)]) for tokens in (ids, other)]
    assert padded[0] == padded[1]
    assert fit_temperature_(copy.deepcopy(model), [Batch(ids[:, :1], None)]) == 1.0
