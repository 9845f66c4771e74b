"""What a user typed, and how to say what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from cyclopts import App, CoercionError, CycloptsError, UnusedCliTokensError

from prunus.cli.job_flags import KEYS

__all__ = ["flags_of", "shown_default", "usage_message"]

#: what a value is, for those who do not know Python
_KINDS: Mapping[type, str] = {int: "a whole number", float: "a number", bool: "yes or no"}


def flags_of(app: App, words: Sequence[str]) -> dict[str, str]:
    """The flags of the command that was typed, by the names that the options have in Python.

    Args:
        app: the command line.
        words: what was typed after the program's name.

    Returns:
        E.g. `--seq-len` for `seq_len`, `MODEL` for `model`, and `--set repair.damping` for `damping`.
    """
    *_, command = app.parse_commands(list(words))[1]
    if command is app or not command.default_command.__module__.startswith("prunus."):  # --help, --version
        return {}
    arguments = [
        argument for argument in command.assemble_argument_collection() if argument.parameter.parse is not False
    ]
    flags = {argument.field_info.name: argument.name for argument in arguments if argument.name != "*"}
    return {**_settings(flags), **flags} if "set" in flags else flags


def _settings(flags: dict[str, str]) -> dict[str, str]:
    """The command's flag or `--set KEY` for every key of a recipe, by the key and by its last word if no other has it.

    Args:
        flags: of the command, by the options' names in Python.
    """
    from prunus.pipeline.job_file import job_keys

    last = Counter(path.rpartition(".")[2] for path in job_keys())
    names = {path: f"--set {path}" for path in job_keys()}
    names |= {path: flags[name] for name, path in KEYS.items() if name in flags}
    return names | {word: names[path] for path in names if last[word := path.rpartition(".")[2]] == 1}


def shown_default(value: Any) -> str | None:
    """A default in the help, as it would be typed; that nothing is asked for goes without saying."""
    if value is None or value is False or value == ():
        return None
    if value is True:
        return "yes"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _kind(target: Any) -> str | None:
    options = get_args(target) or (target,)  # the type itself, or a number that may be left out
    return next((_KINDS[option] for option in options if option in _KINDS), None)


def usage_message(error: CycloptsError) -> str:
    """What was typed wrong, with which value, and what would be right."""
    command = " ".join(["prunus", *(error.command_chain or ())])
    if isinstance(error, UnusedCliTokensError):
        message = f"{command} does not know what to do with {' '.join(error.unused_tokens or ())}."
    elif isinstance(error, CoercionError) and error.msg is None and error.token and (kind := _kind(error.target_type)):
        name = error.token.keyword or (error.argument.name if error.argument else "the value")
        message = f"{name} is {error.token.value!r}; it takes {kind}."
    else:
        message = str(error)
    end = "" if message.endswith(("?", ".")) else "."
    return f"{message}{end} See {command} --help."
