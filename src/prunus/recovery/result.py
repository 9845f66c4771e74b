"""What a recovery leaves: the model of the best step, its card, and the record of how it was made.

prunus/recovery.json   what was done and measured
prunus/recovery.yaml   everything that made it: `prunus recover --recipe` does it again
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from prunus.checkpoint import load_model, save_checkpoint
from prunus.files.json_file import read_json_if_whole
from prunus.machine.processes import number_of_processes
from prunus.model.loss import perplexity_of_loss
from prunus.model.saved_dtype import round_weights_
from prunus.recovery.card import card_with_recovery
from prunus.recovery.checkpoints import Checkpoints, readable
from prunus.recovery.curve import curve
from prunus.recovery.job import RECOVERY
from prunus.recovery.prepared import Prepared
from prunus.recovery.record import RECORD, trainings_in
from prunus.recovery.student import Student, merge_adapters_
from prunus.recovery.training import choose_trained_
from prunus.sweep.sequence_loss import PerplexityResult
from prunus.version import __version__

__all__ = ["AGAIN", "best_model", "facts_of", "save_recovered"]

#: file beside it from which the command can be given again
RECIPE = "recovery.yaml"
#: command that does a job again that nobody typed
AGAIN = f"prunus recover --recipe prunus/{RECIPE} --out AGAIN"
#: files in it about the pruned model that say nothing about the recovered one
MEASURED_BEFORE = ("evaluation.json", "samples.json")


def best_model(prepared: Prepared, checkpoints: Checkpoints, best_step: int) -> Any:
    """The plain model with the weights of a step, rounded to the dtype of the pruned one; step 0 is before."""
    model, _ = load_model(prepared.folder, device=prepared.device)
    if not best_step:
        return model
    adapted = choose_trained_(prepared, model)
    with readable(checkpoints.at(best_step)):
        Student(model, prepared.job.recovery).load_trained_state_(load_file(checkpoints.at(best_step)))
    if adapted is not None:
        merge_adapters_(adapted)
    round_weights_(model)
    return model.eval()


def facts_of(prepared: Prepared, trained: Mapping[str, Any], measured: PerplexityResult) -> dict[str, Any]:
    """What goes into prunus/recovery.json, but for the command.

    Args:
        prepared: the job.
        trained: what `prunus.recovery.training.train` returned.
        measured: held-out perplexity of the result.
    """
    job, options = prepared.job, prepared.job.recovery
    before, dense, after = trained["before"], trained["dense"], measured.nll
    closed = (before - after) / (before - dense) if dense is not None and before > dense else None
    earlier = trainings_in(prepared.folder)
    facts = {
        "prunus": __version__,
        "model": prepared.folder.name,
        "teacher": prepared.teacher_name,
        "options": {
            **asdict(options),
            "lora_alpha": options.alpha if options.train == "lora" else None,
            **prepared.step.settings,
        },
        "text": prepared.train_on.provenance.to_dict(),
        "held_out": prepared.held_out.provenance.to_dict(),
        "device": str(prepared.device),
        "processes": number_of_processes(),
        "trained_parameters": trained["trained_parameters"],
        "steps": trained["steps"],
        "best_step": trained["best_step"],
        "tokens": trained["steps"] * prepared.step.batch_size * job.text.seq_len,
        "seconds": round(trained["seconds"], 1),
        "held_out_loss": {"before": before, "after": after, "dense": dense},
        "protocol": measured.protocol,
        "gap_closed": closed,
        "history": trained["history"],
        "training_losses": trained["training_losses"],
        **({"earlier": earlier} if earlier else {}),
    }
    return {**facts, "curve": curve([*earlier, facts])}


def save_recovered(model: Any, prepared: Prepared, facts: Mapping[str, Any], out: str | Path, overwrite: bool) -> None:
    """Write the result as a folder of the pruned model's kind.

    Args:
        model: the plain model.
        prepared: the job.
        facts: what was done and measured, with the command.
        out: the folder.
        overwrite: replace an earlier result.
    """
    card = card_with_recovery(prepared.folder, Path(out).name, facts, facts["command"])
    extras = {
        **_extras_of_before(prepared.folder, facts),
        RECORD: json.dumps(facts, indent=1) + "\n",
        RECIPE: _recipe(prepared),
    }
    save_checkpoint(model.cpu(), prepared.tokenizer, out, card=card, extras=extras, overwrite=overwrite)


def _recipe(prepared: Prepared) -> str:
    """The job as a file, with what depends on the machine as it was decided."""
    decided = replace(prepared.job.recovery, **prepared.step.settings)
    made_by = {
        "prunus": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "text_sha256": prepared.train_on.provenance.sha256,
    }
    return RECOVERY.text(replace(prepared.job, recovery=decided), made_by)


def _extras_of_before(folder: Path, facts: Mapping[str, Any]) -> dict[str, str | bytes]:
    """Plan, scores and metrics of the pruned model, without what was measured on it or written by it since.

    Perplexity in the metrics becomes that of the recovered model; that of the one that was cut, in whose command it may
    have been trained between rounds, stays under `before_recovery`.
    """
    extras: dict[str, str | bytes] = {
        path.name: path.read_bytes()
        for path in sorted((folder / "prunus").glob("*"))
        if path.is_file() and path.name not in MEASURED_BEFORE
    }
    if metrics := read_json_if_whole(folder / "prunus" / "metrics.json"):
        loss = facts["held_out_loss"]
        new = {
            "perplexity_before": None if loss["dense"] is None else perplexity_of_loss(loss["dense"]),
            "perplexity_before_of": facts["teacher"],
            "perplexity_after": perplexity_of_loss(loss["after"]),
            "perplexity_text": f"held-out sequences ({facts['held_out']['source']})",
            "perplexity_protocol": facts["protocol"],
            "perplexity_by_source": [],
        }
        # Of a model that came from this command before, what it was before the first time.
        old = metrics.get("before_recovery") or {name: metrics[name] for name in new if name in metrics}
        extras["metrics.json"] = json.dumps({**metrics, **new, "before_recovery": old}, indent=1) + "\n"
    return extras
