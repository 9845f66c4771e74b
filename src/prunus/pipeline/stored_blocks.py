"""What a recipe may do to a model whose weights are stored in blocks, and are saved as they are."""

from __future__ import annotations

from prunus.errors import OptionError
from prunus.model.geometry import Geometry
from prunus.pipeline.recipe import Recipe

__all__ = ["check_recipe_for_blocks"]


def check_recipe_for_blocks(title: str, geometry: Geometry, recipe: Recipe, *, fits: bool = False) -> None:
    """Check, before long work, that no weight would have to be encoded again.

    Args:
        title: what people call the format.
        geometry: shape of the model.
        recipe: how it is pruned.
        fits: whether a size to fit stands in place of the ratio.

    Raises:
        OptionError: the recipe repairs weights, removes something else than experts, or counts bytes.
    """
    if fits or recipe.target.name in ("size", "memory"):
        raise OptionError(
            f"how many bytes a part of a model takes is not counted where weights are stored in {title}; in place of a "
            "size give the share of the experts to remove (`experts`)"
        )
    if recipe.repair is not None:
        raise OptionError(
            f"the model's weights are stored in {title}, and a repaired weight would have to be rounded to that again: "
            "prune without repair (`repair=null`), or prune the bf16 checkpoint"
        )
    if (axes := recipe.selection.of(geometry).axes) != ("expert",):
        raise OptionError(
            f"`axes` {','.join(axes)}: of weights that are stored in {title} only whole experts can be removed; leave "
            "`axes` and `shape` out, or prune the bf16 checkpoint"
        )
