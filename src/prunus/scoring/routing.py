"""How many calibration tokens each expert of a mixture got, and what to say of those that got none."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from prunus.errors import CalibrationError
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan
from prunus.statistics import Statistics

__all__ = [
    "ROUTING_COLUMNS",
    "active_parameters",
    "check_enough_reached",
    "idle_experts",
    "routing_of",
    "routing_rows",
    "tokens_of_experts",
    "warn_of_idle_experts",
]

logger = logging.getLogger(__name__)

#: share of the experts that may have been without tokens before it is warned of
TOLERATED = 0.01


def tokens_of_experts(statistics: Sequence[Statistics]) -> dict[str, Any]:
    """Routed tokens per expert and layer, as plain values; empty where the model has no experts.

    Args:
        statistics: of each source of text, with those of `prunus.statistics.routing`.
    """
    sources = [[_counts(layer.get("routing.tokens")) for layer in source.layers] for source in statistics]
    per_layer = [[sum(counts) for counts in zip(*layers, strict=True)] for layers in zip(*sources, strict=True)]
    if not any(per_layer):
        return {}
    return {
        "experts": sum(map(len, per_layer)),
        "experts_without_tokens": idle_experts(per_layer),
        "tokens_of_experts": per_layer,
    }


def _counts(tokens: Tensor | None) -> list[int]:
    return [] if tokens is None else [int(count) for count in tokens.tolist()]


def idle_experts(per_layer: Sequence[Sequence[int]]) -> int:
    """How many experts got no token."""
    return sum(not count for counts in per_layer for count in counts)


def warn_of_idle_experts(routing: Mapping[str, Any] | None) -> None:
    """Say how many experts were without tokens, if they are more than one in a hundred.

    Args:
        routing: what `tokens_of_experts` gave; None = nothing was counted.
    """
    if not routing or routing["experts_without_tokens"] <= TOLERATED * routing["experts"]:
        return
    idle, experts = routing["experts_without_tokens"], routing["experts"]
    logger.warning(
        "%s of %s experts (%.1f %%) got no token of the calibration text, so that they count as worth nothing: too "
        "little text, or text of one kind. Give more `samples`, or text of the kinds that the model is for",
        f"{idle:,}",
        f"{experts:,}",
        100 * idle / experts,
    )


def check_enough_reached(routing: Mapping[str, Any] | None, plan: Plan) -> None:
    """Check that a plan does not keep experts of which nothing is known, beside others of which nothing is known.

    Args:
        routing: what `tokens_of_experts` gave; None = nothing was counted.
        plan: the cut.

    Raises:
        CalibrationError: fewer experts of a layer got tokens than stay, and not all stay: chance would choose the
            others.
    """
    for layer_idx, counts in enumerate(routing["tokens_of_experts"] if routing else ()):
        kept, reached = len(plan.layers[layer_idx].expert), sum(map(bool, counts))
        if reached < kept < len(counts):
            raise CalibrationError(
                f"layer {layer_idx}: the calibration text reached {reached} of {len(counts)} experts, and {kept} are "
                "to stay: chance would choose among the others. Give more `samples`, or text of the kinds that the "
                "model is for"
            )


def routing_of(
    routing: Mapping[str, Any] | None, plan: Plan, tokens_after: Mapping[int, Sequence[int]]
) -> dict[str, Any]:
    """What a cut does to routing, as plain values: the key `routing`, or nothing where no tokens were counted.

    Args:
        routing: what `tokens_of_experts` gave; None = nothing was counted.
        plan: the cut.
        tokens_after: by layer how many tokens each expert that stays got in the cut model; of no layer where that was
            not seen.
    """
    if not routing:
        return {}
    layers = []
    for layer_idx, (counts, kept) in enumerate(zip(routing["tokens_of_experts"], plan.layers, strict=True)):
        if counts:
            stay = sum(counts[expert] for expert in kept.expert)
            after = tokens_after.get(layer_idx)
            layers.append(
                {
                    "layer_idx": layer_idx,
                    "experts": len(counts),
                    "kept": len(kept.expert),
                    "moved": 1 - stay / max(sum(counts), 1),
                    "tokens_before": sorted(counts[expert] for expert in kept.expert),
                    "tokens_after": None if after is None else sorted(after),
                }
            )
    idle = routing["experts_without_tokens"]
    return {"routing": {"experts": routing["experts"], "experts_without_tokens": idle, "layers": layers}}


#: heads of the cells of `routing_rows`
ROUTING_COLUMNS = ("layer", "experts kept", "moved", "tokens per kept expert, before", "after")


def routing_rows(routing: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row per layer with experts, for people.

    Args:
        routing: the key `routing` of metrics.json, see `routing_of`.

    Returns:
        Cells under `ROUTING_COLUMNS`; tokens as least / median / most.
    """

    def spread(tokens: Sequence[int] | None) -> str:
        return f"{tokens[0]:,} / {tokens[len(tokens) // 2]:,} / {tokens[-1]:,}" if tokens else ""

    return [
        (
            str(layer["layer_idx"]),
            f"{layer['kept']:,} of {layer['experts']:,}",
            f"{layer['moved']:.1%}",
            spread(layer["tokens_before"]),
            spread(layer["tokens_after"]),
        )
        for layer in routing["layers"]
    ]


def active_parameters(geometry: Geometry, plan: Plan) -> dict[str, int]:
    """How many parameters work on each token before and after a cut of a mixture; nothing of a dense model."""
    if not geometry.experts_per_token:
        return {}
    after = geometry.active_parameters_left(plan.kept_widths)
    return {"active_parameters_before": geometry.active_parameters, "active_parameters_after": after}
