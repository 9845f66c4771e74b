"""Hooks on the projections of a layer, which hand what flows through them to the statistics that listen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunus.model.families import Block, Projection
from prunus.model.geometry import Geometry, submodule
from prunus.statistics.base import Flow, Statistic
from prunus.sweep.prepared import PreparedBatch

__all__ = ["Taps"]


class Taps:
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

    @property
    def needs_gradients(self) -> bool:
        """Whether any statistic listens to the backward pass."""
        return any(
            statistic.listens_to_output_gradient(self._geometry, projection)
            or statistic.listens_to_input_gradient(self._geometry, projection)
            for statistic in self._statistics
            for projection in self._geometry.family.projections
        ) or any(
            statistic.listens_to_stream_gradient(self._geometry, block)
            for statistic in self._statistics
            for block in self._geometry.family.blocks
            if block.post_norm
        )

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
        try:
            for layer_idx, layer in layers:
                for block in self._geometry.family.blocks:
                    if self._geometry.widths[layer_idx][block.axis]:
                        for projection in block.projections:
                            handles += self._listen(layer_idx, layer, projection)
                        if block.post_norm:
                            handles += self._listen_behind(layer_idx, layer, block, block.post_norm)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _listen(self, layer_idx: int, layer: nn.Module, projection: Projection) -> list[RemovableHandle]:
        geometry = self._geometry
        on_input = [s.on_input for s in self._statistics if s.listens_to_input(geometry, projection)]
        on_output_gradient = [
            s.on_output_gradient for s in self._statistics if s.listens_to_output_gradient(geometry, projection)
        ]
        on_input_gradient = [
            s.on_input_gradient for s in self._statistics if s.listens_to_input_gradient(geometry, projection)
        ]
        if not (on_input or on_output_gradient or on_input_gradient):
            return []

        def forward_hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x: Tensor = args[0]
            assert self._targets is not None
            assert isinstance(module, nn.Linear)
            flow = Flow(geometry, layer_idx, projection, module, self._mask, self._targets, x.detach())
            for listener in on_input:
                listener(flow)
            if on_output_gradient and output.requires_grad:
                output.register_hook(_gradient_hook(flow, on_output_gradient))
            if on_input_gradient and x.requires_grad:
                x.register_hook(_gradient_hook(flow, on_input_gradient))

        return [submodule(layer, projection.path).register_forward_hook(forward_hook)]

    def _listen_behind(self, layer_idx: int, layer: nn.Module, block: Block, post_norm: str) -> list[RemovableHandle]:
        """Listen to the gradient behind the norm of a block, and to what entered its last projection before."""
        geometry = self._geometry
        listeners = [s.on_stream_gradient for s in self._statistics if s.listens_to_stream_gradient(geometry, block)]
        if not listeners:
            return []
        entered: list[Flow] = []

        def before(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            assert self._targets is not None
            assert isinstance(module, nn.Linear)
            entered[:] = [Flow(geometry, layer_idx, block.output, module, self._mask, self._targets, args[0].detach())]

        def behind(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            flow = replace(entered.pop(), norm=module)
            if output.requires_grad:
                output.register_hook(_gradient_hook(flow, listeners))

        return [
            submodule(layer, block.output.path).register_forward_hook(before),
            submodule(layer, post_norm).register_forward_hook(behind),
        ]


def _gradient_hook(flow: Flow, listeners: Sequence[Callable[[Flow], None]]) -> Callable[[Tensor], None]:
    # The list lets the hook drop its hold on the input once it has run; the graph, and with it every hook, lives on
    # until the whole backward pass is over.
    waiting = [flow]

    def hook(gradient: Tensor) -> None:
        seen = replace(waiting.pop(), gradient=gradient.detach())
        for listener in listeners:
            listener(seen)

    return hook
