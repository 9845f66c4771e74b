"""What a YAML file sets, key by key, with the line of whatever is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from prunus.errors import OptionError

__all__ = ["read_nodes"]

#: more than any file of settings needs; one that is larger is something else
MOST_BYTES = 4 * 2**20


def read_nodes(path: Path, is_section: Callable[[str], bool]) -> Iterator[tuple[str, Any, int]]:
    """(key, value, line) of everything that a file sets, in its order.

    Args:
        path: of the file.
        is_section: whether a key has keys below it.

    Raises:
        OptionError: the file cannot be read, is no YAML, or no mapping of words to values.
    """
    text = _text_of(path)
    try:
        # First, as it gives up on what is nested deeply, on which the scan would take minutes.
        node = yaml.compose(text, yaml.SafeLoader)
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise OptionError(f"recipe {path} uses YAML aliases (*name); write the values out")
        if not isinstance(node, yaml.MappingNode):
            raise OptionError(f"recipe {path} must be a mapping of keys to values, e.g. `ratio: 0.2`")
        yield from _nodes(node, "", path, is_section)
    except yaml.YAMLError as error:
        raise OptionError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise OptionError(f"recipe {path} is nested too deeply") from None


def _text_of(path: Path) -> str:
    try:
        if path.is_dir():
            raise OptionError(f"recipe {path} is a folder; name the file in it, e.g. {path / 'prunus' / 'recipe.yaml'}")
        if path.stat().st_size > MOST_BYTES:
            raise OptionError(f"recipe {path} has {path.stat().st_size:,} bytes, which no recipe has")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"recipe {path} cannot be read: {error}") from error


def _nodes(
    node: yaml.MappingNode, prefix: str, file: Path, is_section: Callable[[str], bool]
) -> Iterator[tuple[str, Any, int]]:
    seen = set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise OptionError(f"{file}, line {line}: a key must be a word")
        path = prefix + str(key.value)
        if path in seen:
            raise OptionError(f"{file}, line {line}: {path} is set twice")
        seen.add(path)
        if isinstance(value, yaml.MappingNode) and is_section(path):
            yield from _nodes(value, path + ".", file, is_section)
        else:
            loader = yaml.SafeLoader("")
            yield path, loader.construct_object(value, deep=True), line
