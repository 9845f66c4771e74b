"""A model that goes through its decoder layers one block at a time, for all batches, with what it needs to stop there.

Attention and MLP of a layer are run apart: from the residual stream before a block to the input of its last projection,
and from there to the residual stream after it. Whoever changes that projection does so in between. Experts, routed and
shared, are one step: from what the router is given to what all of them add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.batches import Batch
from prunus.model.families import Block, family_of
from prunus.model.layers import layers_of
from prunus.model.modules import submodule
from prunus.model.widths import layer_widths_of
from prunus.sweep.blocks import StopForward, answering, layer_calls, run_layer, stopped
from prunus.sweep.spool import Slots

__all__ = ["BlockWalk", "Routed"]


@dataclass(frozen=True)
class Routed:
    """The experts of a layer at work on one batch.

    Attributes:
        x: what experts and router are given, (batch · seq_len, hidden_size).
        chosen: experts of each token, int64, (batch · seq_len, experts_per_token).
        weights: the router's weights of them, of the same shape.
        output: what all experts, shared ones included, add to the residual stream, (batch, seq_len, hidden_size).
    """

    x: Tensor
    chosen: Tensor
    weights: Tensor
    output: Tensor


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
    """

    def __init__(self, model: Any, batches: Sequence[Batch], hidden: Slots):
        family = family_of(model.config)
        self.hidden = hidden
        self.layer: nn.Module
        self.layers = layers_of(model)
        self._family, self._widths = family, layer_widths_of(model.config)
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

    @property
    def steps(self) -> tuple[Block, ...]:
        """The blocks of the held layer that add to the residual stream on their own, in its order."""
        blocks = self._family.blocks_of(self._widths[self._index].num_experts)
        return tuple(block for block in blocks if not block.beside_experts)

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
    def routed(self, block: Block, number: int) -> Routed:
        """Run the experts of the held layer.

        Args:
            block: the block of experts; blocks before it in the layer have been left.
            number: of the batch.
        """
        hidden, given, answers = self.hidden[number], [], []

        def note(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            given.append(args)

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            answers.append(output[0] if isinstance(output, tuple) else output)
            raise StopForward

        handles = [
            submodule(self.layer, str(block.experts)).register_forward_pre_hook(note),
            submodule(self.layer, block.module).register_forward_hook(stop),
        ]
        try:
            with stopped(), answering(self._silent(block, hidden)):
                run_layer(self.layer, hidden, self._arguments[number][self._index])
        finally:
            for handle in handles:
                handle.remove()
        return Routed(*given[0], answers[0])

    @torch.no_grad()
    def output(self, block: Block, number: int) -> Tensor:
        """What a block of the held layer adds, before a norm behind it; see `enter` and `routed`."""
        if block.experts:
            return self.routed(block, number).output
        answer: Tensor = self.module(block)(self.enter(block, number))
        return answer

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

        earlier = self.steps[: self.steps.index(block)]
        return {submodule(self.layer, each.module): nothing(each.axis) for each in earlier}
