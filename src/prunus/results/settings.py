"""Settings of a result in words, for its card and its report: those that had an effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunus.importance import METHODS

__all__ = ["in_words", "settings_used"]


def settings_used(metrics: Mapping[str, Any]) -> dict[str, str]:
    """How groups were scored and the rest was repaired, as metrics.json has it, without the method's name.

    Args:
        metrics: of the result, its `scoring` and `repair`; both are missing where a plan was applied.
    """
    scoring = {name: value for name, value in (metrics.get("scoring") or {}).items() if name not in _unread(metrics)}
    repair = metrics.get("repair")
    return {
        **{name: in_words(value) for name, value in scoring.items() if name != "method"},
        "repair": in_words(repair) if repair else "none",
    }


def in_words(value: Any) -> str:
    """A plain value as a reader wants it."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        said = [f"{name} {in_words(inner)}" for name, inner in value.items() if inner not in (None, "", [], {})]
        return ", ".join(said) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(in_words, value)) if value else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _unread(metrics: Mapping[str, Any]) -> frozenset[str]:
    """Settings of scoring that its method does not read."""
    scoring = metrics.get("scoring") or {}
    method = scoring.get("method")
    unread = {"hybrid", "adaptive"} - {method}
    if method in METHODS:
        needs = METHODS[method].needs
        unread |= set() if "activations" in needs else {"activation"}
        unread |= set() if "squares" in needs or scoring.get("hessian") != "mean_loss" else {"hessian"}
        unread |= set() if needs else {"noise"}
    return frozenset(unread)
