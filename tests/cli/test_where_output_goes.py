"""Where results may be written: odd names, links, places that cannot be written to, and never over the model itself."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path

import pytest
from forked import forked
from plain import PLAIN, UNMEASURED
from tiny_folder import SIZES, fails, run

import prunus
from prunus.checkpoint import load_model
from prunus.cli import main
from prunus.errors import CheckpointError, OptionError
from prunus.files.outputs import check_output, whole_file
from prunus.pipeline.work_folder import WorkFolder

#: the quickest way to a pruned folder
QUICK = ["--ratio", "0.1", *PLAIN, "--method", "magnitude", *UNMEASURED]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commands(model: Path, out: Path, text: Path, plan: Path) -> dict[str, list]:
    """Every command that writes a folder."""
    return {
        "prune": ["prune", model, "--out", out, *QUICK],
        "apply": ["apply", model, plan, "--out", out],
        "score": ["score", model, "--out", out, "--method", "magnitude"],
        "compare": [
            "compare",
            model,
            "--recipes",
            "original",
            "--methods",
            "random",
            "--ratios",
            "0.1",
            "--out",
            out,
            "--calibration",
            text,
            *SIZES,
        ],
        "export": ["export", model, "--to", "dense", "--out", out],
    }


@pytest.fixture(scope="module")
def plan(folder, tmp_path_factory) -> Path:
    """A plan for the tiny model that keeps everything."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    prunus.Plan.keep_all(prunus.Geometry.of(load_model(folder)[0])).save(path)
    return path


# --- the model itself ---


@pytest.mark.parametrize("command", ["prune", "apply", "score", "compare", "export"])
@pytest.mark.parametrize("where", ["the same", "through a link", "around it"])
def test_a_model_is_never_replaced_by_its_own_result(capsys, tmp_path, folder, text, plan, command, where):
    # A folder named prunus is one of those that --overwrite may replace.
    model = shutil.copytree(folder, tmp_path / "models" / "prunus")
    before, out = contents(model), model
    if where == "through a link":
        (out := tmp_path / "link").symlink_to(model)
    if where == "around it":
        out = model.parent
    message = fails(capsys, *commands(model, out, text, plan)[command], "--overwrite")
    assert "is the folder of the model, or holds it" in message
    assert contents(model) == before
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["prunus"]


@pytest.mark.parametrize("key", ["calibration.source", "recovery.text", "evaluation.text", "evaluation.tasks"])
def test_what_a_result_is_made_from_is_never_replaced(capsys, tmp_path, folder, text, key):
    """Texts and tasks that somebody put beside an earlier result, under names that --overwrite takes for its own."""
    out = shutil.copytree(folder, tmp_path / "out")
    place = out / ("piqa.json" if key == "evaluation.tasks" else "README.md")
    place.write_text(Path(text).read_text(encoding="utf-8"), encoding="utf-8")
    value = f"[{place}]" if key == "evaluation.tasks" else place
    words = ["prune", folder, "--out", out, *QUICK, "--overwrite", "--set", f"{key}={value}"]
    if key == "recovery.text":
        words += ["--set", "recovery.tokens=1000"]
    message = fails(capsys, *words)
    assert f"{place.name}, which is read here" in message
    assert place.is_file()


def test_a_folder_inside_the_model_leaves_the_model_alone(capsys, tmp_path, folder):
    model = shutil.copytree(folder, tmp_path / "model")
    before = contents(model)
    run(capsys, "prune", model, "--out", model / "small", *QUICK)
    after = contents(model)
    assert {name: after[name] for name in before} == before
    assert load_model(model / "small")[0].num_parameters() < load_model(model)[0].num_parameters()


# --- names and links ---


@pytest.mark.parametrize(
    "name", ["with some spaces", "Größe 小さい モデル", "-q", "a'b\"c", "a\nb", "100%{x}[y]", ".hidden"]
)
def test_odd_names(capsys, tmp_path, folder, name):
    model, out = shutil.copytree(folder, tmp_path / "in" / name), tmp_path / "out" / name
    run(capsys, "prune", model, "--out", out, *QUICK)
    run(capsys, "inspect", out)
    load_model(out)
    assert os.listdir(tmp_path / "out") == [name]
    assert (out / "README.md").read_text(encoding="utf-8")


def test_names_that_are_no_utf_8(tmp_path):
    """As other systems leave them. The card holds the name, and safetensors opens no such file."""
    with pytest.raises(CheckpointError, match="cannot be created"):
        check_output(tmp_path / os.fsdecode(b"gro\xdf"))


def test_links(capsys, tmp_path, folder):
    """What a link leads to is written, and the link stays; also where nothing is there yet."""
    (tmp_path / "real").mkdir()
    for name, target in (("link", tmp_path / "real"), ("dangling", tmp_path / "not yet" / "there")):
        (tmp_path / name).symlink_to(target)
        for more in ([], ["--overwrite"]):
            run(capsys, "prune", folder, "--out", tmp_path / name, *QUICK, *more)
        assert (tmp_path / name).is_symlink()
        assert not target.is_symlink()
        load_model(target)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "link", "not yet", "real"]


def test_links_in_a_circle(capsys, tmp_path, folder):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert "cannot be created" in fails(capsys, "prune", folder, "--out", tmp_path / "a", *QUICK)


def test_a_link_is_not_followed_out_of_a_folder_that_is_replaced(capsys, tmp_path, folder):
    """--overwrite removes the old folder, and not what links in it lead to."""
    run(capsys, "prune", folder, "--out", tmp_path / "out", *QUICK)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "model.safetensors").write_text("years of work")
    (tmp_path / "out" / "plans").symlink_to(tmp_path / "precious")
    run(capsys, "prune", folder, "--out", tmp_path / "out", *QUICK, "--overwrite")
    assert (tmp_path / "precious" / "model.safetensors").read_text() == "years of work"


# --- places that cannot be written to ---


@pytest.mark.parametrize("command", ["prune", "apply", "score", "compare", "export"])
def test_a_file_in_the_way(capsys, tmp_path, folder, text, plan, command):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        message = fails(capsys, *commands(folder, out, text, plan)[command], "--overwrite")
        assert "is a file" in message or "is not a folder" in message
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/out"])
def test_names_that_cannot_be(capsys, tmp_path, folder, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "cannot be created" in fails(capsys, "prune", folder, "--out", name, *QUICK)
    assert os.listdir(tmp_path) == []


def become_nobody() -> None:
    """Give up privileges: root may write anywhere."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def open_to_all(tmp_path: Path) -> None:
    """Let everybody through to a test's own folder, which pytest makes for its user alone."""
    for path in (tmp_path, *tmp_path.parents):
        if path.is_relative_to(Path(os.environ.get("PYTEST_DEBUG_TEMPROOT", "/tmp"))) and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o111)


def test_a_parent_that_may_only_be_read(tmp_path):
    (tmp_path / "read-only").mkdir(mode=0o555)
    open_to_all(tmp_path)
    for name in ("out", "a/b/out"):

        def check(out=tmp_path / "read-only" / name):
            become_nobody()
            check_output(out)

        said = forked(check).err.splitlines()[-1]
        assert said.startswith("prunus.errors.CheckpointError: output folder")
        assert said.endswith(f"no permission to write in {tmp_path / 'read-only'}")
    assert os.listdir(tmp_path / "read-only") == []


def test_errors_of_the_system_are_one_line(capsys, tmp_path, scores):
    """A plan on a full disk: the system refuses to write beyond a size, as `ulimit -f` does."""
    out, (_, hard) = tmp_path / "plan.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        message = fails(capsys, "plan", scores, "--ratio", "0.1", "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert message.count("\n") == 1
    assert "File too large" in message
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def scores(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores"
    assert prunus.cli.main(["score", str(folder), "--out", str(path), "--method", "magnitude"]) == 0
    return path


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_reader_that_has_enough(folder, more):
    """`prunus inspect … | head -1`: no traceback when the pipe is closed."""

    def work():
        read, write = os.pipe()
        os.close(read)
        sys.stdout = os.fdopen(write, "w")
        return prunus.cli.main(["inspect", str(folder), *more])

    ended = forked(work)
    assert (ended.status, ended.err) == (1, "")


# --- one file ---


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as partial:
        partial.write_text("first")
        assert not path.exists()

    def interrupted():
        with whole_file(path) as partial:
            partial.write_text("second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["file"]


# --- the work folder ---


def test_a_work_folder_of_somebody_else_is_refused_before_anything_is_done(capsys, tmp_path, folder, text):
    """Its contents are removed at the end of a run: it must hold nothing but what prunus put there."""
    work = tmp_path / "data"
    (work / "round-1").mkdir(parents=True)
    (work / "round-1" / "results.csv").write_text("years of work")
    (work / "notes.txt").write_text("mine")
    words = ["score", folder, "--out", tmp_path / "out", "--calibration", text, *SIZES, "--set", "run.engine=streamed"]
    assert "holds notes.txt, which prunus did not put there" in fails(capsys, *words, "--set", f"output.work={work}")
    assert contents(work) == {"round-1/results.csv": b"years of work", "notes.txt": b"mine"}
    assert "is a file" in fails(capsys, *words, "--set", f"output.work={work / 'notes.txt'}")
    assert sorted(os.listdir(tmp_path)) == ["data"]


@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_a_killed_run_finds_its_own_work_folder_and_takes_it_away(capsys, tmp_path, folder, text, monkeypatch, engine):
    """With all that leaves anything there: the default recipe."""

    class Killed(BaseException):
        pass

    def killed(*args, **options):
        raise Killed

    words = [
        "prune",
        folder,
        "--ratio",
        "0.3",
        "--calibration",
        text,
        *SIZES,
        "--set",
        "evaluation.held_out=0",
        "--set",
        "output.report=false",
    ]
    words += ["--set", f"run.engine={engine}"]
    run(capsys, *words, "--out", tmp_path / "straight")
    words += ["--out", tmp_path / "out", "--set", f"output.work={tmp_path / 'work'}"]
    with monkeypatch.context() as patched:
        patched.setattr("prunus.pipeline.prune.save_result", killed)
        with pytest.raises(Killed):
            main([str(word) for word in words])
    left = os.listdir(tmp_path / "work")
    assert {"round-1", "round-2"} <= set(left)
    run(capsys, *words)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out", "straight"]


def test_a_work_folder_that_is_empty_or_was_used_before_is_taken(tmp_path):
    for name in ("round-1", "statistics-backward", "prunus-layers-x1"):
        (tmp_path / "work" / name).mkdir(parents=True)
    folder = WorkFolder(tmp_path / "out", tmp_path / "work")
    folder.remove()
    assert os.listdir(tmp_path) == []
    (tmp_path / "out.work").write_text("mine")
    with pytest.raises(OptionError, match=r"out\.work is a file"):
        WorkFolder(tmp_path / "out")
