"""The texts of a job: what importance is measured on, and what the results are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.calibration.loading import SELF_SOURCE, check_counts
from prunus.calibration.sources import Source, read_sources, sequences_of
from prunus.evaluation.perplexity import DEFAULT_SEQ_LEN, window_length
from prunus.model.tokens import check_seq_len, longest_context
from prunus.option_values import check_seed, check_utf8, check_whole

__all__ = ["DEFAULT_CALIBRATION_LEN", "CalibrationOptions", "EvaluationOptions"]

#: tokens of a calibration sequence, where the model has as many positions
DEFAULT_CALIBRATION_LEN = 512


@dataclass(frozen=True)
class CalibrationOptions:
    """The text that importance is measured on.

    Attributes:
        source: a .txt, .jsonl or .parquet file; `mixture` of several kinds, c4 or another data set of the Hub;
            `default` for the text that ships with Python; `self` for text that the model writes. Several of them share
            the sequences, equally or by weight: `[FILE:2, self]`.
        samples: number of sequences.
        seq_len: tokens per sequence; by default 512, or as many as the model has positions for if those are fewer.
        seed: decides which sequences are drawn.
        text_column: column that holds the text in .jsonl and .parquet files.
        chat_column: column that holds conversations in place of text: lists of {"role": …, "content": …} or of
            ShareGPT's {"from": …, "value": …}, or the instruction of Alpaca's rows; they become text by the tokenizer's
            chat template.
        begin_token: where the tokenizer puts a token before every text, as for Llama 3 and Gemma, begin each sequence
            with it.
    """

    source: tuple[str, ...] = ("self", "default")
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    text_column: str = "text"
    chat_column: str | None = None
    begin_token: bool = True

    def __post_init__(self) -> None:
        check_counts(self.samples, DEFAULT_CALIBRATION_LEN if self.seq_len is None else self.seq_len)
        check_seed("seed", self.seed)
        if isinstance(self.source, str):
            object.__setattr__(self, "source", (self.source,))
        sequences_of(self.sources, self.samples)

    @property
    def sources(self) -> list[Source]:
        """The sources with their weights."""
        return read_sources(self.source)

    @property
    def writes_text(self) -> bool:
        """Whether the model writes some of the text."""
        return SELF_SOURCE in self.names

    @property
    def names(self) -> list[str]:
        """The sources without their weights."""
        return [source.name for source in self.sources]

    @property
    def name(self) -> str:
        """The sources for a reader: of files the last part of the path."""
        return " + ".join(Path(name).name for name in self.names)

    def length(self, config: Any) -> int:
        """Tokens per sequence for a model.

        Args:
            config: of the model.

        Raises:
            OptionError: more are asked for than the model has positions for.
        """
        if self.seq_len is None:
            return min(DEFAULT_CALIBRATION_LEN, longest_context(config) or DEFAULT_CALIBRATION_LEN)
        check_seq_len(config, self.seq_len)
        return self.seq_len


@dataclass(frozen=True)
class EvaluationOptions:
    """How the models before and after are compared.

    Attributes:
        text: a text file to measure perplexity on, before and after; without it, calibration sequences that were
            held out.
        seq_len: tokens per window of the text; by default 2048, or as many as the model has positions for if those
            are fewer.
        windows: at most this many windows of the text.
        begin_token: where the tokenizer puts a token before every text, begin each window with it. GPTQ and the
            tools after it do not.
        held_out: number of held-out calibration sequences, where no text is given; 0 = measure nothing.
        tasks: files or folders of zero-shot tasks, measured by `prunus compare`.
        items: at most this many items of each task.
    """

    text: str | None = None
    seq_len: int | None = None
    windows: int | None = None
    begin_token: bool = True
    held_out: int = 16
    tasks: tuple[str, ...] = ()
    items: int | None = None

    def __post_init__(self) -> None:
        if self.items is not None:
            check_whole("items", self.items, why="leave it out for all items")
        check_whole("held_out", self.held_out, smallest=0)
        if self.seq_len is not None:
            check_whole("evaluation.seq_len", self.seq_len, smallest=2, why="a window needs 2 tokens to predict one")
        if self.windows is not None:
            check_whole("evaluation.windows", self.windows, why="leave it out for all windows")
        check_utf8("evaluation.text", self.text)

    def tokens(self, text: str | None, seq_len: int) -> int:
        """At most how many tokens perplexity is measured on: those of a text, else of held-out sequences."""
        if text is None:
            return self.held_out * seq_len
        return len(text) if self.windows is None else self.windows * (self.seq_len or DEFAULT_SEQ_LEN)

    def window(self, text: str | None, seq_len: int, config: Any) -> int:
        """Tokens that go through a model at a time.

        Args:
            text: what perplexity is measured on; None for held-out sequences.
            seq_len: tokens of those.
            config: of the model.

        Raises:
            OptionError: a window is longer than the model's context.
        """
        longest = window_length(config, self.seq_len, "evaluation.seq_len")
        return min(len(text), longest) if text is not None else seq_len * bool(self.held_out)
