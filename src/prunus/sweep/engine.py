"""Where and how a model is held, and which engine runs it: by what is asked for, or by an estimate of memory."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from prunus.checkpoint import (
    check_folder,
    empty_model,
    format_in,
    held_dtype,
    load_model,
    locate,
    open_model,
    resolve_device,
    resolve_dtype,
)
from prunus.checkpoint.hub import at_revision
from prunus.errors import OptionError
from prunus.files.user_path import expanded
from prunus.machine.byte_sizes import parse_bytes, show_bytes
from prunus.machine.placement import dtype_name
from prunus.machine.processes import agreed, is_first
from prunus.option_values import check_whole
from prunus.sweep.batch_size import chosen_batch_size
from prunus.sweep.estimate import Estimate, Workload, available_memory, choose_engine, estimate
from prunus.sweep.sweep import ENGINES, Engine, EngineChoice

__all__ = [
    "Holding",
    "ModelOptions",
    "config_of",
    "holding_of",
    "load_or_open",
    "memory_needed",
    "model_name",
    "settled",
    "streamed_if_in_blocks",
]


@dataclass(frozen=True)
class ModelOptions:
    """Where and how the model is held.

    Attributes:
        device: auto, cpu, cuda, cuda:1, mps; auto is the first of cuda, mps, cpu that there is.
        dtype: float32, bfloat16 or float16, to compute in; auto is the checkpoint's own, or float32 where a measurement
            at the start shows that half precision is slow here. What a result is saved in is `output.save_dtype`.
        max_memory: memory that may be used, e.g. 8GB: RAM, or the GPU's if the device is one. Jobs estimated to exceed
            it are rejected, naming the smallest sufficient limit.
        engine: resident runs each sequence through the whole model; streamed runs all sequences through one layer at a
            time, which takes longer, reads weights from disk when they are needed and holds the gradients of one layer
            only; auto is resident if that fits into memory.
        batch_size: sequences per pass. auto is 1, and to prune on CUDA as many as fit, up to 16,384 tokens. It changes
            time and memory, and results only by rounding.
        revision: branch, tag or commit of a model on the Hub; `owner/name@revision` says the same.
    """

    device: str = "auto"
    dtype: str = "auto"
    max_memory: str | None = None
    engine: EngineChoice = "auto"
    batch_size: int | Literal["auto"] = "auto"
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.max_memory is not None:
            parse_bytes(self.max_memory)
        if self.engine not in ("auto", *ENGINES):
            raise OptionError(f"`engine` {self.engine!r} is unknown; choose one of auto, {', '.join(ENGINES)}")
        resolve_dtype(self.dtype)
        if self.batch_size != "auto":
            check_whole("batch_size", self.batch_size)

    @property
    def sequences_per_pass(self) -> int:
        """The batch size; 1 where it is still open."""
        return 1 if self.batch_size == "auto" else self.batch_size

    def named(self, model: str) -> str:
        """The model's name, with the revision if one is asked for.

        Raises:
            OptionError: only a model of the Hub has revisions.
        """
        return at_revision(model, self.revision)


@dataclass(frozen=True)
class Holding:
    """How a model will be held for a job.

    Attributes:
        engine: which one runs it.
        needed: peak memory of the job under each engine, by the estimate.
        limit: bytes that may be used, by the user's word.
        free: bytes that there are, as far as the machine says.
    """

    engine: Engine
    needed: Estimate
    limit: int | None
    free: int | None

    def __str__(self) -> str:
        limit, free = self.limit, self.free
        bound = f"limit {show_bytes(limit)}" if limit else f"free {show_bytes(free)}" if free else "no limit known"
        return (
            f"engine {self.engine}: about {show_bytes(self.needed.of(self.engine))} of memory (resident "
            f"{show_bytes(self.needed.resident)}, streamed {show_bytes(self.needed.streamed)}, {bound})"
        )


def holding_of(needed: Estimate, options: ModelOptions) -> Holding:
    """The engine that is asked for, else the faster one that fits.

    Args:
        needed: peak memory of the job, see `memory_needed`.
        options: device, memory and engine.

    Raises:
        OptionError: the estimate is larger than `options.max_memory`.
    """
    limit = parse_bytes(options.max_memory) if options.max_memory else None
    free = available_memory(resolve_device(options.device))
    return Holding(choose_engine(needed, options.engine, limit, free), needed, limit, free)


def load_or_open(
    source: str,
    options: ModelOptions,
    workload: Workload | None = None,
    *,
    scratch: Path | None = None,
    progress: bool = True,
) -> tuple[Any, Any, Engine]:
    """Load a model, or open it so that its decoder layers stay on disk, whichever is asked for or fits.

    Args:
        source: a folder, a Hub id or `smollm2-135m`.
        options: device, dtype, memory and engine; engine auto is decided by an estimate, which is printed on stderr.
        workload: what will be done with the model; None for a forward pass at most.
        scratch: folder for changed layers of an opened model.
        progress: whether to print.

    Returns:
        The model, its tokenizer, and the engine it is held for.

    Raises:
        OptionError: the estimate is larger than `options.max_memory`.
    """
    options = streamed_if_in_blocks(source, options)
    engine = options.engine
    if engine == "auto" or options.max_memory is not None:
        holding = holding_of(memory_needed(source, options, workload or Workload()), options)
        engine = holding.engine
        if options.engine == "auto" and progress and is_first():
            print(holding, file=sys.stderr)
    if engine == "streamed":
        return *open_model(source, dtype=options.dtype, device=options.device, scratch=scratch), engine
    return *load_model(source, dtype=options.dtype, device=options.device), "resident"


def streamed_if_in_blocks(source: str, options: ModelOptions) -> ModelOptions:
    """The same options; for a model whose weights are stored in blocks, with the only engine that keeps them.

    Args:
        source: a folder, a Hub id or `smollm2-135m`.
        options: what was asked for.

    Raises:
        OptionError: the resident engine for such a model.
    """
    form = format_in(locate(source))
    if form is None:
        return options
    if options.engine == "resident":
        raise OptionError(
            f"`engine=resident`: the weights of {source} are stored in {form.title}, which prunus decodes one layer at "
            "a time; use streamed, or the bf16 checkpoint"
        )
    return replace(options, engine="streamed")


def settled(config: Any, options: ModelOptions, workload: Workload) -> ModelOptions:
    """The same options with a dtype and a batch size in the place of auto; many processes agree on the dtype.

    Args:
        config: of the model, as `config_of` gives it.
        options: what was asked for. The engine stays as it is.
        workload: what will be done with the model; its batch size is not read.
    """
    device = resolve_device(options.device)
    if options.dtype == "auto":
        dtype = held_dtype(config, "auto", device)
        # Where any process finds half precision slow, all compute in float32.
        options = replace(options, dtype=dtype_name(torch.float32 if agreed(dtype != config.dtype) else dtype))
    if options.batch_size == "auto":

        def fits(size: int) -> bool:
            needed = [
                estimate(empty, empty.dtype, replace(workload, batch_size=each), device, config.dtype)
                for each in (1, size)
            ]
            bounds = [parse_bytes(options.max_memory) if options.max_memory else None, available_memory(device)]
            bound = min((bound for bound in bounds if bound is not None), default=None)
            if bound is None:
                return True
            # A batch for which the model would have to leave memory costs more than it saves.
            resident = options.engine == "resident" or (options.engine == "auto" and needed[0].resident <= bound)
            return needed[1].of("resident" if resident else "streamed") <= bound

        empty = empty_model(config, held_dtype(config, options.dtype, device))
        options = replace(options, batch_size=chosen_batch_size(workload, device, fits))
    return options


def config_of(source: str) -> Any:
    """The config of a model, whose folder is checked before it is read.

    Raises:
        PrunusError: see `prunus.checkpoint.check_folder`.
    """
    return check_folder(locate(source))[0]


def memory_needed(source: str, options: ModelOptions, workload: Workload) -> Estimate:
    """Peak memory of a job under each engine, from config and options alone.

    Args:
        source: a folder, a Hub id or `smollm2-135m`.
        options: device and dtype.
        workload: what will be done with the model.
    """
    config, device = config_of(source), resolve_device(options.device)
    held_in = held_dtype(config, options.dtype, device)
    return estimate(empty_model(config, held_in), held_in, workload, device, config.dtype)


def model_name(model: str) -> str:
    """What a result calls its base model: a Hub id as it is, of a folder its own name."""
    folder = expanded(model)
    # "." and ".." have no name of their own; links keep theirs.
    return Path(os.path.abspath(folder)).name if folder.is_dir() else model
