"""Every file and folder that a command leaves behind: not there or complete, and never written by two runs at once.

    out                       what was there before, or nothing, until the last moment
    .out.lock                 while a run works on `out`: which one
    .out.partial-<random>     being written
    .out.replaced-<random>    with `overwrite`: the old folder, between the two renames and its deletion

The lock is the system's and ends with its process. A run that is killed leaves hidden names behind; the next one that
gets the lock knows that nobody works on them any more, removes them, and puts the old folder back if the killed run was
between the renames. From the lock's own file it knows whether the same command had come as far as its result, so that
only what follows is left to do.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunus.errors import BusyError, CheckpointError, OptionError
from prunus.files.json_file import read_json_if_whole
from prunus.files.user_path import expanded
from prunus.machine.processes import is_first

__all__ = [
    "REST_BYTES",
    "Claim",
    "check_disk",
    "check_inputs",
    "check_output",
    "check_output_file",
    "claimed",
    "output_file",
    "output_folder",
    "whole_file",
]

logger = logging.getLogger(__name__)

#: what a folder that may be replaced can hold; anything else in it is somebody's, and stops the run
OUTPUT_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "*.md"),
    *(
        "vocab.txt",
        "merges.txt",
        "plan.json",
        "*.csv",
        "*.png",
        "*.svg",
        "report.html",
        "LICENSE*",
        "NOTICE*",
        ".gitattributes",
    ),
    *("prunus", "plans", "chat_templates", "additional_chat_templates", "__pycache__", ".cache", ".DS_Store"),
)
#: a folder without any of these is not an earlier output, whatever else it holds
OUTPUT_MARKERS = ("config.json", "plan.json", "groups.csv", "comparison.csv", "prunus")
#: room for tokenizer, card and tables, added to the weights
REST_BYTES = 64 * 2**20
#: a file that may be replaced has its kind's mark within so many bytes
MARKED_BYTES = 4096
#: names of files that were being written
PARTIAL_FILE = re.compile(r"\..+\.partial-[0-9a-f]{16}")
#: names that are longer than this, in bytes, stand as a hash in hidden names, which must not be too long for the disk
LONGEST_NAME = 180


@dataclass
class Claim:
    """The right of one run to write an output.

    Attributes:
        path: of the output, links followed.
        finished: whether `path` is the result of the same command, given before and killed between that and its end.
        facts: plain values that the run wants to have again if it is killed then.
    """

    path: Path
    finished: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    _record: dict[str, Any] = field(default_factory=dict)
    _lock: Path | None = None

    def settle(self, complete: Path) -> None:
        """Note that what lies at `complete` is about to take its place as the result."""
        self._record |= {"result": _identity(complete), "facts": dict(self.facts)}
        self._write()

    def _write(self) -> None:
        if self._lock is not None:
            self._lock.write_text(json.dumps(self._record), encoding="utf-8")


_held: ContextVar[Mapping[Path, Claim]] = ContextVar("held", default={})  # noqa: B039 (never changed in place)


@contextmanager
def claimed(
    out: str | os.PathLike[str],
    work: Path | None = None,
    *,
    is_file: bool = False,
    run: object = None,
    command: str | None = None,
) -> Iterator[Claim]:
    """Keep every other run away from an output, and tidy up after one that was killed.

    Within the context of a claim, one for the same output is the same. Of several processes that share out one job, the
    first one claims.

    Args:
        out: the file or folder that will be written.
        work: the folder for what a killed run goes on from.
        is_file: whether the output is a file, whose name is taken as it is: a link of that name is not followed.
        run: what was asked for: everything that the result depends on, as a value whose `repr` says all.
        command: for the one who reads that the output is taken.

    Raises:
        BusyError: another process has claimed `out` or `work`.
        CheckpointError: a lock cannot be made there.
        OptionError: `work` and `out` are the same, or one lies in the other.
    """
    target = place_of(out, follow=not is_file)
    held = _held.get()
    if target in held:
        yield held[target]
        return
    if not is_first():
        yield Claim(target)
        return
    if not target.is_dir():
        _check_parent(target, f"output {out}" if is_file else f"output folder {out}")
    with ExitStack() as stack:
        asked = hashlib.sha256(repr(run).encode("utf-8", "replace")).hexdigest() if run is not None else None
        claim = stack.enter_context(_locked(target, asked, command))
        claims = {target: claim}
        if work is not None:
            folder = place_of(work)
            if folder == target or folder in target.parents or target in folder.parents:
                raise OptionError(f"work folder {work} and output {out} must not be the same, nor one in the other")
            claims[folder] = stack.enter_context(_locked(folder, None, command))
        token = _held.set({**held, **claims})
        try:
            yield claim
        finally:
            _held.reset(token)


@contextmanager
def output_folder(
    out: str | os.PathLike[str], *inputs: str | os.PathLike[str], overwrite: bool = False
) -> Iterator[Path]:
    """A place to write a folder at, which becomes `out` once the context ends without an error.

    It is flushed to the disk before it gets its name.

    Args:
        out: the folder; what is there stays as it is until the last moment.
        inputs: see `check_output`.
        overwrite: replace an earlier output as a whole.

    Yields:
        An empty folder beside `out`.

    Raises:
        CheckpointError: `out` may not be written, see `check_output`; or, at the end, something else has appeared
            there, and the new folder was left beside it.
    """
    with claimed(out) as claim:
        check_output(out, overwrite, *inputs)
        claim.path.parent.mkdir(parents=True, exist_ok=True)
        partial = _hidden(claim.path, "partial")
        partial.mkdir()
        try:
            yield partial
            _flush(partial)
            claim.settle(partial)
            _move_into_place(partial, claim.path, out, overwrite)
        except BaseException:
            # Ctrl-C too. Only kill -9 and power failure skip this, and then the next run tidies up.
            _remove(partial)
            raise


@contextmanager
def output_file(out: str | os.PathLike[str], what: str, mark: bytes, *, overwrite: bool = False) -> Iterator[Path]:
    """A place to write a file at, which becomes `out` once the context ends without an error.

    Args:
        out: the file. A link of this name is replaced, not followed.
        what: see `check_output_file`, like the next one.
        mark: of this kind of file.
        overwrite: replace an earlier file of this kind.

    Yields:
        An empty file beside `out`.

    Raises:
        OptionError: `out` may not be written, see `check_output_file`.
        CheckpointError: at the end, something else has appeared there, and the new file was left beside it.
    """
    with claimed(out, is_file=True) as claim:
        check_output_file(out, what, mark, overwrite)
        claim.path.parent.mkdir(parents=True, exist_ok=True)
        partial = _new_file(claim.path)
        try:
            yield partial
            _fsync(partial)
            claim.settle(partial)
            _put_into_place(partial, claim.path, out, overwrite)
        except BaseException:
            _remove(partial)
            raise


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A place to write a file at that is a part of something: it takes the place of `path` at the end.

    For files in a folder that this run has claimed or made, and for callers who replace their own files.
    """
    path = Path(path)
    partial = _new_file(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_output(out: str | os.PathLike[str], overwrite: bool = False, *inputs: str | os.PathLike[str] | None) -> None:
    """Refuse an output folder that could not be written, before any long work.

    Args:
        out: where a folder will be written.
        overwrite: whether a folder that is there already may be replaced. Only one that holds nothing but the files of
            a model or of an earlier prunus run ever is.
        inputs: what the result is made from: folders and files, which are never replaced, or the name of a model.

    Raises:
        CheckpointError: `out` is a file, is or holds the current or home directory or an input, is not empty, or
            cannot be created.
    """
    target = place_of(out)
    check_inputs(out, *inputs)
    for place, what in ((_current(), "the current directory"), (_home(), "your home directory")):
        if place is not None and (target == place or target in place.parents):
            raise CheckpointError(f"output {out} is {what} or holds it; name a new folder inside it")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"output {out} is a file; name a folder that does not exist yet")
    entries = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    foreign = [name for name in entries if not any(fnmatch.fnmatch(name, known) for known in OUTPUT_FILES)]
    if foreign or (entries and not any(name in OUTPUT_MARKERS for name in entries)):
        raise CheckpointError(
            f"output folder {out} is not empty, nor an earlier output: it holds {_some(foreign or entries)}. "
            "`overwrite` replaces nothing but model folders; remove it yourself, or choose another"
        )
    if entries and not overwrite:
        raise CheckpointError(
            f"output folder {out} is not empty (it holds {_some(entries)}); choose another, or replace "
            "it with `overwrite`"
        )
    _check_parent(target, f"output folder {out}")


def check_inputs(out: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Refuse an output folder that is, or holds, something that is read to make it.

    Raises:
        CheckpointError: it does.
    """
    target = place_of(out)
    for source in _existing(inputs):
        if target == source or target in source.parents:
            if source.is_dir():
                raise CheckpointError(f"output {out} is the folder of the model, or holds it; name another folder")
            raise CheckpointError(f"output {out} is or holds {source}, which is read here; name another folder")


def check_output_file(out: str | os.PathLike[str], what: str, mark: bytes, overwrite: bool = False) -> None:
    """Refuse an output file that could not be written, before any long work.

    Nothing but a file of the same kind is ever replaced, so that no input is.

    Args:
        out: the file.
        what: its kind, which is also the suggested name, such as `plan.json`.
        mark: bytes that every file of this kind has near its beginning.
        overwrite: whether a file that is there already may be replaced, if it is of this kind (or empty).

    Raises:
        OptionError: `out` is a folder, another kind of file, or there without `overwrite`.
    """
    path = expanded(out)
    if path.is_dir():
        raise OptionError(f"{out} is a folder; `out` is the file to write, e.g. {path / what}")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OptionError(f"{out} exists; choose another `out`, or replace it with `overwrite`")
    if not path.is_file():
        return  # a link that leads nowhere, which is replaced
    with path.open("rb") as file:
        start = file.read(MARKED_BYTES)
    if start and mark not in start:
        raise OptionError(f"{out} is no earlier {what}, and `overwrite` replaces nothing else; choose another `out`")


def check_disk(out: str | os.PathLike[str], expected_bytes: int) -> None:
    """Refuse an output on a disk without room for `expected_bytes` of weights, and what comes with them.

    Raises:
        CheckpointError: too little is free.
    """
    parent, needed = _existing_parent(place_of(out)), expected_bytes + REST_BYTES
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"the disk of {parent} has {free / 1e9:.2f} GB free, the output needs about {needed / 1e9:.2f} GB; free "
            "some space or choose another output folder"
        )


def place_of(out: str | os.PathLike[str], follow: bool = True) -> Path:
    """Where an output will be.

    Args:
        out: its name.
        follow: whether the folder behind a link is meant, and not the link.

    Raises:
        CheckpointError: no file can have this name.
    """
    try:
        path = expanded(out)
        target = path.resolve() if follow else path.parent.resolve() / path.name
        target.exists()
        str(target).encode()
    except (OSError, RuntimeError, UnicodeError) as error:  # too long, links in a circle, nobody's home, not UTF-8
        raise CheckpointError(f"output {str(out)!r} cannot be created: {error}") from error
    return target


# --- locks ---


@contextmanager
def _locked(target: Path, asked: str | None, command: str | None) -> Iterator[Claim]:
    made: list[Path] = []
    try:
        lock, path = _acquire(target, made)
        try:
            earlier, claim = _earlier(path), Claim(target, _lock=path)
            try:
                _tidy(target)
                claim._record = {
                    "process": os.getpid(),
                    "host": platform.node(),
                    "since": datetime.now().astimezone().isoformat(timespec="seconds"),
                    "command": command,
                    "asked": asked,
                }
                if asked is not None and earlier.get("asked") == asked and _is_at(earlier, target):
                    claim.finished, claim.facts = True, earlier.get("facts") or {}
                    claim._record |= {"result": earlier["result"], "facts": claim.facts}
                claim._write()
                yield claim
            except BaseException:
                # Of a result that is in its place the record must stay, for the same command to go on from.
                if asked is None or not _is_at(claim._record, target):
                    path.unlink(missing_ok=True)
                raise
            path.unlink(missing_ok=True)
        finally:
            lock.release()
    finally:
        for parent in reversed(made):
            with suppress(OSError):  # not empty: there is a result in it
                parent.rmdir()


def _acquire(target: Path, made: list[Path]) -> tuple[FileLock, Path]:
    """A lock, its file, and the folders made for it.

    The holder deletes the file before it lets go; filelock takes no lock on a file that has no name any more.
    """
    for _ in range(10):  # a folder that another run had made, and is just taking away
        with suppress(FileNotFoundError):
            try:
                for parent in [parent for parent in reversed(target.parents) if not parent.exists()]:
                    parent.mkdir(exist_ok=True)
                    made.append(parent)
                path = _lock_path(target)
                lock = FileLock(path)
                lock.acquire(blocking=False)
            except Timeout:
                raise BusyError(_busy(target, read_json_if_whole(path) or {})) from None
            except FileNotFoundError:
                raise
            except OSError as error:
                raise CheckpointError(f"{target} cannot be locked: {error}") from error
            return lock, path
    raise CheckpointError(f"{target} cannot be locked: {target.parent} comes and goes; choose another output")


def _lock_path(target: Path) -> Path:
    if target.is_dir() and not os.access(target.parent, os.W_OK | os.X_OK):
        return target / ".prunus.lock"  # files in it may be written, but it cannot be replaced
    return target.with_name(f".{_short(target.name)}.lock")


def _earlier(lock: Path) -> dict[str, Any]:
    """What a killed run left in the file of a lock that is now ours; no file of somebody else is written over."""
    text = lock.read_text(encoding="utf-8", errors="replace") if lock.is_file() and not lock.is_symlink() else "?"
    if text and not text.startswith('{"process": '):
        raise CheckpointError(f"{lock} is not a lock of prunus; move it away, or choose another output")
    return read_json_if_whole(lock) or {}


def _is_at(record: Mapping[str, Any], target: Path) -> bool:
    """Whether what lies there is the result that a record speaks of."""
    return "result" in record and os.path.lexists(target) and record["result"] == _identity(target)


def _busy(target: Path, holder: Mapping[str, Any]) -> str:
    who = "another process"
    if "process" in holder:
        who = f"process {holder['process']} on {holder.get('host')}, since {holder.get('since')}"
        who += f" ({holder['command']})" if holder.get("command") else ""
    return f"{target} is being worked on by {who}. Wait for it or stop it, or choose another place"


def _tidy(target: Path) -> None:
    """Remove what runs that were killed while writing `target` left behind; bring back a folder they had moved away."""
    pattern = re.compile(rf"\.{re.escape(_short(target.name))}\.(partial|replaced)-[0-9a-f]{{16}}")
    found: list[tuple[Path, str]] = []
    with suppress(PermissionError):
        found = [(entry, match[1]) for entry in target.parent.iterdir() if (match := pattern.fullmatch(entry.name))]
    for folder in (target, target / "prunus"):  # files that were being replaced in a folder that stays
        if folder.is_dir() and not folder.is_symlink():
            found += [(entry, "partial") for entry in folder.iterdir() if PARTIAL_FILE.fullmatch(entry.name)]
    for entry, state in found:
        if state == "replaced" and not os.path.lexists(target):
            logger.warning("putting back %s: a run was killed while it replaced this folder", target)
            entry.rename(target)
        else:
            logger.warning("removing %s, left by a run that was killed", entry)
            _remove(entry)


def _identity(path: Path) -> list[int]:
    """What stays the same when a file or folder gets another name, and no other has."""
    status = path.lstat()
    return [status.st_dev, status.st_ino]


# --- names ---


def _short(name: str) -> str:
    data = os.fsencode(name)
    return name if len(data) <= LONGEST_NAME else hashlib.sha256(data).hexdigest()[:32]


def _hidden(target: Path, state: str) -> Path:
    """A name that nobody can have put anything at."""
    return target.with_name(f".{_short(target.name)}.{state}-{secrets.token_hex(8)}")


def _new_file(path: Path) -> Path:
    partial = _hidden(path, "partial")
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return partial


def _existing(inputs: tuple[str | os.PathLike[str] | None, ...]) -> list[Path]:
    """The files and folders among the inputs; others are names of models, or of texts that come with Python."""
    found = []
    for name in inputs:
        with suppress(OSError, RuntimeError, ValueError):
            if name is not None and os.fspath(name) and (path := expanded(name)).exists():
                found.append(path.resolve())
                if path.is_dir():
                    found += [entry.resolve() for entry in path.iterdir() if entry.is_file()]
    return found


def _current() -> Path | None:
    with suppress(OSError):
        return Path.cwd().resolve()
    return None


def _home() -> Path | None:
    with suppress(OSError, RuntimeError):  # a user whom the system does not know
        return Path.home().resolve()
    return None


def _check_parent(target: Path, what: str) -> None:
    parent = _existing_parent(target)
    if not parent.is_dir():
        raise CheckpointError(f"{what} cannot be created: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{what} cannot be created: no permission to write in {parent}")


def _existing_parent(target: Path) -> Path:
    return next(parent for parent in target.parents if parent.exists())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- into place ---


def _move_into_place(partial: Path, target: Path, out: str | os.PathLike[str], overwrite: bool) -> None:
    replaced = None
    if overwrite and target.is_dir() and any(target.iterdir()):
        check_output(out, overwrite)  # it may have become another one since
        replaced = _hidden(target, "replaced")
        target.rename(replaced)
    try:
        partial.rename(target)  # the system renames onto nothing but an empty folder
    except BaseException as error:
        if replaced is not None:
            replaced.rename(target)
        elif isinstance(error, OSError) and os.path.lexists(target):
            raise CheckpointError(_beside(partial, target)) from error
        raise
    _fsync(target.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _put_into_place(partial: Path, target: Path, out: str | os.PathLike[str], overwrite: bool) -> None:
    if overwrite:
        partial.replace(target)
        return
    try:
        os.link(partial, target)  # which, other than a rename, never replaces anything
    except OSError as error:
        if os.path.lexists(target):
            raise CheckpointError(_beside(partial, target)) from error
        partial.rename(target)  # a disk without links
        return
    partial.unlink()


def _beside(partial: Path, target: Path) -> str:
    """Give a result another name than the one that is taken; what to say about it."""
    name = next(
        path
        for number in range(2, 10**6)
        if not os.path.lexists(path := target.with_name(f"{target.stem}-{number}{target.suffix}"))
    )
    partial.rename(name)
    return f"{target} has appeared while the result was made, and stays as it is: the result is in {name}"


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with suppress(OSError):
            entry.unlink()


def _flush(folder: Path) -> None:
    """Have the disk hold every file before the rename can; give all files the mode that this folder implies."""
    mode = folder.stat().st_mode & 0o666  # safetensors writes files that only the owner can read
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(mode)
            _fsync(path)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _fsync(path)


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
