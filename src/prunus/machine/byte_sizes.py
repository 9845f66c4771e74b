"""Sizes in bytes as users write and read them."""

from __future__ import annotations

import re

from prunus.errors import OptionError

__all__ = ["parse_bytes", "show_bytes"]

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

#: a smaller number without a unit is a slip
FEWEST_WITHOUT_UNIT = 1000


def parse_bytes(text: str, name: str = "max_memory") -> int:
    """A size as users write it: 8GB, 512MiB, 1.5 GB.

    Args:
        text: the size.
        name: of the option that it was given for.

    Raises:
        OptionError: it is not a size, or a small number without a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise OptionError(f"`{name}` is {text!r}; write a size such as 8GB, 512MB or 1.5GiB")
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if not match[2] and size < FEWEST_WITHOUT_UNIT:
        raise OptionError(f"`{name}` is {text!r}, which is {size} bytes; write a unit as well, such as {match[1]}GB")
    return size


def show_bytes(size: int) -> str:
    """A size as `parse_bytes` takes it, rounded up."""
    unit, name = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    hundredths = -(-size * 100 // unit)
    return f"{hundredths / 100:.2f}{name}" if unit == 10**9 else f"{-(-size // unit)}{name}"
