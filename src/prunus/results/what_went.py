"""What a cut removed and how that was chosen, in words for a card and a report."""

from __future__ import annotations

from collections.abc import Sequence

from prunus.model.families import ALL_AXES, Axis
from prunus.model.widths import LayerWidths

__all__ = ["how_chosen", "what_went"]

_NAMES: dict[Axis, str] = {
    "attention": "attention groups (a key/value head with the query heads that read it)",
    "mlp": "MLP channels",
    "expert": "experts",
}


def what_went(before: Sequence[LayerWidths], after: Sequence[LayerWidths]) -> str:
    """The kinds of group that were removed.

    Args:
        before: groups of each layer.
        after: those that are left; a layer of which nothing is left has none.
    """
    pairs = list(zip(before, after, strict=True))
    parts = [name for axis, name in _NAMES.items() if any(left and left[axis] < was[axis] for was, left in pairs)]
    parts += ["decoder layers"] if any(was and not left for was, left in pairs) else []
    if not parts:
        return "nothing"
    *others, last = parts
    return f"whole {', '.join(others)}{' and ' if others else ''}{last}"


def how_chosen(before: Sequence[LayerWidths], after: Sequence[LayerWidths], by_scores: bool) -> str:
    """How the groups that went were chosen.

    Args:
        before: groups of each layer.
        after: those that are left.
        by_scores: whether they were ranked when they were cut; else a plan said which.
    """
    if not by_scores:
        return "as a given plan says"
    cut = {axis for was, left in zip(before, after, strict=True) if left for axis in ALL_AXES if left[axis] < was[axis]}
    if not cut:
        return "those of least importance"
    left_in = [{left[axis] for was, left in zip(before, after, strict=True) if left and was[axis]} for axis in cut]
    even = all(len(numbers) == 1 for numbers in left_in)
    return "in every layer those of least importance" if even else "chosen in one ranking over all layers"
