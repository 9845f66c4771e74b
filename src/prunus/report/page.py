"""The page: contents through one template, with style, script, data and the library that draws in the file itself.

Jinja escapes every string, and its `tojson` what goes into a script; model names and generated text are never markup.
The page's own security policy forbids it to load anything. Charts are drawn by Vega, whose bundle for browsers comes
with the package vl-convert-python.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from prunus.errors import OptionError
from prunus.escaping import printable, printable_values
from prunus.files.outputs import check_output_file, claimed, output_file, whole_file
from prunus.files.user_path import expanded
from prunus.version import __version__

if TYPE_CHECKING:
    from prunus.report.contents import Contents

__all__ = ["FILE_NAME", "page", "try_report", "write_report"]

logger = logging.getLogger(__name__)

FILE_NAME = "report.html"
#: in the head of every report
MARK = b'<meta name="generator" content="prunus'
#: by its types, but not in fact, the function needs an argument
BUNDLE = "import sys, vl_convert; sys.stdout.buffer.write(vl_convert.javascript_bundle().encode())"


def write_report(folder: str | Path, out: str | Path | None = None, *, overwrite: bool = True) -> Path:
    """Write a page about a folder of `prunus prune`, `apply` or `compare`.

    Args:
        folder: what prunus wrote.
        out: the file to write; by default report.html in the folder.
        overwrite: replace an earlier report.

    Returns:
        The file.

    Raises:
        BusyError: another process works on the folder, or on `out`.
        CheckpointError: prunus did not write the folder, or a file in it is damaged.
        OptionError: `out` is there already, or with `overwrite` is no report; there is no home directory.
        PlanError: a plan or table in it is malformed.
    """
    path = expanded(out) if out is not None else expanded(folder) / FILE_NAME
    with claimed(folder) if out is None else claimed(path, is_file=True):
        check_output_file(path, FILE_NAME, MARK, overwrite)
        text = page(_contents_of(folder))
        writing = whole_file(path) if out is None else output_file(path, FILE_NAME, MARK, overwrite=overwrite)
        with writing as partial:
            partial.write_text(text, encoding="utf-8")
    return path


def try_report(folder: str | Path) -> None:
    """Write the page into a folder whose result is complete; where that fails, say so and how to make it later."""
    try:
        write_report(folder)
    except Exception as error:  # a picture of the result must not take the result with it
        logger.warning(
            "%s is complete, but its report could not be made (%s: %s); `prunus report %s --overwrite` makes it",
            folder,
            type(error).__name__,
            error,
            shlex.quote(str(folder)),
        )


def _contents_of(folder: str | Path) -> Contents:
    try:
        # Here, as Altair takes a third of a second to import, and looks for a home directory.
        from prunus.report.contents import contents_of
    except RuntimeError as error:
        raise OptionError(f"no report without a home directory; set HOME to any folder ({error})") from error
    return contents_of(folder)


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
    environment.policies["json.dumps_function"] = _printable_json
    drawn = any(section.charts for section in contents.sections)
    library = drawing_library() if drawn else None
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
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _printable_json(values: Any, **options: Any) -> str:
    return json.dumps(printable_values(values), **options)


@cache
def drawing_library() -> str | None:
    """Vega, Vega-Lite and Vega-Embed as one script, safe inside a script element; None if it cannot be had.

    The package runs a JavaScript engine, which takes its process with it where it gets no memory (`ulimit -v`): it has
    one of its own.
    """
    made = subprocess.run([sys.executable, "-c", BUNDLE], capture_output=True, check=False)
    bundle = made.stdout.decode("utf-8", "replace")
    if made.returncode or not bundle:
        logger.warning(
            "the report shows tables in the place of charts: the library that draws them ended with status %d, maybe "
            "for want of memory; `prunus report FOLDER --overwrite` makes the report again",
            made.returncode,
        )
        return None
    # In a script's strings and patterns a backslash before the slash changes nothing; markup it would end is no more.
    return re.sub(r"<(?=/script|!--)", r"\\x3c", bundle, flags=re.IGNORECASE)
