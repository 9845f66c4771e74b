"""What a record of a file or data set holds: text in a column, or a conversation that becomes text.

Conversations come in three forms, told apart by what the column holds:

    messages    [{"role": "user", "content": …}, …]
    ShareGPT    [{"from": "human", "value": …}, …]
    Alpaca      "instruction": …, "input": … (or none), "output": …; the column is that of the instruction
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from prunus.calibration.begin_token import begin_token_of
from prunus.errors import CalibrationError, OptionError

__all__ = ["ChatColumn", "Column", "TextColumn", "column_of"]

#: whom ShareGPT's names of speakers stand for
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
#: columns of an Alpaca row: that of the instruction, as it is usually called, and those beside it
_INSTRUCTION = "instruction"
_INPUT, _ANSWERS, _SYSTEM = "input", ("output", "response"), "system"
_EXPECTED = (
    'a list of {"role": …, "content": …} or of {"from": …, "value": …}, or the instruction of a row that has "output" '
    "as well"
)


class Column(Protocol):
    """Where the text of a record is."""

    @property
    def name(self) -> str:
        """Of the column."""

    @property
    def flag(self) -> str:
        """The option that names the column."""

    def needed(self, names: Sequence[str]) -> list[str]:
        """Those of a table's columns that the text is made of."""

    def text_of(self, record: Mapping[str, Any], where: Callable[[], str]) -> str:
        """The text of a record that has the column, "" for none.

        Args:
            record: the values of all columns that are needed.
            where: names the record for an error.

        Raises:
            CalibrationError: the column holds something else.
        """


@dataclass(frozen=True)
class TextColumn:
    """A column of text.

    Attributes:
        name: of the column.
    """

    name: str
    flag = "`text_column`"

    def needed(self, names: Sequence[str]) -> list[str]:
        """The column alone."""
        return [self.name]

    def text_of(self, record: Mapping[str, Any], where: Callable[[], str]) -> str:
        """The text itself."""
        text = record[self.name]
        if text is not None and not isinstance(text, str):
            raise CalibrationError(
                f"{where()}: column {self.name!r} holds a {type(text).__name__}, not text. "
                f"Columns: {', '.join(map(str, record))}; choose one of text with {self.flag}"
            )
        return text or ""


@dataclass(frozen=True)
class ChatColumn:
    """A column of conversations, which a chat template writes down.

    Attributes:
        name: of the column.
        tokenizer: a transformers tokenizer with a chat template.
    """

    name: str
    tokenizer: Any
    flag = "`chat_column`"

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise OptionError(
                f"`chat_column` is {self.name!r}, and the model's tokenizer has no chat template to write "
                "conversations with; give a text column instead"
            )

    def needed(self, names: Sequence[str]) -> list[str]:
        """The column, and those that an Alpaca row has beside it."""
        return [name for name in names if name in {self.name, _INSTRUCTION, _INPUT, *_ANSWERS, _SYSTEM}]

    def text_of(self, record: Mapping[str, Any], where: Callable[[], str]) -> str:
        """The conversation by the chat template."""
        messages = self._messages(record, where)
        try:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template raises whatever its author liked
            raise CalibrationError(f"{where()}: the chat template does not take this conversation: {error}") from error
        # Where a text begins with a token unasked, sequences do; and documents end with the other.
        return text.removeprefix(self._first).removesuffix(self.tokenizer.eos_token or "")

    @cached_property
    def _first(self) -> str:
        """The token that every sequence begins with, as text; found once, not for every record."""
        return str(self.tokenizer.bos_token) if begin_token_of(self.tokenizer) is not None else ""

    def _messages(self, record: Mapping[str, Any], where: Callable[[], str]) -> list[dict[str, str]]:
        value = record[self.name]
        if isinstance(value, str):
            return self._alpaca(record, where)
        if not isinstance(value, list) or not value:
            raise self._none(where, f"holds {_shown(value)}")
        return [self._message(turn, number, where) for number, turn in enumerate(value, start=1)]

    def _message(self, turn: Any, number: int, where: Callable[[], str]) -> dict[str, str]:
        fields = turn if isinstance(turn, Mapping) else {}
        speaker, content = fields.get("role"), fields.get("content")
        if "role" not in fields and "from" in fields:
            speaker, content = fields["from"], fields.get("value")
            if isinstance(speaker, str) and speaker not in _SPEAKERS:
                raise CalibrationError(
                    f"{where()}: message {number} of column {self.name!r} is from {speaker!r}; known are "
                    f"{', '.join(_SPEAKERS)}"
                )
            speaker = _SPEAKERS[speaker] if isinstance(speaker, str) else speaker
        if not isinstance(speaker, str) or not isinstance(content, str):
            raise self._none(where, f"has message {number}, {_shown(turn)}")
        return {"role": speaker, "content": content}

    def _alpaca(self, record: Mapping[str, Any], where: Callable[[], str]) -> list[dict[str, str]]:
        if self.name in _ANSWERS or (self.name != _INSTRUCTION and _INSTRUCTION in record):
            raise self._none(where, "holds text, and the instruction of its row is in another column")
        answer = next((record[name] for name in _ANSWERS if name in record), None)
        if not isinstance(answer, str):
            raise self._none(where, f"holds text, and the row has no text in column {_ANSWERS[0]!r}")
        beside = {name: record.get(name) or "" for name in (_INPUT, _SYSTEM) if name != self.name}
        asked = "\n\n".join(str(part) for part in (record[self.name], beside.get(_INPUT)) if part)
        system = [{"role": "system", "content": str(beside[_SYSTEM])}] if beside.get(_SYSTEM) else []
        return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    def _none(self, where: Callable[[], str], found: str) -> CalibrationError:
        return CalibrationError(
            f"{where()}: column {self.name!r} {found}, which is no conversation. Expected is {_EXPECTED}; choose the "
            f"column with {self.flag}"
        )


def column_of(text_column: str, chat_column: str | None, tokenizer: Any) -> Column:
    """The column that options name: that of conversations, if there is one.

    Raises:
        OptionError: conversations, and a tokenizer without a chat template.
    """
    return TextColumn(text_column) if chat_column is None else ChatColumn(chat_column, tokenizer)


def no_column(source: object, column: Column, columns: Sequence[Any]) -> CalibrationError:
    """The error for a source that lacks the column."""
    what = "text" if isinstance(column, TextColumn) else "conversations"
    return CalibrationError(
        f"{source} has no column {column.name!r}. Columns: {', '.join(map(str, columns))}; choose the one with the "
        f"{what} by {column.flag}"
    )


def _shown(value: Any) -> str:
    """A value, short enough for an error."""
    text = repr(value)
    return f"{'an empty list' if value == [] else type(value).__name__} ({text[:80]}{'…' if len(text) > 80 else ''})"
