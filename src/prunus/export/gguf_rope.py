"""Rotary position embeddings in the words of GGUF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from prunus.errors import UnsupportedModelError

__all__ = ["Rope", "rope_of"]

#: settings beside these would change what is computed, and are refused
_KNOWN = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
#: what transformers takes for a setting that is not there, where llama.cpp's default could be another
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies of a model.

    Attributes:
        base: the frequencies' base, theta.
        scaling: `linear` or `yarn`, None for none.
        settings: of the scaling.
        factors: what llama.cpp divides each frequency by, float32 of shape (head_dim / 2,); None for nothing.
    """

    base: float
    scaling: str | None = None
    settings: dict[str, float] | None = None
    factors: Tensor | None = None


def rope_of(config: Any, head_dim: int) -> Rope:
    """Read the rotary frequencies off a config.

    Raises:
        UnsupportedModelError: a kind or a setting that llama.cpp computes in another way, or not at all.
    """
    parameters = {name: value for name, value in config.rope_parameters.items() if value is not None}
    kind = parameters.get("rope_type", "default")
    if "rope_theta" not in parameters or kind not in _KNOWN:
        raise UnsupportedModelError(
            f"rotary embeddings {parameters} cannot be written as GGUF; kinds that can: {', '.join(_KNOWN)}"
        )
    share = parameters.pop("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise UnsupportedModelError(
            f"partial_rotary_factor {share}: this family's graph in llama.cpp rotates whole heads"
        )
    unknown = sorted(set(parameters) - {"rope_type", "rope_theta", *_KNOWN[kind]})
    if unknown:
        raise UnsupportedModelError(
            f"rotary embeddings of type {kind!r} with {', '.join(f'{name} {parameters[name]}' for name in unknown)} "
            "cannot be written as GGUF"
        )
    base = float(parameters["rope_theta"])
    if kind == "llama3":
        default = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return Rope(base, factors=default / scaled)
    if kind == "default":
        return Rope(base)
    settings = {name: float(parameters[name]) for name in _KNOWN[kind] if name in parameters}
    if kind == "yarn":
        settings = {**_YARN_DEFAULTS, **settings}
        settings.setdefault("original_max_position_embeddings", float(config.max_position_embeddings))
    return Rope(base, kind, settings)
