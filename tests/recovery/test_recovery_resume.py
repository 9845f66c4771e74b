"""A run that was killed or interrupted goes on, and ends with the same bits."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal

import pytest
from forked import Forked
from tiny_recovery import SHORT, last_wins

from prunus.cli import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")

#: more than one pass over the 36 sequences, so that the second one's order counts too
RUN = [*SHORT, "--samples", "36", "--max-steps", "18", "--set", "recovery.checkpoints=6", "--learning-rate", "3e-3"]
#: and a loss that draws random numbers in every step
RUN += ["--set", "recovery.vocabulary=150"]


@pytest.fixture(scope="module")
def expected(pruned, tmp_path_factory):
    """What a run gives that nobody disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(["recover", str(pruned), "--out", str(out), *last_wins(RUN)]) == 0
    return out


class Killed(BaseException):
    """Not an error that anything handles."""


@pytest.fixture(scope="module")
def without_result(pruned, tmp_path_factory):
    """What a run leaves that is killed when only its result is left to be written."""
    out = tmp_path_factory.mktemp("killed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunus.recovery.result.save_checkpoint", killed)
        with pytest.raises(Killed):
            main(["recover", str(pruned), "--out", str(out), *last_wins(RUN)])
    assert not out.exists()
    return out.with_name("out.work")


def killed(*args, **kwargs):
    raise Killed


def started(pruned, out, after, *more):
    """A run that has come as far as a checkpoint."""
    process = Forked(lambda: main(["recover", str(pruned), "--out", str(out), *last_wins([*RUN, *more])]))
    process.wait_until((out.with_name(out.name + ".work") / f"checkpoint-{after}" / "trainer_state.json").is_file)
    return process


def assert_same(out, expected):
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    found, wanted = (json.loads((folder / "prunus" / "recovery.json").read_text()) for folder in (out, expected))
    for name in ("history", "training_losses", "held_out_loss", "best_step", "steps", "text"):
        assert found[name] == wanted[name], name
    assert not out.with_name(out.name + ".work").exists()


def test_killed_twice(recover, pruned, expected, tmp_path):
    out = tmp_path / "out"
    for after in (3, 12):
        process = started(pruned, out, after)
        process.kill()
        assert process.wait().status == -signal.SIGKILL
        assert not out.exists()
    # A checkpoint that was being written when the power went is none.
    broken = out.with_name("out.work") / "checkpoint-17"
    shutil.copytree(out.with_name("out.work") / "checkpoint-12", broken)
    (broken / "trainer_state.json").write_text('{"global_step": 5')
    recover(pruned, "--out", out, *RUN)
    assert_same(out, expected)


def test_interrupted_by_ctrl_c(recover, pruned, expected, tmp_path):
    out = tmp_path / "out"
    process = started(pruned, out, 3)
    process.kill(signal.SIGINT)
    ended = process.wait()
    errors = ended.err
    assert ended.status == 130, errors
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    (name,) = re.findall(r"checkpoint-\d+", errors)
    assert int(name.partition("-")[2]) >= 3
    assert (out.with_name("out.work") / name / "trainer_state.json").is_file()
    recover(pruned, "--out", out, *RUN)
    assert_same(out, expected)


def test_killed_when_only_the_result_was_left_to_write(
    recover, pruned, expected, without_result, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(without_result, tmp_path / "out.work")
    monkeypatch.setattr("prunus.recovery.trainer.RecoveryTrainer.train", killed)
    recover(pruned, "--out", out, *RUN, "--overwrite")  # which takes away what is of other options
    assert_same(out, expected)


def test_killed_after_the_last_checkpoint(recover, pruned, tmp_path, monkeypatch):
    """In the middle of a pass over the text: nothing is left to train."""
    run = [*SHORT, "--samples", "120", "--max-steps", "7", "--set", "recovery.checkpoints=1"]
    expected = recover(pruned, "--out", tmp_path / "expected", *run)
    with monkeypatch.context() as patch:
        patch.setattr("prunus.recovery.checkpoints.Checkpoints.finish", killed)
        with pytest.raises(Killed):
            recover(pruned, "--out", tmp_path / "out", *run)
    assert (tmp_path / "out.work" / "checkpoint-7").is_dir()
    assert recover(pruned, "--out", tmp_path / "out", *run)["steps"] == 7 == expected["steps"]
    assert_same(tmp_path / "out", tmp_path / "expected")


def test_what_does_not_go_together_is_refused(refused, recover, pruned, without_result, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(without_result, tmp_path / "out.work")
    other = [word if word != "3e-3" else "1e-3" for word in RUN]
    message = refused(pruned, "--out", out, *other)
    assert "learning-rate 0.003, now it is 0.001" in message
    for option, before, now in (("--seed", 0, 1), ("--seq-len", 32, 16), ("--samples", 36, 50)):
        message = refused(pruned, "--out", out, *RUN, option, str(now))
        assert f"was begun with {option} {before}, now it is {now}" in message
    facts = recover(pruned, "--out", out, *SHORT, "--max-steps", "2", "--overwrite")
    assert facts["steps"] == 2
    assert not out.with_name("out.work").exists()
