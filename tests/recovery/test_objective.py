"""The chunked loss against one that is written out token by token in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_families import ONE_EACH, VOCABULARY, case_id, make_model, random_tokens
from tiny_recovery import cut
from torch import nn

from prunus.model.loss import IGNORE_INDEX, head_function, next_token_labels
from prunus.recovery.objective import BeforeHead, TokenWeights, token_loss
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.student import Student

BATCH, LENGTH, HIDDEN, VOCABULARY_HERE = 3, 7, 12, 29


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def parts():
    head, teacher_head = nn.Linear(HIDDEN, VOCABULARY_HERE), nn.Linear(HIDDEN + 4, VOCABULARY_HERE)
    for number, parameter in enumerate([*head.parameters(), *teacher_head.parameters()]):
        parameter.data = numbers(*parameter.shape, seed=number)
    labels = torch.randint(0, VOCABULARY_HERE, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
    labels[:, -1] = IGNORE_INDEX
    labels[1, 3] = IGNORE_INDEX
    hidden = numbers(BATCH, LENGTH, HIDDEN, seed=6)
    return head, hidden, labels, teacher_head, numbers(BATCH, LENGTH, HIDDEN + 4, seed=7)


def written_out(head, hidden, labels, teacher_head, teacher_hidden, *, kl_weight, ce_weight, temperature):
    """The formula, one token and one entry of the vocabulary at a time."""

    def distribution(logits, temperature):
        exponentials = [torch.exp(logit / temperature) for logit in logits]
        return [value / sum(exponentials) for value in exponentials]

    divergences, losses = [], []
    for b in range(BATCH):
        for t in range(LENGTH):
            own = head.weight @ hidden[b, t] + head.bias
            dense = (teacher_head.weight @ teacher_hidden[b, t] + teacher_head.bias).detach()
            p, q = distribution(own, temperature), distribution(dense, temperature)
            divergences.append(sum(qi * (torch.log(qi) - torch.log(pi)) for pi, qi in zip(p, q, strict=True)))
            if labels[b, t] != IGNORE_INDEX:
                losses.append(-torch.log(distribution(own, 1.0)[labels[b, t]]))
    return kl_weight * temperature**2 * sum(divergences) / len(divergences) + ce_weight * sum(losses) / len(losses)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize(
    "weights",
    [
        {"kl_weight": 1.0, "ce_weight": 0.0, "temperature": 1.0},
        {"kl_weight": 0.0, "ce_weight": 1.0, "temperature": 1.0},
        {"kl_weight": 0.7, "ce_weight": 0.2, "temperature": 2.5},
    ],
)
def test_loss_and_gradients_are_those_written_out(parts, weights, chunk):
    head, hidden, labels, teacher_head, teacher_hidden = parts
    oracle_head, oracle_teacher = copy.deepcopy(head).double(), copy.deepcopy(teacher_head).double()
    oracle_hidden = hidden.double().requires_grad_()
    expected = written_out(oracle_head, oracle_hidden, labels, oracle_teacher, teacher_hidden.double(), **weights)
    (3 * expected).backward()

    hidden.requires_grad_()
    student = BeforeHead(hidden, head, list(head.parameters()))
    names = {"kl_weight": "kl", "ce_weight": "ce", "temperature": "temperature"}
    given = TokenWeights(**{names[name]: value for name, value in weights.items()})
    loss = token_loss(student, labels, given, BeforeHead(teacher_hidden, teacher_head), chunk)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), oracle_hidden.grad, rtol=1e-4, atol=1e-6)
    for own, wanted in zip(head.parameters(), oracle_head.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher_head.parameters())


def test_the_divergence_of_equal_distributions_is_zero(parts):
    head, hidden, labels, _, _ = parts
    same = BeforeHead(hidden, head)
    loss = token_loss(same, labels, TokenWeights(kl=1.0, ce=0.0), same)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_nothing_of_the_size_of_all_logits_is_kept(parts):
    """What autograd holds on to between the passes: gradients of hidden states and head, and no logits."""
    head, hidden, labels, teacher_head, teacher_hidden = parts
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    hidden.requires_grad_()
    student, teacher = BeforeHead(hidden, head, list(head.parameters())), BeforeHead(teacher_hidden, teacher_head)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = token_loss(student, labels, TokenWeights(kl=1.0), teacher, chunk=2)
    assert loss.requires_grad
    assert max(sizes) == max(hidden.numel(), head.weight.numel()) < BATCH * LENGTH * VOCABULARY_HERE


def test_mixed_precision_with_a_trained_head(parts):
    """float32 weights under autocast, as all-weight training runs: the gradient of the head is summed over pieces."""
    head, hidden, labels, teacher_head, teacher_hidden = parts
    gradients = []
    for chunk in (3, 1000):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            student = BeforeHead(hidden, head, list(head.parameters()))
            teacher = BeforeHead(teacher_hidden, teacher_head)
            loss = token_loss(student, labels, TokenWeights(kl=1.0), teacher, chunk)
        loss.backward()
        gradients.append(head.weight.grad.clone())
    assert gradients[0].dtype == torch.float32
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("case", ONE_EACH, ids=case_id)
def test_the_student_loss_is_that_of_whole_logits(case):
    """With every family's own factors and caps on logits."""
    dense = make_model(*case, num_hidden_layers=4)
    _, smaller = cut(dense)
    ids = random_tokens()
    options = RecoveryOptions(kl_weight=0.6, ce_weight=0.3, temperature=1.5)
    student = Student(smaller, options, dense).train()
    loss = student(ids)["loss"]
    loss.backward()
    with torch.no_grad():
        own, wanted = (model(ids, use_cache=False).logits.double() for model in (smaller, dense))
    assert own.shape == (*ids.shape, VOCABULARY)
    p, q = (own / 1.5).log_softmax(-1), (wanted / 1.5).log_softmax(-1)
    divergence = (q.exp() * (q - p)).sum(-1).mean() * 1.5**2
    log_p = own.log_softmax(-1)[:, :-1]
    cross_entropy = -log_p.gather(-1, ids[:, 1:, None]).mean()
    expected = 0.6 * divergence + 0.3 * cross_entropy
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert all(parameter.grad is not None for parameter in smaller.parameters())
    student.eval()
    assert student(ids)["loss"].item() == pytest.approx(cross_entropy.item(), rel=1e-5)


@pytest.mark.parametrize("case", [("llama", "mha-tied"), ("gemma2", "gqa-tied"), ("granite", "gqa-tied-biases")])
def test_gradients_of_tied_weights_are_those_of_autograd(case):
    """The head's share, which is taken piece by piece, is added to that of the embedding."""
    dense, smaller = make_model(*case), make_model(*case, seed=1)
    ids = random_tokens()
    student = Student(smaller, RecoveryOptions(kl_weight=1.0, ce_weight=0.5), dense).train()
    student(ids)["loss"].backward()
    own = {name: parameter.grad.clone() for name, parameter in smaller.named_parameters()}
    smaller.zero_grad()
    p, q = smaller(ids).logits.log_softmax(-1), dense(ids).logits.detach().log_softmax(-1)
    labels = next_token_labels(ids)
    losses = torch.nn.functional.cross_entropy(p.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    ((q.exp() * (q - p)).sum(-1).mean() + 0.5 * losses).backward()
    for name, parameter in smaller.named_parameters():
        torch.testing.assert_close(own[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert math.isfinite(head_function(smaller)(torch.zeros(1, 48)).sum().item())
