"""One way to write a file or a folder: whole, by one run at a time, and over nothing that is somebody's."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from forked import another_process

from prunus.errors import BusyError, CheckpointError, OptionError
from prunus.files.outputs import (
    REST_BYTES,
    check_disk,
    check_output,
    check_output_file,
    claimed,
    output_file,
    output_folder,
    whole_file,
)

# ruff: noqa: PT012 (what is raised at the end of a context is raised by the context)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and kills")


#: what a process holds until it is killed
HELD = ExitStack()


def write(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    (folder / "prunus").mkdir()
    (folder / "prunus" / "plan.json").write_text(text)


# --- two runs ---


def test_the_second_run_says_which_process_holds_it_and_a_kill_frees_it(tmp_path):
    out = tmp_path / "new" / "out"
    holding = claimed(out, command="prunus prune base --out out")
    with another_process(holding.__enter__) as child:
        with pytest.raises(BusyError, match=rf"process {child} on .*since 20.*\(prunus prune base --out out\)"):
            claimed(out).__enter__()
        with pytest.raises(BusyError):
            output_folder(out).__enter__()
    with claimed(out):
        assert os.listdir(tmp_path / "new") == [".out.lock"]
    assert os.listdir(tmp_path / "new") == []


def test_an_output_by_another_name(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with another_process(claimed(tmp_path / "real").__enter__), pytest.raises(BusyError):
        claimed(tmp_path / "link").__enter__()


def test_one_work_folder_for_two_outputs(tmp_path):
    first = claimed(tmp_path / "one", tmp_path / "work")
    with another_process(first.__enter__):
        with pytest.raises(BusyError, match="work is being worked on"):
            claimed(tmp_path / "two", tmp_path / "work").__enter__()
        with pytest.raises(BusyError):
            claimed(tmp_path / "work").__enter__()
        assert not (tmp_path / ".two.lock").exists(), "who may not begin holds nothing"
    for work in (tmp_path / "one", tmp_path / "one" / "work", tmp_path):
        with pytest.raises(OptionError, match="must not be the same"):
            claimed(tmp_path / "one", work).__enter__()


def test_threads_are_runs_of_their_own_and_nested_claims_are_not(tmp_path):
    found: list[BaseException] = []

    def run():
        try:
            claimed(tmp_path / "out").__enter__()
        except BusyError as error:
            found.append(error)

    with claimed(tmp_path / "out") as claim, claimed(tmp_path / "out") as same:
        assert same is claim
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert str(os.getpid()) in str(found[0])
    assert os.listdir(tmp_path) == []


def test_a_lock_of_somebody_else_is_not_written_over(tmp_path):
    (tmp_path / ".out.lock").write_text("my own notes")
    (tmp_path / ".other.lock").symlink_to(tmp_path / "precious")
    for name in ("out", "other"):
        with pytest.raises(CheckpointError, match="lock"):
            claimed(tmp_path / name).__enter__()
    assert (tmp_path / ".out.lock").read_text() == "my own notes"
    assert not (tmp_path / "precious").exists()


def test_folders_made_for_a_run_that_leaves_nothing_go_again(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "a" / "b" / "out"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_long_names(tmp_path):
    name = "é" * 125  # 250 bytes, of 255 that the disk takes
    with output_folder(tmp_path / name) as place:
        write(place, "new")
    assert os.listdir(tmp_path) == [name]


# --- what is complete stays ---


def test_a_folder_that_appeared_meanwhile_stays_and_ours_is_not_lost(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"has appeared .* the result is in .*out-2"), output_folder(out) as place:
        write(place, "ours")
        out.mkdir()
        (out / "config.json").write_text("theirs")
    assert (out / "config.json").read_text() == "theirs"
    assert (tmp_path / "out-2" / "config.json").read_text() == "ours"
    assert sorted(os.listdir(tmp_path)) == ["out", "out-2"]


def test_a_file_that_appeared_meanwhile_stays_and_ours_is_not_lost(tmp_path):
    out = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match=r"model-2\.gguf"), output_file(out, "model.gguf", b"GGUF") as place:
        place.write_bytes(b"GGUF ours")
        out.write_bytes(b"theirs")
    assert out.read_bytes() == b"theirs"
    assert (tmp_path / "model-2.gguf").read_bytes() == b"GGUF ours"
    assert sorted(os.listdir(tmp_path)) == ["model-2.gguf", "model.gguf"]


def test_a_folder_of_other_things_that_appeared_is_not_replaced_with_overwrite_either(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="nor an earlier output"), output_folder(out, overwrite=True) as place:
        write(place, "ours")
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    assert (out / "thesis.tex").read_text() == "years of work"


def test_a_whole_folder_is_replaced(tmp_path):
    out = tmp_path / "out"
    with output_folder(out) as place:
        write(place, "old")
        (place / "groups.csv").write_text("old")
    with output_folder(out, overwrite=True) as place:
        assert list(place.iterdir()) == []
        write(place, "new")
    assert sorted(os.listdir(out)) == ["config.json", "prunus"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt, OSError])
def test_an_exception_leaves_what_was_there(tmp_path, interrupted):
    out, file = tmp_path / "out", tmp_path / "plan.json"
    with output_folder(out) as place:
        write(place, "old")
    file.write_text("a plan")
    with pytest.raises(interrupted), output_folder(out, overwrite=True) as place:
        write(place, "new")
        raise interrupted
    with pytest.raises(interrupted), output_file(file, "plan.json", b"plan", overwrite=True) as place:
        place.write_text("half")
        raise interrupted
    assert (out / "config.json").read_text() == "old"
    assert file.read_text() == "a plan"
    assert sorted(os.listdir(tmp_path)) == ["out", "plan.json"]


# --- a kill between the result and the end ---


def result(out: Path, is_file: bool, asked: object, overwrite: bool = False) -> None:
    """A run that gets as far as its result; the caller kills it."""
    claim = HELD.enter_context(claimed(out, is_file=is_file, run=asked))
    claim.facts = {"tensors": 3}
    if is_file:
        with output_file(out, "plan.json", b"plan", overwrite=overwrite) as place:
            place.write_text("a plan")
    else:
        with output_folder(out, overwrite=overwrite) as place:
            write(place, "new")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("is_file", [False, True], ids=["folder", "file"])
def test_the_same_command_knows_its_own_result(tmp_path, is_file, overwrite):
    out = tmp_path / "out"
    if overwrite:
        with another_process(lambda: result(out, is_file, "earlier")):
            pass
    with another_process(lambda: result(out, is_file, ("prune", 0.2), overwrite)):
        pass
    assert sorted(os.listdir(tmp_path)) == [".out.lock", "out"]
    for asked, own in ((("prune", 0.3), False), (None, False)):
        state = (tmp_path / ".out.lock").read_text()
        with claimed(out, is_file=is_file, run=asked) as claim:
            assert claim.finished == own
        (tmp_path / ".out.lock").write_text(state)
    with pytest.raises(ZeroDivisionError), claimed(out, is_file=is_file, run=("prune", 0.2)) as claim:
        assert claim.finished
        assert claim.facts == {"tensors": 3}
        raise ZeroDivisionError  # what follows fails once more
    with claimed(out, is_file=is_file, run=("prune", 0.2)) as claim:
        assert claim.finished
    assert os.listdir(tmp_path) == ["out"]
    with claimed(out, is_file=is_file, run=("prune", 0.2)) as claim:
        assert not claim.finished, "a command that ended is over"


def test_a_result_that_somebody_replaced_is_not_our_own(tmp_path):
    out = tmp_path / "out"
    with another_process(lambda: result(out, False, "prune")):
        pass
    out.rename(tmp_path / "elsewhere")
    out.mkdir()
    with claimed(out, run="prune") as claim:
        assert not claim.finished


def test_killed_before_the_result_has_its_name(tmp_path):
    out = tmp_path / "out"

    def begin():
        HELD.enter_context(claimed(out, run="prune"))
        place = HELD.enter_context(output_folder(out))
        write(place, "half")

    with another_process(begin):
        pass
    (partial,) = tmp_path.glob(".out.partial-*")
    assert not out.exists()
    with claimed(out, run="prune") as claim:
        assert not claim.finished
        assert not partial.exists()


# --- links, and files of other kinds ---


def test_no_link_is_followed_that_is_not_ours(tmp_path):
    """Neither under the names that earlier versions used, nor at the end of the name itself."""
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    for name in ("plan.json.partial", "plan.json"):
        (tmp_path / name).symlink_to(precious)
    (tmp_path / "dangling.json").symlink_to(tmp_path / "not there yet")
    with whole_file(tmp_path / "plan.json") as place:
        assert not place.is_symlink()
        place.write_text("new")
    with output_file(tmp_path / "dangling.json", "plan.json", b"plan", overwrite=True) as place:
        place.write_text("a plan")
    assert precious.read_text() == "years of work"
    assert (tmp_path / "plan.json").read_text() == "new"
    assert not (tmp_path / "not there yet").exists()
    assert (tmp_path / "dangling.json").read_text() == "a plan"


def test_names_of_files_being_written_cannot_be_foreseen(tmp_path):
    names = set()
    for _ in range(3):
        with whole_file(tmp_path / "x") as place:
            names.add(place.name)
    assert len(names) == 3


def test_a_name_that_was_guessed_all_the_same_is_not_opened(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("years of work")
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    (tmp_path / ".x.partial-0000000000000000").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError):
        whole_file(tmp_path / "x").__enter__()
    assert (tmp_path / "precious").read_text() == "years of work"


def test_a_file_is_replaced_by_its_own_kind_only(tmp_path):
    for content, mark in ((b"GGUF...", b"GGUF"), (b"", b"GGUF")):
        (tmp_path / "old").write_bytes(content)
        with pytest.raises(OptionError, match="exists; choose another `out`, or replace it with `overwrite`"):
            check_output_file(tmp_path / "old", "model.gguf", mark)
        check_output_file(tmp_path / "old", "model.gguf", mark, overwrite=True)
    for content in (b"{}", b"x" * 5000 + b"GGUF"):
        (tmp_path / "old").write_bytes(content)
        with pytest.raises(OptionError, match=r"is no earlier model\.gguf"):
            check_output_file(tmp_path / "old", "model.gguf", b"GGUF", overwrite=True)
    with pytest.raises(OptionError, match=r"is a folder; `out` is the file to write, e\.g\. .*model\.gguf"):
        check_output_file(tmp_path, "model.gguf", b"GGUF", overwrite=True)


@pytest.mark.parametrize("read", ["plans/plan.json", "calibration.json"])
def test_a_folder_that_holds_an_input_is_not_replaced(tmp_path, read):
    with output_folder(tmp_path / "out") as place:
        write(place, "old")
        (place / read).parent.mkdir(exist_ok=True)
        (place / read).write_text("x")
    with pytest.raises(CheckpointError, match=r"is or holds .* which is read here"):
        check_output(tmp_path / "out", True, None, "c4", tmp_path / "out" / read)


def test_files_that_were_being_replaced_in_a_result_are_tidied_up(tmp_path):
    with output_folder(tmp_path / "out") as place:
        write(place, "new")
    left = [tmp_path / "out" / ".report.html.partial-0123456789abcdef"]
    left += [tmp_path / "out" / "prunus" / ".evaluation.json.partial-0123456789abcdef"]
    for path in left:
        path.write_text("half")
    with claimed(tmp_path / "out"):
        assert not any(path.exists() for path in left)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "prunus"]


def test_every_check_of_the_disk_asks_for_the_same(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": REST_BYTES + 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    check_disk(tmp_path / "out", 1000)
    with pytest.raises(CheckpointError, match="GB free"):
        check_disk(tmp_path / "out", 1001)
