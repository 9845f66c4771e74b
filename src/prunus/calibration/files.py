"""Calibration text out of files: text, JSON lines and parquet.

Files may be far larger than memory. Each reader yields text in an order drawn with the seed and reads only as far as
its caller takes it, a slice of the file at a time from places all over it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from prunus.errors import CalibrationError

__all__ = ["TEXT_KINDS", "json_documents", "parquet_documents", "text_passages"]

#: what a file's extension says it holds
TEXT_KINDS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}

#: A text file up to this size is tokenised whole, a larger one in passages from all over it.
_WHOLE_TEXT_BYTES = 4 * 2**20
#: Enough text for one window: no language takes more bytes per token over a whole passage.
_BYTES_PER_TOKEN = 8
#: JSON lines that start within one slice are read together.
_SLICE_BYTES = 4096
#: Keeps the permutation of slices small for a file of any size.
_MOST_SLICES = 2**20
#: A parquet row group larger than this is read in parts.
_ROW_GROUP_BYTES = 256 * 2**20
_JSON_ARRAY_BYTES = 256 * 2**20


def text_passages(path: Path, *, samples: int, seq_len: int, seed: int) -> tuple[Iterator[str], int | None]:
    """A text file as non-overlapping passages in an order drawn with the seed.

    Args:
        path: a UTF-8 text file.
        samples: how many windows will be cut.
        seq_len: tokens in each.
        seed: decides the order of passages.

    Returns:
        The passages, and how many windows to cut from each: one from many places of a large file; any number (None)
        from the whole text of a small one.

    Raises:
        CalibrationError: the file is not UTF-8 (while iterating).
    """
    size = path.stat().st_size
    passage = max(1024, _BYTES_PER_TOKEN * seq_len)
    if size <= max(_WHOLE_TEXT_BYTES, 2 * samples * passage):
        return iter([_decode(path, path.read_bytes(), 0).removeprefix("\ufeff")]), None
    return _passages(path, size, passage, seed), 1


def json_documents(path: Path, *, text_column: str, seed: int) -> Iterator[str]:
    """The documents of a file with one JSON object per line (or one array of objects), shuffled with the seed.

    Lines are read together with their neighbours in the file, a few kilobytes at a time.

    Raises:
        CalibrationError: before anything is read in bulk if the first line has no such column; while iterating if a
            line is not a JSON object with text in that column.
    """
    with path.open("rb") as file:
        head = next((line for line in file if line.strip()), b"")
    if head.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        return _array_documents(path, text_column, seed)
    if head:
        _document_of_line(path, head, 0, text_column)
    return _line_documents(path, text_column, seed)


def parquet_documents(path: Path, *, text_column: str, seed: int) -> Iterator[str]:
    """The rows of a parquet file's text column, row groups and the rows in each shuffled with the seed.

    Raises:
        CalibrationError: the file is not parquet, or has no such column of text.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path} is not a readable parquet file: {error}") from error
    schema = file.schema_arrow
    if text_column not in schema.names:
        raise _no_column(path, text_column, schema.names)
    type_ = schema.field(text_column).type
    value_type = type_.value_type if pyarrow.types.is_dictionary(type_) else type_
    if not (pyarrow.types.is_string(value_type) or pyarrow.types.is_large_string(value_type)):
        raise CalibrationError(
            f"{path}: column {text_column!r} holds {type_}, not text. Columns: {', '.join(schema.names)}; "
            "choose one of text with --text-column"
        )
    return _row_documents(file, text_column, seed)


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


def _line_documents(path: Path, text_column: str, seed: int) -> Iterator[str]:
    size = path.stat().st_size
    step = max(_SLICE_BYTES, -(-size // _MOST_SLICES))
    generator = torch.Generator().manual_seed(seed)
    with path.open("rb") as file:
        for number in _permutation(-(-size // step), seed):
            start = number * step
            # A line belongs to the slice that its first byte is in.
            file.seek(max(start - 1, 0))
            if start:
                file.readline()
            lines = []
            while (position := file.tell()) < min(start + step, size):
                lines.append((position, file.readline()))
            for index in torch.randperm(len(lines), generator=generator).tolist():
                position, line = lines[index]
                if line.strip():
                    yield _document_of_line(path, line, position, text_column)


def _document_of_line(path: Path, line: bytes, position: int, text_column: str) -> str:
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{path}, line {_line_number(path, position)} is not JSON: {error}. Give one JSON object per line."
        ) from error
    return _document_of_record(record, text_column, path, lambda: f"{path}, line {_line_number(path, position)}")


def _document_of_record(record: Any, text_column: str, path: Path, where: Callable[[], str]) -> str:
    if not isinstance(record, dict):
        raise CalibrationError(
            f"{where()} holds a {type(record).__name__}, not a JSON object with the text in column {text_column!r}"
        )
    if text_column not in record:
        raise _no_column(path, text_column, list(record))
    text = record[text_column]
    if text is not None and not isinstance(text, str):
        raise CalibrationError(
            f"{where()}: column {text_column!r} holds a {type(text).__name__}, not text. "
            f"Columns: {', '.join(record)}; choose one of text with --text-column"
        )
    return text or ""


def _array_documents(path: Path, text_column: str, seed: int) -> Iterator[str]:
    if (size := path.stat().st_size) > _JSON_ARRAY_BYTES:
        raise CalibrationError(
            f"{path} is one JSON array of {size:,} bytes, which has to be read whole; "
            "convert it to JSON lines (one object per line)"
        )
    try:
        records = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is not JSON: {error}") from error
    return _record_documents(records, path, text_column, seed)


def _record_documents(records: list[Any], path: Path, text_column: str, seed: int) -> Iterator[str]:
    for index in _permutation(len(records), seed):
        yield _document_of_record(
            records[index], text_column, path, functools.partial("{}, item {}".format, path, index)
        )


def _row_documents(file: Any, text_column: str, seed: int) -> Iterator[str]:
    generator = torch.Generator().manual_seed(seed)
    for group in _permutation(file.num_row_groups, seed):
        metadata = file.metadata.row_group(group)
        columns = (metadata.column(index) for index in range(metadata.num_columns))
        size = next(c.total_uncompressed_size for c in columns if c.path_in_schema == text_column)
        parts = -(-size // _ROW_GROUP_BYTES)
        rows = max(1, metadata.num_rows // max(1, parts))
        for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=[text_column]):
            texts = batch.column(0)
            for index in torch.randperm(len(texts), generator=generator).tolist():
                yield texts[index].as_py() or ""


def _no_column(path: Path, text_column: str, columns: list[str]) -> CalibrationError:
    return CalibrationError(
        f"{path} has no column {text_column!r}. Columns: {', '.join(map(str, columns))}; "
        "choose the one with the text by --text-column"
    )


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
