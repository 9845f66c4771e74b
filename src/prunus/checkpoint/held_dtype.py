"""The dtypes of a model on its way: held and computed with in memory, and saved in."""

from __future__ import annotations

from typing import Any

import torch

from prunus.machine.compute_dtype import compute_dtype
from prunus.machine.placement import resolve_device, resolve_dtype

__all__ = ["dtype_to_save", "fast_dtype", "held_dtype"]


def held_dtype(config: Any, dtype: str | torch.dtype | None, device: str | torch.device) -> torch.dtype:
    """The dtype that a model's weights are held and computed with.

    Args:
        config: of the model, as `read_config` gives it; its dtype is that of the checkpoint.
        dtype: what was asked for: a dtype or its name; `auto` for the checkpoint's own, or float32 where half
            precision is slow (see `prunus.machine.compute_dtype`); None for the checkpoint's own wherever it is.
        device: where the model will run.

    Raises:
        OptionError: unknown dtype or device.
    """
    stored: torch.dtype = config.dtype
    asked = stored if dtype is None else resolve_dtype(dtype)
    if asked != "auto":
        return asked
    return fast_dtype(config, stored, resolve_device(device))


def fast_dtype(config: Any, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype, or float32 where a model of this config is much slower in it here."""
    text = config.get_text_config()
    hidden_size = int(text.hidden_size)
    channels = int(getattr(text, "intermediate_size", None) or hidden_size)
    return compute_dtype(dtype, device, hidden_size=hidden_size, channels=channels)


def dtype_to_save(stored: torch.dtype, held: torch.dtype, dtype: str | torch.dtype = "auto") -> torch.dtype:
    """The dtype that a result is saved in.

    Args:
        stored: dtype of the checkpoint.
        held: dtype that its weights are held in.
        dtype: what was asked for; `auto` for the checkpoint's own, or the one they are held in if that has fewer bytes:
            more would be empty.

    Raises:
        OptionError: unknown dtype.
    """
    asked = resolve_dtype(dtype, "save_dtype")
    if asked != "auto":
        return asked
    return held if held.itemsize < stored.itemsize else stored
