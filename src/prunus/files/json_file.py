"""JSON files of models and results: read by one function, checked against what each holds, errors that name the file.

What a file may hold is a subclass of `FileContent`, beside the code that reads it; pydantic checks it. Fields that are
not named there are left as they are, so that files of other versions, and notes that users add, still load.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunus.errors import CheckpointError, PrunusError

__all__ = [
    "Count",
    "FileContent",
    "Number",
    "check_content",
    "check_format",
    "parse_json",
    "read_json",
    "read_json_if_whole",
    "shortened",
]

#: far more than the plan of the largest model takes; nothing larger is read into memory
MOST_BYTES = 64 * 2**20
#: deeper than any file of models or results, and far from where Python's own recursion ends
DEEPEST = 100

#: a whole number of something: no float, text or bool, and none beyond 64 bits
Count = Annotated[int, Field(ge=0, lt=2**63)]
#: a finite number; whole ones do as well
Number = Annotated[float, Field(allow_inf_nan=False)]


class FileContent(BaseModel):
    """What an object in a file holds: types are taken at their word, so that "3" and 3.0 are no whole numbers."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


Content = TypeVar("Content", bound=FileContent)


def read_json(
    path: Path,
    kind: type[dict] | type[list] = dict,
    error: type[PrunusError] = CheckpointError,
    what: str = "",
) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        kind: what it holds: dict for an object, list for an array.
        error: what is raised.
        what: what messages call the file, beside its name: "the plan".

    Raises:
        PrunusError: of the kind `error`: the file cannot be read, is too large, is not JSON, see `parse_json`, or holds
            something else.
    """
    name = f"{what} {path}".strip()
    try:
        found = path.stat()
        mode = found.st_mode
        if not stat.S_ISREG(mode):  # a pipe would have us wait, a device may never end
            raise error(f"{name} is {'a folder' if stat.S_ISDIR(mode) else 'no ordinary file'}; name a JSON file")
        with path.open("rb") as file:
            content = file.read(min(found.st_size, MOST_BYTES) + 1)
    except OSError as problem:
        raise error(f"{name} cannot be read: {problem.strerror or problem}") from problem
    except ValueError as problem:  # a name with a NUL
        raise error(f"{name!r} cannot be read: {problem}") from problem
    if len(content) > MOST_BYTES:
        raise error(f"{name} cannot be read: it has more than {MOST_BYTES // 2**20} MiB, which no such file needs")
    values = parse_json(content, str(path), error)
    if not isinstance(values, kind):
        raise error(f"{path} does not hold a JSON {'array' if kind is list else 'object'}, but a {_kind_of(values)}")
    return values


def parse_json(content: bytes | str, where: str, error: type[PrunusError] = CheckpointError) -> Any:
    """Values of a JSON text, read strictly: what Python's reader lets pass and other programs refuse is refused.

    Args:
        content: UTF-8, with or without a byte order mark.
        where: what messages call it: the file, and the line where there are several.
        error: what is raised.

    Raises:
        PrunusError: of the kind `error`: not UTF-8, not JSON, a key twice in one object, NaN or a number beyond
            floating point, half of a surrogate pair, or lists and objects nested too deeply.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        values = json.loads(
            text.removeprefix("\ufeff"), object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite
        )
        _check_values(values)
    except UnicodeDecodeError as problem:
        raise error(f"{where} cannot be read: it is not UTF-8 (byte {problem.start})") from problem
    except RecursionError:
        raise error(f"{where} cannot be read: {_TOO_DEEP}") from None
    except json.JSONDecodeError as problem:
        raise error(f"{where} is not JSON: {problem}") from problem
    except ValueError as problem:  # also numbers of thousands of digits
        raise error(f"{where} cannot be read: {problem}") from problem
    return values


def read_json_if_whole(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file, or another or half an object in it."""
    try:
        content: dict[str, Any] = read_json(path)
    except CheckpointError:
        return None
    return content


def check_format(values: Any, name: str, version: int, what: str, where: str, error: type[PrunusError]) -> None:
    """Check that what was read is of a format of prunus, and of the version that this prunus reads.

    Args:
        values: from `read_json` or `parse_json`.
        name: of the format, which the field `format` holds.
        version: what the field `version` must hold.
        what: what messages call the format; its last word is what has a version.
        where: what messages call the file.
        error: what is raised.

    Raises:
        PrunusError: of the kind `error`: another format, or another version.
    """
    if not isinstance(values, Mapping) or values.get("format") != name:
        raise error(f"{where}: not a {what}: the field 'format' must be {name!r}")
    if values.get("version") != version:
        raise error(
            f"{where}: {what.split()[-1]} version {values.get('version')!r} is not {version}, which this prunus reads"
        )


def check_content(kind: type[Content], values: Any, where: str, error: type[PrunusError] = CheckpointError) -> Content:
    """Check what was read against what the file holds.

    Args:
        kind: what it holds.
        values: from `read_json` or `parse_json`.
        where: what messages call it, the file as a rule.
        error: what is raised.

    Raises:
        PrunusError: of the kind `error`, naming file, key, value and what is allowed.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as problem:
        raise error(f"{where}: {_first_fault(problem)}") from None


def _first_fault(problem: ValidationError) -> str:
    faults = problem.errors(include_url=False, include_context=False)
    first = faults[0]
    place = ".".join(str(part) for part in first["loc"] if " " not in str(part))  # no tags of unions
    more = f" ({len(faults) - 1} more faults)" if len(faults) > 1 else ""
    if first["type"] == "missing":
        return f"{place} is missing{more}"
    kind, value = first["type"], first["input"]
    message = first["msg"].removeprefix("Value error, ").removesuffix(" after validation")
    allowed = f"it must be {_ALLOWED[kind]}" if kind in _ALLOWED else message.replace("Input should", "it must")
    if kind == "value_error" and isinstance(value, dict | list):
        # A check of several fields at once says itself what is wrong with which.
        return f"{place}: {allowed}{more}".removeprefix(": ")
    return f"{place or 'it'} is {shortened(value)}; {allowed}{more}"


#: pydantic's kinds of faults whose own words name Python's types
_ALLOWED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "an array",
    "tuple_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}


def shortened(value: Any) -> str:
    """A value in a message: as JSON, and no more of it than can be read there."""
    if isinstance(value, dict | list):
        return f"an object of {len(value)}" if isinstance(value, dict) else f"an array of {len(value)}"
    try:
        text = json.dumps(value)
    except ValueError:  # a number of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}…"


def _kind_of(value: Any) -> str:
    names = {dict: "JSON object", list: "JSON array", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


_TOO_DEEP = f"its lists and objects are nested more than {DEEPEST} deep"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return values


def _no_number(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number in JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"it holds {digits[:60]}, which is beyond floating point")
    return number


def _check_values(values: Any) -> None:
    """Raise ValueError for what is too deep, and for text that cannot be written again."""
    level = [values]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.keys()
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError:
                    raise ValueError(f"it holds half of a surrogate pair in {value[:60]!r}") from None
        if not inner:
            return
        level = inner
    raise ValueError(_TOO_DEEP)
