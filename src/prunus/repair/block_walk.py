"""A model that goes through its decoder layers one block at a time, for all batches, with what it needs to stop there.

Attention and MLP of a layer are run apart: from the residual stream before a block to the input of its last projection,
and from there to the residual stream after it. Whoever changes that projection does so in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.batches import Batch
from prunus.model.families import Block, family_of
from prunus.model.geometry import submodule
from prunus.model.layers import layers_of
from prunus.sweep.blocks import StopForward, answering, layer_calls, run_layer, stopped
from prunus.sweep.spool import Slots

__all__ = ["BlockWalk"]


class BlockWalk:
    """The residual streams of all batches on their way through a model.

    Args:
        model: a causal language model in evaluation mode, in memory or opened.
        batches: the tokens.
        hidden: where the residual streams wait, one per batch.

    Attributes:
        hidden: the residual streams before the block that is next, (batch, seq_len, hidden_size).
        layer: the layer that is held, inside `at`.
        layers: all of them.
        blocks: of a layer, in the order in which it runs them.
    """

    def __init__(self, model: Any, batches: Sequence[Batch], hidden: Slots):
        family = family_of(model.config)
        self.hidden = hidden
        self.layer: nn.Module
        self.layers = layers_of(model)
        self.blocks = family.blocks
        self._scale = family.residual_scale(model.config)
        self._arguments: list[Sequence[dict[str, Any]]] = []
        self._index = 0
        for number, batch in enumerate(batches):
            calls = layer_calls(model, family.layers, batch)
            self._arguments.append(calls.arguments)
            hidden[number] = calls.hidden

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Hold a layer, by its number in this model."""
        with self.layers.hold(index, then=index + 1) as layer:
            self.layer, self._index = layer, index
            yield

    def module(self, block: Block) -> nn.Linear:
        """The last projection of a block of the held layer."""
        found: nn.Linear = submodule(self.layer, block.output.path)
        return found

    @torch.no_grad()
    def enter(self, block: Block, number: int) -> Tensor:
        """Run a block of the held layer as far as the input of its last projection, (batch, seq_len, in_features).

        Args:
            block: which one; blocks before it in the layer have been left.
            number: of the batch.
        """
        hidden, seen = self.hidden[number], []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise StopForward

        handle = self.module(block).register_forward_pre_hook(stop)
        try:
            with stopped(), answering(self._silent(block, hidden)):
                run_layer(self.layer, hidden, self._arguments[number][self._index])
        finally:
            handle.remove()
        return seen[0]

    @torch.no_grad()
    def leave(self, block: Block, number: int, output: Tensor) -> None:
        """Go on to the residual stream after a block.

        Args:
            block: the block that was entered.
            number: of the batch.
            output: of its last projection.
        """
        if block.post_norm:
            output = submodule(self.layer, block.post_norm)(output)
        self.hidden[number] = self.hidden[number] + self._scale * output

    def _silent(self, block: Block, hidden: Tensor) -> dict[nn.Module, Callable[..., Any]]:
        """The blocks before one, which are in the residual stream already and add nothing any more."""

        def nothing(axis: str) -> Callable[..., Any]:
            # Attention modules of transformers answer with their weights, too; nobody asked for those.
            zeros = torch.zeros_like(hidden)
            return lambda *args, **kwargs: (zeros, None) if axis == "attention" else zeros

        earlier = self.blocks[: self.blocks.index(block)]
        return {submodule(self.layer, each.module): nothing(each.axis) for each in earlier}
