"""The part of a vocabulary that stands for all of it, against the loss over all of it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_families import make_model, random_tokens
from tiny_recovery import cut
from torch import nn
from torch.nn import functional

from prunus.model.loss import next_token_labels
from prunus.recovery.objective import BeforeHead, TokenWeights, token_loss
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.student import Student, before_head
from prunus.recovery.vocabulary import VocabularySample, VocabularySampler

ENTRIES, HIDDEN = 60, 8


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def text():
    """Zipf's law: entry v occurs about 1 / (v + 1) as often as the first, and the last ten never."""
    chances = 1 / torch.arange(1, ENTRIES - 9)
    return torch.multinomial(chances, 3000, replacement=True, generator=torch.Generator().manual_seed(1))


def test_chances_follow_the_root_of_the_counts_and_add_up(text):
    sampler = VocabularySampler(text, ENTRIES, 20)
    batch = torch.tensor([[3, 55], [3, 7]])
    chances = sampler.chances(batch)
    assert chances[[3, 7, 55]].tolist() == [1, 1, 1]
    assert float(chances.sum()) == pytest.approx(20, rel=2e-3)
    counts = torch.tensor([max(0.5, float((text == v).sum())) for v in range(ENTRIES)]).sqrt()
    open_ones = [v for v in range(ENTRIES) if chances[v] < 1]
    ratios = [float(chances[v] / counts[v]) for v in open_ones]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-5)
    assert len(open_ones) < ENTRIES - 3, "some that are frequent are certain, too"
    assert float(VocabularySampler(text, ENTRIES, 2).chances(batch).sum()) == 3, "never fewer than the batch has"


def test_how_often_entries_are_drawn_is_their_chance(text):
    sampler, batch = VocabularySampler(text, ENTRIES, 20), torch.tensor([[3, 55]])
    torch.manual_seed(0)
    times, rounds = torch.zeros(ENTRIES), 4000
    for _ in range(rounds):
        sample = sampler.draw(batch)
        times[sample.entries] += 1
        torch.testing.assert_close(sample.log_chance, sampler.chances(batch)[sample.entries].log().float())
    # Five standard errors of a share of 4000.
    assert float((times / rounds - sampler.chances(batch)).abs().max()) < 5 * 0.5 / rounds**0.5


def test_all_entries_give_the_loss_itself_and_many_samples_its_mean(text):
    head, dense = nn.Linear(HIDDEN, ENTRIES), nn.Linear(HIDDEN, ENTRIES)
    for number, parameter in enumerate([*head.parameters(), *dense.parameters()]):
        parameter.data = 0.5 * numbers(*parameter.shape, seed=number)
    batch = text[:24].view(2, 12)
    hidden, labels = numbers(2, 12, HIDDEN, seed=8), next_token_labels(batch)
    teacher_hidden = hidden + 0.3 * numbers(2, 12, HIDDEN, seed=9)
    weights = TokenWeights(kl=0.7, ce=0.4, temperature=1.5)

    def gradient(sample: VocabularySample | None) -> tuple[float, torch.Tensor]:
        leaf = hidden.clone().requires_grad_()
        parts = []
        for module, states in ((head, leaf), (dense, teacher_hidden)):
            rows = slice(None) if sample is None else sample.entries
            weight, bias = module.weight[rows].detach(), module.bias[rows].detach()
            parts.append(BeforeHead(states, lambda x, w=weight, b=bias: functional.linear(x, w, b)))
        loss = token_loss(parts[0], labels, weights, parts[1], 5, sample)
        loss.backward()
        return loss.item(), leaf.grad

    loss, exact = gradient(None)
    everything = VocabularySample(torch.arange(ENTRIES), torch.zeros(ENTRIES))
    assert gradient(everything)[0] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(gradient(everything)[1], exact)
    sampler = VocabularySampler(text, ENTRIES, 40)
    torch.manual_seed(0)
    samples = [sampler.draw(batch) for _ in range(200)]
    found, without = (
        [gradient(VocabularySample(sample.entries, factor * sample.log_chance)) for sample in samples]
        for factor in (1, 0)
    )

    def off(gradients: list[tuple[float, torch.Tensor]]) -> float:
        mean = torch.stack([each for _, each in gradients]).mean(dim=0)
        return float((mean - exact).norm() / exact.norm())

    # What is left is the bias of a quotient of two estimates; without the chances it is twice as large.
    assert sum(each for each, _ in found) / len(found) == pytest.approx(loss, rel=0.05)
    assert off(found) < 0.12
    assert off(without) > 0.18


def test_a_student_trains_the_rows_that_were_drawn(text):
    """Gradients of a tied embedding by a sample: those of the same loss made from rows of the logits."""
    model = make_model("llama", "gqa", num_hidden_layers=4, vocab_size=ENTRIES, tie_word_embeddings=True).float()
    _, pruned = cut(model)
    ids = random_tokens().remainder(ENTRIES)
    sampler = VocabularySampler(text, ENTRIES, 30)
    options = RecoveryOptions(train="full", kl_weight=1.0, ce_weight=0.0)
    student = Student(pruned.train(), options, model, sampler)
    torch.manual_seed(4)
    student(ids)["loss"].backward()
    embedding = pruned.get_input_embeddings().weight
    found = embedding.grad.clone()

    torch.manual_seed(4)
    sample = sampler.draw(ids)
    oracle = copy.deepcopy(pruned)
    oracle.zero_grad()
    own, target = (
        m(input_ids=ids).logits[..., sample.entries].double() - sample.log_chance.double() for m in (oracle, model)
    )
    p, q = own.softmax(dim=-1), target.detach().softmax(dim=-1)
    (q * (q.log() - p.log())).sum(dim=-1).mean().backward()
    torch.testing.assert_close(found, oracle.get_input_embeddings().weight.grad, rtol=1e-3, atol=1e-7)


def test_frozen_heads_have_nothing_to_train():
    model = make_model("llama", "gqa", vocab_size=ENTRIES)
    model.requires_grad_(False)
    sample = VocabularySample(torch.tensor([1, 5]), torch.zeros(2))
    assert not before_head(model, torch.zeros(1, 2, model.config.hidden_size), sample).trained
    logits = before_head(model, numbers(1, 2, model.config.hidden_size, seed=0), sample)
    torch.testing.assert_close(logits.head(logits.hidden), model.lm_head(logits.hidden)[..., [1, 5]])
