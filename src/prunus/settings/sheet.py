"""All settings of an option class: read from files and command lines, put together, and written.

class Job:                    its keys
    ratio: float              ratio
    scoring: Scoring          scoring.method, …
    repair: Repair | None     repair (null), or repair.damping, …
"""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from docstring_parser import parse as parse_docstring

from prunus.errors import OptionError
from prunus.settings.key import Form, Key, shown
from prunus.settings.yaml_file import read_nodes

__all__ = ["RECORD", "Sheet"]

T = TypeVar("T")

#: a field and a part of files: noted by what was done, never set by hand
RECORD = "made_by"
#: how files begin that were written beside a result, before their command
AGAIN = "# To make the same result again: "


@dataclass(frozen=True)
class Sheet(Generic[T]):
    """All settings of an option class, whose nested option classes are sections.

    Attributes:
        default: an object of the class; its required fields are empty.
        command: that a file of these settings is for, `prunus prune`.
        listing: command that lists the keys.
        example: of a setting, for messages.
        presets: files with a name of their own, and what each sets.
        forms: key → how it is written, where that is not as its type says.
        at_top: fields whose own fields are keys without a section.
        left_out: fields below that are no settings here and keep their default.
        used: other commands that read these settings → the keys and sections that they use; a file may hold more.
    """

    default: T
    command: str
    listing: str
    example: str
    presets: Mapping[str, Callable[[], T]] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    at_top: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()
    used: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @cached_property
    def keys(self) -> Mapping[str, Key]:
        """Every setting by its path, in the order of the classes."""
        return {key.path: key for key in self._keys_of(type(self.default), "", self.default)}

    def read(
        self,
        source: str | None,
        settings: Sequence[str],
        given: Mapping[str, Any],
        *,
        base: T | None = None,
        command: str | None = None,
    ) -> T:
        """Put the object together: a preset or a file, then single settings, then options that were given directly.

        Args:
            source: one of `presets`, or the path of a YAML file; None = the default.
            settings: `KEY=VALUE`, the value in YAML.
            given: path → value, of options of the command line; None = not given.
            base: where no preset or file is named, start from this.
            command: one of `used`, whose settings are read; None = the sheet's own, which uses all.

        Raises:
            OptionError: an unknown key (the nearest is named), a value of the wrong type (with its line), a setting
                that the command does not use, or options that exclude each other.
        """
        start = self.default if base is None else base
        record: dict[str, str] = {}
        if source in self.presets:
            start = self.presets[str(source)]()
        values = self._values_of(start)
        if source is not None and source not in self.presets:
            found, record = self._file(Path(source))
            self._overlay(values, found)
        for setting in settings:
            found = self._setting(setting)
            self._check_used(found, command, setting)
            self._overlay(values, found)
        for path, raw in given.items():
            if raw is not None:
                self._overlay(values, {path: self.keys[path].value_of(raw)})
        return self._built(type(self.default), values, "", {RECORD: record} if self._recorded else {})

    def is_used(self, path: str, command: str | None) -> bool:
        """Whether a command, one of `used` or the sheet's own, uses the key or section."""
        return command is None or any(f"{path}.".startswith(f"{used}.") for used in self.used[command])

    def text(self, value: T, made_by: Mapping[str, str] | None = None) -> str:
        """An object as a file from which the same command makes the same result again.

        Args:
            value: the object.
            made_by: what else decided the result, for a reader.
        """
        nested: dict[str, Any] = {}
        values = self._values_of(value)
        for path, key in self.keys.items():
            section, _, name = path.rpartition(".")
            at = nested
            if path not in values:  # of a section that there is not
                nested[section] = None
                continue
            if key.required and not values[path]:
                continue
            for part in filter(None, section.split(".")):
                at = at.setdefault(part, {})
            at[name] = key.plain(values[path])
        head = ""
        if made_by:
            nested[RECORD] = dict(made_by)
            head = f"{AGAIN}{self.command} --recipe THIS_FILE --out NEW_FOLDER\n"
        return head + yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)

    # --- classes ---

    def _keys_of(self, cls: type, prefix: str, default: Any) -> Iterator[Key]:
        hints = _hints(cls)
        meanings = {param.arg_name: param.description or "" for param in parse_docstring(cls.__doc__ or "").params}
        for each in fields(cls):
            path, value = prefix + each.name, getattr(default, each.name, MISSING)
            if each.name == RECORD or path in self.left_out:
                continue
            inner = _dataclass_of(hints[each.name])
            if inner is None or path in self.forms:
                meaning = " ".join(meanings.get(each.name, "").split())
                required = each.default is MISSING and each.default_factory is MISSING
                yield Key(path, hints[each.name], value, meaning, required, self.forms.get(path))
            else:
                yield from self._keys_of(inner, self._section(path), value)

    def _section(self, path: str) -> str:
        """The prefix of a nested class's keys."""
        return "" if path in self.at_top else path + "."

    def _values_of(self, value: Any, prefix: str = "") -> dict[str, Any]:
        """Path → value of all keys; those of an absent section are absent."""
        values: dict[str, Any] = {}
        for each in fields(value):
            path, inner = prefix + each.name, getattr(value, each.name)
            if path in self.keys:
                values[path] = inner
            elif is_dataclass(inner):
                values |= self._values_of(inner, self._section(path))
        return values

    def _built(self, cls: type, values: Mapping[str, Any], prefix: str, record: Mapping[str, Any] = {}) -> Any:
        """An object of a class from the values of its keys, and of what is no setting."""
        hints, arguments = _hints(cls), dict(record)
        for each in fields(cls):
            path = prefix + each.name
            if each.name == RECORD or path in self.left_out:
                continue
            if path in self.keys:
                arguments[each.name] = values[path]
            elif path in self._optional and not any(key.startswith(path + ".") for key in values):
                arguments[each.name] = None
            else:
                inner = _dataclass_of(hints[each.name]) or object
                arguments[each.name] = self._built(inner, values, self._section(path))
        return cls(**arguments)

    @cached_property
    def _recorded(self) -> bool:
        """Whether files may say what was made by them."""
        return hasattr(self.default, RECORD)

    @cached_property
    def _optional(self) -> set[str]:
        """Sections that there may be none of."""
        return set(self._optional_below(type(self.default), ""))

    def _optional_below(self, cls: type, prefix: str) -> Iterator[str]:
        for name, hint in _hints(cls).items():
            path, inner = prefix + name, _dataclass_of(hint)
            if inner is None or path in self.forms:
                continue
            if type(None) in typing.get_args(hint):
                yield path
            yield from self._optional_below(inner, self._section(path))

    @cached_property
    def _sections(self) -> set[str]:
        return {path.rpartition(".")[0] for path in self.keys} - {""}

    # --- files and settings ---

    def _file(self, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
        """Path → value of the keys that a file sets, and its record of how it was made."""
        if not os.path.exists(path):  # Path.exists fails at a name that is too long
            close = difflib.get_close_matches(str(path), self.presets, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            names = f"neither a file nor one of {', '.join(self.presets)}" if self.presets else "not there"
            raise OptionError(f"recipe {path} is {names}.{hint}")
        self._check_of_this_command(path)
        values: dict[str, Any] = {}
        record: dict[str, str] = {}

        def is_section(key: str) -> bool:
            return key in self._sections or is_record(key)

        def is_record(key: str) -> bool:
            return self._recorded and key.split(".")[0] == RECORD

        for key, value, line in read_nodes(path, is_section):
            if is_record(key):
                record[key.partition(".")[2]] = str(value)
            else:
                values |= dict(self._leaves(key, value, f"{path}, line {line}"))
        return values, record

    def _check_of_this_command(self, path: Path) -> None:
        """Refuse a recipe that another command wrote beside its result: its keys would be unknown one by one."""
        first = ""
        with suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:  # who reads it all says why not
            first = file.readline(200)
        writer = re.match(re.escape(AGAIN) + r"([\w ]+) --recipe ", first)
        if writer and writer[1] != self.command:
            raise OptionError(
                f"recipe {path} is one of `{writer[1]}`, and `{self.command}` has other settings: "
                f"`{self.listing}` lists them"
            )

    def _setting(self, setting: str) -> dict[str, Any]:
        """The keys that `KEY=VALUE` sets."""
        path, equals, text = setting.partition("=")
        where = f"--set {setting}"
        if not equals:
            raise OptionError(f"{where}: write KEY=VALUE, e.g. --set {self.example}")
        try:
            raw = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError):
            raise OptionError(f"{where}: {text!r} is not a YAML value; quote text with special characters") from None
        return dict(self._leaves(path.strip(), raw, where))

    def _check_used(self, found: Mapping[str, Any], command: str | None, setting: str) -> None:
        for path in found:
            if not self.is_used(path, command):
                listed = ", ".join(self.used[str(command)])
                raise OptionError(f"--set {setting}: `{command}` does not use {path}; it uses {listed}")

    def _leaves(self, path: str, raw: Any, where: str) -> Iterator[tuple[str, Any]]:
        """The keys that a value sets, checked: of a section given as a mapping, or as null, several."""
        if path in self.keys:
            yield path, self.keys[path].value_of(raw, where)
        elif path in self._optional and raw in (None, "none"):
            yield path, None
        elif path in self._sections:
            if not isinstance(raw, Mapping):
                below = ", ".join(key for key in self.keys if key.startswith(path + "."))
                raise OptionError(f"{where}: {path} is {shown(raw)}; it has keys: {below}")
            for name, inner in raw.items():
                yield from self._leaves(f"{path}.{name}", inner, where)
        else:
            raise OptionError(f"{where}: {self._unknown(path)}")

    def _overlay(self, values: dict[str, Any], found: Mapping[str, Any]) -> None:
        """Take values over; null takes the keys of a section away, and any of them brings the others back."""
        for path, value in found.items():
            if path in self._optional:
                for key in [key for key in values if key.startswith(path + ".")]:
                    del values[key]
                continue
            if path not in values:
                section = path.rpartition(".")[0] + "."
                values.update({key: entry.default for key, entry in self.keys.items() if key.startswith(section)})
            values[path] = value

    def _unknown(self, path: str) -> str:
        names = [*self.keys, *self._sections]
        last = {name.rpartition(".")[2]: name for name in names}
        close = difflib.get_close_matches(path, names, n=1, cutoff=0.6) or [
            last[name] for name in difflib.get_close_matches(path.rpartition(".")[2], last, n=1, cutoff=0.6)
        ]
        hint = f"; did you mean {close[0]}?" if close else ";"
        return f"unknown key {path!r}{hint} `{self.listing}` lists all keys"


@cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a class's fields; working them out takes longer than all else that is done with them."""
    return typing.get_type_hints(cls)


def _dataclass_of(annotation: Any) -> type | None:
    options = (annotation, *typing.get_args(annotation))
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)
