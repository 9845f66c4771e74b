"""Text from outside is text and nothing else, in each medium: read back by real parsers, and as bytes of a terminal."""

from __future__ import annotations

import io
import re
import shlex
import subprocess

import html5lib
import pytest
import yaml
from hostile_text import PIECES, UNSEEN, hostile_text
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from prunus.cli import printing
from prunus.cli.terminal import quoted_command
from prunus.escaping import (
    markdown_block,
    markdown_code,
    markdown_text,
    printable,
    printable_values,
    terminal_line,
    terminal_text,
    yaml_block,
)
from prunus.option_names import in_flags

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
#: kinds of tokens that plain text is made of
PLAIN = {"paragraph", "inline", "text", "heading", "table", "thead", "tbody", "tr", "th", "td"}


def tokens_of(source: str) -> list:
    """All tokens of a Markdown document, those within a line too."""
    return [each for token in MARKDOWN.parse(source) for each in (token, *(token.children or ()))]


def kinds_of(source: str) -> set[str]:
    return {re.sub("_(open|close|special)$", "", token.type) for token in tokens_of(source)} - {"text"}


def shown(text: str) -> str:
    """What a document is to show of a text on one line."""
    return printable(" ".join(text.split()))


@given(hostile_text)
def test_markdown_text_is_text_wherever_it_stands(text):
    escaped = markdown_text(text)
    assert UNSEEN.search(escaped) is None
    assert "\n" not in escaped
    for source, kinds in (
        (escaped, {"paragraph", "inline"}),
        (f"# {escaped}", {"heading", "inline"}),
        (f"Before {escaped} after", {"paragraph", "inline"}),
        (f"Before\n{escaped}", {"paragraph", "inline", "softbreak"}),
        (f"| a | b |\n|---|---|\n| {escaped} | {escaped} |", PLAIN - {"text", "paragraph", "heading"}),
    ):
        assert kinds_of(source) <= kinds, source
        content = "".join(token.content for token in tokens_of(source) if token.type in ("text", "text_special"))
        assert shown(text) in content
    # Renderers that make links of bare addresses find none.
    assert not re.search(r"(?i)https?://|www\.", escaped)


@given(hostile_text, hostile_text)
def test_a_table_keeps_its_cells(one, other):
    for function in (markdown_text, markdown_code):
        row = f"| a | b |\n|---|---|\n| {function(one)} | {function(other)} |"
        cells = [token for token in MARKDOWN.parse(row) if token.type == "td_open"]
        assert len(cells) == 2
        assert kinds_of(row) <= PLAIN | {"code_inline"}
        found = ["".join(child.content for child in t.children) for t in MARKDOWN.parse(row) if t.type == "inline"][2:]
        assert found == [shown(one), shown(other)]


@given(hostile_text)
@example("a\n```\n# b")
@example("a\n`````\n# b")
def test_a_markdown_block_is_one_block(text):
    (token,) = MARKDOWN.parse(markdown_block(text, "sh"))
    assert (token.type, token.info) == ("fence", "sh")
    assert token.content == f"{printable(text)}\n"


values = st.recursive(
    st.one_of(hostile_text, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(hostile_text, inner, max_size=3)),
    max_leaves=8,
)


@given(st.dictionaries(hostile_text, values, max_size=4))
def test_yaml_reads_back_as_what_was_written(facts):
    block = yaml_block(facts)
    assert UNSEEN.search(block) is None
    assert yaml.safe_load(block) == printable_values(facts)
    # A line that would end the front matter of a card.
    assert not any(line.startswith(("---", "...")) for line in block.splitlines())


@given(hostile_text)
def test_html_is_valid_and_shows_the_text(text):
    from jinja2 import Environment

    from prunus.report.page import _printable

    environment = Environment(autoescape=True, finalize=_printable)
    page = '<!DOCTYPE html><title>t</title><p title="{{ x }}">{{ x }}</p>'
    source = environment.from_string(page).render(x=text)
    document = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(source)
    (paragraph,) = document.iter("p")
    assert list(paragraph) == []
    assert paragraph.get("title") == printable(text)
    assert (paragraph.text or "") == printable(text)


@given(hostile_text)
def test_a_terminal_gets_no_control_characters(text):
    assert UNSEEN.search(terminal_text(text)) is None
    line = terminal_line(text)
    assert UNSEEN.search(line) is None
    assert "\n" not in line
    letters = re.sub(r"\s", "", re.sub(UNSEEN, "", text))
    rest = iter(re.sub(r"\s", "", terminal_text(text)))
    assert all(letter in rest for letter in letters), "nothing that can be seen is lost"


@given(st.lists(hostile_text, min_size=3, max_size=3))
@example(["", "", "\t\x1b[31m"])
def test_tables_show_strings_as_they_are(words):
    console = Console(
        file=io.StringIO(), force_terminal=True, width=4000, color_system="truecolor", legacy_windows=False
    )
    before, printing.out_console = printing.out_console, console
    try:
        printing.print_rows("a title", ("", "column"), [("a row", "b")])
        own = set(re.findall("\x1b.*?m", console.file.getvalue()))
        console.file.seek(0)
        console.file.truncate()
        printing.print_rows(words[0], ("", words[1]), [("row", words[2])])
    finally:
        printing.out_console = before
    output = console.file.getvalue()
    assert set(re.findall("\x1b.*?m", output)) <= own, "styles that are not the table's"
    bare = re.sub("\x1b.*?m", "", output)
    assert UNSEEN.search(bare) is None
    for word in words:
        for line in terminal_text(word).split("\n"):
            # A title is wrapped to the width of its table.
            assert re.sub(r"[\s│]", "", line) in re.sub(r"[\s│]", "", bare)


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_in_a_table(piece, capsys, monkeypatch):
    monkeypatch.setattr(printing, "out_console", Console(width=200))
    printing.print_rows(piece, ("", piece), [(piece, f"a{piece}b")])
    out = capsys.readouterr().out
    assert UNSEEN.search(out) is None
    if not any(letter.isspace() for letter in piece):
        assert f"a{terminal_text(piece)}b" in out


# What bash makes of a command is what was typed: bytes that are no UTF-8, line breaks and quotes too.
arguments = st.binary(min_size=1, max_size=12).filter(lambda b: 0 not in b and not b.startswith(b"/"))


@given(st.lists(arguments, min_size=1, max_size=4))
def test_a_command_can_be_typed_again(words):
    command = quoted_command("printf", ["%s\\0", *(word.decode("utf-8", "surrogateescape") for word in words)])
    assert UNSEEN.search(command) is None
    assert "\n" not in command
    made = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout
    assert made.split(b"\0")[:-1] == words
    assert shlex.split(command)[0] == "printf"


def test_options_are_named_as_they_were_typed():
    flags = {"seq_len": "--seq-len", "model": "MODEL"}
    assert in_flags("`seq_len` is 1; `model` and `datasets` and seq_len", flags) == (
        "--seq-len is 1; MODEL and `datasets` and seq_len"
    )


def test_a_value_beside_an_option_is_as_it_would_be_typed():
    flags = {"shape": "--shape", "axes": "--set selection.axes"}
    assert in_flags("`shape=uniform`, `axes=[mlp]` or `repair=null`; `shape = uniform`", flags) == (
        "--shape uniform, --set selection.axes=[mlp] or `repair=null`; `shape = uniform`"
    )
