"""Recovery from end to end: check, train, take the best step, measure, save."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from prunus.errors import OptionError
from prunus.files.json_file import read_json
from prunus.files.outputs import check_disk, check_output, claimed, place_of
from prunus.machine.processes import agreed, is_first, joined, wait_for_all
from prunus.machine.stages import Stages
from prunus.recovery.checkpoints import Checkpoints
from prunus.recovery.job import RecoveryJob
from prunus.recovery.options import RecoveryOptions, TextOptions
from prunus.recovery.prepared import Prepared, require_packages
from prunus.recovery.record import RECORD
from prunus.recovery.result import AGAIN, best_model, facts_of, save_recovered
from prunus.recovery.training import train
from prunus.sweep.sequence_loss import PerplexityResult, perplexity_of_windows

__all__ = ["recover_checkpoint", "recover_job"]

logger = logging.getLogger(__name__)


def recover_checkpoint(
    model: str,
    out: str | Path,
    text: TextOptions,
    options: RecoveryOptions | None = None,
    *,
    teacher: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a pruned model a little, and save the result; `recover_job` takes device, memory and more.

    Args:
        model: folder of a pruned model (any model of a described family will do).
        out: folder for the result; complete or not there at all.
        text: what to train on.
        options: how.
        teacher: the dense model, folder or Hub id; None = the base model that the folder names, if it can be found.
        overwrite: replace an earlier result, and earlier checkpoints.
        progress: show progress bars on a terminal.

    Returns:
        What was done and measured, as it is written to prunus/recovery.json; nothing in other processes than the first.

    Raises:
        PrunusError: whatever is wrong with options, models, text or folders; a loss that is not finite.
        KeyboardInterrupt: somebody pressed Ctrl-C.
    """
    job = RecoveryJob(model, teacher, text, options or RecoveryOptions())
    return recover_job(job, out, overwrite=overwrite, progress=progress)


def recover_job(
    job: RecoveryJob,
    out: str | Path,
    *,
    overwrite: bool = False,
    command: str | None = None,
    beside: Path | None = None,
    apart: Tensor | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a pruned model as a job says, and save the result as a folder of the same kind.

    Of all checkpoints, and the model as it came, the one with the lowest held-out loss is kept. Several processes
    (torchrun, `accelerate launch`) train together; the first one writes.

    Args:
        job: the model, its teacher, the text, how it is trained and where.
        out: folder for the result; complete or not there at all.
        overwrite: replace an earlier result, and checkpoints of another job.
        command: what the user typed, for the model card.
        beside: folder in which text that the dense model writes is kept, and found again; by default that of `out`.
        apart: int64, (samples, seq_len): sequences that the result will be measured on; what has text in common with
            them is neither trained on nor held out.
        progress: show progress bars on a terminal.

    Returns:
        What was done and measured, as it is written to prunus/recovery.json; nothing in other processes than the first.

    Raises:
        PrunusError: whatever is wrong with options, models, text or folders; a loss that is not finite.
        KeyboardInterrupt: somebody pressed Ctrl-C; the same call goes on from the last checkpoint.
    """
    if not job.text.source:
        raise OptionError("there is no text to train on: give one with `text`")
    require_packages()
    checkpoints = Checkpoints(out, job.output.work)
    with joined(), claimed(out, checkpoints.path, run=("recover", job, overwrite), command=command) as claim:
        if agreed(claim.finished):
            facts = read_json(claim.path / "prunus" / RECORD) if is_first() else {}
        else:
            check_output(out, overwrite, job.model, *job.text.names)
            checkpoints.check()
            wait_for_all()  # before the first process changes what the others check
            prepared = Prepared.of(job, beside or place_of(out).parent, apart=apart, progress=progress)
            check_output(out, overwrite, *prepared.reads)
            check_disk(out, prepared.expected_bytes)
            stages = Stages(("training", "saving"), prepared.device, progress)
            with _told_how_to_go_on(checkpoints), stages.enter("training"):
                trained = train(prepared, checkpoints, overwrite, progress=progress)
            facts = {}
            if is_first():
                gc.collect()  # what was trained is gone, and the result needs its room
                with stages.enter("saving"):
                    result, trained, after = _best(prepared, checkpoints, trained, progress)
                    facts = {**facts_of(prepared, trained, after), "command": command or AGAIN}
                    save_recovered(result, prepared, facts, out, overwrite)
        if is_first():
            checkpoints.remove()
        wait_for_all()
    return facts


def _best(
    prepared: Prepared, checkpoints: Checkpoints, trained: dict[str, Any], progress: bool
) -> tuple[Any, dict[str, Any], PerplexityResult]:
    """The model of the best step in the dtype that it is saved in, what was done, and its held-out loss.

    Losses during training are of weights before they are rounded, in the dtype of the passes: where training gave less
    than that takes, the model is best as it was.
    """
    for best_step in dict.fromkeys((trained["best_step"], 0)):
        result = best_model(prepared, checkpoints, best_step)
        after = perplexity_of_windows(result, prepared.held_out.input_ids, progress=progress)
        if after.nll < trained["before"]:
            break
    else:
        logger.warning(
            "no checkpoint has a lower held-out loss than the model had before (%.4f, best afterwards %.4f): the "
            "result is the model as it was. Try a lower `learning_rate`, more steps, or more text",
            trained["before"],
            min((each["held_out_loss"] for each in trained["history"]), default=math.nan),
        )
    return result, {**trained, "best_step": best_step}, after


@contextmanager
def _told_how_to_go_on(checkpoints: Checkpoints) -> Iterator[None]:
    """Say, where a run is interrupted, what is kept of it, and what command goes on from there."""
    try:
        yield
    except KeyboardInterrupt:
        if is_first() and (last := checkpoints.last()) is not None:
            logger.warning(
                "interrupted; %s is saved in %s, and the same command goes on from there", last.name, last.parent
            )
        raise
