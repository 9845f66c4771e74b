"""How long attention and MLP blocks of each width take on this machine.

Nothing is taken out of its place. Models of the family's own classes are built with random weights, whose decoder
layers have the widths in question, all at once, and continue prompts as `prunus bench` does: weights come out of
memory, not out of a cache that a single layer would fit into, and decode appends to a real key/value cache. Marks of
time at the borders of the blocks part each pass. What a block adds to the residual stream, and its norms, count with
it.

Every pass goes through all widths, so that a slow moment of the machine falls on all alike; medians of all passes are
kept. Layers of different attention windows are averaged in the numbers in which the model has them.
"""

from __future__ import annotations

import logging
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from prunus.checkpoint import empty_model, held_dtype, locate, pruned_config, read_config, resolve_device
from prunus.checkpoint.random_weights import random_weights
from prunus.errors import UnsupportedModelError
from prunus.evaluation.greedy import greedy_run
from prunus.evaluation.speed import check_context
from prunus.evaluation.speed_options import SpeedOptions
from prunus.files.user_path import expanded
from prunus.machine.bars import Bar
from prunus.model.families import AXES, Axis
from prunus.model.geometry import Geometry
from prunus.model.modules import submodule
from prunus.model.widths import LayerWidths
from prunus.selection.latency_profile import LatencyProfile, PhaseTimes, ProfiledShape
from prunus.sweep.engine import ModelOptions

__all__ = ["profile", "widths_to_measure"]

#: widths are measured at so many equal steps, and every number of attention groups up to it
STEPS = 8
#: the share of a CPU that a measurement has to get; below, it warns
BUSY = 0.9

logger = logging.getLogger(__name__)


def profile(
    model: str,
    options: SpeedOptions | None = None,
    model_options: ModelOptions | None = None,
    *,
    progress: bool = True,
) -> LatencyProfile:
    """Measure how long the blocks of a model take on this machine, by their width. Reads no weights.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.
        options: what is run, and how often.
        model_options: device and dtype.
        progress: show a bar on a terminal.

    Raises:
        CheckpointError: there is no such model, or its config cannot be read.
        OptionError: prompt and new tokens are more than the model's context.
        UnsupportedModelError: the family is not described.
    """
    options, model_options = options or SpeedOptions(), model_options or ModelOptions()
    folder = locate(model)
    config = read_config(folder)
    check_context(options, config, folder.name)
    device = resolve_device(model_options.device)
    held_in = held_dtype(config, model_options.dtype, device)
    geometry = Geometry.of(empty_model(config, held_in))
    if geometry.family.mixture is not None:
        raise UnsupportedModelError(
            f"{folder.name} is a mixture of experts: which experts a token goes to decides its time, and widths alone "
            "do not tell it. Choose another `target` than latency"
        )
    prompts = torch.randint(
        geometry.vocab_size,
        (options.batch_size, options.prompt_tokens),
        generator=torch.Generator().manual_seed(options.seed),
    ).to(device)
    probes = [
        random_weights(empty_model(pruned_config(config, widths, layer_indices), held_in), device)
        for widths, layer_indices in _probes(geometry)
    ]
    prefill, decode = _Times(), _Times()
    rounds = options.warm_up + options.repeats
    wall, used = time.perf_counter(), time.thread_time()
    with Bar("profile", total=rounds * len(probes), unit="run", progress=progress) as bar:
        for number in range(rounds):
            for probe in probes:
                passes = _timed_passes(probe, prompts, options.new_tokens)
                if number >= options.warm_up:
                    prefill.add(probe, passes[:1])
                    decode.add(probe, passes[1:])
                bar.update()
    share = (time.thread_time() - used) / (time.perf_counter() - wall)
    if device.type == "cpu" and share < BUSY:
        logger.warning(
            "this process got only %.0f %% of the processor, so that long blocks are overestimated: measure again when "
            "the machine is idle",
            100 * share,
        )
    return LatencyProfile(
        model=Path(model).name if expanded(model).is_dir() else model,
        shape=ProfiledShape.of(geometry),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        machine=f"{platform.machine()} {platform.system()}",
        threads=torch.get_num_threads(),
        dtype=str(held_in).removeprefix("torch."),
        torch=torch.__version__,
        transformers=transformers.__version__,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        batch_size=options.batch_size,
        repeats=options.repeats,
        prefill=prefill.medians(),
        decode=decode.medians(),
    )


def widths_to_measure(axis: Axis, widest: int) -> list[int]:
    """The widths of an axis whose time is measured, ascending; between them, time is interpolated.

    Of a few attention groups each number. Of channels one, eight equal steps, and before every second of them one
    channel less, which shows what a width costs that is no multiple of anything.
    """
    steps = {widest * step // STEPS for step in range(1, STEPS + 1)}
    if axis == "attention":
        return sorted({1, *steps} - {0}) if widest > STEPS else list(range(1, widest + 1))
    odd = {widest * step // STEPS - 1 for step in range(2, STEPS + 1, 2)}
    return sorted({1, *(width for width in steps | odd if width > 0)}) if widest else []


def _probes(geometry: Geometry) -> Iterator[tuple[list[LayerWidths], list[int]]]:
    """Widths of the layers of each model to run, and which of the model's layers they stand for."""
    points = {axis: widths_to_measure(axis, max(layer[axis] for layer in geometry.widths)) for axis in AXES}
    count = max(len(widths) for widths in points.values())
    pairs = [
        LayerWidths(attention, channels)
        for attention, channels in zip(
            *(islice(cycle(points[axis] or [0]), count) for axis in AXES),
            strict=True,
        )
    ]
    layers = len(geometry.widths)
    for start in range(0, count, layers):
        part = pairs[start : start + layers]
        yield part, [number * layers // len(part) for number in range(len(part))]


class _Times:
    """The times of blocks by their width, of many passes."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[Axis, int], list[float]] = defaultdict(list)
        self._rest: list[float] = []

    def add(self, probe: Any, passes: Sequence[Sequence[float]]) -> None:
        """Add passes of a probe, each given as the seconds between its marks."""
        widths = Geometry.of(probe).widths
        blocks = [(axis, layer[axis]) for layer in widths for axis in AXES if layer[axis]]
        for first, *parts, last in passes:
            for block, seconds in zip(blocks, parts, strict=True):
                self._blocks[block].append(seconds)
            self._rest.append(first + last)

    def medians(self) -> PhaseTimes:
        """The median time of each width, and of all that is outside layers."""

        def points(axis: Axis) -> tuple[tuple[int, float], ...]:
            measured = sorted((width, median(all_)) for (of, width), all_ in self._blocks.items() if of == axis)
            return tuple(measured)

        return PhaseTimes(median(self._rest), points("attention"), points("mlp"))


def _timed_passes(model: Any, prompts: torch.Tensor, new_tokens: int) -> list[list[float]]:
    """Continue prompts, and time every pass through the model.

    Returns:
        For each pass the seconds before the first layer, those of every block that is there, and those after the last.
    """
    clock = _Clock(prompts.device)
    with _marked(model, clock.mark):
        greedy_run(model, prompts, new_tokens)
    marks = len(clock.marks) // new_tokens
    return [clock.between(clock.marks[number * marks : (number + 1) * marks]) for number in range(new_tokens)]


@contextmanager
def _marked(model: Any, mark: Callable[..., None]) -> Iterator[None]:
    """Call `mark` at the beginning of each pass, where each block begins, after the last one, and at the end."""
    geometry = Geometry.of(model)
    layers = submodule(model, geometry.family.layers)
    handles = [model.register_forward_pre_hook(mark)]
    for layer, widths in zip(layers, geometry.widths, strict=True):
        handles.append(layer.register_forward_pre_hook(mark))
        if widths["attention"] and widths["mlp"]:
            begins = submodule(layer, geometry.family.block("mlp").begins)
            handles.append(begins.register_forward_pre_hook(mark))
    handles.append(layers[-1].register_forward_hook(mark))
    handles.append(model.register_forward_hook(mark))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Clock:
    """Marks of time on a device: on CUDA events on its stream, since kernels run on after their call has returned."""

    def __init__(self, device: torch.device) -> None:
        self.marks: list[Any] = []
        self._device = device

    def mark(self, *_: Any) -> None:
        """Take the time; for hooks, whose arguments are not read."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
            return
        if self._device.type == "mps":
            torch.mps.synchronize()
        self.marks.append(time.perf_counter())

    def between(self, marks: Sequence[Any]) -> list[float]:
        """Seconds from each mark to the next; on CUDA once the device has come to rest."""
        if self._device.type == "cuda":
            return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
        return [b - a for a, b in pairwise(marks)]
