"""Sums over tokens of several sources, against one least-squares problem with rescaled rows."""

from __future__ import annotations

import pytest
import torch
from tiny_families import make_model, random_tokens

from prunus.calibration import calibration_from_tokens
from prunus.calibration.sources import mixed
from prunus.model.geometry import Geometry
from prunus.repair import block_repair
from prunus.repair.block_repair import RepairOptions, repair_
from prunus.repair.least_squares import TokenSums, solve_ridge
from prunus.scoring.score import score
from prunus.selection.select import select
from prunus.surgery import apply_plan


def tokens(seed: int, count: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, 5, generator=generator), torch.randn(count, 3, generator=generator)


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.0, 30.0, 0.2)])
def test_sources_weigh_by_their_tokens_alone(scales):
    sources = [tokens(seed, count, scale) for seed, (count, scale) in enumerate(zip((12, 20, 9), scales, strict=True))]
    sums = TokenSums(5, 3, torch.device("cpu"))
    for number, (x, target) in enumerate(sources):
        sums.add(x[:7], target[:7], number)
        sums.add(x[7:], target[7:], number)
    found = sums.equations()
    # Every row divided by the root of its source's mean square: an ordinary problem in plain float64.
    roots = [float(x.double().square().sum(dim=1).mean().sqrt()) for x, _ in sources]
    x = torch.cat([x.double() / root for (x, _), root in zip(sources, roots, strict=True)])
    target = torch.cat([target.double() / root for (_, target), root in zip(sources, roots, strict=True)])
    torch.testing.assert_close(found.gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.cross.double(), x.T @ target, rtol=1e-5, atol=1e-5)
    assert found.target_square == pytest.approx(float(target.square().sum()), rel=1e-5)


def test_the_size_of_a_source_changes_no_solution():
    def solved(scale: float):
        sums = TokenSums(5, 3, torch.device("cpu"))
        for number, factor in enumerate((1.0, scale)):
            x, target = tokens(number, 15, 1.0)
            sums.add(factor * x, factor * target, number)
        found = sums.equations()
        return solve_ridge(found.gram, found.cross, torch.zeros(3, 5), 0.1)[0]

    torch.testing.assert_close(solved(100.0), solved(1.0), rtol=1e-4, atol=1e-5)


def test_a_repair_is_told_the_source_of_each_batch(monkeypatch):
    seen = []

    class Watched(TokenSums):
        def add(self, x, target, source=0):
            seen.append((len(x), source))
            super().add(x, target, source)

    monkeypatch.setattr(block_repair, "TokenSums", Watched)
    model = make_model("llama", "gqa", num_hidden_layers=1)
    whole = mixed([calibration_from_tokens(random_tokens(number, 6, seed=number)) for number in (3, 2)])
    plan = select(score(model, whole, progress=False).table, Geometry.of(model), 0.2)
    repair_(apply_plan(model, plan), model, plan, list(whole.batches(2)), RepairOptions(), progress=False)
    assert seen == 2 * [(12, 0), (6, 0), (12, 1)]
