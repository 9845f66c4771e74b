"""The tables of families in the documentation are those of the registry."""

from __future__ import annotations

import re
from pathlib import Path

from prunus.model.families import FAMILIES
from prunus.pipeline.families_page import PROGRAMS, families_page, families_table

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current():
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == families_page(), "run: python -m prunus.pipeline.families_page > docs/families.md"


def test_the_readme_has_the_same_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert families_table() in readme, f"put this into README.md, under Families:\n\n{families_table()}"


def test_the_chinese_readme_has_the_same_families():
    readme = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    section = readme.split("## 支持的模型系列")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == list(FAMILIES)


def test_programs_name_families_only():
    """A misspelt family would read "not tried"."""
    assert {name for families in PROGRAMS.values() for name in families} <= set(FAMILIES)
