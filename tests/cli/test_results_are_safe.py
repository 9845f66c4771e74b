"""No command writes where another one works, over what it reads, or less than a whole result."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import shutil
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from forked import another_process
from plain import PLAIN, UNMEASURED
from tiny_folder import SIZES, fails, run

from prunus.cli import main
from prunus.files.outputs import claimed
from prunus.report.page import BUNDLE, drawing_library

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and limits")

QUICK = ["--ratio", "0.1", *PLAIN, "--method", "magnitude", "--set", "evaluation.held_out=0"]
QUIET, STREAMED = ["--set", "output.report=false"], ["--set", "run.engine=streamed"]
RANDOM = ["--recipes", "original", "--methods", "random"]
TRAIN = ["--text", "default", "--seq-len", "16", "--set", "text.held_out=2", "--batch-size", "2", "--max-steps", "2"]
LOADING = [
    ("prunus.pipeline.inputs", "load_or_open"),
    ("prunus.recovery.training", "load_model"),
]


class Killed(BaseException):
    """Not an error that anything handles."""


def killed(*args, **options):
    raise Killed


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pruned(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "small"
    assert main(["prune", str(folder), "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(scope="module")
def scores(folder, text, tmp_path_factory) -> Path:
    """With statistics, which a method that needs none does not write."""
    out = tmp_path_factory.mktemp("scores") / "scores"
    assert main(["score", str(folder), "--out", str(out), "--calibration", str(text), *SIZES]) == 0
    return out


@pytest.fixture
def commands(folder, pruned, scores, text):
    """Every command that writes a result of its own, but for the output."""
    draw = ["--calibration", text, *SIZES]
    return {
        "prune": ["prune", folder, *QUICK],
        "prune, streamed": ["prune", folder, *draw, *UNMEASURED, *STREAMED],
        "apply": ["apply", folder, pruned / "prunus" / "plan.json"],
        "score": ["score", folder, *draw, *STREAMED],
        "compare": ["compare", folder, *RANDOM, "--ratios", "0.1", *draw, *QUIET],
        "recover": ["recover", pruned, "--teacher", folder, *TRAIN],
        "dense": ["export", pruned, "--to", "dense"],
        "gguf": ["export", pruned, "--to", "gguf"],
        "plan": ["plan", scores, "--ratio", "0.1"],
        "profile": ["profile", folder, "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1"],
        "report": ["report", pruned],
    }


ALL = ["prune", "apply", "score", "compare", "recover", "dense", "gguf", "plan", "profile", "report"]


def held(out: Path) -> AbstractContextManager[int]:
    """A process that works on an output until it is killed."""
    return another_process(claimed(out, command="prunus something").__enter__)


# --- two at once ---


@pytest.mark.parametrize("name", ALL)
def test_the_second_of_two_runs_stops_at_once(capsys, tmp_path, commands, name, monkeypatch):
    for module, long in (*LOADING, ("prunus.evaluation.profiling", "profile")):
        monkeypatch.setattr(importlib.import_module(module), long, killed)
    out = tmp_path / "out"
    with held(out) as child:
        message = fails(capsys, *commands[name], "--out", out)
        assert f"{out} is being worked on by process {child} on " in message
        assert "(prunus something)" in message
        assert os.listdir(tmp_path) == [".out.lock"]


def test_two_runs_on_one_work_folder(capsys, tmp_path, commands):
    with held(tmp_path / "work") as child:
        for name in ("prune, streamed", "score", "recover"):
            work = ["--set", f"output.work={tmp_path / 'work'}"]
            message = fails(capsys, *commands[name], "--out", tmp_path / name, *work)
            assert f"work is being worked on by process {child}" in message
    assert os.listdir(tmp_path) == [".work.lock"]


def test_what_is_written_into_a_result(capsys, tmp_path, pruned, text):
    """Its report and its card are not written while another process replaces it."""
    out = shutil.copytree(pruned, tmp_path / "out")
    with held(out):
        assert "is being worked on" in fails(capsys, "report", out, "--overwrite")
        before = contents(out)
        status = main(["eval", str(out), "--text", str(text), "--windows", "1", "--seq-len", "16", "--update-card"])
        said = capsys.readouterr()
        assert status == 1
        assert "is being worked on" in said.err
        assert "perplexity" in said.out, "figures that could not be kept are shown"
        assert contents(out) == before


# --- killed between the result and the end ---


@pytest.mark.parametrize(
    ("name", "then"),
    [
        ("prune", "prunus.pipeline.prune.try_report"),
        ("prune, streamed", "prunus.pipeline.work_folder.WorkFolder.remove"),
        ("score", "prunus.pipeline.work_folder.WorkFolder.remove"),
        ("recover", "prunus.recovery.result.save_checkpoint"),
    ],
)
def test_the_same_command_does_what_was_left(capsys, tmp_path, commands, name, then, monkeypatch):
    words = [str(word) for word in commands[name]]
    run(capsys, *words, "--out", tmp_path / "straight" / "out")
    words += ["--out", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(then, killed_after(then) if name == "recover" else killed)
        with pytest.raises(Killed):
            main(words)
    saved = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert saved
    for module, long in LOADING:
        monkeypatch.setattr(importlib.import_module(module), long, killed)
    run(capsys, *words)
    assert all(path.stat().st_mtime_ns == written for path, written in saved.items()), "nothing is made twice"
    assert sorted(os.listdir(tmp_path)) == ["out", "straight"]
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "straight" / "out").keys()
    assert "not empty" in fails(capsys, *words), "a command that has ended is over"


def killed_after(name: str):
    place, _, attribute = name.rpartition(".")
    whole = getattr(sys.modules[place], attribute)

    def wrapper(*args, **options):
        whole(*args, **options)
        raise Killed

    return wrapper


# --- over inputs ---


def test_a_gguf_never_takes_the_place_of_weights(capsys, tmp_path, pruned):
    model = shutil.copytree(pruned, tmp_path / "model")
    before = contents(model)
    for name in ("model.safetensors", "config.json"):
        message = fails(capsys, "export", model, "--to", "gguf", "--out", model / name, "--overwrite")
        assert "is no earlier model.gguf" in message
    assert contents(model) == before
    for more in ([], ["--overwrite"]):
        run(capsys, "export", model, "--to", "gguf", "--out", model / "model.gguf", *more)


@pytest.mark.parametrize("name", ["gguf", "plan", "profile", "report"])
def test_no_file_of_another_kind_is_replaced(capsys, tmp_path, commands, name):
    out = tmp_path / "thesis.json"
    out.write_text('{"years": "of work"}')
    assert "exists; choose another --out, or replace it with --overwrite" in fails(
        capsys, *commands[name], "--out", out
    )
    assert "--overwrite replaces nothing else" in fails(capsys, *commands[name], "--out", out, "--overwrite")
    assert out.read_text() == '{"years": "of work"}'
    assert os.listdir(tmp_path) == ["thesis.json"]


@pytest.mark.parametrize("name", ["gguf", "plan", "report"])
def test_planted_links_are_not_followed(capsys, tmp_path, commands, name):
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "out.partial").symlink_to(tmp_path / "precious")
    (tmp_path / f".out.partial-{os.getpid()}").symlink_to(tmp_path / "precious")
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert "exists" in fails(capsys, *commands[name], "--out", tmp_path / "out")
    run(capsys, *commands[name], "--out", tmp_path / "out", "--overwrite")
    assert (tmp_path / "precious").read_text() == "years of work"
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("name", ["score", "compare"])
def test_overwrite_replaces_the_whole_folder(capsys, tmp_path, scores, folder, text, name):
    out = shutil.copytree(scores, tmp_path / "out")
    (out / "plans").mkdir()
    (out / "plans" / "old.json").write_text("{}")
    if name == "score":
        run(capsys, "score", folder, "--out", out, "--method", "magnitude", "--overwrite")
        assert sorted(os.listdir(out)) == ["groups.csv", "score.json"]
    else:
        words = [*RANDOM, "--ratios", "0.1", "--calibration", text, *SIZES, "--overwrite"]
        run(capsys, "compare", folder, "--out", out, *words)
        assert not {"groups.csv", "statistics.safetensors"} & set(os.listdir(out))
        assert os.listdir(out / "plans") == ["random-0.1-seed0.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_comparison_that_fails_leaves_no_folder_and_shows_its_rows(capsys, tmp_path, commands, monkeypatch, caplog):
    def fail(*args, **options):
        raise OSError("no more")

    monkeypatch.setattr("prunus.pipeline.compare.score_together", fail)
    assert "no more" in fails(capsys, *commands["compare"], "--out", tmp_path / "out")
    assert os.listdir(tmp_path) == ["out.work"]
    assert "recipe,ratio,seed,parameters,perplexity" in caplog.text
    assert "\ndense,0.0" in caplog.text


def test_a_plan_is_not_applied_over_itself(capsys, tmp_path, folder, pruned):
    out = shutil.copytree(pruned, tmp_path / "out")
    before = contents(out)
    message = fails(capsys, "apply", folder, out / "prunus" / "plan.json", "--out", out, "--overwrite")
    assert "plan.json, which is read here" in message
    assert contents(out) == before


# --- what comes after the result ---


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no"), KeyError("rows")])
def test_a_report_that_fails_does_not_take_the_run_with_it(capsys, tmp_path, commands, monkeypatch, caplog, error):
    def fail(*args):
        raise error

    monkeypatch.setattr("prunus.report.page.page", fail)
    run(capsys, *commands["prune"], "--out", tmp_path / "out")
    assert f"`prunus report {tmp_path / 'out'} --overwrite` makes it" in caplog.text
    monkeypatch.undo()
    run(capsys, "report", tmp_path / "out")


def test_a_library_that_dies_for_want_of_memory_dies_alone(capsys, tmp_path, pruned, caplog):
    """Under `ulimit -v` the JavaScript engine ends its process by a signal."""
    out = shutil.copytree(pruned, tmp_path / "out")
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    drawing_library.cache_clear()
    resource.setrlimit(resource.RLIMIT_AS, (max(size, 2**30), hard))
    try:
        run(capsys, "report", out, "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        drawing_library.cache_clear()
    assert "maybe for want of memory; `prunus report FOLDER --overwrite` makes the report again" in caplog.text
    assert (out / "report.html").read_text().rstrip().endswith("</html>")
    assert "javascript_bundle" in BUNDLE


@pytest.mark.parametrize("card", [b"---\nlicense: [unclosed\n---\n# Card\n", b"\xff\xfe\x00", None])
def test_a_card_that_cannot_be_read_is_refused_before_long_work(capsys, tmp_path, pruned, card, monkeypatch):
    out = shutil.copytree(pruned, tmp_path / "out")
    if card is not None:
        (out / "README.md").write_bytes(card)
    else:
        (out / "prunus" / "metrics.json").write_text("{")
    monkeypatch.setattr(importlib.import_module("prunus.evaluation.evaluate"), "evaluate", killed)
    message = fails(capsys, "eval", out, "--update-card")
    assert "cannot be read" in message or "is not JSON" in message
    assert message.count("\n") == 1 or card == b"---\nlicense: [unclosed\n---\n# Card\n"


def test_figures_are_shown_where_they_cannot_be_kept(capsys, tmp_path, pruned, text, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    out = shutil.copytree(pruned, tmp_path / "out")
    monkeypatch.setattr(importlib.import_module("prunus.results.result_folder"), "add_evaluation", full)
    words = ["eval", out, "--text", text, "--windows", "1", "--seq-len", "16", "--update-card", "--json"]
    assert main([str(word) for word in words]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["perplexity"] > 1
    assert "No space left on device" in said.err
