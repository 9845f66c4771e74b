"""Sums over tokens of several sources, against one least-squares problem with rescaled rows."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref

import pytest
import torch
from tiny_families import make_model, random_tokens

from prunus.calibration import calibration_from_tokens
from prunus.calibration.sources import mixed
from prunus.model.geometry import Geometry
from prunus.repair import block_repair, least_squares
from prunus.repair.block_repair import RepairOptions, repair_
from prunus.repair.least_squares import NormalEquations, TokenSums, solve_ridge_
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
        return solve_ridge_(found, torch.zeros(3, 5), 0.1).weight

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


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_parts_and_the_shape_of_memory_change_nothing(monkeypatch, at_once):
    """A weight in half precision, solved and measured in parts, against lstsq of one stacked system."""
    x, target = tokens(0, 40, 3.0)
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(9)).bfloat16()
    sums = TokenSums(5, 3, torch.device("cpu"))
    sums.add(x, target)
    equations = sums.equations()
    gram = equations.gram.clone()
    monkeypatch.setattr(least_squares, "AT_ONCE", at_once)
    errors = [equations.error(weight)]
    solution = solve_ridge_(equations, weight, 0.2)
    root = (0.2 * gram.double().diagonal().mean()).sqrt()
    rows = torch.cat([x.double(), root * torch.eye(5)]), torch.cat([target.double(), root * weight.double().T])
    torch.testing.assert_close(solution.weight, torch.linalg.lstsq(*rows).solution.T, rtol=1e-5, atol=1e-6)
    for measured, by in ((*errors, weight.double()), (solution.error, solution.weight)):
        left = (x.double() @ by.T - target.double()).square().sum() / target.double().square().sum()
        assert measured == pytest.approx(float(left), rel=1e-5)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_what_is_not_positive_definite_is_refused(value):
    gram = torch.eye(5)
    gram[3, 3] = value
    with pytest.raises(torch.linalg.LinAlgError):
        solve_ridge_(NormalEquations(gram, torch.ones(5, 3), 1.0), torch.zeros(3, 5), 0.01)


def test_one_copy_of_the_sums_is_made():
    """Of a model of 8 billion parameters they take 0.8 GB, in float64 twice that."""
    width, rows = 1500, 64
    program = (
        "import torch; from prunus.machine.metering import metered; from prunus.repair import least_squares as l\n"
        "torch.set_num_threads(1)\n"
        "def both(n, m):\n"
        "    e = l.NormalEquations(torch.eye(n), torch.ones(n, m), 1.0)\n"
        "    with metered('cpu') as cost:\n"
        "        e.error(torch.zeros(m, n)); l.solve_ridge_(e, torch.zeros(m, n), 0.1)\n"
        "    return cost.peak_bytes\n"
        f"print(both(64, 8), both({width}, {rows}))"
    )
    # Large pages, which `make test` asks for, count as a whole when a part of them is used.
    small_pages = {**os.environ, "GLIBC_TUNABLES": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=small_pages)
    small, large = map(int, done.stdout.split())
    sums, copy = 4 * width * (width + rows), 8 * width**2
    assert large - small < sums + 1.5 * copy


def test_the_sums_are_let_go_before_they_are_factored(monkeypatch):
    equations = NormalEquations(torch.eye(5), torch.ones(5, 3), 1.0)
    held, whole = weakref.ref(equations.gram), least_squares._factored_

    def spied(matrix):
        assert held() is None
        return whole(matrix)

    monkeypatch.setattr(least_squares, "_factored_", spied)
    solve_ridge_(equations, torch.zeros(3, 5), 0.1)
