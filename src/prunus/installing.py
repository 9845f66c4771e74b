"""What to type to install packages that prunus can do without until they are needed.

prunus itself may be a checkout that no index has, so that installing an extra of it would fail: the packages of the
extra are named instead, with the versions that prunus asks for in its own metadata.
"""

from __future__ import annotations

import shlex
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement

__all__ = ["install_command"]


def install_command(*packages: str) -> str:
    """`pip install` of packages, in the versions that prunus needs."""
    wanted = " ".join(shlex.quote(_requirement(package)) for package in packages)
    return f"pip install {wanted}"


def _requirement(package: str) -> str:
    try:
        stated = [Requirement(line) for line in requires("prunus") or ()]
    except PackageNotFoundError:  # a checkout on the path
        stated = []
    for requirement in stated:
        if requirement.name == package:
            requirement.marker = None
            return str(requirement)
    return package
