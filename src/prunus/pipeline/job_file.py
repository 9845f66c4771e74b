"""Jobs as YAML files, and every setting as a key: what `--recipe FILE` and `--set KEY=VALUE` read.

    model: smollm2-135m
    ratio: 0.2
    rounds: 2
    scoring:
      method: gate_fisher
    repair: null

A file may give any part; the rest is the default. Keys, types, defaults and meanings come from the option classes, so
that files, flags, `prunus recipe` and docs/recipe.md cannot disagree. `job_text` writes every key.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from docstring_parser import parse as parse_docstring
from pydantic import ConfigDict, TypeAdapter, ValidationError

from prunus.errors import OptionError, PlanError
from prunus.pipeline.job import Job
from prunus.pipeline.recipe import Recipe
from prunus.selection.constraints import ALIGNMENTS
from prunus.selection.latency_profile import LatencyProfile

__all__ = ["PRESETS", "Key", "job_keys", "job_text", "read_job"]

#: recipes with a name of their own
PRESETS: Mapping[str, Callable[[], Recipe]] = {
    "default": Recipe,
    "original": Recipe.original,
    "fast": Recipe.fast,
}
#: more than any job needs; a file that is larger is something else
MOST_BYTES = 4 * 2**20
#: noted by a job that is done, never set by hand
RECORD = "made_by"


@dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        path: `scoring.method`.
        type: annotation of the field.
        default: of the default job.
        meaning: one or more sentences from the class that has the field.
    """

    path: str
    type: Any
    default: Any
    meaning: str

    @property
    def allowed(self) -> str:
        """What values there are, in words."""
        return _words(self.type)

    def value_of(self, raw: Any, where: str) -> Any:
        """Check and convert a value of a file or a command line.

        Raises:
            OptionError: it is of another type, or none of the choices.
        """
        if isinstance(raw, str) and raw == "none" and type(None) in typing.get_args(self.type):
            return None
        if self.path in READERS and raw is not None:
            return READERS[self.path](raw, where)
        if isinstance(raw, bool) and bool not in (self.type, *typing.get_args(self.type)):
            raise OptionError(f"{where}: {self.path} is {_shown(raw)}; it must be {self.allowed}")
        try:
            return TypeAdapter(self.type, config=ConfigDict(allow_inf_nan=False)).validate_python(raw)
        except ValidationError:
            raise OptionError(f"{where}: {self.path} is {_shown(raw)}; it must be {self.allowed}") from None


@cache
def job_keys() -> Mapping[str, Key]:
    """Every setting of a job by its path, in the order of the classes."""
    return {key.path: key for key in _keys_of(Job, "", Job(""))}


def read_job(recipe: str | None, settings: Sequence[str], given: Mapping[str, Any], *, base: Job | None = None) -> Job:
    """Put a job together: a recipe or job file, then single settings, then options that were given directly.

    Args:
        recipe: one of `PRESETS`, or the path of a YAML file; None = the default.
        settings: `KEY=VALUE`, the value in YAML.
        given: path → value, of options of the command line; None = not given.
        base: where a recipe is not named, start from this; by default `Job` with the default recipe.

    Raises:
        OptionError: an unknown key (the nearest is named), a value of the wrong type (with its line), or options that
            exclude each other.
    """
    preset = PRESETS.get(recipe or "default")
    start = base if base is not None and recipe is None else Job("", recipe=preset() if preset else Recipe())
    values = _flat(start)
    record: Mapping[str, str] = {}
    if preset is None:
        found, record = _read_file(Path(str(recipe)))
        _overlay(values, found)
    for setting in settings:
        path, equals, text = setting.partition("=")
        where = f"--set {setting}"
        if not equals:
            raise OptionError(f"{where}: write KEY=VALUE, e.g. --set repair.damping=0.1")
        try:
            raw = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError):
            raise OptionError(f"{where}: {text!r} is not a YAML value; quote text with special characters") from None
        _overlay(values, dict(_leaves(path.strip(), raw, where)))
    for path, raw in given.items():
        if raw is not None:
            values[path] = job_keys()[path].value_of(raw, "--" + path.rpartition(".")[2].replace("_", "-"))
    return replace(_built(Job, values, ""), made_by=record)


def job_text(job: Job, made_by: Mapping[str, str] | None = None) -> str:
    """A job as a file from which `prunus prune --recipe FILE --out NEW` makes the same result again."""
    nested: dict[str, Any] = {}
    values = _flat(job)
    for path in job_keys():
        if path not in values:  # of a repair that there is not
            nested["repair"] = None
            continue
        if path == "model" and not job.model:
            continue
        value = values[path]
        *sections, name = path.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = _plain(path, value)
    if made_by:
        nested[RECORD] = dict(made_by)
    head = "# To make the same result again: prunus prune --recipe THIS_FILE --out NEW_FOLDER\n" if made_by else ""
    return head + yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)


# --- keys from classes --------------------------------------------------------------------------------------------


def _keys_of(cls: type, prefix: str, default: Any) -> Iterator[Key]:
    hints = typing.get_type_hints(cls)
    meanings = {param.arg_name: param.description or "" for param in parse_docstring(cls.__doc__ or "").params}
    for field in fields(cls):
        if field.name == RECORD:
            continue
        path, value = prefix + field.name, getattr(default, field.name, MISSING)
        inner = _dataclass_of(hints[field.name])
        if inner is None or path in READERS:
            meaning = " ".join(meanings.get(field.name, "").split())
            yield Key(path, hints[field.name], value, meaning)
        else:
            yield from _keys_of(inner, _section(path), value)


def _section(path: str) -> str:
    """The prefix of a nested class's keys; those of the recipe stand at the top."""
    return "" if path == "recipe" else path + "."


def _dataclass_of(annotation: Any) -> type | None:
    options = (annotation, *typing.get_args(annotation))
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _flat(job: Job) -> dict[str, Any]:
    """Path → value of all keys; those of an absent section are absent."""
    values = {}
    for path in job_keys():
        at: Any = job if path.split(".")[0] in {field.name for field in fields(Job)} else job.recipe
        for part in path.split("."):
            at = None if at is None else getattr(at, part)
            if at is None:
                break
        if at is not None or not (path.startswith("repair.") and job.recipe.repair is None):
            values[path] = at
    return values


def _built(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """An object of a class from the values of its keys."""
    hints, arguments = typing.get_type_hints(cls), {}
    for field in fields(cls):
        path = prefix + field.name
        if field.name == RECORD:
            continue
        if path in job_keys():
            arguments[field.name] = values[path]
        elif path == "repair" and not any(key.startswith("repair.") for key in values):
            arguments[field.name] = None
        else:
            arguments[field.name] = _built(_dataclass_of(hints[field.name]) or object, values, _section(path))
    return cls(**arguments)


# --- files --------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Path → value of the keys that a file sets, and its record of how it was made."""
    try:
        if path.is_dir():
            raise OptionError(f"recipe {path} is a folder; name the file in it, e.g. {path / 'prunus' / 'recipe.yaml'}")
        if path.stat().st_size > MOST_BYTES:
            raise OptionError(f"recipe {path} has {path.stat().st_size:,} bytes, which no recipe has")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        close = difflib.get_close_matches(str(path), PRESETS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise OptionError(f"recipe {path} is neither a file nor one of {', '.join(PRESETS)}.{hint}") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"recipe {path} cannot be read: {error}") from error
    try:
        # First, as it gives up on what is nested deeply, on which the scan would take minutes.
        node = yaml.compose(text, yaml.SafeLoader)
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise OptionError(f"recipe {path} uses YAML aliases (*name); write the values out")
        if not isinstance(node, yaml.MappingNode):
            raise OptionError(f"recipe {path} must be a mapping of keys to values, e.g. `ratio: 0.2`")
        values: dict[str, Any] = {}
        record: dict[str, str] = {}
        for path_of_key, value, line in _nodes(node, "", path):
            where = f"{path}, line {line}"
            if path_of_key.split(".")[0] == RECORD:
                record[path_of_key.partition(".")[2]] = str(value)
                continue
            values |= dict(_leaves(path_of_key, value, where))
    except yaml.YAMLError as error:
        raise OptionError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise OptionError(f"recipe {path} is nested too deeply") from None
    return values, record


def _nodes(node: yaml.MappingNode, prefix: str, file: Path) -> Iterator[tuple[str, Any, int]]:
    """(path, value, line) of every key below a node."""
    seen = set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise OptionError(f"{file}, line {line}: a key must be a word")
        path = prefix + str(key.value)
        if path in seen:
            raise OptionError(f"{file}, line {line}: {path} is set twice")
        seen.add(path)
        if isinstance(value, yaml.MappingNode) and path not in job_keys():
            if value.value and path not in _sections() and not path.startswith(RECORD):
                raise OptionError(f"{file}, line {line}: {_unknown(path)}")
            yield from _nodes(value, path + ".", file)
        else:
            loader = yaml.SafeLoader("")
            yield path, loader.construct_object(value, deep=True), line


def _leaves(path: str, raw: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The keys that a value sets, checked: of a section given as a mapping, or as null, several."""
    keys = job_keys()
    if path in keys:
        yield path, keys[path].value_of(raw, where)
    elif path == "repair" and raw in (None, "none"):
        yield path, None
    elif path in _sections():
        if not isinstance(raw, Mapping):
            raise OptionError(f"{where}: {path} is {_shown(raw)}; it has keys: {', '.join(_below(path))}")
        for name, inner in raw.items():
            yield from _leaves(f"{path}.{name}", inner, where)
    else:
        raise OptionError(f"{where}: {_unknown(path)}")


def _overlay(values: dict[str, Any], found: Mapping[str, Any]) -> None:
    """Take values over; `repair: null` takes the keys of the repair away, and any of them brings the others back."""
    for path, value in found.items():
        if path == "repair":
            for key in [key for key in values if key.startswith("repair.")]:
                del values[key]
            continue
        if path.startswith("repair.") and path not in values:
            values.update({key: entry.default for key, entry in job_keys().items() if key.startswith("repair.")})
        values[path] = value


def _sections() -> set[str]:
    return {path.rpartition(".")[0] for path in job_keys()} - {""}


def _below(section: str) -> list[str]:
    return [path for path in job_keys() if path.startswith(section + ".")]


def _unknown(path: str) -> str:
    names = [*job_keys(), *_sections()]
    last = {name.rpartition(".")[2]: name for name in names}
    close = difflib.get_close_matches(path, names, n=1, cutoff=0.6) or [
        last[name] for name in difflib.get_close_matches(path.rpartition(".")[2], last, n=1, cutoff=0.6)
    ]
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown key {path!r}{hint or ';'} `prunus recipe` lists all keys"


# --- values -------------------------------------------------------------------------------------------------------


def _read_weights(raw: Any, where: str) -> tuple[tuple[str, float], ...]:
    entries = raw.items() if isinstance(raw, Mapping) else ()
    if not entries or not all(isinstance(name, str) and type(weight) in (int, float) for name, weight in entries):
        raise OptionError(f"{where}: scoring.hybrid is {_shown(raw)}; write {{taylor: 0.5, wanda: 0.5}}")
    return tuple((name, float(weight)) for name, weight in entries)


def _read_alignment(raw: Any, where: str) -> int:
    if isinstance(raw, str) and raw in ALIGNMENTS:
        return ALIGNMENTS[raw]
    if type(raw) is not int:
        choices = ", ".join(ALIGNMENTS)
        raise OptionError(f"{where}: selection.align is {_shown(raw)}; it must be a whole number or one of {choices}")
    return raw


def _read_profile(raw: Any, where: str) -> LatencyProfile:
    if isinstance(raw, str):
        return LatencyProfile.load(raw)
    try:
        return LatencyProfile.from_dict(raw)
    except PlanError as error:
        raise OptionError(f"{where}: target.profile: {error}") from error


#: keys whose files hold something other than the field
READERS: Mapping[str, Callable[[Any, str], Any]] = {
    "scoring.hybrid": _read_weights,
    "selection.align": _read_alignment,
    "target.profile": _read_profile,
}


def _plain(path: str, value: Any) -> Any:
    """A value as YAML has it."""
    if path == "scoring.hybrid":
        return dict(value)
    if isinstance(value, LatencyProfile):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).strip()
    text = text.removesuffix("...").strip()
    return text if len(text) <= 60 else text[:57] + "…"


def _words(annotation: Any) -> str:
    """A type, in words."""
    arguments = typing.get_args(annotation)
    if annotation is LatencyProfile:
        return "a file of `prunus profile`"
    if typing.get_origin(annotation) is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [_words(option) for option in arguments if option is not type(None)]
        return " or ".join([*inner, "null"] if type(None) in arguments else inner)
    if typing.get_origin(annotation) is tuple:
        return "a list, each " + _words(arguments[0])
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(annotation, "a value")
