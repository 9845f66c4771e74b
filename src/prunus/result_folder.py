"""The folder that a user gets: the model, its card, and what it was made by."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.checkpoint import (
    CalibrationFacts,
    CardFacts,
    OriginalFacts,
    PerplexityFacts,
    is_ragged,
    license_of,
    locate,
    model_card,
    save_checkpoint,
)
from prunus.errors import PlanError
from prunus.lineage import COMPOSED_PLAN, Lineage, lineage_of
from prunus.plan import Plan
from prunus.scoring import Score
from prunus.version import __version__

__all__ = ["save_result"]

logger = logging.getLogger(__name__)


def save_result(
    smaller: Any,
    tokenizer: Any,
    out: str | Path,
    plan: Plan,
    scored: Score | None,
    metrics: Mapping[str, Any],
    source: str,
    command: str,
    overwrite: bool,
) -> dict[str, Any]:
    """Write a model folder with its card, and the plan, scores and metrics in its subfolder `prunus/`.

    If the base model is itself a folder that prunus cut, the subfolder also gets the composed plan, from the model that
    was never cut, and card and metrics name that one.

    Args:
        smaller: the pruned model.
        tokenizer: its tokenizer.
        out: the folder to write.
        plan: the cut.
        scored: the table it was chosen from; None for a plan that was given.
        metrics: what was done and measured.
        source: folder or Hub id of the base model, whose license is carried over.
        command: what the user typed.
        overwrite: replace an earlier result.

    Returns:
        The metrics as written: as given, and with `original` if the base model had been cut before.
    """
    origin = _origin(locate(source), plan)
    metrics = {**metrics, "original": origin.to_dict()} if origin else dict(metrics)
    extras: dict[str, str | bytes] = {
        "plan.json": plan.to_json(),
        "metrics.json": json.dumps(metrics, indent=1) + "\n",
    }
    if origin is not None:
        extras[COMPOSED_PLAN] = origin.plan.to_json()
    if scored is not None:
        extras["groups.csv"] = scored.table.to_csv(index=False)
        extras["score.json"] = scored.to_json()
    card = model_card(_card_facts(smaller, Path(out).name, plan, origin, metrics, source, command))
    save_checkpoint(smaller, tokenizer, out, card=card, extras=extras, overwrite=overwrite)
    return metrics


def _origin(base: Path, plan: Plan) -> Lineage | None:
    """Where the result comes from, if its base model had been cut before."""
    earlier = lineage_of(base)
    try:
        return earlier.then(plan) if earlier else None
    except PlanError:
        logger.warning(
            "the plan in %s does not lead to the model that lies there, so no plan from the original model is written",
            base / "prunus",
        )
        return None


def _card_facts(
    smaller: Any,
    name: str,
    plan: Plan,
    origin: Lineage | None,
    metrics: Mapping[str, Any],
    source: str,
    command: str,
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
        quantity=metrics["target"]["quantity"] if "target" in metrics else "parameters",
        parameters_before=metrics["parameters_before"],
        parameters_after=metrics["parameters_after"],
        base_widths=(origin.plan if origin else plan).widths,
        widths=(origin.plan if origin else plan).kept_widths,
        original=OriginalFacts(origin.model, origin.parameters, "/" in origin.model) if origin else None,
        num_key_value_groups=config.num_attention_heads // config.num_key_value_heads,
        model_type=config.model_type,
        ragged=is_ragged(config),
        command=command,
        version=__version__,
        # The packaged model is a conversion of a Hub model, and has no page of its own.
        on_hub="/" in metrics["base_model"] and not Path(source).is_dir(),
        license=license_of(locate(source)),
        calibration=CalibrationFacts(**{key: provenance[key] for key in facts}) if provenance else None,
        perplexities=perplexities,
        details={
            **{name: str(value) for name, value in metrics.get("scoring", {}).items() if name != "method"},
            "compensation": str(metrics.get("compensation") or "none"),
        },
    )
