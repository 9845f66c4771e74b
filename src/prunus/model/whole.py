"""The multimodal model that a language model was taken out of.

Everything in prunus works on causal language models. Of a multimodal model that is its language model, under the names
that a causal language model has; what lies around it (towers for images or sound, what projects their features) is
neither scored nor cut, stays on disk, and is written around the result again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.errors import PlanError
from prunus.model.families import Multimodal

__all__ = ["Whole", "attach_whole_", "whole_of"]

#: where a language model keeps the multimodal model around it
ATTRIBUTE = "_prunus_whole"


@dataclass(frozen=True)
class Whole:
    """A multimodal model without its language model.

    Attributes:
        kind: which one.
        config: its config, of transformers or of prunus.
        folder: where it lies.
        parameters: of all that is not the language model.
    """

    kind: Multimodal
    config: Any
    folder: Path
    parameters: int

    @property
    def early_layers(self) -> int:
        """How many decoder layers, from the first on, take in features of images, and must not be removed."""
        places = self.kind.early_layers and getattr(self.config.vision_config, self.kind.early_layers, None)
        return len(places) if places else 0

    def check_layers(self, survivors: Sequence[int]) -> None:
        """Check that features of images still reach the layers they are made for.

        Args:
            survivors: indices of the decoder layers that stay.

        Raises:
            PlanError: one of the early layers is removed.
        """
        early = self.early_layers
        if removed := [layer_idx for layer_idx in range(early) if layer_idx not in survivors]:
            raise PlanError(
                f"the plan removes decoder layer {removed[0]}, and features of images are added behind each of the "
                f"first {early} layers of {self.kind.title}: without it they would reach others. Plan with "
                f"`selection.layer_start` {early}, or save the language model alone (`output.text_only`)"
            )


def whole_of(model: Any) -> Whole | None:
    """The multimodal model around a language model; None if there is none."""
    whole: Whole | None = getattr(model, ATTRIBUTE, None)
    return whole


def attach_whole_(model: Any, whole: Whole | None) -> None:
    """Say what a language model is saved inside of; None: it is saved by itself."""
    setattr(model, ATTRIBUTE, whole)
