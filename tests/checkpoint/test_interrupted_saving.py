"""A disk that fills up, and kill -9, at any moment of saving: what is there is the old folder or the whole new one.

As a program, `PYTHONPATH=tests python tests/checkpoint/test_interrupted_saving.py [KILLS]` kills many more times than
the suite does.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from forked import Forked, forked
from tiny_models import RAGGED, cut, dense_model

from prunus.checkpoint import load_model, save_checkpoint
from prunus.checkpoint import save as save_module
from prunus.errors import CheckpointError
from prunus.files import outputs
from prunus.files.outputs import claimed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, kills and mounts")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(model, tokenizer, out: Path, card: str) -> None:
    save_checkpoint(model, tokenizer, out, card=card, extras={"plan.json": card}, overwrite=True, max_shard_size=20_000)


def model_of(seed: int):
    """Models of the same shape with other weights."""
    torch.manual_seed(seed)
    model = cut(dense_model("llama"), RAGGED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def check_whole(out: Path, whole: dict[str, dict[str, bytes]]) -> str:
    """What the folder holds is one of these, to the last byte; says which."""
    found = contents(out)
    names = [name for name, expected in whole.items() if found == expected]
    assert names, f"neither old nor new: {sorted(found)}"
    return names[0]


# --- a disk that fills up ---


@pytest.mark.parametrize("limit", [0, 100, 3000, 8000, 15_000, 19_000])
def test_files_that_may_not_grow(tokenizer, tmp_path, limit):
    """The system refuses to write beyond a size (as `ulimit -f` does): in the small files, or within the weights."""
    out = tmp_path / "out"
    save(model_of(0), tokenizer, out, "old")
    before, (_, hard) = contents(out), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match="could not write the model folder"):
            save(model_of(1), tokenizer, out, "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert contents(out) == before
    assert os.listdir(tmp_path) == ["out"]


def mount_a_small_disk(place: Path) -> None:
    """Give this process a file system of 80 MB that no other sees; OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    new_user, new_mounts = 0x10000000, 0x00020000
    if libc.unshare(new_user | new_mounts):
        raise OSError(ctypes.get_errno(), "no namespace of its own")
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(line)
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=80m"):
        raise OSError(ctypes.get_errno(), "no mount")


def test_a_disk_that_fills_up_after_it_was_checked(tokenizer, tmp_path, monkeypatch):
    """On a real file system, of which another program leaves less and less while the folder is written."""
    source, place = tmp_path / "source", tmp_path / "small disk"
    model = model_of(1)
    save(model, tokenizer, source, "old")
    place.mkdir()
    size = sum(map(len, contents(source).values()))
    rooms = [0, 4096, 30_000, size // 2, size - 20_000, 20 * size]
    check, ballast = save_module.check_disk, place / "ballast"

    def work():
        try:
            mount_a_small_disk(place)
        except OSError as error:
            return print(f"cannot be: {error}")
        shutil.copytree(source, place / "out")
        for room in rooms:

            def fill_up_after_the_check(out, expected, room=room):
                check(out, expected)
                free = os.statvfs(place)
                with ballast.open("wb") as file:
                    left = free.f_bavail * free.f_frsize - room
                    while left > 0:
                        left -= file.write(bytes(min(left, 2**20)))

            monkeypatch.setattr(save_module, "check_disk", fill_up_after_the_check)
            try:
                save_checkpoint(model, tokenizer, place / "out", card="new", extras={}, overwrite=True)
                print("saved")
            except CheckpointError as error:
                print(error)
            ballast.unlink()
            print(sorted(os.listdir(place)), (place / "out" / "README.md").read_text())
        return None

    ended = forked(work)
    assert ended.status == 0, ended.err
    if ended.out.startswith("cannot be"):
        pytest.skip(ended.out)
    lines = ended.out.splitlines()
    assert len(lines) == 2 * len(rooms)
    for said, there in zip(lines[0:-2:2], lines[1:-2:2], strict=True):
        assert "could not write the model folder" in said
        assert "No space left" in said or "os error 28" in said.lower() or "storage full" in said.lower(), said
        assert there == "['out'] old"
    assert lines[-2:] == ["saved", "['out'] new"]


# --- kill -9 ---


def killed_while_saving(model, tokenizer, out: Path, after: float) -> bool:
    """Save in another process, and kill that after some seconds; whether it still ran."""
    process = Forked(lambda: save(model, tokenizer, out, "new"))
    time.sleep(after)
    process.kill()
    return process.wait().status == -signal.SIGKILL


def check_kills(kills: int, folder: Path, tokenizer, seed: int) -> dict[str, int]:
    """Kill saving at random moments; returns how often it was killed and what was found."""
    old, new, out = folder / "old", folder / "new", folder / "out"
    models = {"old": model_of(0), "new": model_of(1)}
    for name, model in models.items():
        save(model, tokenizer, folder / name, name)
    whole = {"old": contents(old), "new": contents(new)}
    begun = time.perf_counter()
    save(models["new"], tokenizer, folder / "timed", "new")
    seconds = time.perf_counter() - begun
    generator, found = random.Random(seed), {"killed": 0, "old": 0, "new": 0, "nothing": 0}
    for number in range(kills):
        fresh = number % 3 == 2
        shutil.rmtree(out, ignore_errors=True)
        if not fresh:
            shutil.copytree(old, out)
        found["killed"] += killed_while_saving(models["new"], tokenizer, out, generator.uniform(0, 1.3) * seconds)
        with claimed(out):  # the next run tidies up
            pass
        assert sorted(os.listdir(folder)) == sorted(["old", "new", "timed", *(["out"] if out.exists() else [])])
        if fresh and not out.exists():
            found["nothing"] += 1
        else:
            found[check_whole(out, whole)] += 1
            assert not (fresh and contents(out) == whole["old"])
    return found


def test_killed_at_random_moments(tokenizer, tmp_path):
    found = check_kills(9, tmp_path, tokenizer, seed=3)
    assert found["killed"], "it was never killed"
    load_model(tmp_path / "new")


def test_killed_at_every_call_that_changes_names(tokenizer, tmp_path):
    """Just before and just after each rename, deletion of a folder and creation of one."""
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    save(model_of(0), tokenizer, old, "old")
    save(model_of(1), tokenizer, new, "new")
    whole = {"old": contents(old), "new": contents(new)}
    model, found = model_of(1), []
    for number in range(100):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(old, out)

        def killed(number=number):
            _die_at(number)
            save(model, tokenizer, out, "new")

        ended = forked(killed)
        with claimed(out):
            pass
        assert sorted(os.listdir(tmp_path)) == ["new", "old", "out"]
        found.append(check_whole(out, whole))
        if ended.status != -signal.SIGKILL:
            break
    else:
        pytest.fail("more calls than there can be")
    assert found == sorted(found, reverse=True), "old, and from some moment on new"
    assert set(found) == {"old", "new"}
    assert len(found) > 6


def _die_at(number: int) -> None:
    """Kill this process before the number-th call that changes names; every other one counts as its end."""
    calls = 0

    def spied(call):
        def wrapper(*args, **kwargs):
            nonlocal calls
            for moment in ("before", "after"):
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                if moment == "before":
                    result = call(*args, **kwargs)
            return result

        return wrapper

    for owner, names in ((Path, ("rename", "mkdir", "unlink")), (outputs.shutil, ("rmtree",))):
        for name in names:
            setattr(owner, name, spied(getattr(owner, name)))


if __name__ == "__main__":
    from conftest import tokenizer as fixture

    with tempfile.TemporaryDirectory() as place:
        kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
        print(check_kills(kills, Path(place), fixture.__wrapped__(), seed=time.time_ns()))
