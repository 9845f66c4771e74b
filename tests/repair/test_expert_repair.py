"""The repair of experts, against the problem written out and solved at once."""

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
    x[:20] *= 4
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


@pytest.mark.parametrize("sources", [1, 2])
def test_each_expert_is_solved_from_its_own_tokens_and_its_part_of_the_error(work, sources):
    """Of two sources, of which one gives longer inputs, each counts by its tokens alone."""
    model, block, seen, target = work
    source_of = torch.arange(40) // 20 if sources == 2 else torch.zeros(40, dtype=torch.int64)
    mask = mask_of(target)
    counted = mask.flatten()
    x, experts = seen.x[counted], block.experts
    _, weights = contributions(model, block, x)
    error = (target - seen.output).flatten(0, 1)[counted].double()
    sums = ExpertSums(experts, torch.float32)
    for part in range(2):
        here = slice(20 * part, 20 * part + 20)
        half = Routed(seen.x[here], seen.chosen[here], seen.weights[here], seen.output[part : part + 1])
        sums.add(half, target[part : part + 1], mask[part : part + 1], int(source_of[20 * part]))
    old = experts.down_proj.detach().clone()
    source_of, expected = source_of[counted], []
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
        if sources == 2:
            for source in range(2):
                own = source_of[tokens] == source
                scale = (inputs[own].square().sum() / max(1, own.sum())).sqrt()
                inputs[own], wanted[own] = inputs[own] / scale, wanted[own] / scale
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
    sums = ExpertSums(block.experts, torch.float32)
    sums.add(few, target, None)
    sums.solve_(DAMPING)
    same = [bool(torch.equal(old, new)) for old, new in zip(before, block.experts.down_proj.detach(), strict=True)]
    assert same == [False, True, True, False, True, True]


def test_batches_add_up(work):
    """Both halves of the tokens, one after the other, are the tokens."""
    _, block, seen, target = work
    found = []
    for parts in (1, 2):
        before = block.experts.down_proj.detach().clone()
        sums = ExpertSums(block.experts, torch.float32)
        each = (seen.x, seen.chosen, seen.weights, seen.output, target)
        for x, chosen, weights, output, wanted in zip(*(tensor.chunk(parts) for tensor in each), strict=True):
            sums.add(Routed(x, chosen, weights, output), wanted, None)
        errors = sums.solve_(DAMPING)
        found.append((block.experts.down_proj.detach().clone(), torch.tensor(errors[:2]), sums.tokens))
        with torch.no_grad():
            block.experts.down_proj.copy_(before)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
