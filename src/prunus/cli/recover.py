"""`prunus recover`: train what pruning damaged."""

from __future__ import annotations

from math import exp
from pathlib import Path

from prunus.cli.flags import Flag, ModelName
from prunus.cli.option_flags import RecoveryFlags, TextFlags
from prunus.cli.printing import print_json, print_rows, short, typed_command
from prunus.recovery import RecoveryOptions, recover_checkpoint

__all__ = ["recover"]


def recover(
    model: ModelName,
    /,
    *,
    out: Path,
    text: TextFlags,
    options: RecoveryFlags = RecoveryOptions(),
    teacher: str | None = None,
    device: str = "auto",
    resume: Flag = False,
    work: Path | None = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Train a pruned model a little, so that it wins back part of what it lost; needs the packages peft and accelerate.

    By default it learns the dense model's next-token distribution (distillation), with adapters that are merged at the
    end. The result is a folder of the same kind, with the weights that had the lowest loss on held-out text. It runs on
    one device, or on many under `torchrun` or `accelerate launch` with `-m prunus recover …`.

    Args:
        model: folder of a pruned model.
        out: folder for the result; it appears when it is complete.
        teacher: the dense model, folder or Hub id; by default the one that MODEL was cut from, if it is here.
        device: auto, cpu, cuda or mps.
        resume: go on from the last checkpoint of a run that was killed or interrupted; give the same options.
        work: folder for checkpoints; by default OUT.work. Removed at the end.
        overwrite: replace an earlier result in the folder, and earlier checkpoints.
        json: print what was done and measured as JSON.
    """
    facts = recover_checkpoint(
        model,
        out,
        text,
        options,
        teacher=teacher,
        device=device,
        resume=resume,
        work=work,
        overwrite=overwrite,
        command=typed_command(),
    )
    if not facts:
        return  # another process prints
    if json:
        print_json(facts)
        return
    rows = [(name, f"{exp(loss):.2f}") for name, loss in facts["held_out_loss"].items() if loss is not None]
    rows += [(name, short(facts[name])) for name in ("best_step", "steps", "tokens", "seconds")]
    if facts["gap_closed"] is not None:
        rows.append(("gap in log perplexity closed", f"{facts['gap_closed']:.1%}"))
    print_rows(f"{facts['model']} → {out}; perplexity on held-out sequences", ("", ""), rows)
