"""The calibration text that is always there: the manual inside Python's standard library.

`pydoc_data.topics` holds the language reference as text, some 110,000 tokens of English prose with code in it. The text
differs between Python versions, so the same seed gives other tokens on another version: the provenance names the
version and carries the hash of the tokens.

Why this text: SmolLM2-135M cut by 20 % with `taylor` on 32 x 512 tokens has a perplexity (8 windows of 1024 of
wikitext-2 / of C4; dense 29.2 / 28.5) of 82.5 / 76.8 with it, of 101.5 / 95.8 with text that the model writes from its
begin-of-text token, and of 96.2 / 85.6 with the docstrings of the standard library. With C4 itself it is 71.1 / 62.9:
ordinary text is better where there is some. Another seed moves these figures by 4 to 10 %.
benchmarks/default_calibration.py repeats the comparison.
"""

from __future__ import annotations

import platform
import re

from prunus.errors import CalibrationError

__all__ = ["embedded_documents", "embedded_name"]

_RULE = re.compile(r"[*=\-~^\"'#+]{3,}")
_LIST_ITEM = re.compile(r"([*+-]|\d+\.|[A-Za-z]\.)\s")


def embedded_name() -> str:
    """Name of the source for the provenance, with the Python version that its text depends on."""
    return f"pydoc_data.topics of Python {'.'.join(platform.python_version_tuple()[:2])}"


def embedded_documents() -> list[str]:
    """The topics of Python's built-in help, one document each, in a fixed order and without layout.

    Lines under headings go, and paragraphs of prose are put back on one line; code stays as it is. Against the text as
    it ships this was 4 to 7 % better at 10 % cut and 2 to 4 % worse at 20 %, which is no more than another seed makes.

    Raises:
        CalibrationError: this Python was packaged without its manual.
    """
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise CalibrationError(
            "the default calibration text is the manual in Python's standard library (pydoc_data.topics), which this "
            "Python was packaged without. Give a calibration text, or take the source `self`."
        ) from error

    return [_without_layout(topics.topics[name]) for name in sorted(topics.topics)]


def _without_layout(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(flowed for paragraph in paragraphs if (flowed := _flow(paragraph)))


def _flow(paragraph: str) -> str:
    lines = [line.rstrip() for line in paragraph.split("\n") if not _RULE.fullmatch(line.strip())]
    if not lines:
        return ""
    margin = len(lines[0]) - len(lines[0].lstrip())
    if margin > 2 and not _LIST_ITEM.match(lines[0].lstrip()):
        return "\n".join(lines)
    joined = lines[0].strip()
    for line in lines[1:]:
        joined += ("\n" if _LIST_ITEM.match(line.lstrip()) else " ") + line.strip()
    return joined
