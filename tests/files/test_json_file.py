"""JSON is read by one function, which refuses what other programs would read otherwise, and names what is wrong."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from prunus.errors import CheckpointError, PlanError
from prunus.files.json_file import MOST_BYTES, Count, FileContent, Number, check_content, parse_json, read_json


class _Inner(FileContent):
    share: Number


class _Content(FileContent):
    widths: list[Count]
    inner: _Inner | None = None


REFUSED = {
    "cut off": (b'{"a": 1', "is not JSON"),
    "nothing": (b"", "is not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), r"not UTF-8 \(byte 7\)"),
    "NaN": (b'{"a": NaN}', "holds NaN, which is no number"),
    "infinity": (b'{"a": -Infinity}', "holds -Infinity, which is no number"),
    "infinity in digits": (b'{"a": 1e999}', "holds 1e999, which is beyond floating point"),
    "a key twice": (b'{"x": {"a": 1, "b": 2, "a": 3}}', "the key 'a' stands twice"),
    "half a pair": (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    "half a pair in a key": (b'{"\\udc00": 1}', "half of a surrogate pair"),
    "deep": (b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}", "nested more than 100 deep"),
    "deeper than Python": (b"[" * 100_000, "nested more than 100 deep"),
    "thousands of digits": (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read"),
    "an array": (b"[1]", "does not hold a JSON object, but a JSON array"),
    "null": (b"null", "does not hold a JSON object, but a null"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tmp_path, content, message):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message) as caught:
        read_json(path, error=PlanError)
    assert str(path) in str(caught.value)


def test_what_is_read(tmp_path):
    path = tmp_path / "file.json"
    values = {"a": [1, 2.5, None, True, "é😀"], "b": {"a": 10**30}, "c": json.loads("[" * 90 + "]" * 90)}
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8-sig")  # as Windows' editor saves it
    assert read_json(path) == values
    path.write_text(json.dumps(values))  # characters as escapes: whole pairs
    assert read_json(path) == values


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.json cannot be read: No such file"):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(CheckpointError, match="is a folder; name a JSON file"):
        read_json(tmp_path)
    with pytest.raises(CheckpointError, match="no ordinary file"):
        read_json(Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="no ordinary file"):
        read_json(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "a\x00b")


def test_a_file_of_any_size_takes_no_more_memory_than_the_limit(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no room on the disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="more than 64 MiB"):
        read_json(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4 * MOST_BYTES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "widths is missing"),
        ({"widths": 3}, "widths is 3; it must be an array"),
        ({"widths": [1, "2"]}, 'widths.1 is "2"; it must be a whole number'),
        ({"widths": [1, 2.0]}, "widths.1 is 2.0; it must be a whole number"),
        ({"widths": [True]}, "widths.0 is true; it must be a whole number"),
        ({"widths": [-1]}, "widths.0 is -1; it must be greater than or equal to 0"),
        ({"widths": [2**63]}, "widths.0 is 9223372036854775808; it must be less than"),
        ({"widths": [10**400]}, "widths.0 is 1000.*…; it must be"),
        ({"widths": [], "inner": {"share": "0.5"}}, 'inner.share is "0.5"; it must be a number'),
        ({"widths": [], "inner": {"share": 10**400}}, "inner.share is 1000"),
        ({"widths": [], "inner": {"share": float("nan")}}, "inner.share is NaN; it must be a finite number"),
        ({"widths": [], "inner": [1]}, "inner is an array of 1; it must be an object"),
        ({"widths": [-1, -2], "inner": 7}, r"widths.0 is -1; .*\(2 more faults\)"),
    ],
    ids=repr,
)
def test_content_that_cannot_be(values, message):
    with pytest.raises(PlanError, match=rf"^some\.json: {message}"):
        check_content(_Content, values, "some.json", PlanError)


def test_fields_that_nobody_reads_are_left_alone():
    checked = check_content(_Content, {"widths": [1], "note": {"by": "me"}, "inner": {"share": 1}}, "some.json")
    assert checked.widths == [1]
    assert checked.inner is not None
    assert checked.inner.share == 1.0


def test_lines_of_a_file():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "file, line 1") == {"a": 1}
    with pytest.raises(CheckpointError, match=r"^file, line 7 is not JSON"):
        parse_json("{", "file, line 7")
