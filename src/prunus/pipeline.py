"""The main job, top to bottom: calibrate, score, select, cut, measure, save."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import prunus
from prunus.calibration import Calibration, load_calibration
from prunus.checkpoint import (
    CalibrationFacts,
    CardFacts,
    PerplexityFacts,
    check_disk,
    check_output,
    is_ragged,
    license_of,
    load_model,
    locate,
    model_bytes,
    model_card,
    save_checkpoint,
)
from prunus.compensation import CompensationOptions, Repair, compensate_
from prunus.errors import CalibrationError, OptionError
from prunus.evaluation.perplexity import PerplexityResult, perplexity, perplexity_of_windows, read_text
from prunus.groups import Geometry
from prunus.importance import get_method
from prunus.metering import metered
from prunus.packaged_model import resolve_model
from prunus.plan import Plan
from prunus.scoring import Score, ScoringOptions, score
from prunus.selection import Constraints, check_ratio, check_reachable, select
from prunus.surgery import apply_plan

__all__ = [
    "CalibrationOptions",
    "EvaluationOptions",
    "ModelOptions",
    "PruneResult",
    "apply_checkpoint",
    "prune",
    "prune_checkpoint",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOptions:
    """Where and how the model is held.

    Attributes:
        device: auto, cpu, cuda, cuda:1, mps; auto is the first of cuda, mps, cpu that there is.
        dtype: auto keeps the checkpoint's own; else float32, bfloat16 or float16. The result is saved in it.
    """

    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class CalibrationOptions:
    """The text that importance is measured on.

    Attributes:
        calibration: a .txt, .jsonl or .parquet file; c4, wikitext2, ptb or another data set of the Hub; `default` for
            the text that ships with Python; `self` for text that the model writes.
        samples: number of sequences.
        seq_len: tokens per sequence.
        seed: decides which sequences are drawn.
        text_column: column that holds the text in .jsonl and .parquet files.
    """

    calibration: str = "default"
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    text_column: str = "text"


@dataclass(frozen=True)
class EvaluationOptions:
    """How the models before and after are compared.

    Attributes:
        eval_text: a text file to measure perplexity on, before and after; without it, calibration sequences that were
            held out.
        eval_seq_len: tokens per window of the text.
        eval_windows: only the first so many windows of the text.
        held_out: number of held-out calibration sequences, where no text is given; 0 = measure nothing.
    """

    eval_text: str | None = None
    eval_seq_len: int = 2048
    eval_windows: int | None = None
    held_out: int = 16

    def __post_init__(self) -> None:
        if self.held_out < 0:
            raise OptionError(f"held_out is {self.held_out}; it must not be negative")


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
        "prunus": prunus.__version__,
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
    _save(
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
        "prunus": prunus.__version__,
        "base_model": Path(model).name if Path(model).is_dir() else model,
        "ratio": 1 - smaller.num_parameters() / geometry.total_parameters,
        "parameters_before": geometry.total_parameters,
        "parameters_after": smaller.num_parameters(),
        "plan": plan.fingerprint,
    }
    _save(
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


def draw_calibration(
    model: Any,
    tokenizer: Any,
    options: CalibrationOptions,
    *,
    held_out: int,
    needed: bool,
    progress: bool = True,
) -> tuple[Calibration | None, Calibration | None]:
    """The sequences to calibrate on, and others of the same source that are held out for measuring."""
    samples = options.samples if needed else 0
    if samples + held_out == 0:
        return None, None
    drawn = load_calibration(
        options.calibration,
        tokenizer,
        samples=samples + held_out,
        seq_len=options.seq_len,
        seed=options.seed,
        text_column=options.text_column,
        model=model,
        progress=progress,
    )
    if not held_out:
        return drawn, None
    return drawn.split(held_out) if samples else (None, drawn)


def measure(
    model: Any,
    tokenizer: Any,
    text: str | None,
    held_out: Calibration | None,
    options: EvaluationOptions,
    *,
    progress: bool = True,
) -> PerplexityResult | None:
    """Perplexity on the evaluation text, else on held-out calibration sequences, else nothing."""
    if text is not None:
        return perplexity(
            model, tokenizer, text, seq_len=options.eval_seq_len, max_windows=options.eval_windows, progress=progress
        )
    if held_out is not None:
        return perplexity_of_windows(model, held_out.input_ids, progress=progress)
    return None


def text_name(evaluation: EvaluationOptions, calibration: CalibrationOptions) -> str:
    """What `measure` measures on, for a reader."""
    if evaluation.eval_text:
        return Path(evaluation.eval_text).name
    name = Path(calibration.calibration).name
    return f"held-out calibration sequences ({name})"


def _command(model: str, out: str | Path, ratio: float, method: str) -> str:
    return f"prunus prune {shlex.quote(model)} --out {shlex.quote(str(out))} --ratio {ratio:g} --method {method}"


def _save(
    smaller: Any,
    tokenizer: Any,
    out: str | Path,
    plan: Plan,
    scored: Score | None,
    metrics: Mapping[str, Any],
    source: str,
    command: str,
    overwrite: bool,
) -> None:
    extras: dict[str, str | bytes] = {
        "plan.json": plan.to_json(),
        "metrics.json": json.dumps(metrics, indent=1) + "\n",
    }
    if scored is not None:
        extras["groups.csv"] = scored.table.to_csv(index=False)
        extras["score.json"] = scored.to_json()
    card = model_card(_card_facts(smaller, Path(out).name, plan, metrics, source, command))
    save_checkpoint(smaller, tokenizer, out, card=card, extras=extras, overwrite=overwrite)


def _card_facts(
    smaller: Any, name: str, plan: Plan, metrics: Mapping[str, Any], source: str, command: str
) -> CardFacts:
    config = smaller.config
    provenance = metrics.get("calibration")
    facts = ("source", "samples", "seq_len", "seed", "sha256")
    perplexities: tuple[PerplexityFacts, ...] = ()
    if metrics.get("perplexity_after") is not None:
        perplexities = (
            PerplexityFacts(
                metrics["perplexity_text"],
                metrics["perplexity_protocol"],
                metrics["perplexity_before"],
                metrics["perplexity_after"],
            ),
        )
    return CardFacts(
        name=name,
        base_model=metrics["base_model"],
        method=metrics["scoring"]["method"] if "scoring" in metrics else "a given plan",
        ratio=metrics["ratio"],
        parameters_before=metrics["parameters_before"],
        parameters_after=metrics["parameters_after"],
        base_widths=plan.widths,
        widths=plan.kept_widths,
        num_key_value_groups=config.num_attention_heads // config.num_key_value_heads,
        model_type=config.model_type,
        ragged=is_ragged(config),
        command=command,
        version=prunus.__version__,
        license=license_of(locate(source)),
        calibration=CalibrationFacts(**{key: provenance[key] for key in facts}) if provenance else None,
        perplexities=perplexities,
        details={
            **{name: str(value) for name, value in metrics.get("scoring", {}).items() if name != "method"},
            "compensation": str(metrics.get("compensation") or "none"),
        },
    )
