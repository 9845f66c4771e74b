"""Block-major order: all batches through one layer, then all through the next; backwards likewise.

One forward sweep keeps only what enters each layer. Then, from the last layer down, each layer runs again for every
batch, this time with a graph, and backpropagates; its statistics are finished before the next layer's begin. At any
time there are the gradients of one layer, the activations of one layer for one batch, and the inputs of all layers,
which wait on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prunus.groups import Geometry, submodule
from prunus.loss import head_function
from prunus.sweep.blocks import layer_calls, run_layer
from prunus.sweep.objective import losses_and_gradient
from prunus.sweep.prepared import PreparedBatch, check_losses
from prunus.sweep.taps import Taps

__all__ = ["run_streamed"]


def run_streamed(
    model: Any,
    geometry: Geometry,
    taps: Taps,
    batches: Sequence[PreparedBatch],
    finish_layer: Callable[[int], None],
    *,
    progress: bool,
) -> float | None:
    """Run all batches through one layer at a time.

    Args:
        model: a frozen causal language model in evaluation mode.
        geometry: its shape.
        taps: who listens.
        batches: the calibration sequences.
        finish_layer: called once for every layer, as soon as all batches are through it.
        progress: show a progress bar when stderr is a terminal.

    Returns:
        The loss summed over all tokens, or None without a backward pass.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    layers = submodule(model, geometry.family.layers)
    device = model.device
    calls = [layer_calls(model, geometry.family.layers, batch.batch) for batch in batches]
    hidden = [call.hidden for call in calls]
    passes = len(layers) * (2 if taps.needs_gradients else 1) - int(taps.needs_gradients)
    with tqdm(total=passes, desc="statistics", unit="layer", disable=None if progress else True) as bar:
        if not taps.needs_gradients:
            for layer_idx, layer in enumerate(layers):
                with torch.no_grad(), taps.on([(layer_idx, layer)]):
                    for number, batch in enumerate(batches):
                        taps.start_batch(batch, device)
                        hidden[number] = run_layer(layer, hidden[number], calls[number].arguments[layer_idx])
                finish_layer(layer_idx)
                bar.update()
            return None

        # The last layer runs forwards only once: with a graph, and on through the head.
        waiting: list[list[Tensor]] = []
        for layer_idx, layer in enumerate(layers[:-1]):
            waiting.append([tensor.cpu() for tensor in hidden])
            with torch.no_grad():
                for number, call in enumerate(calls):
                    hidden[number] = run_layer(layer, hidden[number], call.arguments[layer_idx])
            bar.update()
        waiting.append([tensor.cpu() for tensor in hidden])
        del hidden

        loss = 0.0
        gradients: list[Tensor] = [torch.empty(0)] * len(batches)
        head, norm = head_function(model), submodule(model, geometry.family.final_norm)
        for layer_idx in reversed(range(len(layers))):
            with taps.on([(layer_idx, layers[layer_idx])]), torch.enable_grad():
                entering = waiting.pop()
                for number, batch in enumerate(batches):
                    taps.start_batch(batch, device)
                    x = entering[number].to(device).detach().requires_grad_()
                    output = run_layer(layers[layer_idx], x, calls[number].arguments[layer_idx])
                    if layer_idx == len(layers) - 1:
                        output = norm(output)
                        losses, gradient = losses_and_gradient(
                            output, head, batch.labels.to(device), batch.sampling_seed
                        )
                        inputs = [*(layer[number] for layer in waiting), entering[number], output]
                        check_losses(losses, batch, partial(_first_non_finite, inputs))
                        loss += float(losses.sum())
                    else:
                        gradient = gradients[number].to(device)
                    output.backward(gradient)
                    assert x.grad is not None
                    gradients[number] = x.grad.cpu()
            finish_layer(layer_idx)
            bar.update()
    return loss


def _first_non_finite(entering: Sequence[Tensor]) -> str:
    """Say which layer is the first to answer NaN or infinity, from what enters each layer and what leaves the last."""
    for number, values in enumerate(entering):
        if not bool(torch.isfinite(values).all()):
            return (
                f"layer {number - 1} is the first whose output is not finite"
                if number
                else "the embeddings are not finite"
            )
    return "the head's logits are not finite"
