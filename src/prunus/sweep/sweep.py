"""The interface of both engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prunus.calibration.batches import Batch
from prunus.calibration.made_from import made_from
from prunus.errors import OptionError, StatisticsError
from prunus.files.records import Records
from prunus.files.tensor_file import TensorLayout
from prunus.machine.processes import add_up_, is_first, number_of_processes, rank, share, wait_for_all
from prunus.model.evaluation_mode import evaluation_mode
from prunus.model.geometry import Geometry
from prunus.model.layers import layers_of
from prunus.model.live import live_model
from prunus.statistics.base import Statistic, Statistics
from prunus.sweep.layer_hooks import LayerHooks
from prunus.sweep.prepared import PreparedBatch, prepare
from prunus.sweep.resident import run_resident
from prunus.sweep.spool import DiskSpool, Spool
from prunus.sweep.streamed import run_streamed

__all__ = ["ENGINES", "Engine", "EngineChoice", "sweep"]

Engine = Literal["resident", "streamed"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
#: what a user may say; `auto` is decided by `prunus.sweep.estimate`
EngineChoice = Literal["auto", "resident", "streamed"]


def sweep(
    model: Any,
    batches: Sequence[Batch],
    statistics: Sequence[Statistic],
    *,
    engine: Engine = "resident",
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    work: Path | None = None,
    progress: bool = True,
) -> Statistics:
    """Run calibration batches through a model and take statistics on the way.

    Args:
        model: a transformers causal language model, in memory or (streamed only) opened by `open_model`. Its weights,
            their `requires_grad` and its mode are left as found.
        batches: token batches, padded or not.
        statistics: what to take; those of the same labels share the passes. Without any that listens to gradients there
            is no backward pass.
        engine: `resident` runs each batch through the whole model, forwards and backwards. `streamed` runs all batches
            through one layer at a time: what a statistic accumulates for a layer is reduced before the next layer's
            begins, and only one layer's activations are alive for backpropagation; each layer runs forwards twice.
            Both give the same statistics to rounding.
        seed: of the tokens that are drawn from the model's predictions, for statistics that want such labels.
        provenance: recorded in the result.
        work: folder for what the streamed engine has finished and what enters its layers, which otherwise is in memory.
            A run that was killed goes on from there, with the same result. Left in place: it is the caller's.
        progress: show a progress bar when stderr is a terminal.

    Returns:
        The statistics of every layer.

    Raises:
        OptionError: unknown engine; the resident one for an opened model; more processes than batches.
        StatisticsError: `work` holds what was made from other inputs.
        CalibrationError: no batches, or a sequence without any token to predict.
        NonFiniteError: the loss is NaN or infinite; the first layer with such an output is named.
        UnsupportedModelError: see `live_model` and `Geometry.of`.
    """
    if engine not in ENGINES:
        raise OptionError(f"`engine` {engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    model = live_model(model)
    if engine == "resident" and layers_of(model).stored:
        raise OptionError("the resident engine needs the whole model in memory: use load_model, or the streamed engine")
    geometry = Geometry.of(model)
    reports: list[dict[str, Tensor]] = [{} for _ in geometry.widths]
    text = prepare(batches)
    work = work if engine == "streamed" else None
    inputs: Mapping[str, Any] = {}
    if work is not None:
        taken = [statistic.describe() for statistic in statistics]
        more = {"dtype": str(model.dtype), "statistics": taken, "seed": seed, "processes": number_of_processes()}
        inputs = made_from(model, batches, more)
    loss = None
    for labels in dict.fromkeys(statistic.labels for statistic in statistics):
        listening = [statistic for statistic in statistics if statistic.labels == labels]
        hooks = LayerHooks(geometry, listening)
        prepared = prepare(batches, sampling_seed=seed) if labels == "sampled" else text
        folder = work / labels if work is not None else None
        records = _run(model, geometry, hooks, listening, prepared, engine, folder, inputs, progress)
        for layer_idx, report in enumerate(reports):
            report |= records[layer_idx]
        if hooks.needs_gradients and labels == "text":
            # Noted with the last layer: the streamed order finishes it first, maybe in an earlier run.
            loss = records.about(len(reports) - 1)["loss"] / sum(int(batch.targets.sum()) for batch in prepared)
    return Statistics(tuple(reports), sum(len(b.input_ids) for b in batches), loss, dict(provenance or {}))


def _run(
    model: Any,
    geometry: Geometry,
    hooks: LayerHooks,
    statistics: Sequence[Statistic],
    prepared: Sequence[PreparedBatch],
    engine: Engine,
    folder: Path | None,
    inputs: Mapping[str, Any],
    progress: bool,
) -> Records:
    """One forward pass, or forward and backward pass, over this process' share of the batches."""
    sequences = sum(len(batch.targets) for batch in prepared)
    mine = share(prepared)
    spool = Spool()
    if not is_first():
        wait_for_all()  # until the first process has checked the folder, or made it
    records = Records(folder, inputs, writes=is_first())
    if is_first():
        wait_for_all()
    if folder is not None:
        layouts = [TensorLayout(model.dtype, (*batch.labels.shape, geometry.hidden_size)) for batch in mine]
        spool = DiskSpool(folder / f"process-{rank()}", layouts)

    def finish_layer(layer_idx: int, layer: nn.Module, loss: float) -> None:
        total = torch.tensor([loss], dtype=torch.float64)
        accumulated = [pair for statistic in statistics for pair in statistic.accumulated(layer_idx)]
        add_up_([*accumulated, (total, "sum")])
        report: dict[str, Tensor] = {}
        for statistic in statistics:
            report |= statistic.finish_layer(geometry, layer_idx, layer, sequences)
        records.put(layer_idx, report, {"loss": float(total)})
        wait_for_all()  # nobody may drop what another one would need to go on before this layer's record is there

    progress = progress and is_first()
    with _frozen(model):
        if engine == "resident":
            run_resident(model, geometry, hooks, mine, finish_layer, progress=progress)
        elif len(records) < len(geometry.widths):
            finished = len(records)
            _check_unbroken(records, range(len(geometry.widths)), hooks.needs_gradients, folder)
            run_streamed(model, geometry, hooks, mine, finish_layer, spool=spool, finished=finished, progress=progress)
    spool.close()
    return records


def _check_unbroken(records: Records, layers: Sequence[int], backward: bool, folder: Path | None) -> None:
    """Raise unless the finished layers are the first ones, or with a backward pass the last ones."""
    order = layers[::-1] if backward else layers
    if missing := [layer_idx for layer_idx in order[: len(records)] if layer_idx not in records]:
        raise StatisticsError(
            f"{folder} lacks the record of layer {missing[0]}, but holds those of layers that come after it; remove "
            "the folder"
        )


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
