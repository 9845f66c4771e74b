"""`prunus prune`: from a model to a smaller one, in one go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from prunus.cli.flags import (
    COMPENSATION,
    SCORING,
    SELECTION,
    BestScoring,
    BestScoringFlags,
    CalibrationFlags,
    CompensationFlags,
    EvaluationFlags,
    Flag,
    ModelFlags,
    ModelName,
    SearchFlags,
    Selection,
    SelectionFlags,
    Target,
    TargetFlags,
    seeded,
)
from prunus.cli.printing import print_json, print_rows, typed_command
from prunus.pipeline.budget_search import SearchOptions
from prunus.pipeline.inputs import CalibrationOptions, EvaluationOptions, ModelOptions
from prunus.pipeline.prune import prune_checkpoint
from prunus.repair.compensation import CompensationOptions
from prunus.scoring.score import ScoringOptions

__all__ = ["DEFAULT_ATTENTION_WEIGHT", "DEFAULT_ROUNDS", "DEFAULT_SCORE_NOISE", "prune"]

#: the default recipe of `prunus prune`, beside its method: chosen on held-out calibration text, see benchmarks/LOG.md
DEFAULT_ROUNDS = 2
DEFAULT_ATTENTION_WEIGHT = 1.5
DEFAULT_SCORE_NOISE = 0.3


def prune(
    model: ModelName,
    /,
    *,
    out: Path,
    ratio: float = 0.25,
    calibration: CalibrationFlags = CalibrationOptions(),
    scoring: BestScoringFlags = BestScoring(),
    attention_weight: Annotated[float | None, Parameter(group=SCORING)] = None,
    score_noise: Annotated[float | None, Parameter(group=SCORING)] = None,
    selection: SelectionFlags = Selection(),
    target: TargetFlags = Target(),
    compensate: Annotated[bool, Parameter(group=COMPENSATION)] = True,
    compensation: CompensationFlags = CompensationOptions(),
    rounds: Annotated[int | None, Parameter(group=SELECTION)] = None,
    search: SearchFlags = SearchOptions(),
    evaluation: EvaluationFlags = EvaluationOptions(),
    where: ModelFlags = ModelOptions(),
    work: Path | None = None,
    report: bool = True,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Prune a model and save the smaller one: score, plan, apply, repair and measure in one go.

    The defaults are a recipe that was measured, see benchmarks/RESULTS.md. `--method taylor --no-compensate --rounds 1`
    is plain first-order Taylor pruning.

    Args:
        model: folder, Hub id or `smollm2-135m`.
        out: folder for the result; it appears when it is complete.
        ratio: share of all parameters to remove, or of what --target says, in [0, 1).
        attention_weight: factor on the scores of attention groups; by default 1.5, as repair makes up for lost channels
            better than for lost attention, and 1 with
            `--no-compensate` or `--normalize zscore`.
        score_noise: share of the tokens that are replaced by random ones in half of the sequences that scores are taken
            on, so that scores hold for other text as well; by default 0.3, and 0 with `--no-compensate`.
        compensate: repair the remaining weights by least squares on the calibration sequences.
        rounds: cut in so many equal parts, scoring what is left (and repaired) before each next one; by default 2, but
            1 for `--shape uniform`, which knows no more.
        work: folder from which a killed run goes on when the same command is given again; by default OUT.work, with the
            streamed engine only. Removed at the end.
        report: write report.html, with what both models make of a few prompts.
        overwrite: replace an earlier result in the folder.
        json: print the metrics as JSON.
    """
    metrics = prune_checkpoint(
        model,
        out,
        ratio,
        calibration=calibration,
        scoring=replace(
            seeded(scoring, calibration),
            attention_weight=_attention_weight(scoring, compensate) if attention_weight is None else attention_weight,
            score_noise=(DEFAULT_SCORE_NOISE if compensate else 0.0) if score_noise is None else score_noise,
        ),
        constraints=selection,
        target=target,
        compensation=compensation if compensate else None,
        rounds=rounds or (1 if selection.shape == "uniform" else DEFAULT_ROUNDS),
        search=search,
        evaluation=evaluation,
        model_options=where,
        overwrite=overwrite,
        work=work,
        command=typed_command(),
        report=report,
    )
    if json:
        print_json(metrics)
        return
    print_rows(
        f"{metrics['base_model']} → {out}",
        ("", "before", "after"),
        [
            ("parameters", f"{metrics['parameters_before']:,}", f"{metrics['parameters_after']:,}"),
            *_target_row(metrics["target"]),
            *_perplexity_row(metrics),
        ],
    )


def _attention_weight(scoring: ScoringOptions, compensate: bool) -> float:
    # Standard scores may be negative, and take no factor.
    return DEFAULT_ATTENTION_WEIGHT if compensate and scoring.normalize != "zscore" else 1.0


def _target_row(target: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if target["target"] == "params":
        return []
    return [(target["quantity"], f"{target['before']:,.0f}", f"{target['after']:,.0f}")]


def _perplexity_row(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if metrics["perplexity_after"] is None:
        return []
    before, after = metrics["perplexity_before"], metrics["perplexity_after"]
    return [(f"perplexity, {metrics['perplexity_text']}", f"{before:.2f}", f"{after:.2f}")]
