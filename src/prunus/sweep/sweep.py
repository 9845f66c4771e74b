"""The interface of both engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import Tensor, nn

from prunus.calibration.batches import Batch
from prunus.errors import OptionError
from prunus.evaluation.mode import evaluation_mode
from prunus.groups import Geometry, submodule
from prunus.statistics.base import Statistic, Statistics
from prunus.sweep.prepared import prepare
from prunus.sweep.resident import run_resident
from prunus.sweep.streamed import run_streamed
from prunus.sweep.taps import Taps

__all__ = ["ENGINES", "Engine", "sweep"]

Engine = Literal["resident", "streamed"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


def sweep(
    model: Any,
    batches: Sequence[Batch],
    statistics: Sequence[Statistic],
    *,
    engine: Engine = "resident",
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Statistics:
    """Run calibration batches through a model and take statistics on the way.

    Args:
        model: a transformers causal language model. Its weights, their `requires_grad` and its mode are left as found.
        batches: token batches, padded or not.
        statistics: what to take; those of the same labels share the passes. Without any that listens to gradients there
            is no backward pass.
        engine: `resident` runs each batch through the whole model, forwards and backwards. `streamed` runs all batches
            through one layer at a time: what a statistic accumulates for a layer is reduced before the next layer's
            begins, and only one layer's activations are alive for backpropagation; each layer runs forwards twice.
            Both give the same statistics to rounding.
        seed: of the tokens that are drawn from the model's predictions, for statistics that want such labels.
        provenance: recorded in the result.
        progress: show a progress bar when stderr is a terminal.

    Returns:
        The statistics of every layer.

    Raises:
        OptionError: unknown engine.
        CalibrationError: no batches, or a sequence without any token to predict.
        NonFiniteError: the loss is NaN or infinite; the first layer with such an output is named.
        UnsupportedModelError: see `Geometry.of`.
    """
    if engine not in ENGINES:
        raise OptionError(f"engine {engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    geometry = Geometry.of(model)
    layers = submodule(model, geometry.family.layers)
    reports: list[dict[str, Tensor]] = [{} for _ in layers]
    sequences = sum(len(batch.input_ids) for batch in batches)
    loss = None
    run = run_resident if engine == "resident" else run_streamed
    for labels in dict.fromkeys(statistic.labels for statistic in statistics):
        listening = [statistic for statistic in statistics if statistic.labels == labels]

        def finish_layer(layer_idx: int, listening: Sequence[Statistic] = listening) -> None:
            for statistic in listening:
                reports[layer_idx] |= statistic.finish_layer(geometry, layer_idx, layers[layer_idx], sequences)

        prepared = prepare(batches, sampling_seed=seed if labels == "sampled" else None)
        with _frozen(model):
            summed = run(model, geometry, Taps(geometry, listening), prepared, finish_layer, progress=progress)
        if summed is not None and labels == "text":
            loss = summed / sum(int(batch.targets.sum()) for batch in prepared)
    return Statistics(tuple(reports), sequences, loss, dict(provenance or {}))


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
