"""What a recipe may do to a language model that is saved inside a multimodal model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prunus.errors import OptionError
from prunus.model.geometry import Geometry
from prunus.model.whole import whole_of
from prunus.pipeline.recipe import Recipe

__all__ = ["recipe_inside", "whole_metrics"]


def recipe_inside(recipe: Recipe, model: Any) -> Recipe:
    """The recipe for a language model, with the constraints that a multimodal model around it adds.

    Args:
        recipe: how to prune.
        model: the language model.

    Raises:
        OptionError: the recipe cuts what cannot be cut there, or does not fit the language model, see `Recipe.of`.
    """
    recipe = recipe.of(Geometry.of(model))
    if (whole := whole_of(model)) is None:
        return recipe
    selection = recipe.selection
    axes = selection.axes or ()
    if other := [axis for axis in axes if axis not in whole.kind.axes]:
        raise OptionError(
            f"inside {whole.kind.title} no class of transformers can hold fewer groups of {other[0]}; set "
            f"`selection.axes` to [{', '.join(whole.kind.axes)}], or save the language model alone (`output.text_only`)"
        )
    if selection.shape != "uniform" and selection.layer_start < whole.early_layers:
        selection = replace(selection, layer_start=whole.early_layers)
    return replace(recipe, selection=selection)


def whole_metrics(before: Any, after: Any) -> dict[str, Any]:
    """What the metrics of a result say about the multimodal model around it; nothing for a language model alone.

    Args:
        before: the dense language model.
        after: the pruned one.
    """
    if (whole := whole_of(after)) is None:
        return {}
    counts = {
        "parameters_before": before.num_parameters() + whole.parameters,
        "parameters_after": after.num_parameters() + whole.parameters,
    }
    return {"whole": {"model_type": whole.kind.model_type, "title": whole.kind.title, **counts}}
