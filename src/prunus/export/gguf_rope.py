"""Rotary position embeddings in the words of GGUF."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from prunus.errors import UnsupportedModelError
from prunus.model.families import family_of

__all__ = ["Rope", "rope_of"]

#: settings beside these would change what is computed, and are refused
_KNOWN = {
    "default": (),
    "dynamic": ("factor", "alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "linear": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "llama_4_scaling_beta",
        "max_position_embeddings",  # repeated from the config, and not read
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("factor", "long_factor", "short_factor", "original_max_position_embeddings", "attention_factor"),
}
#: families whose rotary embeddings of type dynamic only stretch the base, by `alpha`; llama.cpp has no others
_STRETCHED = ("hunyuan_v1_dense",)
#: kinds of layers that may have frequencies of their own
_GLOBAL, _WINDOW = "full_attention", "sliding_attention"
#: what transformers takes for a setting that is not there, where llama.cpp's default could be another
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies of a model.

    Attributes:
        base: the frequencies' base, theta.
        dimensions: values of a head that are rotated, from the first on.
        scaling: `linear` or `yarn`, None for none.
        settings: of the scaling.
        position_scale: queries are scaled by one plus so much times the logarithm of one plus how many
            `settings["original_max_position_embeddings"]` lie before them; 0 for no such scale.
        factors: what llama.cpp divides each frequency by, float32 of shape (dimensions / 2,); None for nothing.
        short_factors: in their place in contexts up to `settings["original_max_position_embeddings"]`.
        long_factors: and in longer ones.
        window_base: base in layers with a sliding window, whose frequencies are never scaled; None for `base`.
    """

    base: float
    dimensions: int
    scaling: str | None = None
    settings: dict[str, float] | None = None
    position_scale: float = 0.0
    factors: Tensor | None = None
    short_factors: Tensor | None = None
    long_factors: Tensor | None = None
    window_base: float | None = None


def rope_of(config: Any, head_dim: int) -> Rope:
    """Read the rotary frequencies off a config.

    Raises:
        UnsupportedModelError: a kind or a setting that llama.cpp computes in another way, or not at all.
    """
    stored = config.rope_parameters
    if _GLOBAL not in stored:
        return _rope(stored, config, head_dim)
    window = _rope(stored[_WINDOW], config, head_dim, _WINDOW)
    if window != Rope(window.base, head_dim):
        raise UnsupportedModelError(
            f"rotary embeddings {stored[_WINDOW]} of layers with a sliding window cannot be written as GGUF; only "
            "those of type default can"
        )
    return replace(_rope(stored[_GLOBAL], config, head_dim, _GLOBAL), window_base=window.base)


def _rope(stored: Mapping[str, Any], config: Any, head_dim: int, layer_type: str | None = None) -> Rope:
    parameters = {name: value for name, value in stored.items() if value is not None}
    kind = parameters.get("rope_type", "default")
    stretched = bool(parameters.get("alpha")) and family_of(config).model_type in _STRETCHED
    if "rope_theta" not in parameters or kind not in _KNOWN or (kind == "dynamic" and not stretched):
        raise UnsupportedModelError(
            f"rotary embeddings {parameters} cannot be written as GGUF; kinds that can: {', '.join(_KNOWN)} "
            "(dynamic with Hunyuan's `alpha` only)"
        )
    if parameters.get("type") == kind:
        del parameters["type"]  # what it was called before
    dimensions = int(head_dim * parameters.pop("partial_rotary_factor", 1.0))
    unknown = sorted(set(parameters) - {"rope_type", "rope_theta", *_KNOWN[kind]})
    if unknown:
        raise UnsupportedModelError(
            f"rotary embeddings of type {kind!r} with {', '.join(f'{name} {parameters[name]}' for name in unknown)} "
            "cannot be written as GGUF"
        )
    base = float(parameters["rope_theta"])
    if kind == "default":
        return Rope(base, dimensions)
    if kind == "dynamic":
        # As transformers' compute_ntk_alpha_rope_parameters and llama.cpp's converter: the other settings do nothing.
        return Rope(base * parameters["alpha"] ** (dimensions / (dimensions - 2)), dimensions)
    if kind == "llama3":
        default = base ** -(torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions)
        scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)
        return Rope(base, dimensions, factors=default / scaled)
    if kind == "longrope":
        _, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        original = parameters.get("original_max_position_embeddings", config.max_position_embeddings)
        settings = {"original_max_position_embeddings": float(original), "attention_factor": float(attention)}
        short, long = (torch.tensor(parameters[f"{name}_factor"], dtype=torch.float32) for name in ("short", "long"))
        return Rope(base, dimensions, settings=settings, short_factors=short, long_factors=long)
    factor = float(parameters["factor"])
    if kind == "linear":
        return Rope(base, dimensions, kind, {"factor": factor})
    settings = {name: float(parameters.get(name, default)) for name, default in _YARN_DEFAULTS.items()}
    original = parameters.get("original_max_position_embeddings", config.max_position_embeddings)
    settings |= {"factor": factor, "original_max_position_embeddings": float(original)}
    _, attention = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)
    own = 1.0 + 0.1 * math.log(max(factor, 1.0))  # llama.cpp's, which a factor in the file multiplies
    if not math.isclose(attention, own, rel_tol=1e-6):
        settings["attention_factor"] = attention / own
    return Rope(base, dimensions, kind, settings, float(parameters.get("llama_4_scaling_beta", 0.0)))
