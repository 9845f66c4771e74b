"""The sequences that recovery trains on, and those that are held out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunus.calibration import Calibration, calibration_from_texts, load_calibration
from prunus.calibration.hub import hub_text
from prunus.errors import CalibrationError, OptionError
from prunus.recovery.options import TextOptions

__all__ = ["MOST_SAMPLES", "load_sequences"]

#: sequences that are drawn where the user does not bound them: with 512 tokens each, eight million tokens
MOST_SAMPLES = 2**14


def load_sequences(
    options: TextOptions, tokenizer: Any, needed: int | None, batch_size: int
) -> tuple[Calibration, Calibration]:
    """Draw sequences and part off the held-out ones.

    Args:
        options: which text.
        tokenizer: of the model that is trained.
        needed: sequences that all steps together go through; None where that is open.
        batch_size: sequences per step: fewer are too few.

    Returns:
        What is trained on, and what is held out.

    Raises:
        CalibrationError: the text is missing, unreadable or too short.
    """
    samples = options.samples if options.samples is not None else min(needed or MOST_SAMPLES, MOST_SAMPLES)
    samples += options.held_out
    wanted: dict[str, Any] = {"samples": samples, "seq_len": options.seq_len, "seed": options.seed, "fewer": True}
    if options.chat_column is None:
        drawn = load_calibration(options.text, tokenizer, text_column=options.text_column, **wanted)
    else:
        texts = list(_chat_texts(options.text, options.chat_column, tokenizer, limit=50 * samples))
        name = Path(options.text).name
        drawn = calibration_from_texts(texts, tokenizer, source=name, **wanted)
        drawn = replace(drawn, provenance=replace(drawn.provenance, kind="chat"))
    if len(drawn) < options.held_out + batch_size:
        raise CalibrationError(
            f"the text {options.text} holds {len(drawn)} sequences of {options.seq_len} tokens, and {options.held_out} "
            f"held out with one step of {batch_size} need {options.held_out + batch_size}. Give more text, or smaller "
            "--seq-len, --held-out or --batch-size"
        )
    return drawn.split(options.held_out)


def _chat_texts(source: str, column: str, tokenizer: Any, limit: int) -> Iterator[str]:
    """Conversations as text, by the chat template of the tokenizer."""
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError(
            f"chat_column is {column!r}, and the model's tokenizer has no chat template to write conversations with; "
            "give a text column instead"
        )
    for number, messages in enumerate(_column(source, column)):
        if number == limit:
            return
        if not _is_conversation(messages):
            raise CalibrationError(
                f"{source}, record {number + 1}: column {column!r} holds no conversation, a list of "
                '{"role": …, "content": …}; choose the right one with --chat-column'
            )
        try:
            yield tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template raises whatever its author liked
            raise CalibrationError(
                f"{source}, record {number + 1}: the chat template does not take this conversation: {error}"
            ) from error


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )


def _column(source: str, column: str) -> Iterator[Any]:
    path = Path(source).expanduser()
    records: Iterable[Any]
    if path.suffix.lower() in (".jsonl", ".json"):
        records = _json_records(path)
    elif path.suffix.lower() == ".parquet":
        records = _parquet_records(path)
    elif path.exists() or path.suffix:
        raise CalibrationError(
            f"conversations come from .jsonl, .parquet or a data set of the Hub, and {source} is neither"
        )
    else:
        records = _hub_records(source, column)
    for number, record in enumerate(records):
        if not isinstance(record, Mapping) or column not in record:
            columns = ", ".join(map(str, record)) if isinstance(record, Mapping) else "none"
            raise CalibrationError(
                f"{source}, record {number + 1} has no column {column!r}. Columns: {columns}; choose with --chat-column"
            )
        yield record[column]


def _json_records(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise CalibrationError(
                            f"{path}, line {number} is not JSON: {error}. Give one JSON object per line."
                        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error


def _parquet_records(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise CalibrationError(f"{path} is not a readable parquet file: {error}") from error


def _hub_records(source: str, column: str) -> Iterator[Any]:
    text = hub_text(source, column)
    try:
        import datasets

        yield from datasets.load_dataset(text.path, text.config, split=text.split, streaming=True)
    except ImportError as error:
        raise CalibrationError(
            'a data set of the Hub needs the package `datasets`: pip install "prunus[hub-data]"'
        ) from error
    except Exception as error:  # no network, no such data set or split, access refused, …
        raise CalibrationError(f"cannot read the data set {source}: {type(error).__name__}: {error}") from error
