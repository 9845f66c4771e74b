"""Temperature of a repaired model: one factor on the last norm corrects its overconfidence.

Least squares makes the remaining weights fit the calibration tokens, and on other text the model errs more often than
its logits say. The hidden states h before the head are multiplied by the factor that the text likes best,

    s = argmin_s Σ_t −log softmax(head(s · h_t))[x_{t+1}],

and s goes into the weight of the norm that makes h. The order of the predictions, and so greedy text, stays the same.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2 (temperature scaling, T = 1/s).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from prunus.calibration import Batch
from prunus.model.evaluation_mode import evaluation_mode
from prunus.model.families import family_of
from prunus.model.loss import IGNORE_INDEX, chunked_cross_entropy, head_function, next_token_labels
from prunus.model.modules import submodule
from prunus.model.saved_dtype import saved_dtype
from prunus.sweep.blocks import last_hidden_states
from prunus.sweep.spool import Slots

__all__ = ["fit_temperature_"]

#: about how many tokens the factor is measured on: it is one number, and the loss is flat around it
TOKENS = 2048
#: where the factor is looked for
LOWEST, HIGHEST = 0.5, 2.0
#: on a logarithmic scale: how far apart the first factors are, and how closely the best is found
STEP, CLOSE = math.log(2) / 4, 0.01
#: parabolas after which the best factor so far will do; two are usual
MOST_PARABOLAS = 8
#: how often the tokens go through the head, as a rule
PASSES = 4


@torch.no_grad()
def fit_temperature_(
    model: Any,
    batches: Sequence[Batch],
    *,
    among: Sequence[int] | None = None,
    residual: Slots | None = None,
    tokens: int = TOKENS,
) -> float:
    """Scale the last norm of a model so that its logits fit calibration text best.

    Args:
        model: in memory or opened; the weight of its last norm is changed.
        batches: calibration sequences, of which evenly spaced ones are used.
        among: numbers of the sequences, counted over all batches, that may be used; None = all.
        residual: the residual stream after the last layer for every batch, if somebody has it.
        tokens: about how many tokens to measure on.

    Returns:
        s, the factor on the hidden states before the head: below 1 where the model was too sure.
    """
    family = family_of(model.config)
    norm, head = submodule(model, family.final_norm), head_function(model)
    places = [(number, row) for number, batch in enumerate(batches) for row in range(len(batch.input_ids))]
    usable = places if among is None else [places[sequence] for sequence in among]
    step = max(1, sum(batches[number].input_ids.shape[1] for number, _ in usable) // tokens)
    rows: dict[int, list[int]] = {}
    for number, row in usable[::step]:
        rows.setdefault(number, []).append(row)
    chosen = [_part(batches[number], which) for number, which in rows.items()]
    with evaluation_mode(model):
        hidden = (
            [norm(residual[number][which]) for number, which in rows.items()]
            if residual is not None
            else list(last_hidden_states(model, chosen))
        )
        labels = [
            next_token_labels(batch.input_ids, batch.attention_mask).to(states.device)
            for batch, states in zip(chosen, hidden, strict=True)
        ]

        def loss(factor: float) -> float:
            return sum(
                float(chunked_cross_entropy(states * factor, head, wanted).double().sum())
                for states, wanted in zip(hidden, labels, strict=True)
            )

        if all(bool((wanted == IGNORE_INDEX).all()) for wanted in labels):
            return 1.0
        factor = _lowest(loss)
    scaled = factor * (norm.weight.float() + family.norm_offset) - family.norm_offset
    norm.weight.copy_(scaled.to(saved_dtype(model)))
    return factor


def _part(batch: Batch, rows: list[int]) -> Batch:
    """Some sequences of a batch."""
    mask = batch.attention_mask
    return replace(batch, input_ids=batch.input_ids[rows], attention_mask=None if mask is None else mask[rows])


def _lowest(loss: Callable[[float], float]) -> float:
    """Where in [LOWEST, HIGHEST] a function with one minimum has it.

    On a logarithmic scale the loss is nearly a parabola, so that few values of it are needed: each is a pass through
    the head. Three points are moved until the middle one is the lowest; then the lowest point of the parabola through
    them takes the place of one of them, until it is where the middle one is.

    Source: Brent 1973, "Algorithms for Minimization without Derivatives", chapter 5 (parabolic interpolation).
    """
    at = cache(lambda point: loss(math.exp(point)))
    left, middle, right = -STEP, 0.0, STEP
    while at(left) < at(middle) and math.exp(middle) > LOWEST:
        left, middle, right = left - STEP, left, middle
    while at(right) < at(middle) and math.exp(middle) < HIGHEST:
        left, middle, right = middle, right, right + STEP
    for _ in range(MOST_PARABOLAS):
        before, behind = (middle - left) * (at(middle) - at(right)), (right - middle) * (at(middle) - at(left))
        if before + behind == 0:  # flat
            break
        vertex = middle - ((middle - left) * before - (right - middle) * behind) / (before + behind) / 2
        if abs(vertex - middle) < CLOSE:
            middle = vertex
            break
        if at(vertex) < at(middle):
            left, middle, right = (left, vertex, middle) if vertex < middle else (middle, vertex, right)
        else:
            left, right = (vertex, right) if vertex < middle else (left, vertex)
    return min(max(math.exp(middle), LOWEST), HIGHEST)
