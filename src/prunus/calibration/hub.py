"""Calibration text from data sets on the Hugging Face hub, through the optional package `datasets`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from prunus.calibration.columns import ChatColumn, Column, TextColumn, no_column
from prunus.errors import CalibrationError
from prunus.installing import install_command

__all__ = ["HUB_NAMES", "HubText", "hub_documents", "hub_text"]

#: Rows are shuffled within a buffer of this many while they are streamed.
_SHUFFLE_BUFFER = 1024


@dataclass(frozen=True)
class HubText:
    """A text data set of the hub.

    Attributes:
        path: id of the data set.
        config: its configuration; None for the only one.
        split: its split.
        column: the column with the text, or with conversations.
        joiner: what the rows are joined by when all of them are one running text; None when a row is a document.
        revision: branch to read; None for the main one.
        chat: column with conversations, which is read instead where the tokenizer has a chat template.
    """

    path: str
    config: str | None
    split: str
    column: Column
    joiner: str | None = None
    revision: str | None = None
    chat: str | None = None


HUB_NAMES: Mapping[str, HubText] = {
    "c4": HubText("allenai/c4", "en", "train", TextColumn("text")),
    # rows are lines that carry their own line ends
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", TextColumn("text"), joiner=""),
    # Rows are sentences. The main branch holds only a loading script, which `datasets` no longer runs.
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "train",
        TextColumn("sentence"),
        joiner=" ",
        revision="refs/convert/parquet",
    ),
    "wikipedia": HubText("wikimedia/wikipedia", "20231101.en", "train", TextColumn("text")),
    # files of Python
    "code": HubText("codeparrot/codeparrot-clean-valid", None, "train", TextColumn("content")),
    # without a chat template what the users of the conversations began with
    "dialogue": HubText("HuggingFaceH4/ultrachat_200k", None, "train_sft", TextColumn("prompt"), chat="messages"),
}


def hub_text(source: str, column: Column, tokenizer: Any) -> HubText:
    """The data set that a name stands for: a short name, whose column is known, or `owner/name[:config[:split]]`."""
    if source in HUB_NAMES:
        text = HUB_NAMES[source]
        if text.chat is None or not getattr(tokenizer, "chat_template", None):
            return text
        return replace(text, column=ChatColumn(text.chat, tokenizer))
    path, config, split, *_ = [*source.split(":"), "", ""]
    return HubText(path, config or None, split or "train", column)


def hub_documents(text: HubText, *, seed: int) -> Iterator[str]:
    """Stream a data set's documents, shuffled with the seed, downloading no more than is read.

    A data set that is one running text comes as a single document, its rows in order.

    Raises:
        CalibrationError: `datasets` is not installed, the data set cannot be reached, or it has no such column.
    """
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"the data set {text.path!r} needs the package datasets, which is not installed. Run: "
            f"{install_command('datasets')} — or take the source `default`, which needs nothing."
        ) from error
    try:
        rows: Any = datasets.load_dataset(
            text.path, text.config, split=text.split, streaming=True, revision=text.revision
        )
        if text.joiner is None:
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        rows = iter(rows)
        first = next(rows, None)
    except Exception as error:
        # What goes wrong out there has no common type: no network, no such data set or split, access refused, …
        raise _unreachable(text, error) from error
    if first is None:
        return iter(())
    documents = _documents(itertools.chain([first], rows), text)
    return documents if text.joiner is None else iter([text.joiner.join(documents)])


def _documents(rows: Iterator[Mapping[str, Any]], text: HubText) -> Iterator[str]:
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unreachable(text, error) from error
        if row is None:
            return
        number += 1
        where = functools.partial("the data set {!r}, row {} of those read".format, text.path, number)
        if text.column.name not in row:
            raise no_column(where(), text.column, list(row))
        yield text.column.text_of(row, where)


def _unreachable(text: HubText, error: Exception) -> CalibrationError:
    what = ":".join(filter(None, (text.path, text.config, text.split)))
    return CalibrationError(
        f"cannot read the data set {what} from the hub: {type(error).__name__}: {error}. Check its name and the "
        "network, or take a file or the source `default`, which need no network."
    )
