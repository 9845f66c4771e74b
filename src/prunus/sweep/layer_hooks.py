"""Hooks on the projections and experts of a layer, which tell the statistics of each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunus.model.experts import routed
from prunus.model.families import Block, Projection
from prunus.model.geometry import Geometry
from prunus.model.modules import submodule
from prunus.statistics.base import ExpertsCall, Moment, ProjectionCall, Statistic
from prunus.sweep.blocks import answering
from prunus.sweep.prepared import PreparedBatch

__all__ = ["LayerHooks"]

_Call = TypeVar("_Call", ProjectionCall, ExpertsCall)


class LayerHooks:
    """Connects statistics to layers.

    Weights never need a gradient of their own: a statistic that wants one makes it from a projection's input and the
    gradient by its output, and an input is let go as soon as its statistics have seen it.

    Args:
        geometry: shape of the model.
        statistics: who listens.
    """

    def __init__(self, geometry: Geometry, statistics: Sequence[Statistic]):
        self._geometry = geometry
        self._statistics = statistics
        self._mask: Tensor | None = None
        self._targets: Tensor | None = None

    @cached_property
    def needs_gradients(self) -> bool:
        """Whether any statistic listens to the backward pass."""
        geometry = self._geometry
        blocks = {
            block
            for layer_idx, widths in enumerate(geometry.widths)
            for block in geometry.blocks(layer_idx)
            if widths[block.axis]
        }
        return any(self._listeners(moment, part) for block in blocks for moment, part in _backward_moments(block))

    def _listeners(self, moment: Moment, part: Projection | Block) -> list[Callable[..., None]]:
        """The methods that want to be called at a moment."""
        return [getattr(s, f"on_{moment}") for s in self._statistics if s.listens(moment, self._geometry, part)]

    def start_batch(self, batch: PreparedBatch, device: torch.device | str) -> None:
        """Say which batch the next forward and backward pass is about, and where it runs."""
        mask = batch.batch.attention_mask
        self._mask = None if mask is None else mask.to(device).bool()
        self._targets = batch.targets.to(device, torch.float32)

    @contextmanager
    def on(self, layers: Sequence[tuple[int, nn.Module]]) -> Iterator[None]:
        """Listen to some layers while the context lasts.

        Args:
            layers: indices and modules of decoder layers.
        """
        handles: list[RemovableHandle] = []
        with ExitStack() as stack:
            stack.callback(_remove, handles)
            for layer_idx, layer in layers:
                for block in self._geometry.blocks(layer_idx):
                    if self._geometry.widths[layer_idx][block.axis]:
                        for projection in block.projections:
                            handles += self._listen(layer_idx, layer, projection)
                        if block.post_norm:
                            handles += self._listen_behind(layer_idx, layer, block, block.post_norm)
                        if block.experts:
                            handles += self._listen_to_router(layer_idx, layer, block)
                            stack.enter_context(self._answering_for_experts(layer_idx, layer, block))
            yield

    def _listen(self, layer_idx: int, layer: nn.Module, projection: Projection) -> list[RemovableHandle]:
        geometry = self._geometry
        on_input = self._listeners("input", projection)
        on_output_gradient = self._listeners("output_gradient", projection)
        on_input_gradient = self._listeners("input_gradient", projection)
        if not (on_input or on_output_gradient or on_input_gradient):
            return []

        def forward_hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x: Tensor = args[0]
            assert self._targets is not None
            assert isinstance(module, nn.Linear)
            given = _by_sequence(x.detach(), len(self._targets))
            call = ProjectionCall(geometry, layer_idx, projection, module, self._mask, self._targets, given)
            for listener in on_input:
                listener(call)
            if on_output_gradient and output.requires_grad:
                output.register_hook(_gradient_hook(call, on_output_gradient))
            if on_input_gradient and x.requires_grad:
                x.register_hook(_gradient_hook(call, on_input_gradient))

        return [submodule(layer, projection.path).register_forward_hook(forward_hook)]

    def _listen_behind(self, layer_idx: int, layer: nn.Module, block: Block, post_norm: str) -> list[RemovableHandle]:
        """Listen to the gradient behind the norm of a block, and to what entered its last projection before."""
        geometry = self._geometry
        listeners = self._listeners("stream_gradient", block)
        if not listeners:
            return []
        entered: list[ProjectionCall] = []

        def before(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            assert self._targets is not None
            assert isinstance(module, nn.Linear)
            x = args[0].detach()
            entered[:] = [ProjectionCall(geometry, layer_idx, block.output, module, self._mask, self._targets, x)]

        def behind(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            call = replace(entered.pop(), norm=module)
            if output.requires_grad:
                output.register_hook(_gradient_hook(call, listeners))

        return [
            submodule(layer, block.output.path).register_forward_hook(before),
            submodule(layer, post_norm).register_forward_hook(behind),
        ]

    def _listen_to_router(self, layer_idx: int, layer: nn.Module, block: Block) -> list[RemovableHandle]:
        """Listen to the gradient by the logits of a router."""
        listeners = self._listeners("router_gradient", block)
        if not listeners:
            return []

        def forward_hook(router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits, weights, chosen = output
            assert self._targets is not None
            x = args[0].detach().flatten(0, -2)
            experts = submodule(layer, str(block.experts))
            call = ExpertsCall(
                self._geometry, layer_idx, block, experts, self._mask, self._targets, x, chosen, weights.detach()
            )
            if logits.requires_grad:
                logits.register_hook(_gradient_hook(call, listeners))

        return [submodule(layer, str(block.router)).register_forward_hook(forward_hook)]

    @contextmanager
    def _answering_for_experts(self, layer_idx: int, layer: nn.Module, block: Block) -> Iterator[None]:
        """Listen to the experts of a layer: where outputs of single ones are wanted, run them one after the other."""
        on_routing = self._listeners("routing", block)
        on_output = self._listeners("expert_output", block)
        on_weights = self._listeners("routing_gradient", block)
        on_gradient = self._listeners("expert_gradient", block)
        experts = submodule(layer, str(block.experts))
        together = experts.forward

        def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            assert self._targets is not None
            call = ExpertsCall(
                self._geometry,
                layer_idx,
                block,
                experts,
                self._mask,
                self._targets,
                x.detach(),
                chosen,
                weights.detach(),
            )
            for listener in on_routing:
                listener(call)

            def each(expert: int, tokens: Tensor, places: Tensor, output: Tensor) -> None:
                for listener in on_output:
                    listener(call, expert, tokens, places, output)

            output: Tensor = routed(experts, x, chosen, weights, each) if on_output else together(x, chosen, weights)
            if on_weights and weights.requires_grad:
                weights.register_hook(_gradient_hook(call, on_weights))
            if on_gradient and output.requires_grad:
                output.register_hook(_gradient_hook(call, on_gradient))
            return output

        if not (on_routing or on_output or on_weights or on_gradient):
            yield
            return
        with answering({experts: forward}):
            yield


def _backward_moments(block: Block) -> Iterator[tuple[Moment, Projection | Block]]:
    """What the backward pass through a block can tell of."""
    for projection in block.projections:
        yield "input_gradient", projection
        yield "output_gradient", projection
    if block.post_norm:
        yield "stream_gradient", block
    if block.experts:
        yield "routing_gradient", block
        yield "expert_gradient", block
        yield "router_gradient", block


def _by_sequence(values: Tensor, sequences: int) -> Tensor:
    """(batch · seq_len, features), which is what shared experts are given, → (batch, seq_len, features)."""
    return values.unflatten(0, (sequences, -1)) if values.ndim == 2 else values


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _gradient_hook(call: _Call, listeners: Sequence[Callable[[_Call], None]]) -> Callable[[Tensor], None]:
    # The list lets the hook drop its hold on the input once it has run; the graph, and with it every hook, lives on
    # until the whole backward pass is over.
    waiting = [call]

    def hook(gradient: Tensor) -> None:
        before = waiting.pop()
        given = gradient.detach()
        if isinstance(before, ProjectionCall):
            given = _by_sequence(given, len(before.x))
        seen = replace(before, gradient=given)
        for listener in listeners:
            listener(seen)

    return hook
