"""Text that the model writes itself: for calibration where there is none, and beside what there is.

Whatever a model was trained on, what it writes is of all kinds of it, if it is asked for all kinds: it continues the
beginnings of `prunus.calibration.prompts`, in the languages that it knows. A model that is scored and repaired on such
text beside the given one loses less on text of other kinds (benchmarks/LOG.md).

Documents are written in batches, one after the other, which depend on the model, the prompts and the seed alone: more
sequences, or longer ones, take more of the same. In a folder they are kept as JSON lines,

    self-text-3f2a91bc.jsonl      {"text": "", "made_from": {…}}, then {"kind": …, "language": …, "text": …, "ids": […]}

and a later run for the same model goes on with them, as does one that was killed. Another program, or a person, reads
the column "text".
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.calibration.languages import language_costs, language_shares
from prunus.calibration.prompts import VERSION, fill, kinds_of
from prunus.calibration.sampled import continuations
from prunus.calibration.words import Words, words_of
from prunus.errors import CalibrationError
from prunus.files.json_file import Count, FileContent, check_content, parse_json
from prunus.files.outputs import whole_file
from prunus.machine.bars import Bar
from prunus.machine.processes import is_first
from prunus.model.digest import digest_model
from prunus.model.live import live_model
from prunus.model.tokens import check_token_ids, longest_context, token_ids

__all__ = ["AT_ONCE", "FEWEST_NEW", "LONGEST_PROMPT", "MOST_NEW", "Document", "self_written"]

logger = logging.getLogger(__name__)

#: documents that are written side by side
AT_ONCE = 64
#: tokens that a batch goes on for after its prompts, at least and at most, and of a prompt at most
FEWEST_NEW, MOST_NEW, LONGEST_PROMPT = 200, 384, 64


@dataclass(frozen=True)
class Document:
    """A text that the model wrote.

    Attributes:
        kind: of its prompt, see `prunus.calibration.prompts`.
        language: of its prompt, or that its words were drawn for.
        ids: int64, with the prompt, without a token before it.
    """

    kind: str
    language: str
    ids: Tensor


def self_written(
    model: Any,
    tokenizer: Any,
    *,
    seq_len: int,
    seed: int = 0,
    begin: int | None = None,
    keep: Path | None = None,
    progress: bool = True,
) -> Iterator[Document]:
    """What a model writes, document by document, without an end.

    Args:
        model: a causal language model, in memory or opened; opened, its layers are read once for every token that a
            batch of `AT_ONCE` documents is long.
        tokenizer: its tokenizer.
        seq_len: of the sequences that will be cut: no document goes on for longer after its prompt.
        seed: of all draws.
        begin: token that stands before every text.
        keep: folder in which documents are kept, and found again; None for memory alone.
        progress: show a bar on a terminal.

    Raises:
        OptionError: the tokenizer makes tokens that the model does not embed.
        NonFiniteError: the model's logits are NaN or infinite.
        CalibrationError: the file of documents in `keep` is damaged.
    """
    model = live_model(model)
    most_new = min(MOST_NEW, seq_len)
    file = None
    if keep is not None:
        made_from = {"model": digest_model(model), "tokenizer": _digest_of(tokenizer), "prompts": VERSION}
        file = _File(keep, {**made_from, "new_tokens": most_new, "seed": seed, "begin": begin})
    prompts: _Prompts | None = None
    for batch in count():
        documents = None if file is None else file.batch(batch)
        if documents is None:
            prompts = prompts or _Prompts(model, tokenizer, begin)
            documents = _write(model, prompts, most_new, seed, batch, progress)
            if file is not None:
                file.add(documents, tokenizer)
        yield from documents


def _digest_of(tokenizer: Any) -> str:
    """What of a tokenizer decides the text: its vocabulary, special tokens and chat template."""
    words = sorted(tokenizer.get_vocab().items()), tokenizer.all_special_ids, str(tokenizer.chat_template)
    return hashlib.sha256(repr(words).encode()).hexdigest()


class _Prompts:
    """Beginnings for one model, all kinds in turn."""

    def __init__(self, model: Any, tokenizer: Any, begin: int | None):
        self.tokenizer, self.begin = tokenizer, begin
        self.stop = set(tokenizer.all_special_ids)
        self.kinds = kinds_of(chat=self._takes_questions())
        self.words: Words = words_of(tokenizer)
        self.shares = language_shares(language_costs(model, tokenizer, begin), self.words)

    def draw(self, number: int, generator: torch.Generator) -> tuple[str, str, Tensor]:
        """The kind of a document, its language, and the ids of its prompt."""
        kind = self.kinds[number % len(self.kinds)]
        chances = torch.tensor(list(self.shares.values()), dtype=torch.float64)
        language = list(self.shares)[int(torch.multinomial(chances, 1, generator=generator))]
        text = fill(kind, language, self.words, generator)
        if kind == "chat":
            text = self._question(text)
        (ids,) = token_ids(self.tokenizer, [text])
        # A template may put the token before every text itself.
        ids = ids[1:] if self.begin is not None and ids[:1].tolist() == [self.begin] else ids
        if not len(ids) and self.begin is None:
            raise CalibrationError(
                f"the model's tokenizer has no token for anything in {text!r}, which the model was to continue; give "
                "text to calibrate or train on in place of `self`"
            )
        return kind, language, ids[-LONGEST_PROMPT:]

    def _question(self, text: str) -> str:
        turn = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def _takes_questions(self) -> bool:
        if not getattr(self.tokenizer, "chat_template", None):
            return False
        try:
            self._question("?")
        except Exception as error:  # a template raises whatever its author liked
            logger.warning("the model writes no answers: its chat template does not take a question alone: %s", error)
            return False
        return True


def _write(model: Any, prompts: _Prompts, most_new: int, seed: int, batch: int, progress: bool) -> list[Document]:
    """One batch of documents."""
    digest = hashlib.sha256(f"{seed} {batch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    drawn = [prompts.draw(batch * AT_ONCE + number, generator) for number in range(AT_ONCE)]
    least = min(FEWEST_NEW, most_new)
    new_tokens = least + int(torch.randint(most_new - least + 1, (1,), generator=generator))
    before = torch.tensor([] if prompts.begin is None else [prompts.begin], dtype=torch.int64)
    beginnings = [torch.cat([before, ids]) for _, _, ids in drawn]
    if (context := longest_context(model.config)) is not None:
        beginnings = [ids[: context - 1] for ids in beginnings]
        new_tokens = min(new_tokens, context - max(map(len, beginnings)))
    for ids in beginnings:
        check_token_ids(model.config, ids)
    total = AT_ONCE * (max(map(len, beginnings)) + new_tokens - 1)
    with Bar("writing text", total=total, unit="token", progress=progress) as bar:
        written = continuations(
            model, beginnings, new_tokens=new_tokens, stop=prompts.stop, generator=generator, told=bar.update
        )
    return [
        Document(kind, language, ids[len(before) :]) for (kind, language, _), ids in zip(drawn, written, strict=True)
    ]


class _Line(FileContent):
    kind: str
    language: str
    text: str
    ids: list[Count]


class _File:
    """The documents that are kept of one model.

    Args:
        folder: where the file is, or will be.
        made_from: everything that the documents depend on.

    Raises:
        CalibrationError: the file is damaged.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any]):
        head = json.dumps({"text": "", "made_from": made_from}, sort_keys=True)
        self.path = folder / f"self-text-{hashlib.sha256(head.encode()).hexdigest()[:8]}.jsonl"
        self._lines = [head]
        if self.path.exists():
            self._lines = self._read(head)
            logger.info("%s: %d documents that the model wrote are used again", self.path, len(self._lines) - 1)

    def batch(self, number: int) -> list[Document] | None:
        """A batch, if it is there."""
        lines = self._lines[1 + number * AT_ONCE : 1 + (number + 1) * AT_ONCE]
        contents = [self._content(line) for line in lines]
        return [Document(one.kind, one.language, torch.tensor(one.ids)) for one in contents] or None

    def add(self, documents: list[Document], tokenizer: Any) -> None:
        """Keep a further batch; of several processes, which all write the same, the first one does."""
        for document in documents:
            text = tokenizer.decode(document.ids)
            line = _Line(kind=document.kind, language=document.language, text=text, ids=document.ids.tolist())
            self._lines.append(json.dumps(line.model_dump()))
        if is_first():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as partial:
                partial.write_text("\n".join(self._lines) + "\n", encoding="utf-8")

    def _read(self, head: str) -> list[str]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{self.path} cannot be read ({error}); remove it") from error
        if lines[:1] != [head] or len(lines) % AT_ONCE != 1:
            raise CalibrationError(f"{self.path} is not text that prunus keeps of this model, or damaged; remove it")
        return lines

    def _content(self, line: str) -> _Line:
        where = f"{self.path}, which is damaged and should be removed: a line"
        return check_content(_Line, parse_json(line, where, CalibrationError), where, CalibrationError)
