"""The main job, top to bottom: calibrate, score, select, cut, measure, save."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunus.calibration import Calibration
from prunus.checkpoint import check_disk, check_output, load_model, model_bytes
from prunus.compensation import CompensationOptions, Repair, compensate_
from prunus.errors import CalibrationError
from prunus.evaluation.perplexity import read_text
from prunus.groups import Geometry
from prunus.importance import get_method
from prunus.inputs import CalibrationOptions, EvaluationOptions, ModelOptions, draw_calibration, measure, text_name
from prunus.metering import metered
from prunus.packaged_model import resolve_model
from prunus.plan import Plan
from prunus.result_folder import save_result
from prunus.scoring import Score, ScoringOptions, score
from prunus.selection import Constraints, check_ratio, check_reachable, select
from prunus.surgery import apply_plan
from prunus.version import __version__

__all__ = [
    "PruneResult",
    "apply_checkpoint",
    "prune",
    "prune_checkpoint",
]


@dataclass(frozen=True)
class PruneResult:
    """What pruning a live model gives.

    Attributes:
        model: the smaller model.
        plan: which groups stayed.
        score: the global table, and what it was made from.
        repairs: what compensation did to each block; empty without compensation.
    """

    model: Any
    plan: Plan
    score: Score
    repairs: Sequence[Repair] = ()


def prune(
    model: Any,
    ratio: float,
    calibration: Calibration | None = None,
    *,
    scoring: ScoringOptions | None = None,
    constraints: Constraints | None = None,
    compensation: CompensationOptions | None = None,
    progress: bool = True,
) -> PruneResult:
    """Prune a live transformers model.

    Args:
        model: a causal language model; it stays as it is.
        ratio: share of all its parameters to remove, in [0, 1).
        calibration: token sequences, from `prunus.load_calibration` or `prunus.calibration_from_texts`; None for a
            method that needs none.
        scoring: method and normalisation; default: first-order Taylor.
        constraints: what may be cut; default: everything.
        compensation: repair the remaining weights by least squares, see `prunus.compensation`; None = plain slicing.
        progress: show progress bars on a terminal.

    Returns:
        The smaller model with its plan and the table it was chosen from.

    Raises:
        OptionError: ratio outside [0, 1), unknown method.
        CalibrationError: the method needs calibration sequences.
        BudgetError: the ratio cannot be reached under the constraints.
        UnsupportedModelError: the model's family is not described.
    """
    check_reachable(Geometry.of(model), ratio, constraints)
    if compensation is not None and calibration is None:
        raise CalibrationError("compensation needs calibration sequences; give some, or leave compensation out")
    scored = score(model, calibration, scoring, progress=progress)
    plan = select(scored.table, scored.geometry, ratio, constraints)
    smaller = apply_plan(model, plan)
    repairs: list[Repair] = []
    if compensation is not None:
        assert calibration is not None
        batch_size = (scoring or ScoringOptions()).batch_size
        repairs = compensate_(
            smaller, model, plan, list(calibration.batches(batch_size)), compensation, progress=progress
        )
    return PruneResult(smaller, plan, scored, repairs)


def prune_checkpoint(
    model: str,
    out: str | Path,
    ratio: float,
    *,
    calibration: CalibrationOptions | None = None,
    scoring: ScoringOptions | None = None,
    constraints: Constraints | None = None,
    compensation: CompensationOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    model_options: ModelOptions | None = None,
    overwrite: bool = False,
    command: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Prune a model folder or Hub model and save the result.

    Args:
        model: a folder, a Hub id, or `smollm2-135m` for the packaged model.
        out: folder for the result; complete or not there at all.
        ratio: share of all parameters to remove, in [0, 1).
        calibration: the text that importance is measured on.
        scoring: method and normalisation.
        constraints: what may be cut.
        compensation: repair the remaining weights by least squares; None = plain slicing.
        evaluation: how the models before and after are compared.
        model_options: device and dtype.
        overwrite: replace an earlier result.
        command: what the user typed, for the model card.
        progress: show progress bars on a terminal.

    Returns:
        The metrics, as they are written to prunus/metrics.json.

    Raises:
        PrunusError: whatever is wrong with options, model, text or folder, as far as possible before any long work.
    """
    calibration, scoring = calibration or CalibrationOptions(), scoring or ScoringOptions()
    evaluation, model_options = evaluation or EvaluationOptions(), model_options or ModelOptions()
    # Everything that can fail for a wrong option fails here, before the model is loaded.
    check_ratio(ratio)
    check_output(out, overwrite)
    text = read_text(evaluation.eval_text) if evaluation.eval_text else None
    source = resolve_model(model)
    dense, tokenizer = load_model(source, dtype=model_options.dtype, device=model_options.device)
    geometry = Geometry.of(dense)
    check_reachable(geometry, ratio, constraints)
    check_disk(out, int(model_bytes(dense) * (1 - ratio)))
    sequences, held_out = draw_calibration(
        dense,
        tokenizer,
        calibration,
        held_out=0 if text else evaluation.held_out,
        needed=bool(get_method(scoring.method).needs) or compensation is not None,
        progress=progress,
    )

    with metered(dense.device) as cost:
        result = prune(
            dense,
            ratio,
            sequences,
            scoring=scoring,
            constraints=constraints,
            compensation=compensation,
            progress=progress,
        )
    before = measure(dense, tokenizer, text, held_out, evaluation, progress=progress)
    del dense
    after = measure(result.model, tokenizer, text, held_out, evaluation, progress=progress)

    metrics = {
        "prunus": __version__,
        "base_model": Path(model).name if Path(model).is_dir() else model,
        "ratio": ratio,
        "parameters_before": geometry.total_parameters,
        "parameters_after": result.model.num_parameters(),
        "perplexity_before": before.perplexity if before else None,
        "perplexity_after": after.perplexity if after else None,
        "perplexity_text": text_name(evaluation, calibration) if after else None,
        "perplexity_protocol": after.protocol if after else None,
        "plan": result.plan.fingerprint,
        "compensation": asdict(compensation) if compensation else None,
        "seconds_to_prune": round(cost.seconds, 1),
        "peak_bytes": cost.peak_bytes,
        **{key: value for key, value in result.score.about.items() if key not in ("seconds", "peak_bytes")},
    }
    save_result(
        result.model,
        tokenizer,
        out,
        result.plan,
        result.score,
        metrics,
        source,
        command or _command(model, out, ratio, scoring.method),
        overwrite,
    )
    return metrics


def apply_checkpoint(
    model: str,
    plan: Plan,
    out: str | Path,
    *,
    model_options: ModelOptions | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Cut a model folder or Hub model by a plan and save the result; nothing is measured.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.
        plan: which groups stay.
        out: folder for the result.
        model_options: device and dtype.
        overwrite: replace an earlier result.
        command: what the user typed, for the model card.

    Returns:
        The metrics, as they are written to prunus/metrics.json.
    """
    model_options = model_options or ModelOptions()
    check_output(out, overwrite)
    source = resolve_model(model)
    dense, tokenizer = load_model(source, dtype=model_options.dtype, device=model_options.device)
    geometry = Geometry.of(dense)
    plan.check_fits(geometry)
    smaller = apply_plan(dense, plan)
    del dense
    metrics = {
        "prunus": __version__,
        "base_model": Path(model).name if Path(model).is_dir() else model,
        "ratio": 1 - smaller.num_parameters() / geometry.total_parameters,
        "parameters_before": geometry.total_parameters,
        "parameters_after": smaller.num_parameters(),
        "plan": plan.fingerprint,
    }
    save_result(
        smaller,
        tokenizer,
        out,
        plan,
        None,
        metrics,
        source,
        command or f"prunus apply {shlex.quote(model)} plan.json --out {shlex.quote(str(out))}",
        overwrite,
    )
    return metrics


def _command(model: str, out: str | Path, ratio: float, method: str) -> str:
    return f"prunus prune {shlex.quote(model)} --out {shlex.quote(str(out))} --ratio {ratio:g} --method {method}"
