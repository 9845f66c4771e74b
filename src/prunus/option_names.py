"""Options in messages: in backticks by their names in Python (`seq_len`), which a command line shows as its flags.

A message so says the same to both, and names what was typed: --seq-len, or --seq_len for the original scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prunus.errors import OptionError

__all__ = ["in_flags", "options_named"]

_NAME = re.compile(r"`([\w.]+)`")


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message with every option that it names in backticks named by its flag: `seq_len` as --seq-len."""
    return _NAME.sub(lambda match: flags.get(match[1], match[0]), message)


@contextmanager
def options_named(**names: str) -> Iterator[None]:
    """Name options in errors as the caller's user knows them.

    Args:
        **names: name that a function has for an option → name that the user gave it by, `seq_len="eval_seq_len"`.
    """
    try:
        yield
    except OptionError as error:
        message = _NAME.sub(lambda match: f"`{names.get(match[1], match[1])}`", str(error))
        raise OptionError(message) from error.__cause__
