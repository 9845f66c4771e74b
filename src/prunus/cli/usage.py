"""What a user typed, and how to say what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, get_args

from cyclopts import App, CoercionError, CycloptsError, UnknownOptionError, UnusedCliTokensError

from prunus.cli import eval_flags, job_flags, recovery_flags

__all__ = ["flags_of", "shown_default", "usage_message"]

#: command → which of its options set which key, and where its keys are described; all others have those of a job
_SETTINGS: Mapping[str, tuple[Mapping[str, str], str]] = {
    "recover": (recovery_flags.KEYS, "prunus.recovery.job:RECOVERY"),
    "eval": (eval_flags.KEYS, "prunus.evaluation.job:EVALUATION"),
}
_JOB = job_flags.KEYS, "prunus.pipeline.job_file:JOB"

#: option → the one that gives several of its values
SEVERAL: Mapping[str, str] = {"ratio": "ratios", "method": "methods", "seed": "seeds"}
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
    typed = {word.partition("=")[0] for word in words}
    if flags.get("experts") in typed and flags["ratio"] not in typed:
        flags["ratio"] = flags["experts"]  # typed in its place
    # Options of one value, for a command that takes several of them.
    flags |= {one: flags[many] for one, many in SEVERAL.items() if many in flags}
    if "set" not in flags:
        return flags
    keys, sheet = _SETTINGS.get(words[0], _JOB)
    module, _, name = sheet.partition(":")
    return {**_settings(flags, keys, list(getattr(import_module(module), name).keys)), **flags}


def _settings(flags: Mapping[str, str], keys: Mapping[str, str], paths: Sequence[str]) -> dict[str, str]:
    """The flag or `--set KEY` for every key of a command, by the key and by its last word if no other has it.

    Args:
        flags: of the command, by the options' names in Python.
        keys: option → the key that it sets.
        paths: all keys.
    """
    last = Counter(path.rpartition(".")[2] for path in paths)
    names = {path: f"--set {path}" for path in paths}
    names |= {path: flags[name] for name, path in keys.items() if name in flags}
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
    if isinstance(error, UnknownOptionError) and error.argument_collection.get("--set", None) is not None:
        message += " Settings without an option of their own are given as --set KEY=VALUE."
    end = "" if message.endswith(("?", ".")) else "."
    return f"{message}{end} See {command} --help."
