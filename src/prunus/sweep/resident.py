"""The whole model in memory: one ordinary forward, and where needed backward, pass per batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunus.calibration import Batch
from prunus.errors import CalibrationError, NonFiniteError
from prunus.evaluation.mode import evaluation_mode
from prunus.groups import Geometry, submodule
from prunus.loss import IGNORE_INDEX, head_function, next_token_labels
from prunus.statistics.base import Statistic, Statistics
from prunus.sweep.objective import losses_and_gradient
from prunus.sweep.taps import Taps

__all__ = ["sweep"]


def sweep(
    model: Any,
    batches: Sequence[Batch],
    statistics: Sequence[Statistic],
    *,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Statistics:
    """Run calibration batches through a model and take statistics on the way.

    Args:
        model: a transformers causal language model. Its weights, their `requires_grad` and its mode are left as found.
        batches: token batches, padded or not.
        statistics: what to take; all of them share the passes. Without any that listens to gradients there is no
            backward pass.
        provenance: recorded in the result.
        progress: show a progress bar when stderr is a terminal.

    Returns:
        The statistics of every layer.

    Raises:
        CalibrationError: no batches, or a sequence without any token to predict.
        NonFiniteError: the loss is NaN or infinite; the first layer with such an output is named.
        UnsupportedModelError: see `Geometry.of`.
    """
    geometry = Geometry.of(model)
    layers = submodule(model, geometry.family.layers)
    taps = Taps(geometry, statistics)
    if not batches:
        raise CalibrationError("there are no calibration batches; give at least one sequence")
    sequences = tokens = 0
    loss = 0.0
    with _frozen(model), taps.on(list(enumerate(layers))):
        for batch in tqdm(batches, desc="statistics", unit="batch", disable=None if progress else True):
            labels = next_token_labels(batch.input_ids, batch.attention_mask)
            targets = (labels != IGNORE_INDEX).sum(dim=1)
            if bool((targets == 0).any()):
                raise CalibrationError(
                    f"calibration sequence {sequences + int((targets == 0).nonzero()[0])} has no token to predict; "
                    "every sequence needs at least two tokens"
                )
            batch_losses = _run_batch(model, geometry, taps, batch, labels, targets)
            if batch_losses is not None:
                if not bool(torch.isfinite(batch_losses).all()):
                    first = sequences + int((~torch.isfinite(batch_losses)).nonzero()[0])
                    raise NonFiniteError(
                        f"the loss of calibration sequence {first} is {float(batch_losses[first - sequences])}: "
                        f"{_first_non_finite(model, geometry, batch)}. Load the model in bf16 or fp32; fp16 overflows "
                        "easily."
                    )
                loss += float(batch_losses.sum())
            sequences += len(batch.input_ids)
            tokens += int(targets.sum())
    reports: list[dict[str, Tensor]] = []
    for layer_idx, layer in enumerate(layers):
        report: dict[str, Tensor] = {}
        for statistic in statistics:
            report |= statistic.finish_layer(geometry, layer_idx, layer, sequences)
        reports.append(report)
    return Statistics(
        tuple(reports), sequences, loss / tokens if taps.needs_gradients else None, dict(provenance or {})
    )


def _run_batch(
    model: Any, geometry: Geometry, taps: Taps, batch: Batch, labels: Tensor, targets: Tensor
) -> Tensor | None:
    """One batch through the model; the losses per sequence if there was a backward pass."""
    device = model.device
    input_ids = batch.input_ids.to(device)
    mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
    taps.start_batch(None if mask is None else mask.bool(), targets.to(device, torch.float32))
    decoder = submodule(model, geometry.family.layers.rpartition(".")[0])
    embeddings = submodule(model, geometry.family.embedding)(input_ids).detach()
    if not taps.needs_gradients:
        with torch.no_grad():
            decoder(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
        return None
    # Gradients start here: the weights have none, so autograd computes those of the activations alone.
    embeddings.requires_grad_()
    with torch.enable_grad():
        hidden = decoder(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
        losses, gradient = losses_and_gradient(hidden, head_function(model), labels.to(device))
        hidden.backward(gradient)
    return losses


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients, and dropout is off, while the context lasts."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluation_mode(model):
        try:
            for parameter in required:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in required:
                parameter.requires_grad_(True)


def _first_non_finite(model: Any, geometry: Geometry, batch: Batch) -> str:
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
            mask = None if batch.attention_mask is None else batch.attention_mask.to(model.device)
            model(batch.input_ids.to(model.device), attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return f"{found[0]} is the first whose output is not finite" if found else "the head's logits are not finite"
