"""Surroundings that are not a user's own terminal: containers without a home, closed or narrow output, launchers."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import forked
from tiny_folder import fails

from prunus.checkpoint.packaged_model import cache_root
from prunus.cli import main
from prunus.errors import OptionError
from prunus.files.outputs import check_output
from prunus.files.user_path import expanded
from prunus.machine.processes import launched

LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


# --- variables of launchers ---


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("value", ["two", "1.5", "-3", "9" * 30, "0x1", "1 2"])
def test_variables_that_hold_no_number(capsys, folder, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    message = fails(capsys, "inspect", folder)
    assert f"the environment variable {name} is {value!r}" in message
    assert f"unset {name}" in message


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("value", ["", "  "])
def test_empty_variables_are_none(capsys, folder, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert launched() == 1
    assert name not in os.environ, "libraries would take it for a number"
    assert main(["inspect", str(folder)]) == 0


def test_a_rank_beyond_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(OptionError, match="RANK is 2 and WORLD_SIZE 2"):
        launched()
    monkeypatch.setenv("WORLD_SIZE", "0")
    with pytest.raises(OptionError, match="WORLD_SIZE is '0'"):
        launched()


def test_processes_without_a_meeting_place(capsys, folder, text, monkeypatch, tmp_path):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = fails(capsys, "score", folder, "--out", tmp_path / "out", "--calibration", text)
    assert "WORLD_SIZE is 2, but RANK is not set: start processes by torchrun" in message


# --- no home directory ---


@pytest.fixture
def homeless(monkeypatch) -> None:
    """As in a container under a number that the list of users lacks."""
    import pwd

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME", "PRUNUS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()


def test_no_home_directory(homeless, capsys, folder, text, tmp_path):
    check_output(tmp_path / "new", overwrite=False)
    assert cache_root().is_absolute()
    assert str(os.getuid()) in str(cache_root())
    with pytest.raises(OptionError, match="'~/x' begins with a home directory that is not known here"):
        expanded("~/x")
    assert "begins with a home directory" in fails(capsys, "inspect", "~/model")
    words = ["prune", folder, "--out", tmp_path / "out", "--recipe", "original", "--method", "magnitude"]
    sizes = ["--set", "evaluation.held_out=0", "--set", "output.report=false", "--ratio", "0.1"]
    assert main([str(word) for word in [*words, *sizes, "--calibration", text]]) == 0

    def report():
        for name in [name for name in sys.modules if name.startswith(("altair", "prunus.report."))]:
            del sys.modules[name]
        return main(["report", str(tmp_path / "out")])

    ended = forked(report)
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert "set HOME to any folder" in ended.err


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="becomes another user")
def test_a_user_without_an_entry(tmp_path):
    """Really another user, with nothing in the environment."""
    (tmp_path / "open").mkdir(mode=0o777)
    command = [sys.executable, "-c", "from prunus.cli import main; raise SystemExit(main(['--version']))"]
    environment = {"PYTHONPATH": f"{Path(torch.__file__).parents[1]}:{Path(main.__globals__['__file__']).parents[2]}"}
    another = {"user": 54321, "group": 54321, "extra_groups": [], "cwd": "/"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, **another)
    except PermissionError:
        pytest.skip("the interpreter lies where only its owner may look")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


# --- output ---


def test_output_that_is_not_utf_8(folder, monkeypatch):
    """Tables have arrows and lines that ASCII lacks."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["inspect", str(folder), "--ratio", "0.2"]) == 0
    print("→ and \udce9")
    out.flush()
    assert out.buffer.getvalue().decode("ascii").endswith("\\u2192 and \\udce9\n")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_closed_output(folder, monkeypatch, tmp_path, name):
    """Python has None in the place of a stream that was closed when it began (`>&-`)."""
    monkeypatch.setattr(sys, name, None)
    assert main(["inspect", str(folder)]) == 0
    assert main(["inspect", str(tmp_path / "nothing")]) == 1


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_processes_whose_output_goes_nowhere(folder):
    """Closed, full, and a reader that has enough: an exit status, at most a message, and no traceback at the end."""
    code = """
import os, sys
import prunus.pipeline.inspection  # once, and not in either process
from prunus.cli import main

def tried(prepare):
    child = os.fork()
    if not child:
        prepare()
        sys.exit(main(["inspect", sys.argv[1]]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def full():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

def unread():
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)

print(tried(full), tried(unread), file=sys.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(main.__globals__["__file__"]).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "1 1", done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "No space left on device" in done.stderr
