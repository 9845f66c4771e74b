"""Running a model layer by layer: what enters the first layer, and what each layer is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.batches import Batch
from prunus.model.families import family_of
from prunus.model.layers import layers_of
from prunus.model.modules import submodule

__all__ = ["TOKENS_AT_ONCE", "LayerCalls", "StopForward", "last_hidden_states", "layer_calls", "run_layer", "stopped"]

#: tokens whose hidden states are in memory while an opened model is evaluated; more take further walks over its layers
TOKENS_AT_ONCE = 2**15


@dataclass(frozen=True)
class LayerCalls:
    """How the decoder layers are called for one batch.

    Attributes:
        hidden: what enters the first layer, (batch, seq_len, hidden_size).
        arguments: keyword arguments of each layer's call: positions, masks; layers may differ in their masks.
    """

    hidden: Tensor
    arguments: Sequence[dict[str, Any]]


@torch.no_grad()
def layer_calls(model: Any, layers_path: str, batch: Batch) -> LayerCalls:
    """What the decoder layers of a model are called with for a batch.

    The model's own forward runs with its layers replaced by ones that only note their arguments: whatever a family or a
    version of transformers hands to its layers is seen as it is, and nothing of it is written again here.

    Args:
        model: a transformers causal language model.
        layers_path: path of its list of decoder layers.
        batch: the tokens.
    """
    layers = submodule(model, layers_path)
    decoder = submodule(model, layers_path.rpartition(".")[0])
    entered: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def note(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        entered.append(hidden_states)
        arguments.append(kwargs)
        return hidden_states

    with answering(dict.fromkeys(layers, note)):
        decoder(input_ids=batch.input_ids.to(model.device), **batch.mask_arguments(model.device), use_cache=False)
    return LayerCalls(entered[0], arguments)


@contextmanager
def answering(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules answer with other functions than their own forward while the context lasts."""
    # A module may have a forward of its own: accelerate wraps it so.
    own = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            if before is None:
                del module.forward  # that of the class shows again
            else:
                module.forward = before


class StopForward(Exception):
    """Raised by a hook when a forward pass has come far enough."""


@contextmanager
def stopped() -> Iterator[None]:
    """A forward pass that a hook may end early by raising `StopForward`."""
    try:
        yield
    except StopForward:
        return


def run_layer(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Call a decoder layer; some families answer with a tuple."""
    output = layer(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def last_hidden_states(model: Any, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """Hidden states after the final norm, (batch, seq_len, hidden_size), for one batch after another.

    An opened model's layers are read once for every `TOKENS_AT_ONCE` tokens; a model in memory runs batch by batch.

    Args:
        model: a causal language model in evaluation mode.
        batches: the tokens.
    """
    family, layers, device = family_of(model.config), layers_of(model), model.device
    if not layers.stored:
        decoder = submodule(model, family.layers.rpartition(".")[0])
        for batch in batches:
            beside = batch.mask_arguments(device)
            yield decoder(input_ids=batch.input_ids.to(device), **beside, use_cache=False).last_hidden_state
        return
    norm = submodule(model, family.final_norm)
    for group in _groups(batches):
        calls = [layer_calls(model, family.layers, batch) for batch in group]
        hidden, arguments = [call.hidden for call in calls], [call.arguments for call in calls]
        del calls
        for layer_idx in range(len(layers)):
            with layers.hold(layer_idx, then=layer_idx + 1) as layer:
                for number in range(len(group)):
                    hidden[number] = run_layer(layer, hidden[number], arguments[number][layer_idx])
        while hidden:
            yield norm(hidden.pop(0))


def _groups(batches: Sequence[Batch]) -> Iterator[list[Batch]]:
    """Batches in groups of at most `TOKENS_AT_ONCE` tokens, or of one."""
    group: list[Batch] = []
    for batch in batches:
        if group and sum(b.input_ids.numel() for b in (*group, batch)) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(batch)
    if group:
        yield group
