"""Values that an option takes: whole numbers (2.5, True and 10**30 are refused), factors, shares, names."""

from __future__ import annotations

import math
import numbers
from typing import Any

from prunus.errors import OptionError

__all__ = ["LARGEST", "check_positive", "check_seed", "check_share", "check_utf8", "check_whole", "is_number"]

#: counts of sequences, tokens, rounds and items: more than any run has, and their products fit into 64 bits
LARGEST = 2**31 - 1


def check_whole(name: str, value: Any, *, smallest: int = 1, largest: int = LARGEST, why: str = "") -> None:
    """Check an option that counts something.

    Args:
        name: of the option.
        value: what it was given.
        smallest: the smallest value that works.
        largest: the largest.
        why: ends the message, after a colon.

    Raises:
        OptionError: it is no whole number, or out of range.
    """
    _check_kind(name, value)
    if value < smallest:
        raise OptionError(f"`{name}` is {value}; the smallest is {smallest}{f': {why}' if why else ''}")
    if value > largest:
        raise OptionError(f"`{name}` is {value}; the largest is {largest:,}")


def check_positive(name: str, value: Any) -> None:
    """Check a factor.

    Raises:
        OptionError: it is no positive, finite number.
    """
    if not is_number(value) or value <= 0:
        raise OptionError(f"`{name}` is {value!r}; it must be a positive and finite number")


def check_share(name: str, value: Any, what: str) -> None:
    """Check a share.

    Args:
        name: of the option.
        value: what it was given.
        what: it is, as in "it is a share of the tokens".

    Raises:
        OptionError: it is no number in [0, 1].
    """
    if not is_number(value) or not 0 <= value <= 1:
        raise OptionError(f"`{name}` is {value!r}; {what} and must lie in [0, 1]")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_seed(name: str, value: Any) -> None:
    """Check a seed, which torch takes up to 64 bits of.

    Raises:
        OptionError: it is no whole number, or needs more bits.
    """
    _check_kind(name, value)
    if not -(2**63) <= value < 2**63:
        raise OptionError(f"`{name}` is {value}; a seed has at most 63 bits and a sign")


def check_utf8(name: str, value: str | None) -> None:
    """Check that a name can be written down in a result: those of files may be any bytes.

    Raises:
        OptionError: it is not UTF-8.
    """
    try:
        (value or "").encode("utf-8")
    except UnicodeEncodeError as error:
        called = name if " " in name else f"`{name}`"
        raise OptionError(
            f"{called} is {value!r}, which is not UTF-8, and the result could not say what it was made from; rename it"
        ) from error


def _check_kind(name: str, value: Any) -> None:
    # True is an int to Python, and numpy's integers are none.
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise OptionError(f"`{name}` is {value!r}; give a whole number")
