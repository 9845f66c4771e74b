"""The page: contents through one template, with style, script, data and the library that draws in the file itself.

Jinja escapes every string, and its `tojson` what goes into a script; model names and generated text are never markup.
The page's own security policy forbids it to load anything. Charts are drawn by Vega, whose bundle for browsers comes
with the package vl-convert-python (extra `prunus[report]`); without it, charts are tables.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prunus.files.replacing import replacing
from prunus.report.contents import Contents, contents_of
from prunus.version import __version__

__all__ = ["FILE_NAME", "page", "write_report"]

logger = logging.getLogger(__name__)

FILE_NAME = "report.html"
#: what HTML forbids in text: control characters, halves of characters, code points that are none
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write a page about a folder of `prunus prune`, `apply` or `compare`.

    Args:
        folder: what prunus wrote.
        out: the file to write; by default report.html in the folder.

    Returns:
        The file.

    Raises:
        CheckpointError: prunus did not write the folder, or a file in it is damaged.
        PlanError: a plan or table in it is malformed.
    """
    text = page(contents_of(folder))
    path = Path(out) if out is not None else Path(folder).expanduser() / FILE_NAME
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def page(contents: Contents) -> str:
    """The page as HTML, with nothing to load from elsewhere."""
    environment = Environment(
        loader=PackageLoader("prunus", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = any(section.charts for section in contents.sections)
    library = drawing_library() if drawn else None
    if drawn and library is None:
        logger.warning("the report shows tables in the place of charts; for charts: pip install 'prunus[report]'")
    own = Path(__file__).parent
    return environment.get_template("page.html.jinja").render(
        contents=contents,
        version=__version__,
        style=Markup((own / "page.css").read_text(encoding="utf-8")),
        script=Markup((own / "page.js").read_text(encoding="utf-8")),
        library=Markup(library) if library else None,
    )


def _printable(value: Any) -> Any:
    """Any string as one that may stand in a page: a model can write every character."""
    return FORBIDDEN.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def drawing_library() -> str | None:
    """Vega, Vega-Lite and Vega-Embed as one script, safe inside a script element; None if it is not installed."""
    if find_spec("vl_convert") is None:
        return None
    import vl_convert

    make: Any = vl_convert.javascript_bundle  # by its types, but not in fact, it needs an argument
    bundle: str = make()
    # In a script's strings and patterns a backslash before the slash changes nothing; markup it would end is no more.
    return re.sub(r"<(?=/script|!--)", r"\\x3c", bundle, flags=re.IGNORECASE)
