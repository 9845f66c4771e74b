r"""Zero-shot accuracy on multiple-choice tasks, from local files of their items.

Protocol, that of lm-evaluation-harness: a model answers with the choice whose text it finds most likely after the
question. `accuracy` compares summed log-likelihoods, `accuracy_norm` those divided by the number of characters of the
choice. Nothing is shown before the question. The tokenizer adds the special tokens that it always adds (Llama's `<s>`,
for one), unless the text starts with one. A text longer than the model's context loses tokens at its start.

    arc_easy, arc_challenge
                "Question: {question}\nAnswer:" + " {choice}"
    openbookqa  "{question_stem}" + " {choice}"
    piqa        "Question: {goal}\nAnswer:" + " {solution}"
    social_iqa  "Q: {context} {question}\nA:" + " {answer}"
    winogrande  the sentence up to the gap with either option + the rest of the sentence, which is what is scored;
                its length is the same for both, so the two accuracies agree

Log-softmax is float32. The harness takes it in the model's dtype unless it is told `softmax_dtype=float32`; a sum of
log-likelihoods in bfloat16 has 8 bits, and choices tie. In float32 both give the same answer to every item, see
benchmarks/harness_check.py.

Source: Gao et al., "A framework for few-shot language model evaluation" (the tasks of these names).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from torch import Tensor

from prunus.errors import NonFiniteError, OptionError
from prunus.files.json_file import FileContent, check_content, parse_json, shortened
from prunus.files.user_path import expanded
from prunus.machine.bars import Bar
from prunus.model.evaluation_mode import evaluation_mode
from prunus.model.loss import head_function
from prunus.model.tokens import check_token_ids, longest_context
from prunus.option_values import check_whole

__all__ = [
    "TASKS",
    "EncodedTask",
    "Item",
    "Task",
    "ZeroShotResult",
    "answers",
    "encode_task",
    "load_task",
    "load_tasks",
    "zero_shot",
    "zero_shot_of",
]


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        choices: context and continuation of each choice; the continuation is what is scored.
        lengths: characters by which each choice's log-likelihood is divided in `accuracy_norm`.
        gold: number of the right choice.
    """

    choices: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """A task's name and its items, in the order of the file."""

    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class EncodedTask:
    """A task as the tokens of its choices.

    Attributes:
        task: what was tokenised.
        items: those of its items that are asked.
        pairs: for each choice of each item the token ids, and how many of the last ones are scored.
    """

    task: Task
    items: Sequence[Item]
    pairs: Sequence[tuple[list[int], int]]


@dataclass(frozen=True)
class ZeroShotResult:
    """How a model did on a task.

    Attributes:
        task: its name.
        items: questions that were asked.
        accuracy: share answered right, by log-likelihood.
        accuracy_norm: by log-likelihood per character.
        stderr: standard error of `accuracy_norm` from the number of items.
    """

    task: str
    items: int
    accuracy: float
    accuracy_norm: float
    stderr: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


def _whole(value: Any) -> Any:
    """Digits as the number that they are; anything else as it is, and a bool is no number."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        return int(value)
    if type(value) is not int:
        raise ValueError("it must be a whole number")
    return value


def _asked(context: str, choices: Sequence[str], gold: int) -> Item:
    return Item(tuple((context, f" {choice}") for choice in choices), tuple(len(choice) for choice in choices), gold)


#: a whole number, in digits or as text of them
_Number = Annotated[int, Field(strict=False, ge=0, lt=2**31), BeforeValidator(_whole)]
_Text = Annotated[str, Field(min_length=1)]


class _Lettered(FileContent):
    text: Annotated[list[_Text], Field(min_length=2)]
    label: list[str]

    @model_validator(mode="after")
    def _one_label_each(self) -> _Lettered:
        if len(self.label) != len(self.text) or len(set(self.label)) < len(self.label):
            raise ValueError(f"{len(self.text)} texts need as many labels, each another; these are {self.label}")
        return self


def _form(choices: Any) -> str:
    return "by letter" if isinstance(choices, dict) else "by number"


class _Choices(FileContent):
    """Choices as a list, the right one by its number; or as data sets of the Hub have them, by its letter."""

    choices: Annotated[
        Annotated[list[_Text], Field(min_length=2), Tag("by number")] | Annotated[_Lettered, Tag("by letter")],
        Discriminator(_form),
    ]
    gold: _Number | None = None
    answerKey: str | None = None

    def answered(self, context: str) -> Item:
        if isinstance(self.choices, list):
            if self.gold is None:
                raise ValueError("gold: Field required beside a list of choices")
            return _asked(context, self.choices, self.gold)
        if self.answerKey is None or (key := self.answerKey.strip()) not in self.choices.label:
            raise ValueError(f"answerKey is {self.answerKey!r}, which is no label of a choice")
        return _asked(context, self.choices.text, self.choices.label.index(key))


class _Arc(_Choices):
    question: str

    def item(self) -> Item:
        return self.answered(f"Question: {self.question}\nAnswer:")


class _OpenBookQa(_Choices):
    question_stem: str

    def item(self) -> Item:
        return self.answered(self.question_stem)


class _Piqa(FileContent):
    goal: str
    sol1: _Text
    sol2: _Text
    label: _Number

    def item(self) -> Item:
        return _asked(f"Question: {self.goal}\nAnswer:", [self.sol1, self.sol2], self.label)


class _SocialIqa(FileContent):
    context: str
    question: str
    answerA: _Text
    answerB: _Text
    answerC: _Text
    label: _Number

    def item(self) -> Item:
        context = f"Q: {self.context} {self.question}\nA:"
        return _asked(context, [self.answerA, self.answerB, self.answerC], self.label - 1)


class _Winogrande(FileContent):
    sentence: str
    option1: _Text
    option2: _Text
    answer: _Number

    def item(self) -> Item:
        before, gap, after = self.sentence.partition("_")
        if not gap:
            raise ValueError("the sentence has no gap '_'")
        rest = after.strip()
        options = (self.option1, self.option2)
        return Item(tuple((before + option, f" {rest}") for option in options), (len(rest),) * 2, self.answer - 1)


#: what a line of a task's file holds, and how it becomes an item
TASKS: dict[str, type[_Arc | _OpenBookQa | _Piqa | _SocialIqa | _Winogrande]] = {
    "arc_challenge": _Arc,
    "arc_easy": _Arc,
    "openbookqa": _OpenBookQa,
    "piqa": _Piqa,
    "social_iqa": _SocialIqa,
    "winogrande": _Winogrande,
}


def load_task(path: str | Path, name: str | None = None) -> Task:
    """Read a task from JSON lines.

    Args:
        path: the file; fields as the data sets have them on the Hub (ARC: question, choices, answerKey; OpenBookQA:
            question_stem, choices, answerKey; PIQA: goal, sol1, sol2, label; Social IQa: context, question, answerA,
            answerB, answerC, label; WinoGrande: sentence, option1, option2, answer). `choices` may also be a list of
            texts, with `gold`, the right one's number from 0, in place of answerKey.
        name: one of `TASKS`; None = the one that the file is named after.

    Raises:
        OptionError: no such task, or a line that is not an item of it.
    """
    path = Path(path)
    if not os.path.exists(path):  # Path.exists fails at a name that is too long
        raise OptionError(f"cannot read the task file {path}: there is no such file or folder")
    if name is None:
        name = next((task for task in TASKS if path.name.startswith(task)), None)
    if name not in TASKS:
        raise OptionError(f"{path.name} names no task that is known; name it after one of {', '.join(TASKS)}")
    if path.is_dir():
        raise OptionError(f"cannot read the task file {path}: it is a folder")
    items = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    items.append(_item(name, line, f"{path}, line {number}"))
    except OSError as error:
        raise OptionError(f"cannot read the task file {path}: {error.strerror or error}") from error
    if not items:
        raise OptionError(f"{path} holds no items")
    return Task(name, tuple(items))


def _item(name: str, line: bytes, where: str) -> Item:
    said = check_content(
        TASKS[name], parse_json(line, where, OptionError), f"{where}: not an item of {name}", OptionError
    )
    try:
        item = said.item()
    except ValueError as error:
        raise OptionError(f"{where}: not an item of {name}: {error}") from error
    if not 0 <= item.gold < len(item.choices) or not all(item.lengths):
        raise OptionError(
            f"{where}: not an item of {name}: the right answer is none of the choices, or a choice is empty"
        )
    return item


def load_tasks(paths: Sequence[str | Path]) -> tuple[Task, ...]:
    """Read tasks from files, or from folders of them.

    Args:
        paths: files for `load_task`; of a folder every `.jsonl` file that is named after a task, in the order of names.

    Raises:
        OptionError: a folder holds no task, a task is there twice, or see `load_task`.
    """
    files: list[Path] = []
    for path in map(expanded, paths):
        found = [file for file in sorted(path.glob("*.jsonl")) if file.name.startswith(tuple(TASKS))]
        if path.is_dir() and not found:
            raise OptionError(f"{path} holds no task: its .jsonl files are named after one of {', '.join(TASKS)}")
        files += found if path.is_dir() else [path]
    tasks = tuple(load_task(file) for file in files)
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise OptionError(f"task {min(twice)} is given twice; name one file of it")
    return tasks


def zero_shot(
    model: Any, tokenizer: Any, task: Task, *, limit: int | None = None, batch_size: int = 16, progress: bool = True
) -> ZeroShotResult:
    """Let a model answer a task.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        task: see `load_task`.
        limit: only the first so many items.
        batch_size: choices per forward pass; it changes the result only by rounding.
        progress: show a bar on a terminal.

    Raises:
        OptionError: a limit or batch size below 1, or a choice without a token of its own.
        NonFiniteError: a log-likelihood is NaN.
    """
    encoded = encode_task(model.config, tokenizer, task, limit=limit)
    return zero_shot_of(model, encoded, batch_size=batch_size, progress=progress)


def zero_shot_of(model: Any, encoded: EncodedTask, *, batch_size: int = 16, progress: bool = True) -> ZeroShotResult:
    """Let a model answer a task that was tokenised before, see `zero_shot`."""
    right = _answers(model, encoded, batch_size, progress)
    task = encoded.task
    accuracy, accuracy_norm = (sum(verdicts) / len(right) for verdicts in zip(*right, strict=True))
    stderr = (accuracy_norm * (1 - accuracy_norm) / max(1, len(right) - 1)) ** 0.5
    return ZeroShotResult(task.name, len(right), accuracy, accuracy_norm, stderr)


def answers(
    model: Any, tokenizer: Any, task: Task, *, limit: int | None = None, batch_size: int = 16, progress: bool = True
) -> list[tuple[bool, bool]]:
    """For every item whether a model answers it right, by log-likelihood and by log-likelihood per character.

    Arguments and errors are those of `zero_shot`.
    """
    return _answers(model, encode_task(model.config, tokenizer, task, limit=limit), batch_size, progress)


def encode_task(config: Any, tokenizer: Any, task: Task, *, limit: int | None = None) -> EncodedTask:
    """Tokenise a task, with all checks that need no weights.

    Args:
        config: of the model that will answer.
        tokenizer: its tokenizer.
        task: see `load_task`.
        limit: only the first so many items.

    Raises:
        OptionError: a limit below 1, a choice without a token of its own, or a token that the model does not embed.
    """
    if limit is not None:
        check_whole("limit", limit)
    items = task.items[:limit]
    longest = longest_context(config) or 2**31
    pairs = []
    for number, item in enumerate(items):
        for context, continuation in item.choices:
            ids, scored = _encode(tokenizer, context, continuation)
            # Each scored token has a token before it.
            if not 0 < scored <= min(longest, len(ids) - 1):
                raise OptionError(
                    f"{task.name}, item {number}: {scored} of the {len(ids)} tokens of its text belong to the choice "
                    f"{shortened(continuation.strip())}; at least one must, and one not, within a context of {longest}"
                )
            # The last token is predicted, and not read.
            pairs.append((ids[-(longest + 1) :], scored))
    check_token_ids(config, torch.tensor([token for ids, _ in pairs for token in ids]))
    return EncodedTask(task, items, pairs)


@torch.no_grad()
def _answers(model: Any, encoded: EncodedTask, batch_size: int, progress: bool) -> list[tuple[bool, bool]]:
    check_whole("batch_size", batch_size)
    task, items, pairs = encoded.task, encoded.items, encoded.pairs
    likelihoods = torch.empty(len(pairs), dtype=torch.float64)
    # Sequences of like lengths together: little padding.
    order = sorted(range(len(pairs)), key=lambda number: len(pairs[number][0]))
    with (
        evaluation_mode(model),
        Bar(task.name, total=len(pairs), unit="choice", progress=progress) as bar,
    ):
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            likelihoods[numbers] = _log_likelihoods(model, [pairs[number] for number in numbers])
            bar.update(len(numbers))
    if bool(likelihoods.isnan().any()):
        raise NonFiniteError(f"{task.name}: a log-likelihood is NaN. Check the model's weights, or load it in float32.")
    return list(_verdicts(items, likelihoods))


def _encode(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of both texts together, and how many of the last ones belong to the continuation.

    They are tokenised as one text, and cut where the context alone would end. Spaces at the end of the context go to
    the continuation, as most tokenizers join a space with the word after it.
    """
    both, start = context + continuation, context.rstrip()
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    marked = first is not None and both.startswith(tokenizer.decode(first))
    ids = tokenizer(both, add_special_tokens=not marked)["input_ids"]
    return ids, len(ids) - len(tokenizer(start, add_special_tokens=not marked)["input_ids"])


def _log_likelihoods(model: Any, pairs: Sequence[tuple[list[int], int]]) -> Tensor:
    """Log-likelihood of the last tokens of each sequence: float64 (len(pairs),)."""
    # Padding stands on the right, where no token before it looks: no mask is needed.
    input_ids = torch.zeros(len(pairs), max(len(ids) for ids, _ in pairs) - 1, dtype=torch.int64)
    for row, (ids, _) in enumerate(pairs):
        input_ids[row, : len(ids) - 1] = torch.tensor(ids[:-1])
    hidden = model.base_model(input_ids=input_ids.to(model.device), use_cache=False).last_hidden_state
    # Only positions that predict a scored token go through the head.
    rows = torch.tensor([row for row, (_, scored) in enumerate(pairs) for _ in range(scored)])
    columns = torch.tensor([len(ids) - scored + k - 1 for ids, scored in pairs for k in range(scored)])
    targets = torch.tensor([token for ids, scored in pairs for token in ids[len(ids) - scored :]])
    logits = head_function(model)(hidden[rows, columns]).float()
    losses = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
    return torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, rows, -losses.double().cpu())


def _verdicts(items: Sequence[Item], likelihoods: Tensor) -> Iterator[tuple[bool, bool]]:
    """For every item whether it was answered right, by the sum and per character."""
    first = 0
    for item in items:
        sums = likelihoods[first : first + len(item.choices)]
        first += len(item.choices)
        per_character = sums / torch.tensor(item.lengths, dtype=torch.float64)
        yield int(sums.argmax()) == item.gold, int(per_character.argmax()) == item.gold
