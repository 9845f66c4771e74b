"""Every family × axis, and × method where methods are tested, on models of two layers.

All of them come from the registries `FAMILIES` and `METHODS`: a new entry is tested with no line changed here, but for
a tiny model of a new family (`tests/tiny_families.py`) and an oracle for a new method (`test_oracles.py`).
"""

from __future__ import annotations

import pytest
from cut_cases import CUTS, METHODS, Tiny
from tiny_families import CASES, case_id


@pytest.fixture(params=CASES, ids=case_id)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return Tiny(*request.param)


@pytest.fixture(params=CUTS)
def axes(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param
