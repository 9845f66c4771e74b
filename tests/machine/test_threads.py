"""Threads by the share of the machine that a container has, and waiting ones asleep."""

from __future__ import annotations

import os

import pytest

from prunus.machine import threads
from prunus.machine.threads import cpu_quota, share_cores

NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """`groups(own, {file: content})`: control groups as they show in a container, and the group of this process."""
    monkeypatch.setattr(threads, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "OWN_GROUPS", tmp_path / "own")

    def make(own, files):
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return make


@pytest.fixture
def environment(monkeypatch):
    """An environment in which nobody has said anything about threads, on eight cores."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_cores", lambda: 8)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return os.environ


V1 = {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}
CASES = {
    "version 2, its own group": ("0::/\n", {"cpu.max": "400000 100000\n"}, 4.0),
    "version 2, a group below": ("0::/a/b\n", {"a/b/cpu.max": "150000 100000", "a/cpu.max": "max 100000"}, 1.5),
    "version 2, a tighter one above": ("0::/a/b\n", {"a/b/cpu.max": "600000 100000", "a/cpu.max": "30000 10000"}, 3.0),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    "version 2, of the host": ("0::/docker/123\n", {"cpu.max": "200000 100000\n"}, 2.0),
    "version 1": ("3:cpu,cpuacct:/\n2:memory:/x\n", V1, 2.5),
    "version 1, its own folder": (
        "3:cpu,cpuacct:/\n",
        {name.replace("cpu/", "cpu,cpuacct/"): v for name, v in V1.items()},
        2.5,
    ),
    "version 1, of the host": ("3:cpu:/docker/123\n", V1, 2.5),
    "version 1, no limit": ("3:cpu:/\n", {**V1, "cpu/cpu.cfs_quota_us": "-1\n"}, None),
    "another controller's": ("3:cpuset:/\n", V1, None),
    "nonsense": ("0::/\n", {"cpu.max": "all of them\n"}, None),
    "no groups": ("", {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_quota_of_the_tightest_group(groups, case):
    own, files, expected = CASES[case]
    groups(own, files)
    assert cpu_quota() == expected


def test_a_system_without_control_groups(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "OWN_GROUPS", tmp_path / "missing")
    assert cpu_quota() is None


@pytest.mark.parametrize(("quota", "expected"), [("250000", "2"), ("50000", "1"), ("800000", None), ("max", None)])
def test_as_many_threads_as_the_quota_has_room_for(groups, environment, quota, expected):
    groups("0::/\n", {"cpu.max": f"{quota} 100000"})
    share_cores()
    assert environment.get("OMP_NUM_THREADS") == expected
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["KMP_BLOCKTIME"] == "0"


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_set_stays(groups, environment, name):
    groups("0::/\n", {"cpu.max": "200000 100000"})
    environment[name] = "7"
    share_cores()
    assert environment[name] == "7"
    if name == "OMP_NUM_THREADS":
        assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    else:
        assert [other for other in NAMES[1:] if other in environment] == [name], "one word on waiting is enough"
        assert environment["OMP_NUM_THREADS"] == "2"
