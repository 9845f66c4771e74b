"""Options in messages: in backticks by their names in Python (`seq_len`), which a command line shows as its flags.

A message so says the same to both, and names what was typed: --seq-len, or --seq_len for the original scripts. With a
value (`shape=uniform`) it is what can be typed: --shape uniform, or --set selection.axes=[mlp].
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["in_flags"]

_NAME = re.compile(r"`([\w.]+)(?:=([\w.\[\]]+))?`")


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message with its options by their flags: `seq_len` as --seq-len, `seq_len=8` as --seq-len 8."""

    def shown(match: re.Match[str]) -> str:
        flag, value = flags.get(match[1]), match[2]
        if flag is None:
            return match[0]
        return flag if value is None else f"{flag}={value}" if flag.startswith("--set ") else f"{flag} {value}"

    return _NAME.sub(shown, message)
