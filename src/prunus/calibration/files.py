"""Calibration text out of files: text, JSON lines and parquet.

Files may be far larger than memory. Each reader yields text in an order drawn with the seed and reads only as far as
its caller takes it, a slice of the file at a time from places all over it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.columns import Column, no_column
from prunus.errors import CalibrationError

__all__ = ["TEXT_KINDS", "json_documents", "parquet_documents", "text_readings"]

#: what a file's extension says it holds
TEXT_KINDS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}

#: A text file up to this size is tokenised whole, a larger one in passages from all over it.
_WHOLE_TEXT_BYTES = 4 * 2**20
#: The passages that are tried first: enough for a window of most text. What takes more gets longer ones.
_FIRST_BYTES_PER_TOKEN = 8
#: JSON lines that start within one slice are read together.
_SLICE_BYTES = 4096
#: Keeps the permutation of slices small for a file of any size.
_MOST_SLICES = 2**20
#: A parquet row group larger than this is read in parts.
_ROW_GROUP_BYTES = 256 * 2**20
_JSON_ARRAY_BYTES = 256 * 2**20


def text_readings(path: Path, *, samples: int, seq_len: int, seed: int) -> Iterator[tuple[Iterator[str], int | None]]:
    """Ways of reading a text file for windows of so many tokens, each in passages twice as long as the one before.

    How much text makes a window depends on language and tokenizer: the caller goes on to the next way where too many
    passages were too short for one.

    Args:
        path: a UTF-8 text file.
        samples: how many windows will be cut.
        seq_len: tokens in each.
        seed: decides the order of passages.

    Yields:
        Non-overlapping passages in an order drawn with the seed, and how many windows to cut from each: one from many
        places of a large file; at last, and of a small file at once, any number (None) from the whole text.

    Raises:
        CalibrationError: the file is not UTF-8 (while iterating over passages).
    """
    size = path.stat().st_size
    passage = max(1024, _FIRST_BYTES_PER_TOKEN * seq_len)
    while size > max(_WHOLE_TEXT_BYTES, 2 * samples * passage):
        yield _passages(path, size, passage, seed), 1
        passage *= 2
    yield iter([_decode(path, path.read_bytes(), 0).removeprefix("\ufeff")]), None


def json_documents(path: Path, *, column: Column, seed: int) -> Iterator[str]:
    """The documents of a file with one JSON object per line (or one array of objects), shuffled with the seed.

    Lines are read together with their neighbours in the file, a few kilobytes at a time.

    Raises:
        CalibrationError: before anything is read in bulk if the first line has no such column; while iterating if a
            line is not a JSON object with what belongs in that column.
    """
    with path.open("rb") as file:
        head = next((line for line in file if line.strip()), b"")
    if head.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        return _array_documents(path, column, seed)
    if head:
        _document_of_line(path, head, 0, column)
    return _line_documents(path, column, seed)


def parquet_documents(path: Path, *, column: Column, seed: int) -> Iterator[str]:
    """The documents of a parquet file, row groups and the rows in each shuffled with the seed.

    Raises:
        CalibrationError: the file is not parquet, or has no such column; while iterating if a row holds something else
            in it.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path} is not a readable parquet file: {error}") from error
    if column.name not in file.schema_arrow.names:
        raise no_column(path, column, file.schema_arrow.names)
    return _row_documents(path, file, column, seed)


def _passages(path: Path, size: int, passage: int, seed: int) -> Iterator[str]:
    with path.open("rb") as file:
        # Passages that lie apart where the file is large enough, so that their number stays small.
        stride = max(passage, size // _MOST_SLICES)
        for number in _permutation(size // stride, seed):
            start = number * stride
            file.seek(start)
            # A slice may begin and end inside a character, and inside a word.
            raw = file.read(passage)
            while raw and raw[0] & 0xC0 == 0x80:
                raw = raw[1:]
            text = _decode(path, raw, start, cut_off=True)
            words = text.split(None, 1) if start and text[:1].strip() else ["", text]
            yield words[-1].removeprefix("\ufeff")


def _decode(path: Path, raw: bytes, start: int, cut_off: bool = False) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last character of a slice may be incomplete; anything else is not UTF-8.
        if cut_off and error.start >= len(raw) - 3:
            return raw[: error.start].decode("utf-8")
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {start + error.start}). Convert it to UTF-8 first."
        ) from error


def _line_documents(path: Path, column: Column, seed: int) -> Iterator[str]:
    size = path.stat().st_size
    step = max(_SLICE_BYTES, -(-size // _MOST_SLICES))
    generator = torch.Generator().manual_seed(seed)
    with path.open("rb") as file:
        for number in _permutation(-(-size // step), seed):
            # A line belongs to the slice that its first byte is in. Only the slice is searched for line ends: a line
            # may be as long as the file, and would be read again for every slice.
            start, stop = number * step, min((number + 1) * step, size)
            file.seek(max(start - 1, 0))
            ends = [match.end() for match in re.finditer(b"\n", file.read(stop - 1 - max(start - 1, 0)))]
            positions = [0, *ends] if start == 0 else [start - 1 + end for end in ends]
            for index in torch.randperm(len(positions), generator=generator).tolist():
                file.seek(positions[index])
                line = file.readline()
                if line.strip():
                    yield _document_of_line(path, line, positions[index], column)


def _document_of_line(path: Path, line: bytes, position: int, column: Column) -> str:
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{path}, line {_line_number(path, position)} is not JSON: {error}. Give one JSON object per line."
        ) from error
    return _document_of_record(record, column, path, lambda: f"{path}, line {_line_number(path, position)}")


def _document_of_record(record: Any, column: Column, path: Path, where: Callable[[], str]) -> str:
    if not isinstance(record, dict):
        raise CalibrationError(
            f"{where()} holds a {type(record).__name__}, not a JSON object with the column {column.name!r}"
        )
    if column.name not in record:
        raise no_column(where(), column, list(record))
    return column.text_of(record, where)


def _array_documents(path: Path, column: Column, seed: int) -> Iterator[str]:
    if (size := path.stat().st_size) > _JSON_ARRAY_BYTES:
        raise CalibrationError(
            f"{path} is one JSON array of {size:,} bytes, which has to be read whole; "
            "convert it to JSON lines (one object per line)"
        )
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is not JSON: {error}") from error
    return _record_documents(records, path, column, seed)


def _record_documents(records: list[Any], path: Path, column: Column, seed: int) -> Iterator[str]:
    for index in _permutation(len(records), seed):
        yield _document_of_record(records[index], column, path, functools.partial("{}, item {}".format, path, index))


def _row_documents(path: Path, file: Any, column: Column, seed: int) -> Iterator[str]:
    generator = torch.Generator().manual_seed(seed)
    names = column.needed(file.schema_arrow.names)
    for group in _permutation(file.num_row_groups, seed):
        metadata = file.metadata.row_group(group)
        chunks = (metadata.column(index) for index in range(metadata.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in names)
        parts = -(-size // _ROW_GROUP_BYTES)
        rows = max(1, metadata.num_rows // max(1, parts))
        for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=names):
            for index in torch.randperm(batch.num_rows, generator=generator).tolist():
                (record,) = batch.slice(index, 1).to_pylist()
                yield column.text_of(record, functools.partial("{}, a row of row group {}".format, path, group))


def _permutation(length: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _line_number(path: Path, position: int) -> int:
    """Only for error messages: reads the file up to there."""
    lines, left = 1, position
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(left, 2**20))):
            lines += part.count(b"\n")
            left -= len(part)
    return lines
