"""The training itself: load the models, measure, train, and say which step was best."""

from __future__ import annotations

import logging
import math
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunus.checkpoint import held_dtype, load_model, read_config
from prunus.machine.processes import is_first, number_of_processes, wait_for_all
from prunus.model.digest import digest_model
from prunus.recovery.checkpoints import Checkpoints
from prunus.recovery.pace import Pace
from prunus.recovery.prepared import Prepared
from prunus.recovery.student import Student, add_adapters, freeze_embeddings_
from prunus.recovery.vocabulary import VocabularySampler
from prunus.sweep.sequence_loss import perplexity_of_windows

__all__ = ["choose_trained_", "train"]

logger = logging.getLogger(__name__)


def train(prepared: Prepared, checkpoints: Checkpoints, overwrite: bool, *, progress: bool) -> dict[str, Any]:
    """Train, or go on training, or do nothing where training is over.

    Args:
        prepared: the job.
        checkpoints: of the run.
        overwrite: take away those of another job.
        progress: show progress bars on a terminal.

    Returns:
        What was measured on the way, as `Checkpoints.finish` keeps it.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
        KeyboardInterrupt: somebody asked the run to stop; a checkpoint is written.
    """
    student, teacher = _load_student(prepared), _load_teacher(prepared)
    if is_first():
        checkpoints.begin(_inputs(prepared, student, teacher), overwrite)
    wait_for_all()
    if (finished := checkpoints.finished()) is not None:
        return finished
    losses = _measured(prepared, student, teacher, progress)
    choose_trained_(prepared, student)
    model = Student(student, prepared.job.recovery, teacher, _vocabulary(prepared, student))
    last = checkpoints.last()
    state, seconds = _fitted(prepared, model, checkpoints.path, last, reserved=losses.seconds, progress=progress)
    trained = {
        **_outcome(state, losses.before),
        "seconds": seconds,
        "before": losses.before,
        "dense": losses.dense,
        "trained_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
    }
    if is_first():
        checkpoints.finish(trained)
    return trained


def choose_trained_(prepared: Prepared, model: Any) -> Any:
    """Put adapters on a model, or freeze what is not trained; the layers in the adapters' wrapper, None without any."""
    options = prepared.job.recovery
    if options.train == "lora":
        return add_adapters(model, options.lora_rank, options.alpha, prepared.job.text.seed)
    if options.train == "layers":
        freeze_embeddings_(model)
    return None


def _vocabulary(prepared: Prepared, model: Any) -> VocabularySampler | None:
    """What draws the part of the vocabulary that the loss looks at; None where that is all of it."""
    entries, size = model.config.get_text_config().vocab_size, prepared.job.recovery.vocabulary
    if size is None or size >= entries:
        return None
    return VocabularySampler(prepared.train_on.input_ids, entries, size)


def _load_student(prepared: Prepared) -> Any:
    # FSDP wants one dtype in everything that it shards together.
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    whole = prepared.job.recovery.train != "lora" or sharded or not prepared.step.bfloat16
    model, _ = load_model(prepared.folder, dtype="float32" if whole else "bfloat16", device=prepared.device)
    return model


def _load_teacher(prepared: Prepared) -> Any:
    if prepared.teacher is None:
        return None
    dtype = "bfloat16" if prepared.step.bfloat16 else "float32"
    model, _ = load_model(prepared.teacher, dtype=dtype, device=prepared.device)
    return model.requires_grad_(False)


def _inputs(prepared: Prepared, student: Any, teacher: Any) -> dict[str, Any]:
    """What the result depends on."""
    decided = {"batch_size": prepared.step.batch_size, "learning_rate": prepared.step.learning_rate}
    named = {name: value for name, value in asdict(prepared.job.recovery).items() if name != "micro_batch"} | decided
    # Options first: where they differ, so do digests, and a message names what was changed.
    return {
        **named,
        "samples": prepared.job.text.samples,
        "seq_len": prepared.job.text.seq_len,
        "seed": prepared.job.text.seed,
        "order_seed": prepared.job.text.order,
        "model": digest_model(student),
        "teacher": digest_model(teacher) if teacher is not None else None,
        "training text": prepared.train_on.provenance.sha256,
        "held-out text": prepared.held_out.provenance.sha256,
    }


@dataclass(frozen=True)
class _Losses:
    """Held-out losses before training.

    Attributes:
        before: of the pruned model.
        dense: of its teacher; None where there is none.
        seconds: that measuring the pruned model took.
    """

    before: float
    dense: float | None
    seconds: float


def _measured(prepared: Prepared, student: Any, teacher: Any, progress: bool) -> _Losses:
    # All losses that are compared are of models in the dtype that the result will have, whatever those that train it.
    dtype, ids = held_dtype(read_config(prepared.folder), "auto", prepared.device), prepared.held_out.input_ids

    def loss(model: Any, folder: Path) -> tuple[float, float]:
        own = model if model.dtype == dtype else load_model(folder, dtype=dtype, device=prepared.device)[0]
        begun = time.monotonic()
        return perplexity_of_windows(own, ids, progress=progress).nll, time.monotonic() - begun

    before, seconds = loss(student, prepared.folder)
    dense = None if prepared.teacher is None else loss(teacher, prepared.teacher)[0]
    return _Losses(before, dense, seconds)


def _fitted(
    prepared: Prepared, model: Student, folder: Path, last: Path | None, *, reserved: float, progress: bool
) -> tuple[Any, float]:
    """Trainer's state at the end of the run, and the seconds of training.

    Args:
        prepared: the job.
        model: the student with its loss.
        folder: for checkpoints.
        last: checkpoint to go on from.
        reserved: seconds that the measurement at the end will take.
        progress: show a bar on a terminal.
    """
    from prunus.recovery.trainer import AlreadyOver, RecoveryTrainer, interruptible, training_arguments

    options = prepared.job.recovery
    limit = 60 * options.max_minutes if options.max_minutes else None
    pace = Pace(prepared.steps, limit, options.warmup, options.decay, options.checkpoints)
    pace.reserved = reserved
    # Trainer leaves out what cannot be shared out evenly: so often that it can be.
    held_out, processes = prepared.held_out.input_ids, number_of_processes()
    held_out = held_out.repeat(processes // math.gcd(len(held_out), processes), 1)
    arguments = training_arguments(
        folder,
        options,
        prepared.step,
        steps=prepared.steps,
        seed=prepared.job.text.order,
        device=prepared.device,
        held_out=len(held_out),
    )
    with interruptible() as interruption:
        trainer = RecoveryTrainer(
            model,
            arguments,
            pace,
            prepared.train_on.input_ids,
            held_out,
            interruption,
            progress=progress and is_first(),
        )
        with suppress(AlreadyOver):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.keeper.interrupted:
        raise KeyboardInterrupt
    return trainer.state, pace.seconds


def _outcome(state: Any, before: float) -> dict[str, Any]:
    """Which step was best, and all losses on the way.

    Args:
        state: Trainer's, at the end.
        before: held-out loss before training; step 0 is best where no checkpoint has a lower one.
    """
    best_loss = state.best_metric if state.best_metric is not None else float("inf")
    best_step = state.best_global_step if best_loss < before else 0
    log = state.log_history
    return {
        "steps": state.global_step,
        "best_step": best_step,
        "history": [
            {"step": entry["step"], "held_out_loss": entry["eval_loss"]} for entry in log if "eval_loss" in entry
        ],
        "training_losses": [{"step": entry["step"], "loss": entry["loss"]} for entry in log if "loss" in entry],
    }
