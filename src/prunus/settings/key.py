"""One setting: its path, what values it takes, and what it means."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from prunus.errors import OptionError

__all__ = ["Form", "Key", "shown"]


@dataclass(frozen=True)
class Form:
    """How a file writes a value that is of no plain type, or is written in another way.

    Attributes:
        read: what a file or a command line has, and the setting's name for an error → the value.
        write: the value → what YAML has.
        allowed: what values there are, in words; empty = as the type says.
    """

    read: Callable[[Any, str], Any]
    write: Callable[[Any], Any] = lambda value: value
    allowed: str = ""


@dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        path: `scoring.method`.
        type: annotation of the field.
        default: where nothing is said.
        meaning: one or more sentences from the class that has the field.
        required: whether the class has no default for it.
        form: how it is written, where that is not as its type says.
    """

    path: str
    type: Any
    default: Any
    meaning: str
    required: bool = False
    form: Form | None = None

    @property
    def allowed(self) -> str:
        """What values there are, in words."""
        words = _words(self.type)
        if self.form is None or not self.form.allowed:
            return words
        return f"{self.form.allowed} or null" if words.endswith(" or null") else self.form.allowed

    def value_of(self, raw: Any, where: str = "") -> Any:
        """Check and convert a value of a file or a command line.

        Args:
            raw: the value, as YAML has it.
            where: it was written; "" for an option of the command line, which messages name by its flag.

        Raises:
            OptionError: it is of another type, or none of the choices.
        """
        name = f"{where}: {self.path}" if where else f"`{self.path}`"
        if isinstance(raw, str) and raw == "none" and type(None) in typing.get_args(self.type):
            return None
        if self.form is not None and raw is not None:
            return self.form.read(raw, name)
        if isinstance(raw, bool) and bool not in (self.type, *typing.get_args(self.type)):
            raise OptionError(f"{name} is {shown(raw)}; it must be {self.allowed}")
        if isinstance(raw, str) and typing.get_origin(self.type) is tuple:
            raw = [raw]  # one is a list as well
        try:
            return TypeAdapter(self.type, config=ConfigDict(allow_inf_nan=False)).validate_python(raw)
        except ValidationError:
            raise OptionError(f"{name} is {shown(raw)}; it must be {self.allowed}") from None

    def plain(self, value: Any) -> Any:
        """A value as YAML has it."""
        if self.form is not None and value is not None:
            return self.form.write(value)
        return list(value) if isinstance(value, tuple) else value

    @property
    def shown_default(self) -> str:
        """The default as YAML has it, on one line."""
        text = yaml.safe_dump(self.plain(self.default), default_flow_style=True, width=1000)
        return "required" if self.required else text.replace("\n...", "").strip()


def shown(value: Any) -> str:
    """A value as a message quotes it."""
    text = repr(value) if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).strip()
    text = text.removesuffix("...").strip()
    return text if len(text) <= 60 else text[:57] + "…"


def _words(annotation: Any) -> str:
    """A type, in words."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [_words(option) for option in arguments if option is not type(None)]
        return " or ".join([*inner, "null"] if type(None) in arguments else inner)
    if typing.get_origin(annotation) is tuple:
        return "a list, each " + _words(arguments[0])
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(annotation, "a value")
