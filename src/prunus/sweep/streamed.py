"""Block-major order: all batches through one layer, then all through the next; backwards likewise.

One forward sweep keeps only what enters each layer. Then, from the last layer down, each layer runs again for every
batch, this time with a graph, and backpropagates; its statistics are finished before the next layer's begin. At any
time there are the weights of one layer (and the next, on its way), the gradients of one layer, and the activations of
one layer for one batch; what enters the layers waits in a spool, in memory or on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunus.groups import Geometry, submodule
from prunus.layers import layers_of
from prunus.loss import head_function
from prunus.sweep.blocks import layer_calls, run_layer
from prunus.sweep.objective import losses_and_gradient
from prunus.sweep.prepared import PreparedBatch, check_losses
from prunus.sweep.spool import Spool
from prunus.sweep.taps import Taps

__all__ = ["run_streamed"]


def run_streamed(
    model: Any,
    geometry: Geometry,
    taps: Taps,
    batches: Sequence[PreparedBatch],
    finish_layer: Callable[[int, nn.Module, float], None],
    *,
    spool: Spool,
    finished: int,
    progress: bool,
) -> None:
    """Run all batches through one layer at a time.

    Args:
        model: a frozen causal language model in evaluation mode, in memory or opened.
        geometry: its shape.
        taps: who listens.
        batches: the calibration sequences.
        finish_layer: called once for every layer, with the held layer and the loss summed over all tokens (0 without a
            backward pass), as soon as all batches are through it.
        spool: where what enters the layers, and the gradients by it, wait.
        finished: how many layers an earlier run finished, whose spool this is: the first ones, or with a backward pass
            the last ones.
        progress: show a progress bar when stderr is a terminal.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    layers, device = layers_of(model), model.device
    last = len(layers) - 1
    backward = taps.needs_gradients
    arguments: list[Sequence[dict[str, Any]]] = []

    def entering() -> Iterator[Tensor]:
        for batch in batches:
            call = layer_calls(model, geometry.family.layers, batch.batch)
            arguments.append(call.arguments)
            yield call.hidden

    def leaving(layer_idx: int, layer: nn.Module) -> Iterator[Tensor]:
        for number, batch in enumerate(batches):
            taps.start_batch(batch, device)
            x = spool.read(f"inputs-{layer_idx}", number).to(device)
            yield run_layer(layer, x, arguments[number][layer_idx])

    spool.write("inputs-0", entering())
    bar = tqdm(
        total=len(layers) * (2 if backward else 1) - int(backward),
        desc="statistics",
        unit="layer",
        disable=None if progress else True,
    )
    with bar:
        if not backward:
            bar.update(finished)
            for layer_idx in range(finished, len(layers)):
                with layers.hold(layer_idx, then=layer_idx + 1) as layer, torch.no_grad():
                    with taps.on([(layer_idx, layer)]):
                        if layer_idx < last:
                            spool.write(f"inputs-{layer_idx + 1}", leaving(layer_idx, layer))
                        else:
                            _exhaust(leaving(layer_idx, layer))
                    finish_layer(layer_idx, layer, 0.0)
                spool.drop(f"inputs-{layer_idx}")
                bar.update()
            return

        # The last layer runs forwards only once: with a graph, and on through the head.
        top = last - finished
        bar.update(2 * finished)
        for layer_idx in range(top):
            if not spool.has(f"inputs-{layer_idx + 1}"):
                with layers.hold(layer_idx, then=layer_idx + 1) as layer, torch.no_grad():
                    spool.write(f"inputs-{layer_idx + 1}", leaving(layer_idx, layer))
            bar.update()

        loss = 0.0
        head, norm = head_function(model), submodule(model, geometry.family.final_norm)

        def backpropagated(layer_idx: int, layer: nn.Module) -> Iterator[Tensor]:
            nonlocal loss
            for number, batch in enumerate(batches):
                taps.start_batch(batch, device)
                x = spool.read(f"inputs-{layer_idx}", number).to(device).detach().requires_grad_()
                output = run_layer(layer, x, arguments[number][layer_idx])
                if layer_idx == last:
                    output = norm(output)
                    losses, gradient = losses_and_gradient(output, head, batch.labels.to(device), batch.sampling_seed)
                    check_losses(losses, batch, partial(_first_non_finite, spool, len(layers), number, output))
                    loss += float(losses.sum())
                else:
                    gradient = spool.read(f"gradients-{layer_idx + 1}", number).to(device)
                output.backward(gradient)
                assert x.grad is not None
                yield x.grad

        for layer_idx in range(top, -1, -1):
            with layers.hold(layer_idx, then=layer_idx - 1) as layer:
                with taps.on([(layer_idx, layer)]), torch.enable_grad():
                    if layer_idx:
                        spool.write(f"gradients-{layer_idx}", backpropagated(layer_idx, layer))
                    else:
                        _exhaust(backpropagated(layer_idx, layer))
                finish_layer(layer_idx, layer, loss)
            spool.drop(f"inputs-{layer_idx}")
            spool.drop(f"gradients-{layer_idx + 1}")
            bar.update()


def _exhaust(tensors: Iterator[Tensor]) -> None:
    for _ in tensors:
        pass


def _first_non_finite(spool: Spool, layers: int, number: int, output: Tensor) -> str:
    """Say which layer is the first to answer NaN or infinity, from what enters each layer and what leaves the last."""
    for layer_idx in range(layers + 1):
        values = spool.read(f"inputs-{layer_idx}", number) if layer_idx < layers else output
        if not bool(torch.isfinite(values).all()):
            return (
                f"layer {layer_idx - 1} is the first whose output is not finite"
                if layer_idx
                else "the embeddings are not finite"
            )
    return "the head's logits are not finite"
