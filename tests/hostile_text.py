"""Strings that would do harm where they are shown, for property tests of what prunus writes and prints."""

from __future__ import annotations

import re

from hypothesis import strategies as st

#: each does something in some medium
PIECES = (
    # terminals: colour, title, link, clipboard, clear screen, one-byte CSI, backspace, carriage return
    *(
        "\x1b[31m",
        "\x1b]0;owned\x07",
        "\x1b]8;;http://evil\x1b\\",
        "\x1b]52;c;AAAA\x07",
        "\x1b[2J",
        "\x9b31m",
        "\b",
        "\r",
    ),
    *(
        "\x00",
        "\x07",
        "\x7f",
        "\x85",
        "\u2028",
        "\u202e",
        "\u2066",
        "\u200f",
        "\ufeff",
        "\U000e0041",
        "\ud800",
        "\udcff",
    ),
    *("[red]", "[/red]", "[link=http://evil]", "[bold", ":smile:"),
    # Markdown
    *(
        "# ",
        "## ",
        "- ",
        "+ ",
        "1. ",
        "> ",
        "---",
        "===",
        "***",
        "___",
        "```",
        "~~~",
        "`",
        "``",
        "|",
        "\\|",
        "\\",
        "\\`",
    ),
    *("[a](http://evil)", "![a](x)", "[a]: http://evil", "<http://evil>", "https://evil.example", "www.evil.example"),
    *("*a*", "_a_", "**a**", "~~a~~", "a_b_c", "$x$", "&lt;", "&#60;", "^", "@name", ":---:", "    code"),
    *("<!-- evaluation by prunus -->", "<!-- end of evaluation by prunus -->", "<!--", "-->"),
    # HTML and scripts
    *(
        "<b>",
        "</script>",
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "'",
        '"',
        "{{ 7*7 }}",
        "{% x %}",
    ),
    # YAML
    *(
        ": ",
        "#",
        " #",
        "&a ",
        "*a",
        "!!python/object:os.system",
        "!x",
        "? ",
        "- a",
        "{a: b}",
        "[a",
        "%TAG",
        "|",
        ">",
        "@",
    ),
    *("null", "true", "1e3", "2020-01-01", "~", "a: b"),
    *("\n", "\n\n", "\r\n", "\t", " ", "  ", "x", "é", "你好", "😀", "1", "0.2"),
)
hostile_text = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.text(st.characters(codec=None, exclude_categories=()), max_size=20),
)
#: what a string must not bring into a document or onto a terminal, beside line feed and tab
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]"
)
