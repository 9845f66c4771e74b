"""Block-major order: all batches through one layer, then all through the next; backwards likewise.

One forward sweep keeps only what enters each layer. Then, from the last layer down, each layer runs again for every
batch, this time with a graph, and backpropagates; its statistics are finished before the next layer's begin. At any
time there are the weights of one layer (on CUDA also the next, on its way), the gradients of one layer, and the
activations of one layer for one batch; what enters the layers waits in a spool, in memory or on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunus.machine.bars import Bar
from prunus.model.geometry import Geometry
from prunus.model.layers import layers_of
from prunus.model.loss import head_function
from prunus.model.modules import submodule
from prunus.sweep.blocks import layer_calls, run_layer
from prunus.sweep.layer_hooks import LayerHooks
from prunus.sweep.objective import losses_and_gradient
from prunus.sweep.prepared import PreparedBatch, check_losses
from prunus.sweep.spool import Spool

__all__ = ["run_streamed"]

#: told of a layer when all batches are through it: index, the held layer, loss summed over all tokens
FinishLayer = Callable[[int, nn.Module, float], None]


def run_streamed(
    model: Any,
    geometry: Geometry,
    hooks: LayerHooks,
    batches: Sequence[PreparedBatch],
    finish_layer: FinishLayer,
    *,
    spool: Spool,
    finished: int,
    progress: bool,
) -> None:
    """Run all batches through one layer at a time.

    Args:
        model: a frozen causal language model in evaluation mode, in memory or opened.
        geometry: its shape.
        hooks: who listens.
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
    sweep = _Sweep(model, geometry, hooks, batches, spool)
    # The last layer runs forwards only once: with a graph, and on through the head.
    steps = 2 * len(sweep.layers) - 1 if hooks.needs_gradients else len(sweep.layers)
    with Bar("scoring", total=steps, unit="layer", progress=progress) as bar:
        if hooks.needs_gradients:
            bar.resume(2 * finished)
            sweep.forwards(bar, until=sweep.last - finished)
            sweep.backwards(bar, finish_layer, first=sweep.last - finished)
        else:
            bar.resume(finished)
            sweep.forwards_listening(bar, finish_layer, first=finished)


class _Sweep:
    """A model, and the batches on their way through it."""

    def __init__(
        self, model: Any, geometry: Geometry, hooks: LayerHooks, batches: Sequence[PreparedBatch], spool: Spool
    ) -> None:
        self.layers = layers_of(model)
        self.last = len(self.layers) - 1
        self._hooks, self._batches, self._spool, self._device = hooks, batches, spool, model.device
        self._head, self._norm = head_function(model), submodule(model, geometry.family.final_norm)
        self._arguments: list[Sequence[dict[str, Any]]] = []
        spool.write("inputs-0", self._entering(model, geometry.family.layers))

    def forwards_listening(self, bar: Bar, finish_layer: FinishLayer, *, first: int) -> None:
        """All that statistics without gradients need: from the layer `first` on."""
        for layer_idx in range(first, len(self.layers)):
            with self.layers.hold(layer_idx, then=layer_idx + 1) as layer, torch.no_grad():
                with self._hooks.on([(layer_idx, layer)]):
                    self._store(f"inputs-{layer_idx + 1}", self._leaving(layer_idx, layer), layer_idx < self.last)
                finish_layer(layer_idx, layer, 0.0)
            self._spool.drop(f"inputs-{layer_idx}")
            bar.update()

    def forwards(self, bar: Bar, *, until: int) -> None:
        """Spool what enters the layers up to `until`, where an earlier run has not."""
        for layer_idx in range(until):
            if not self._spool.has(f"inputs-{layer_idx + 1}"):
                with self.layers.hold(layer_idx, then=layer_idx + 1) as layer, torch.no_grad():
                    self._spool.write(f"inputs-{layer_idx + 1}", self._leaving(layer_idx, layer))
            bar.update()

    def backwards(self, bar: Bar, finish_layer: FinishLayer, *, first: int) -> None:
        """Run the layers again with a graph, from `first` down, and backpropagate each for every batch."""
        losses: list[float] = []
        for layer_idx in range(first, -1, -1):
            with self.layers.hold(layer_idx, then=layer_idx - 1) as layer:
                with self._hooks.on([(layer_idx, layer)]), torch.enable_grad():
                    gradients = self._backpropagated(layer_idx, layer, losses)
                    self._store(f"gradients-{layer_idx}", gradients, layer_idx > 0)
                finish_layer(layer_idx, layer, sum(losses, 0.0))
            self._spool.drop(f"inputs-{layer_idx}")
            self._spool.drop(f"gradients-{layer_idx + 1}")
            bar.update()

    def _store(self, name: str, tensors: Iterator[Tensor], wanted: bool) -> None:
        """Make the tensors, and spool them where a further layer wants them."""
        if wanted:
            self._spool.write(name, tensors)
        else:
            for _ in tensors:
                pass

    def _entering(self, model: Any, layers: str) -> Iterator[Tensor]:
        for batch in self._batches:
            call = layer_calls(model, layers, batch.batch)
            self._arguments.append(call.arguments)
            yield call.hidden

    def _leaving(self, layer_idx: int, layer: nn.Module) -> Iterator[Tensor]:
        for number, batch in enumerate(self._batches):
            self._hooks.start_batch(batch, self._device)
            x = self._spool.read(f"inputs-{layer_idx}", number).to(self._device)
            yield run_layer(layer, x, self._arguments[number][layer_idx])

    def _backpropagated(self, layer_idx: int, layer: nn.Module, losses: list[float]) -> Iterator[Tensor]:
        """The gradient by what enters a layer, for each batch; of the last layer also its loss, summed over tokens."""
        for number, batch in enumerate(self._batches):
            self._hooks.start_batch(batch, self._device)
            x = self._spool.read(f"inputs-{layer_idx}", number).to(self._device).detach().requires_grad_()
            output = run_layer(layer, x, self._arguments[number][layer_idx])
            if layer_idx == self.last:
                output = self._norm(output)
                labels = batch.labels.to(self._device)
                each, gradient = losses_and_gradient(output, self._head, labels, batch.sampling_seeds)
                check_losses(each, batch, partial(self._first_non_finite, number, output))
                losses.append(float(each.sum()))
            else:
                gradient = self._spool.read(f"gradients-{layer_idx + 1}", number).to(self._device)
            output.backward(gradient)
            assert x.grad is not None
            yield x.grad

    def _first_non_finite(self, number: int, output: Tensor) -> str:
        """Say which layer first answers NaN or infinity, from what enters each layer and what leaves the last."""
        for layer_idx in range(len(self.layers) + 1):
            spooled = layer_idx <= self.last
            values = self._spool.read(f"inputs-{layer_idx}", number) if spooled else output
            if not bool(torch.isfinite(values).all()):
                return (
                    f"layer {layer_idx - 1} is the first whose output is not finite"
                    if layer_idx
                    else "the embeddings are not finite"
                )
        return "the head's logits are not finite"
