"""Text from outside, made safe for what it is shown in: a terminal, Markdown, HTML, YAML.

Names of models and files, prompts, what models write, fields of other people's cards and messages of libraries may hold
anything: escape sequences that rewrite a terminal, characters that reverse the direction of what follows, markup. Each
medium has one function here, and whatever goes there goes through it:

terminal   `terminal_text`, `terminal_line`
Markdown   `markdown_text`, `markdown_code`, `markdown_block`
HTML       `printable`, with Jinja's autoescape; `printable_values` for JSON in a script element
YAML       `yaml_block`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

__all__ = [
    "markdown_block",
    "markdown_code",
    "markdown_text",
    "printable",
    "printable_values",
    "terminal_line",
    "terminal_text",
    "yaml_block",
]

#: what is no visible character, but does something: to a terminal, to the order of text, to a parser
_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed, among them the start of escape sequences
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # direction of text
    "\u200b\u2028\u2029\u2060-\u2064\ufeff\ufff9-\ufffb"  # separators and marks that nobody sees
    "\U000e0000-\U000e007f"  # a second, invisible ASCII
    "\ud800-\udfff"  # halves of characters, which are also how Python holds names that are not UTF-8
    "\ufdd0-\ufdef"  # no characters at all, and the last two of every plane
    f"{''.join(chr(plane + last) for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF))}"
    "]"
)


def printable(text: str) -> str:
    """A string without characters that do something unseen; each becomes the replacement character �."""
    return _UNSAFE.sub("\ufffd", text.replace("\r\n", "\n"))


def printable_values(values: Any) -> Any:
    """Values for JSON or YAML with every string in them, and every key, made `printable`."""
    if isinstance(values, str):
        return printable(values)
    if isinstance(values, Mapping):
        return {printable_values(name): printable_values(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [printable_values(value) for value in values]
    return values


def terminal_text(text: object) -> str:
    """A text of one or more lines for a terminal; what could act on it is shown by its number, as in Python."""
    return _UNSAFE.sub(_as_python_writes_it, str(text).replace("\r\n", "\n"))


def terminal_line(text: object) -> str:
    """A message for a terminal on one line, so that nothing in it can pass for another message."""
    return terminal_text(" ".join(line.strip() for line in str(text).splitlines()))


def _as_python_writes_it(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def markdown_text(text: str) -> str:
    """A string as text of a paragraph, a heading or a table cell: one line, no markup, no links."""
    text = re.sub(r"([\\`*_{}\[\]<>#|~&$!@^])", r"\\\1", _one_line(text))
    text = re.sub(r"://|www\.", lambda match: match[0].replace(":", "\\:").replace(".", "\\."), text, flags=re.I)
    return re.sub(r"^([-+=:]|\d+(?=[.)](\s|$)))", _escaped_start, text)


def _escaped_start(match: re.Match[str]) -> str:
    # A list or an underline would begin here. A digit cannot be escaped, but the mark behind it can.
    return f"{match[0]}\\" if match[0].isdigit() else f"\\{match[0]}"


def markdown_code(text: str) -> str:
    """A string as inline code of a paragraph or a table cell; as text if it holds what would end one of these."""
    text = _one_line(text)
    return markdown_text(text) if not text or re.search(r"[`|\\]", text) else f"`{text}`"


def markdown_block(text: str, language: str) -> str:
    """A string as a fenced block of code."""
    text = printable(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def yaml_block(values: Mapping[str, Any]) -> str:
    """Values as YAML that reads back as these values, whatever the strings in them hold; ends with a line feed."""
    return yaml.safe_dump(printable_values(values), sort_keys=False, allow_unicode=True, width=float("inf"))
