"""Names of devices and dtypes, as users write them."""

from __future__ import annotations

from typing import Literal

import torch

from prunus.errors import OptionError

__all__ = ["DTYPES", "dtype_name", "resolve_device", "resolve_dtype"]

#: float64 is what some old checkpoints are in; nobody needs to be offered it
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
OFFERED = ("auto", "float32", "bfloat16", "float16")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device a name stands for; `auto` is the first of cuda, mps, cpu that this machine has.

    Raises:
        OptionError: the name is not a device, or this machine does not have it.
    """
    if isinstance(device, str) and device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"`device` {device!r} is not known to torch; use auto, cpu, cuda, cuda:1 or mps") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"`device` {device!r} was asked for, but torch sees no CUDA GPU; use `device=cpu` or auto")
    if resolved.type == "cuda" and resolved.index is not None and resolved.index >= torch.cuda.device_count():
        raise OptionError(
            f"`device` {device!r} was asked for, but this machine has {torch.cuda.device_count()} CUDA GPUs, "
            "counted from cuda:0"
        )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError(f"`device` {device!r} was asked for, but torch cannot use MPS here; use `device=cpu` or auto")
    if resolved.type not in ("cpu", "cuda", "mps") and not _holds_numbers(resolved):
        raise OptionError(f"`device` {device!r} cannot run a model here; use auto, cpu, cuda, cuda:1 or mps")
    return resolved


def _holds_numbers(device: torch.device) -> bool:
    """Whether tensors can be made there and read back: not on `meta`, nor on what torch knows by name alone."""
    try:
        return torch.ones(1, device=device).item() == 1
    except (RuntimeError, NotImplementedError, AssertionError, ImportError):
        return False


def resolve_dtype(dtype: str | torch.dtype = "auto", option: str = "dtype") -> torch.dtype | Literal["auto"]:
    """The dtype a name stands for; `auto`, which depends on the model, stays `auto`.

    Args:
        dtype: a dtype or its name.
        option: whose value it is, for the message.

    Raises:
        OptionError: not one of auto, float32, bfloat16, float16.
    """
    if isinstance(dtype, torch.dtype):
        if dtype in DTYPES.values():
            return dtype
    elif dtype == "auto":
        return "auto"
    elif dtype in DTYPES:
        return DTYPES[dtype]
    raise OptionError(f"`{option}` {dtype!r} cannot be used; choose one of {', '.join(OFFERED)}")


def dtype_name(dtype: torch.dtype) -> str:
    """The name that `resolve_dtype` takes a dtype by."""
    return str(dtype).removeprefix("torch.")
