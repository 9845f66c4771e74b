"""`prunus inspect`: what a model consists of."""

from __future__ import annotations

from prunus.cli.flags import Flag, ModelName
from prunus.cli.printing import print_json, print_rows, short
from prunus.model.families import AXES
from prunus.pipeline.inspection import inspect as inspect_model

__all__ = ["inspect"]


def inspect(model: ModelName, /, *, ratio: float | None = None, json: Flag = False) -> None:
    """Show what a model consists of, what a ratio would remove, and what was removed from a pruned one.

    Args:
        model: folder, Hub id or `smollm2-135m`; its weights are not read.
        ratio: also say what removing this share of all parameters means.
        json: print the facts as JSON.
    """
    facts = inspect_model(model, ratio)
    if json:
        print_json(facts)
        return
    layers, removed = facts.pop("layers"), facts.pop("removed", None)
    print_rows(str(facts.pop("model")), ("", ""), [(name, short(value)) for name, value in facts.items()])
    if removed is None:
        rows = [(str(i), *(f"{count:,}" for count in layer.values())) for i, layer in enumerate(layers)]
        print_rows("groups per layer", ("layer", *AXES), rows)
    else:
        rows = [(str(row["layer_idx"]), *(f"{row[axis]:,} of {row['of'][axis]:,}" for axis in AXES)) for row in removed]
        print_rows("groups removed, by layer of the base model", ("layer", *AXES), rows)
