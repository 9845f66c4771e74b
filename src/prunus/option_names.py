"""Options in messages: in backticks by their names in Python (`seq_len`), which a command line shows as its flags.

A message so says the same to both, and names what was typed: --seq-len, or --seq_len for the original scripts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["in_flags"]

_NAME = re.compile(r"`([\w.]+)`")


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message with every option that it names in backticks named by its flag: `seq_len` as --seq-len."""
    return _NAME.sub(lambda match: flags.get(match[1], match[0]), message)
