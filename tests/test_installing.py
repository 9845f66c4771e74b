"""What messages and pages tell a user to install can be installed: what pyproject.toml asks for, and never prunus."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from prunus import installing
from prunus.installing import install_command

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    Requirement(line).name: line
    for extra, lines in PROJECT["optional-dependencies"].items()
    if extra != "dev"
    for line in lines
}
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("GLOBAL*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("package", EXTRAS)
def test_the_command_names_what_the_project_asks_for(package):
    *words, requirement = shlex.split(install_command(package))
    assert words == ["pip", "install"]
    wanted, stated = Requirement(requirement), Requirement(EXTRAS[package])
    assert (wanted.name, wanted.extras, wanted.specifier, wanted.marker) == (
        *(stated.name, stated.extras, stated.specifier),
        None,
    )


def test_several_packages_and_a_checkout_that_is_not_installed(monkeypatch):
    assert shlex.split(install_command("peft", "accelerate")) == [
        "pip",
        "install",
        EXTRAS["peft"],
        EXTRAS["accelerate"],
    ]

    def requires(name):
        raise installing.PackageNotFoundError(name)

    monkeypatch.setattr(installing, "requires", requires)
    assert install_command("peft", "accelerate") == "pip install peft accelerate"


def test_every_package_that_code_asks_for_is_an_extra():
    code = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    named = re.findall(r"install_command\(([\"'][^)]*)\)", code)
    assert len(named) >= 3
    assert {name for call in named for name in re.findall(r"[\"']([\w-]+)[\"']", call)} <= EXTRAS.keys()
    assert "prunus[" not in code, "the package is on no index"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_name_what_the_project_asks_for(page):
    for command in re.findall(r"pip install ([^`#\n&]+)", page.read_text()):
        for word in shlex.split(command):
            requirement = re.match(r"[\w.-]+", word)
            if requirement and requirement[0] in EXTRAS:
                assert word == EXTRAS[requirement[0]]
            assert not word.startswith("prunus")
