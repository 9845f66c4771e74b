"""The error tree: complete, and as its documentation draws it."""

from __future__ import annotations

import inspect
import re

import pytest

import prunus
from prunus import errors

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def test_all_is_complete():
    assert set(errors.__all__) == set(CLASSES)
    assert errors.__all__ == sorted(errors.__all__)


def test_every_error_is_a_prunus_error():
    for error in CLASSES.values():
        assert issubclass(error, errors.PrunusError)
        assert error.__module__ == "prunus.errors"
    assert prunus.PrunusError is errors.PrunusError


def test_the_tree_in_the_docstring_is_the_tree_of_classes():
    """Each line of the drawing names a class under its parent, with the first line of the class's own docstring."""
    drawn: dict[str, tuple[str | None, str]] = {}
    parents: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        if match := re.fullmatch(r"(?P<branch>[ │├└─]*)(?P<name>\w+Error)(?:\s+(?P<summary>.*))?", line):
            indent = len(match["branch"])
            while parents and parents[-1][0] >= indent:
                parents.pop()
            drawn[match["name"]] = (parents[-1][1] if parents else None, match["summary"] or "")
            parents.append((indent, match["name"]))
    assert set(drawn) == set(CLASSES)
    for name, (parent, summary) in drawn.items():
        bases = [base for base in CLASSES[name].__bases__ if base.__name__ in CLASSES]
        assert [base.__name__ for base in bases] == ([parent] if parent else []), name
        if parent:
            assert inspect.getdoc(CLASSES[name]).splitlines()[0].rstrip(".").lower() == summary.lower()


def test_option_errors_are_value_errors():
    """Callers that know nothing of prunus catch them with what Python raises for a bad argument."""
    with pytest.raises(ValueError, match="no good"):
        raise errors.OptionError("no good")


def test_the_public_names_exist():
    assert prunus.__all__ == sorted(prunus.__all__, key=lambda name: (name != name.upper(), name.islower(), name))
    for name in prunus.__all__:
        assert getattr(prunus, name) is not None
