"""Each way of repairing experts, against the problem written out and solved at once."""

from __future__ import annotations

import pytest
import torch
from tiny_mixtures import EXPERTS, choose, make_mixture, one_expert

from prunus.repair.block_walk import Routed
from prunus.repair.expert_repair import ExpertSums

DAMPING = 1e-2


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def work(request):
    """A block of experts with tokens that went through it, and what it should have added."""
    model = make_mixture(request.param)
    block = model.model.layers[1].mlp
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    router = block.gate if hasattr(block, "gate") else block.router
    with torch.no_grad():
        _, weights, chosen = router(x)
        output = block.experts(x, chosen, weights)
    target = output + torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return model, block, Routed(x, chosen, weights, output.view(2, 20, -1)), target.view(2, 20, -1)


def mask_of(target):
    mask = torch.ones(target.shape[:2], dtype=torch.bool)
    mask[1, 15:] = False
    return mask


def contributions(model, block, x):
    """w f(x) and w of every token and expert, by the tests' own rule of routing."""
    added, weights = torch.zeros(len(x), EXPERTS, x.shape[1], dtype=torch.float64), torch.zeros(len(x), EXPERTS)
    with torch.no_grad():
        for number, token in enumerate(x):
            for expert, weight in zip(*choose(model, block, token, range(EXPERTS)), strict=True):
                added[number, expert] = (weight * one_expert(model, block, expert, token)).double()
                weights[number, expert] = weight
    return added, weights.double()


def test_gains_are_the_best_factors(work):
    model, block, seen, target = work
    mask = mask_of(target)
    counted = mask.flatten()
    added, _ = contributions(model, block, seen.x[counted])
    error = (target - seen.output).flatten(0, 1)[counted].double()
    columns = added.transpose(1, 2).reshape(-1, EXPERTS)  # (tokens · hidden, experts)
    ridge = DAMPING * columns.square().sum(dim=0).mean()
    gram = columns.T @ columns + ridge * torch.eye(EXPERTS, dtype=torch.float64)
    factors = 1 + torch.linalg.solve(gram, columns.T @ error.flatten())
    before = {name: p.detach().clone() for name, p in block.experts.named_parameters()}
    sums = ExpertSums(block.experts, "gain", torch.float32)
    sums.add(seen, target, mask)
    relative_before, relative_after, _ = sums.solve_(DAMPING)
    shape = factors.view(-1, 1, 1).float()
    for name, old in before.items():
        factor = shape.view(-1, *[1] * (old.ndim - 1)) if name.startswith("down_proj") else 1.0
        torch.testing.assert_close(getattr(block.experts, name).detach(), old * factor, rtol=1e-4, atol=1e-5)
    left = error - ((factors - 1)[None, :, None] * added).sum(dim=1)
    total = target.flatten(0, 1)[counted].double().square().sum()
    assert relative_before == pytest.approx(float(error.square().sum() / total), rel=1e-4)
    assert relative_after == pytest.approx(float(left.square().sum() / total), rel=1e-4)


def test_each_expert_is_solved_from_its_own_tokens_and_its_part_of_the_error(work):
    model, block, seen, target = work
    mask = mask_of(target)
    counted = mask.flatten()
    x, experts = seen.x[counted], block.experts
    _, weights = contributions(model, block, x)
    error = (target - seen.output).flatten(0, 1)[counted].double()
    sums = ExpertSums(experts, "least_squares", torch.float32)
    sums.add(seen, target, mask)
    old = experts.down_proj.detach().clone()
    expected = []
    for expert in range(EXPERTS):
        tokens = weights[:, expert] > 0
        w = weights[tokens, expert, None]
        weight = (old[expert].T if experts.is_transposed else old[expert]).double()
        gate_up = x[tokens] @ (
            experts.gate_up_proj[expert] if experts.is_transposed else experts.gate_up_proj[expert].T
        )
        if experts.has_bias:
            gate_up = gate_up + experts.gate_up_proj_bias[expert]
        inputs = w * experts._apply_gate(gate_up).detach().double()
        part = w / weights[tokens].sum(dim=1, keepdim=True)
        wanted = inputs @ weight.T + part * error[tokens]
        ridge = DAMPING * inputs.square().sum(dim=0).mean()
        gram = inputs.T @ inputs + ridge * torch.eye(inputs.shape[1], dtype=torch.float64)
        solved = torch.linalg.solve(gram, inputs.T @ wanted + ridge * weight.T)
        expected.append(solved if experts.is_transposed else solved.T)
    before, after, condition = sums.solve_(DAMPING)
    torch.testing.assert_close(experts.down_proj.detach(), torch.stack(expected).float(), rtol=1e-3, atol=1e-4)
    assert after < before
    assert condition >= 1
    assert sums.tokens.tolist() == (weights > 0).sum(dim=0).tolist()


def test_an_expert_without_tokens_stays(work):
    _, block, seen, target = work
    few = Routed(seen.x, torch.zeros_like(seen.chosen), seen.weights, seen.output)
    few.chosen[:, 1] = 3
    before = block.experts.down_proj.detach().clone()
    sums = ExpertSums(block.experts, "least_squares", torch.float32)
    sums.add(few, target, None)
    sums.solve_(DAMPING)
    same = [bool(torch.equal(old, new)) for old, new in zip(before, block.experts.down_proj.detach(), strict=True)]
    assert same == [False, True, True, False, True, True]


@pytest.mark.parametrize("way", ["least_squares", "gain"])
def test_batches_add_up(work, way):
    """Both halves of the tokens, one after the other, are the tokens."""
    _, block, seen, target = work
    found = []
    for parts in (1, 2):
        before = block.experts.down_proj.detach().clone()
        sums = ExpertSums(block.experts, way, torch.float32)
        each = (seen.x, seen.chosen, seen.weights, seen.output, target)
        for x, chosen, weights, output, wanted in zip(*(tensor.chunk(parts) for tensor in each), strict=True):
            sums.add(Routed(x, chosen, weights, output), wanted, None)
        errors = sums.solve_(DAMPING)
        found.append((block.experts.down_proj.detach().clone(), torch.tensor(errors[:2]), sums.tokens))
        with torch.no_grad():
            block.experts.down_proj.copy_(before)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
