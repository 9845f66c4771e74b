"""What single experts of a mixture make of tokens.

transformers keeps the weights of all routed experts of a layer in one tensor each, and runs them together. Importance
and repair ask for one expert at a time. What an expert computes is read off its module: `_apply_gate`, biases, and
whether the weights are transposed, as transformers' own implementations of experts read it
(`transformers.integrations.moe`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["expert_hidden", "expert_output", "expert_weights", "routed", "tokens_of_experts"]


def expert_weights(experts: Any, expert: int) -> dict[str, Tensor]:
    """The weights of one expert by their names in the module, without the dimension of the experts.

    Args:
        experts: the module of all routed experts of a layer.
        expert: which one.
    """
    return {name: tensor.detach()[expert] for name, tensor in experts.named_parameters(recurse=False)}


def expert_hidden(experts: Any, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What enters the last projection of one expert, (tokens, intermediate).

    Args:
        experts: the module of all routed experts of a layer.
        weights: of the expert, see `expert_weights`.
        x: what the expert is given, (tokens, hidden_size).
    """
    gate_up = _linear(experts, x, weights["gate_up_proj"], weights.get("gate_up_proj_bias"))
    hidden: Tensor = experts._apply_gate(gate_up)
    return hidden


def expert_output(experts: Any, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The output of one expert before it is weighed by the router, (tokens, hidden_size).

    Args:
        experts: the module of all routed experts of a layer.
        weights: of the expert, see `expert_weights`.
        x: what the expert is given, (tokens, hidden_size).
    """
    hidden = expert_hidden(experts, weights, x)
    return _linear(experts, hidden, weights["down_proj"], weights.get("down_proj_bias"))


def tokens_of_experts(chosen: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The tokens of every expert that has any.

    Args:
        chosen: experts of each token, int64, (tokens, experts_per_token).

    Yields:
        An expert, its tokens, and at which place each of them chose it: int64, (its tokens,).
    """
    for expert in chosen.unique().tolist():
        tokens, places = torch.where(chosen == expert)
        yield int(expert), tokens, places


def routed(
    experts: Any,
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    each: Callable[[int, Tensor, Tensor, Tensor], None],
) -> Tensor:
    """The output of all experts, as of the module's own forward but for rounding, one expert after the other.

    Args:
        experts: the module of all routed experts of a layer.
        x: (tokens, hidden_size).
        chosen: experts of each token, int64, (tokens, experts_per_token).
        weights: the router's weights of them, of the same shape.
        each: told of every expert that has tokens: the expert, its tokens, at which place each chose it, and its
            output, (its tokens, hidden_size), before it is weighed.
    """
    total = torch.zeros_like(x)
    for expert, tokens, places in tokens_of_experts(chosen):
        output = expert_output(experts, expert_weights(experts, expert), x[tokens])
        each(expert, tokens, places, output)
        total = total.index_add(0, tokens, (output * weights[tokens, places, None]).to(total.dtype))
    return total


def _linear(experts: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x.to(weight.dtype) @ (weight if experts.is_transposed else weight.T)
    return product if bias is None else product + bias
