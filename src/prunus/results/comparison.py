"""Names in the folder of a comparison, for whoever writes and reads it."""

from __future__ import annotations

__all__ = ["DENSE", "plan_name"]

#: name of the row of the model before pruning
DENSE = "dense"


def plan_name(recipe: str, ratio: float, seed: int) -> str:
    """The file of a plan in the subfolder plans/."""
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in recipe)
    short = f"{ratio:g}"
    return f"{safe}-{short if float(short) == ratio else repr(ratio)}-seed{seed}.json"
