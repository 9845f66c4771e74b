"""`prunus inspect`: what a model consists of."""

from __future__ import annotations

from pathlib import Path

from prunus.cli.flags import Flag, ModelName
from prunus.errors import OptionError

__all__ = ["inspect"]


def inspect(
    model: ModelName,
    /,
    *,
    ratio: float | None = None,
    group: str | None = None,
    table: Path | None = None,
    json: Flag = False,
) -> None:
    """Show what a model consists of, what a ratio would remove, what was removed from a pruned one, or one group.

    Args:
        model: folder, Hub id or `smollm2-135m`; its weights are not read.
        ratio: also say what removing this share of all parameters means.
        group: show one group instead, e.g. `3:mlp:17`, `0:attention:1` or `2:expert:5`: which rows and columns of which
            tensors are cut together, and what that saves.
        table: groups.csv, or the folder that `prunus score` wrote: importance, score and rank of the group.
        json: print the facts as JSON.
    """
    from prunus.cli.printing import print_json, print_rows, short
    from prunus.pipeline.inspection import inspect as inspect_model
    from prunus.pipeline.inspection import inspect_group
    from prunus.scoring.routing import ROUTING_COLUMNS, routing_rows

    if group is not None:
        facts = inspect_group(model, group, table)
        if json:
            print_json(facts)
            return
        shown = [(part["tensor"], part["indices"], f"{part['parameters']:,}") for part in facts.pop("parts")]
        print_rows(f"group {group}", ("cut together", "", "parameters"), shown)
        print_rows("", ("", ""), [(name, short(value)) for name, value in facts.items()])
        return
    if table is not None:
        raise OptionError("`table` says what one group is worth; name it with `group`, e.g. 3:mlp:17")
    facts = inspect_model(model, ratio)
    if json:
        print_json(facts)
        return
    layers, removed, axes = facts.pop("layers"), facts.pop("removed", None), list(facts["groups"])
    routing = facts.pop("routing", None)
    print_rows(str(facts.pop("model")), ("", ""), [(name, short(value)) for name, value in facts.items()])
    if removed is None:
        rows = [(str(i), *(f"{count:,}" for count in layer.values())) for i, layer in enumerate(layers)]
        print_rows("groups per layer", ("layer", *axes), rows)
    else:
        rows = [(str(row["layer_idx"]), *(f"{row[axis]:,} of {row['of'][axis]:,}" for axis in axes)) for row in removed]
        print_rows("groups removed, by layer of the base model", ("layer", *axes), rows)
    if routing:
        print_rows("tokens of experts, by layer of the model that was cut", ROUTING_COLUMNS, routing_rows(routing))
