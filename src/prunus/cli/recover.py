"""`prunus recover`: train what pruning damaged."""

from __future__ import annotations

from pathlib import Path

from prunus.cli.flags import Flag, OptionalModel
from prunus.cli.job_flags import given
from prunus.cli.recovery_flags import (
    KEYS,
    NO_FILE,
    NO_PLACE,
    NO_TEXT,
    NO_TRAINING,
    FileFlags,
    PlaceFlags,
    TextFlags,
    TrainingFlags,
)
from prunus.cli.values import check_given

__all__ = ["recover"]


def recover(
    model: OptionalModel = None,
    /,
    *,
    out: Path,
    teacher: str | None = None,
    file: FileFlags = NO_FILE,
    text: TextFlags = NO_TEXT,
    training: TrainingFlags = NO_TRAINING,
    place: PlaceFlags = NO_PLACE,
    overwrite: Flag = False,
    dry_run: Flag = False,
    json: Flag = False,
) -> None:
    """Train a pruned model to recover part of the lost quality; needs the packages peft and accelerate.

    By default all weights but the embeddings learn the text and the dense model's predictions on it, half and half.
    The result is a folder of the same kind, with the weights that had the lowest loss on held-out text. After Ctrl-C
    or a kill the same command resumes from the last checkpoint. It runs on one device, or on many under `torchrun` or
    `accelerate launch` with `-m prunus recover …`.

    Args:
        model: folder of a pruned model; optional with the --recipe of an earlier result.
        out: folder for the result; it appears when it is complete.
        teacher: the dense model, folder or Hub id; by default the one that MODEL was cut from, if it can be found.
        overwrite: replace an earlier result in the folder, and checkpoints of other options.
        dry_run: say what memory, disk and time it would take; nothing is written.
        json: print what was done and measured as JSON.
    """
    from prunus.cli.forecast import show_forecast
    from prunus.cli.printing import print_json, print_rows, short, typed_command
    from prunus.model.loss import perplexity_of_loss
    from prunus.pipeline.recovering import forecast_recover
    from prunus.recovery.job import RECOVERY
    from prunus.recovery.run import recover_job

    direct = {"model": model, "teacher": teacher, **given(text, training, place, keys=KEYS)}
    job = RECOVERY.read(file.recipe, file.set, direct)
    check_given(MODEL=job.model, text=job.text.source)
    if dry_run:
        show_forecast(forecast_recover(job, out, overwrite=overwrite), json)
        return
    facts = recover_job(job, out, overwrite=overwrite, command=typed_command())
    if not facts:
        return  # another process prints
    if json:
        print_json(facts)
        return
    losses = {name: loss for name, loss in facts["held_out_loss"].items() if loss is not None}
    rows = [(name, f"{perplexity_of_loss(loss):.2f}") for name, loss in losses.items()]
    rows += [("teacher", facts["teacher"])] if facts["teacher"] else []
    rows += [(name, short(facts[name])) for name in ("best_step", "steps", "tokens", "seconds")]
    if facts["gap_closed"] is not None:
        rows.append(("gap in log perplexity closed", f"{facts['gap_closed']:.1%}"))
    print_rows(f"{facts['model']} → {out}; perplexity on held-out sequences", ("", ""), rows)
