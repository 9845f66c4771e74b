"""The interface between a sweep, which runs the model, and the statistics that are taken on the way."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunus.errors import StatisticsError
from prunus.files.json_file import Count, FileContent, Number, check_content, parse_json
from prunus.files.outputs import whole_file
from prunus.model.families import Block, Projection
from prunus.model.geometry import Geometry

__all__ = ["ExpertsCall", "Labels", "Moment", "ProjectionCall", "Statistic", "Statistics"]


class _StatisticsContent(FileContent):
    layers: Count
    sequences: Count
    loss: Number | None
    provenance: dict[str, Any]


#: what a sweep tells statistics of: in the forward pass, and in the backward pass where
#: it is a gradient
Moment = Literal[
    "input",
    "input_gradient",
    "output_gradient",
    "stream_gradient",
    "routing",
    "expert_output",
    "routing_gradient",
    "expert_gradient",
    "router_gradient",
]

#: what each position has to predict: the text's next token, or one drawn from the model's own prediction
Labels = Literal["text", "sampled"]


@dataclass(frozen=True)
class ProjectionCall:
    """A call of one projection of one layer, with one batch.

    Attributes:
        geometry: shape of the model.
        layer_idx: the decoder layer.
        projection: which projection.
        module: its linear module.
        mask: bool, (batch, seq_len), True where there is a token; None = no padding.
        targets: float32, (batch,): number of tokens of each sequence that have a loss.
        x: input of the projection, (batch, seq_len, in_features), detached.
        gradient: of the summed token losses, by what the listener listens to: the projection's output, (batch, seq_len,
            out_features), its input, or what the residual stream gets of the block, (batch, seq_len, hidden_size). None
            in the forward pass.
        norm: the norm between the block that the projection ends and the residual stream; None but for
            `on_stream_gradient`.
    """

    geometry: Geometry
    layer_idx: int
    projection: Projection
    module: nn.Linear
    mask: Tensor | None
    targets: Tensor
    x: Tensor
    gradient: Tensor | None = None
    norm: nn.Module | None = None

    def tokens(self, values: Tensor) -> Tensor:
        """Drop padding: (batch, seq_len, features) → (tokens, features)."""
        return values.flatten(0, 1) if self.mask is None else values[self.mask]


@dataclass(frozen=True)
class ExpertsCall:
    """A call of the routed experts of one layer, with one batch.

    Attributes:
        geometry: shape of the model.
        layer_idx: the decoder layer.
        block: its block of experts.
        module: the module of the experts.
        mask: bool, (batch, seq_len), True where there is a token; None = no padding.
        targets: float32, (batch,): number of tokens of each sequence that have a loss.
        x: what experts and router are given, (batch · seq_len, hidden_size), detached.
        chosen: experts of each token, int64, (batch · seq_len, experts_per_token).
        weights: the router's weights of them, of the same shape, detached.
        gradient: of the summed token losses, by what the listener listens to: by `weights`, by the output of all
            experts, (batch · seq_len, hidden_size), or by the router's logits, (batch · seq_len, experts). None in the
            forward pass.
    """

    geometry: Geometry
    layer_idx: int
    block: Block
    module: nn.Module
    mask: Tensor | None
    targets: Tensor
    x: Tensor
    chosen: Tensor
    weights: Tensor
    gradient: Tensor | None = None

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.geometry.widths[self.layer_idx].num_experts

    def tokens(self, values: Tensor) -> Tensor:
        """Drop padding: (batch · seq_len, …) → (tokens, …)."""
        return values if self.mask is None else values[self.mask.flatten()]

    @property
    def sequences(self) -> Tensor:
        """Number, within the batch, of the sequence that each token belongs to: int64, (batch · seq_len,)."""
        number = torch.arange(len(self.targets), device=self.x.device)
        return number.repeat_interleave(len(self.x) // len(self.targets))


class Statistic(ABC):
    """Accumulates something about the projections of a layer.

    Subclasses say in `listens` which moments they want, and override the `on_…` methods of those. Losses are summed
    over tokens and sequences, so that the gradient of any sequence is there unscaled; `targets` of a call gives the
    number of tokens to divide by where a mean is wanted.
    """

    #: the table of names under which `finish_layer` reports
    keys: tuple[str, ...] = ()
    #: what the loss is of, where the statistic listens to gradients
    labels: Labels = "text"

    def listens(self, moment: Moment, geometry: Geometry, part: Projection | Block) -> bool:
        """Whether the statistic wants to be told of a moment, by the method `on_…` of that name.

        Args:
            moment: what happens.
            geometry: shape of the model.
            part: where: a projection for `input`, `input_gradient` and `output_gradient`; for `stream_gradient` a block
                with a norm behind its last projection; for all others the block of experts.
        """
        return False

    def on_input(self, call: ProjectionCall) -> None:  # noqa: B027 (optional to override)
        """Called in the forward pass with what enters a projection."""

    def on_output_gradient(self, call: ProjectionCall) -> None:  # noqa: B027 (optional to override)
        """Called in the backward pass with a projection's input and the gradient by its output."""

    def on_input_gradient(self, call: ProjectionCall) -> None:  # noqa: B027 (optional to override)
        """Called in the backward pass with a projection's input and the gradient by it."""

    def on_stream_gradient(self, call: ProjectionCall) -> None:  # noqa: B027 (optional to override)
        """Called in the backward pass with the input of a block's last projection and the gradient behind its norm."""

    def on_routing(self, call: ExpertsCall) -> None:  # noqa: B027 (optional to override)
        """Called in the forward pass with the experts that were chosen."""

    def on_expert_output(  # noqa: B027 (optional to override)
        self, call: ExpertsCall, expert: int, tokens: Tensor, places: Tensor, output: Tensor
    ) -> None:
        """Called in the forward pass with the output of each expert, see `prunus.model.experts.routed`."""

    def on_routing_gradient(self, call: ExpertsCall) -> None:  # noqa: B027 (optional to override)
        """Called in the backward pass with the gradient by the router's weights."""

    def on_expert_gradient(self, call: ExpertsCall) -> None:  # noqa: B027 (optional to override)
        """Called in the backward pass with the gradient by the output of all experts."""

    def on_router_gradient(self, call: ExpertsCall) -> None:  # noqa: B027 (optional to override)
        """Called in the backward pass with the gradient by the router's logits."""

    @abstractmethod
    def accumulated(self, layer_idx: int) -> list[tuple[Tensor, str]]:
        """The running tensors of a layer, to be added up in place over processes.

        Returns:
            Each with `sum` or `max`, in an order that depends on the model alone.
        """

    def describe(self) -> dict[str, Any]:
        """The kind of statistic and its options, as plain values."""
        options = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "keys"}
        return {"kind": type(self).__name__, **options}

    @abstractmethod
    def finish_layer(self, geometry: Geometry, layer_idx: int, layer: nn.Module, sequences: int) -> dict[str, Tensor]:
        """Reduce what was accumulated for a layer, and free it.

        Args:
            geometry: shape of the model.
            layer_idx: the decoder layer.
            layer: the decoder layer, for its weights.
            sequences: number of calibration sequences that were seen.

        Returns:
            Named tensors on the CPU.
        """


@dataclass(frozen=True)
class Statistics:
    """Statistics of a whole model.

    Attributes:
        layers: per decoder layer, tensors by name.
        sequences: calibration sequences seen.
        loss: mean loss per token on them in nats, or None where no loss was computed.
        provenance: what they were made from, for a reader and for comparing.
    """

    layers: tuple[Mapping[str, Tensor], ...]
    sequences: int
    loss: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write as safetensors; a reader never sees a half-written file."""
        # Projections that share an input share their tensors, which safetensors refuses: each name gets its own copy.
        tensors = {
            f"layers.{i}.{name}": tensor.clone(memory_format=torch.contiguous_format)
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.items()
        }
        about = {
            "layers": len(self.layers),
            "sequences": self.sequences,
            "loss": self.loss,
            "provenance": dict(self.provenance),
        }
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata={"prunus_statistics": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read statistics back.

        Raises:
            StatisticsError: missing, damaged, or not a statistics file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                where = f"{path} is not a prunus statistics file"
                said = parse_json((file.metadata() or {})["prunus_statistics"], where, StatisticsError)
                about = check_content(_StatisticsContent, said, where, StatisticsError)
                names = list(file.keys())
                if about.layers > len(names):
                    raise ValueError(f"{len(names)} tensors cannot be of {about.layers} layers")
                layers: list[dict[str, Tensor]] = [{} for _ in range(about.layers)]
                by_number = {str(number): layer for number, layer in enumerate(layers)}
                for key in names:
                    number, _, name = key.removeprefix("layers.").partition(".")
                    by_number[number][name] = file.get_tensor(key)
            return cls(tuple(layers), about.sequences, about.loss, about.provenance)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise StatisticsError(f"{path} is not a prunus statistics file: {type(error).__name__} {error}") from error
