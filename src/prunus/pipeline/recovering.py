"""What a recovery will take, before it starts; nothing is trained and nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import empty_model, model_bytes, read_config
from prunus.files.outputs import check_disk, check_output
from prunus.model.geometry import Geometry
from prunus.pipeline.forecast import READING, SMALL_FILES, WRITING_SPEED, Forecast, seconds_to_write
from prunus.pipeline.probe import Probe
from prunus.pipeline.stages import LOADING, MEASURING, SAVING, WRITING
from prunus.recovery.checkpoints import Checkpoints
from prunus.recovery.job import RecoveryJob
from prunus.recovery.memory import training_bytes
from prunus.recovery.prepared import Prepared, require_packages
from prunus.scoring.score import ScoringOptions
from prunus.sweep.estimate import available_memory

__all__ = ["TRAINING", "forecast_recover"]

TRAINING = "training"
#: a pass whose gradients are those that training takes: of activations for adapters, of weights besides for the others
PASSES = {"lora": "gate_fisher", "layers": "taylor", "full": "taylor"}


def forecast_recover(job: RecoveryJob, out: str | Path, *, overwrite: bool = False) -> Forecast:
    """What `prunus.recovery.recover_job` would take.

    The text is drawn, as far as a run would draw it, for the number of steps; weights are not read.

    Args:
        job: the model, its teacher, the text, how it is trained and where.
        out: folder for the result.
        overwrite: replace an earlier result.

    Raises:
        PrunusError: whatever is wrong with options, models, text or folder.
    """
    require_packages()
    check_output(out, overwrite, job.model, *job.text.names)
    Checkpoints(out, job.output.work).check()
    prepared = Prepared.of(job)
    check_output(out, overwrite, *prepared.reads)
    check_disk(out, prepared.expected_bytes)
    dtype = torch.bfloat16 if prepared.step.bfloat16 else torch.float32
    student = empty_model(read_config(prepared.folder), dtype)
    geometry = Geometry.of(student)
    tokens = prepared.step.micro_batch * job.text.seq_len
    return Forecast(
        family=geometry.family.title,
        parameters=geometry.total_parameters,
        groups={axis: sum(widths[axis] for widths in geometry.widths) for axis in geometry.axes},
        removals=(),
        engine="resident",
        device=str(prepared.device),
        dtype=str(dtype).removeprefix("torch."),
        memory_bytes=training_bytes(
            job, prepared.folder, prepared.teacher, prepared.device, bfloat16=prepared.step.bfloat16, tokens=tokens
        ),
        free_bytes=available_memory(prepared.device),
        disk_bytes=prepared.expected_bytes,
        stages=_stages(prepared, student),
    )


def _stages(prepared: Prepared, student: Any) -> dict[str, float]:
    """Seconds of each stage."""
    job, options = prepared.job, prepared.job.recovery
    own = Probe(student, prepared.device, prepared.step.micro_batch)
    teacher = None
    if prepared.teacher is not None:
        teacher = empty_model(read_config(prepared.teacher), student.dtype)
    step = own.scoring(ScoringOptions(method=PASSES[options.train], noise=0.0), job.text.seq_len) + own.head_backward
    measuring = own.forward(job.text.seq_len) + own.head_forward
    step += own.forward(job.text.seq_len) * options.gradient_checkpointing
    bytes_read, once = model_bytes(student), measuring
    if teacher is not None:
        dense = Probe(teacher, prepared.device, prepared.step.micro_batch)
        each = dense.forward(job.text.seq_len) + dense.head_forward
        step, once, bytes_read = step + each, once + each, bytes_read + model_bytes(teacher)
    held_out = len(prepared.held_out) * job.text.seq_len
    limits = [60 * options.max_minutes] if options.max_minutes else []
    if prepared.steps is not None:
        steps = prepared.steps * prepared.step.batch_size * job.text.seq_len * step
        limits.append(steps + options.checkpoints * held_out * measuring)
    return {
        LOADING: SMALL_FILES + bytes_read / READING,
        **_writing(prepared, student.dtype),
        MEASURING: held_out * (once + measuring),
        TRAINING: min(limits),
        SAVING: SMALL_FILES + model_bytes(student) * (1 / READING + 1 / WRITING_SPEED),
    }


def _writing(prepared: Prepared, dtype: torch.dtype) -> dict[str, float]:
    """The stage in which the dense model writes text, if it does and none is kept."""
    text = prepared.job.text
    if prepared.writer is None:
        return {}
    probe = Probe(empty_model(read_config(prepared.writer), dtype), prepared.device, prepared.step.micro_batch)
    tokens = text.written * (len(prepared.train_on) + len(prepared.held_out)) * text.seq_len
    return {WRITING: seconds_to_write(probe, tokens, text.seq_len)}
