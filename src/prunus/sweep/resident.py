"""The whole model in memory: one ordinary forward, and where needed backward, pass per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunus.machine.bars import tracked
from prunus.model.geometry import Geometry
from prunus.model.loss import head_function
from prunus.model.modules import submodule
from prunus.sweep.layer_hooks import LayerHooks
from prunus.sweep.objective import losses_and_gradient
from prunus.sweep.prepared import PreparedBatch, check_losses

__all__ = ["run_resident"]


def run_resident(
    model: Any,
    geometry: Geometry,
    hooks: LayerHooks,
    batches: Sequence[PreparedBatch],
    finish_layer: Callable[[int, nn.Module, float], None],
    *,
    progress: bool,
) -> None:
    """Run each batch through the whole model, then finish every layer.

    Args:
        model: a frozen causal language model in evaluation mode.
        geometry: its shape.
        hooks: who listens.
        batches: the calibration sequences.
        finish_layer: called once for every layer, after all batches, with the layer and the loss summed over all tokens
            (0 without a backward pass).
        progress: show a progress bar when stderr is a terminal.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    layers = submodule(model, geometry.family.layers)
    loss = 0.0
    with hooks.on(list(enumerate(layers))):
        for batch in tracked(batches, "scoring", total=len(batches), unit="batch", progress=progress):
            losses = _run_batch(model, geometry, hooks, batch)
            if losses is not None:
                check_losses(losses, batch, partial(_first_non_finite, model, geometry, batch))
                loss += float(losses.sum())
    for layer_idx, layer in enumerate(layers):
        finish_layer(layer_idx, layer, loss)


def _run_batch(model: Any, geometry: Geometry, hooks: LayerHooks, batch: PreparedBatch) -> Tensor | None:
    """One batch through the model; the losses per sequence if there was a backward pass."""
    input_ids, arguments = batch.on(model.device)
    hooks.start_batch(batch, model.device)
    decoder = submodule(model, geometry.family.layers.rpartition(".")[0])
    embeddings = submodule(model, geometry.family.embedding)(input_ids).detach()
    if not hooks.needs_gradients:
        with torch.no_grad():
            decoder(inputs_embeds=embeddings, **arguments, use_cache=False)
        return None
    # Gradients start here: the weights have none, so autograd computes those of the activations alone.
    embeddings.requires_grad_()
    with torch.enable_grad():
        hidden = decoder(inputs_embeds=embeddings, **arguments, use_cache=False).last_hidden_state
        losses, gradient = losses_and_gradient(
            hidden, head_function(model), batch.labels.to(model.device), batch.sampling_seeds
        )
        hidden.backward(gradient)
    return losses


def _first_non_finite(model: Any, geometry: Geometry, batch: PreparedBatch) -> str:
    """Say where in the model the first NaN or infinity comes out."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if not found and not bool(torch.isfinite(values).all()):
                found.append(name)

        return hook

    layers = submodule(model, geometry.family.layers)
    handles = [layer.register_forward_hook(watch(f"layer {i}")) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            input_ids, arguments = batch.on(model.device)
            model(input_ids, **arguments, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return f"{found[0]} is the first whose output is not finite" if found else "the head's logits are not finite"
