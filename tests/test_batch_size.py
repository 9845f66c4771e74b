"""How sequences are put into batches changes time and memory, and results by rounding alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain import plain_recipe, plain_scoring
from tiny_families import make_model, random_tokens

import prunus
from prunus.calibration import calibration_from_tokens
from prunus.repair.block_repair import RepairOptions
from prunus.scoring.adaptive import AdaptiveOptions
from prunus.scoring.score import score_together

#: of 11 sequences: one at a time, several with a smaller last batch, all at once
SIZES = (1, 4, 11)
WAYS = {
    "taylor": plain_scoring(method="taylor"),
    "taylor_2nd": plain_scoring(method="taylor_2nd"),
    "taylor_2nd-empirical": plain_scoring(method="taylor_2nd", hessian="empirical_fisher"),
    "taylor_2nd-sampled": plain_scoring(method="taylor_2nd", hessian="sampled_fisher"),
    "gate_fisher": plain_scoring(method="gate_fisher"),
    "gate_fisher-sampled": plain_scoring(method="gate_fisher", hessian="sampled_fisher"),
    "wanda": plain_scoring(method="wanda", normalize="layer_sum"),
    "wanda-std": plain_scoring(method="wanda", normalize="layer_sum", activation="std"),
    "magnitude": plain_scoring(method="magnitude"),
    "random": plain_scoring(method="random"),
    "hybrid": plain_scoring(method="hybrid"),
    "adaptive": plain_scoring(method="adaptive", adaptive=AdaptiveOptions(candidates=("gate_fisher", "wanda"))),
}


def padded(samples=11, seq_len=14):
    """Sequences of unequal length, filled up on either side."""
    ids = random_tokens(samples, seq_len)
    mask = torch.ones_like(ids)
    for row in range(samples):
        length = 4 + (5 * row) % (seq_len - 3)
        mask[row, slice(length, None) if row % 2 else slice(None, seq_len - length)] = 0
    return calibration_from_tokens(ids, mask)


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "gqa")


@pytest.mark.parametrize("filled", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("way", WAYS)
def test_scores_of_every_method(model, way, filled):
    calibration = padded() if filled else calibration_from_tokens(random_tokens(11, 14))
    options = replace(WAYS[way], noise=0.3, random_seed=3)
    keys = ["layer_idx", "group_type", "group_idx"]
    first = None
    for size in SIZES:
        (found,) = score_together(model, calibration, [options], batch_size=size, progress=False)
        importance = found.table.set_index(keys)["importance"].sort_index()
        first = importance if first is None else first
        assert importance.to_numpy() == pytest.approx(first.to_numpy(), rel=2e-4, abs=1e-9), size


@pytest.mark.parametrize("way", WAYS)
def test_plans_and_repaired_weights(model, way):
    """Two rounds with repair in between: everything that one of them decides, the other inherits."""
    samples = 22 if way == "adaptive" else 11  # it is scored on half of them in the second round, and needs eight
    calibration = padded(samples)
    scoring = replace(WAYS[way], noise=0.3, random_seed=3)
    results = [
        prunus.prune(
            model,
            0.3,
            calibration,
            plain_recipe(scoring, repair=RepairOptions(), rounds=2),
            batch_size=size,
            progress=False,
        )
        for size in SIZES
    ]
    assert len({result.plan for result in results}) == 1
    expected = results[0].model.state_dict()
    for result in results[1:]:
        for name, tensor in result.model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=2e-2, atol=2e-3)
