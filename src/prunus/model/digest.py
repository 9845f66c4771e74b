"""A model, or token batches, as one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from prunus.model.compact import pieces
from prunus.model.layers import layers_of, outside_layers

__all__ = ["digest_model", "digest_tensors"]

#: config fields that change no result
IGNORED_FIELDS = ("architectures", "auto_map", "transformers_version", "use_cache", "dtype", "torch_dtype")


def digest_model(model: Any) -> str:
    """SHA-256 over a model's config, and the name, dtype, shape and bytes of every tensor; all weights are read once.

    Args:
        model: a transformers causal language model, in memory or opened.
    """
    config = model.config.to_dict()
    described = {n: value for n, value in config.items() if n not in IGNORED_FIELDS and not n.startswith("_")}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    _add(digest, outside_layers(model).items())
    layers = layers_of(model)
    for layer_idx in range(len(layers)):
        with layers.hold(layer_idx, then=layer_idx + 1) as layer:
            _add(digest, ((f"{layer_idx}.{name}", tensor) for name, tensor in layer.state_dict().items()))
    return digest.hexdigest()


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the name, dtype, shape and bytes of tensors, in order."""
    digest = hashlib.sha256()
    _add(digest, tensors)
    return digest.hexdigest()


def _add(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for piece in pieces(tensor.detach()):
            digest.update(piece.cpu().contiguous().flatten().view(torch.uint8).numpy())
