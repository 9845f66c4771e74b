"""Held-out losses over what a training took, in one or several rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["curve"]


def curve(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Held-out losses of all rounds, over tokens and seconds of training since the first.

    Args:
        rounds: of each round what prunus/recovery.json says.

    Returns:
        Points in order: `round`, counted from 1, `step` within it, 0 for the loss before, `tokens` and `seconds` of all
        rounds so far, and `held_out_loss` in nats per token.
    """
    points: list[dict[str, Any]] = []
    tokens, seconds = 0, 0.0
    for number, facts in enumerate(rounds, start=1):
        per_step = facts["options"]["batch_size"] * facts["text"]["seq_len"]
        pace = facts["seconds"] / max(facts["steps"], 1)
        losses = [(0, facts["held_out_loss"]["before"])]
        losses += [(entry["step"], entry["held_out_loss"]) for entry in facts["history"]]
        points += [
            {
                "round": number,
                "step": step,
                "tokens": tokens + step * per_step,
                "seconds": round(seconds + step * pace, 1),
                "held_out_loss": loss,
            }
            for step, loss in losses
        ]
        tokens, seconds = tokens + facts["tokens"], seconds + facts["seconds"]
    return points
