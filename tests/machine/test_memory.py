"""Memory that can still be taken: the machine's, within the limit of a container."""

from __future__ import annotations

import psutil
import pytest

from prunus.machine import memory


def test_without_a_container(monkeypatch):
    monkeypatch.setattr(memory, "CGROUPS", ())
    assert memory.available_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert 10**6 < memory.resident_set() < psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("limit", "used", "left"), [("3000", "1000", 2000), ("3000", "4000", 0), ("max", "1000", None)]
)
def test_the_limit_of_a_container_holds(monkeypatch, tmp_path, limit, used, left):
    (tmp_path / "limit").write_text(limit + "\n")
    (tmp_path / "used").write_text(used + "\n")
    monkeypatch.setattr(
        memory, "CGROUPS", ((tmp_path / "missing", tmp_path / "missing"), (tmp_path / "limit", tmp_path / "used"))
    )
    if left is None:
        assert memory.available_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    else:
        assert memory.available_bytes() == left
