"""Zero-shot accuracy against one choice at a time, unpadded, through the whole model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from tiny_families import make_model

from prunus.errors import NonFiniteError, OptionError
from prunus.evaluation.zero_shot import TASKS, answers, load_task, load_tasks, zero_shot

RECORDS = {
    "arc_easy": [
        {"id": "a", "question": "What is wet?", "choices": ["water", "a dry stone", "x", "fire"], "gold": 0},
        {"id": "b", "question": "Why?", "choices": ["because of the sun", "no", "yes"], "gold": 2},
        {"id": "c", "question": "Where does it occur?", "choices": ["here", "over there"], "gold": 1},
    ],
    "arc_challenge": [
        {
            "question": "Which is a metal?",
            "choices": {"text": ["iron", "old wood", "salt"], "label": ["A", "B", "C"]},
            "answerKey": "C",
        },
        {"question": "How many?", "choices": {"text": ["one", "a few"], "label": ["1", "2"]}, "answerKey": "1"},
    ],
    "openbookqa": [
        {
            "question_stem": "The sun is",
            "choices": {"text": ["a star", "a lamp"], "label": ["A", "B"]},
            "answerKey": "A ",
        },
        {
            "question_stem": "Ice melts when it is",
            "choices": {"text": ["warm", "in the dark"], "label": ["A", "B"]},
            "answerKey": "B",
        },
    ],
    "social_iqa": [
        {
            "context": "Kai lent Lee a coat.",
            "question": "Why?",
            "answerA": "it was cold",
            "answerB": "to annoy",
            "answerC": "no",
            "label": "1",
        },
        {
            "context": "Jo ran.",
            "question": "What next?",
            "answerA": "rest",
            "answerB": "sing a song",
            "answerC": "fly",
            "label": "3",
        },
    ],
    "piqa": [
        {"goal": "open a jar", "sol1": "turn the lid", "sol2": "sing to the jar quietly", "label": 0},
        {"goal": "ice", "sol1": "freeze water", "sol2": "boil it", "label": 1},
    ],
    "winogrande": [
        {"sentence": "Ann thanked Bea because _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        {"sentence": "The cup did not fit the box as _ was big.", "option1": "cup", "option2": "box", "answer": "1"},
    ],
}


class LetterTokenizer:
    """One token per letter: what is right of the cut is then known without looking."""

    bos_token_id = eos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) % 90 for letter in text]}


class MarkedTokenizer(LetterTokenizer):
    """The same with a token at the start, which is spelled `^`."""

    bos_token_id = 91

    def __call__(self, text, add_special_tokens=True):
        marks = [91] if add_special_tokens else []
        return {"input_ids": marks + [91 if letter == "^" else ord(letter) % 90 for letter in text]}

    def decode(self, token):
        assert token == 91
        return "^"


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "gqa")


def write(tmp_path, name, records=None):
    path = tmp_path / f"{name}_test.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records or RECORDS[name]))
    return path


def prompts(name, record):
    """Context and continuation of every choice, by the task's description."""
    if name in ("arc_easy", "arc_challenge", "openbookqa"):
        listed = record["choices"]
        context = record["question_stem"] if name == "openbookqa" else f"Question: {record['question']}\nAnswer:"
        return [(context, f" {choice}") for choice in (listed if isinstance(listed, list) else listed["text"])]
    if name == "social_iqa":
        context = f"Q: {record['context']} {record['question']}\nA:"
        return [(context, f" {record[key]}") for key in ("answerA", "answerB", "answerC")]
    if name == "piqa":
        return [(f"Question: {record['goal']}\nAnswer:", f" {record[key]}") for key in ("sol1", "sol2")]
    head, tail = record["sentence"].split("_")
    return [(head + record[key], " " + tail.strip()) for key in ("option1", "option2")]


def gold(name, record):
    if "answerKey" in record:
        return {"A": 0, "B": 1, "C": 2, "1": 0}[record["answerKey"].strip()]
    if "answer" in record:
        return int(record["answer"]) - 1
    return record["gold"] if "gold" in record else int(record["label"]) - (name == "social_iqa")


@torch.no_grad()
def likelihood(model, context, continuation):
    ids = LetterTokenizer()(context + continuation, False)["input_ids"]
    log_probabilities = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    first = len(context)
    return sum(float(log_probabilities[t - 1, ids[t]]) for t in range(first, len(ids)))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_accuracies_are_those_of_one_choice_at_a_time(model, tmp_path, name, batch_size):
    right, right_norm = [], []
    for record in RECORDS[name]:
        pairs = prompts(name, record)
        sums = [likelihood(model, *pair) for pair in pairs]
        per_character = [total / len(pair[1].strip()) for total, pair in zip(sums, pairs, strict=True)]
        right.append(sums.index(max(sums)) == gold(name, record))
        right_norm.append(per_character.index(max(per_character)) == gold(name, record))
    result = zero_shot(model, LetterTokenizer(), load_task(write(tmp_path, name)), batch_size=batch_size)
    assert (result.task, result.items) == (name, len(RECORDS[name]))
    assert result.accuracy == pytest.approx(sum(right) / len(right))
    assert result.accuracy_norm == pytest.approx(sum(right_norm) / len(right_norm))
    share = result.accuracy_norm
    assert result.stderr == pytest.approx((share * (1 - share) / (len(right) - 1)) ** 0.5)


def test_log_likelihoods_themselves(model, tmp_path):
    """Accuracies are coarse: the numbers behind them agree too."""
    from prunus.evaluation.zero_shot import _encode, _log_likelihoods

    pairs = [pair for name in TASKS for record in RECORDS[name] for pair in prompts(name, record)]
    encoded = [_encode(LetterTokenizer(), *pair) for pair in pairs]
    actual = _log_likelihoods(model, encoded)
    expected = torch.tensor([likelihood(model, *pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("context", "continuation", "ids", "scored"),
    [
        ("ab", " cd", [91, *map(ord, "ab cd")], 3),
        ("ab  ", "cd", [91, *map(ord, "ab  cd")], 4),  # spaces at the end are scored, as the harness scores them
        ("^ab", "c", [91, *map(ord, "abc")], 1),  # marked already
    ],
)
def test_tokens_of_a_choice(context, continuation, ids, scored):
    from prunus.evaluation.zero_shot import _encode

    expected = [token if token == 91 else token % 90 for token in ids]
    assert _encode(MarkedTokenizer(), context, continuation) == (expected, scored)


@torch.no_grad()
def test_a_long_text_loses_its_start(tmp_path):
    """All of the context that the model can read is read: its last token is only predicted."""
    model = make_model("llama", "gqa", max_position_embeddings=16)
    records = [
        {"goal": "p" * 30 + str(n), "sol1": f"a{n} b", "sol2": f"c{n * 7} dd", "label": n % 2} for n in range(12)
    ]
    expected = []
    for record in records:
        sums = []
        for context, continuation in prompts("piqa", record):
            ids = [ord(letter) % 90 for letter in context + continuation][-17:]
            logits = torch.log_softmax(model(torch.tensor([ids[:-1]])).logits[0].double(), dim=-1)
            own = len(continuation)
            sums.append(sum(float(logits[len(ids) - own + k - 1, ids[len(ids) - own + k]]) for k in range(own)))
        expected.append(sums.index(max(sums)) == record["label"])
    actual = answers(model, LetterTokenizer(), load_task(write(tmp_path, "piqa", records)))
    assert [right for right, _ in actual] == expected
    assert len(set(expected)) == 2


def test_a_choice_without_a_token_of_its_own(model, tmp_path):
    class Swallowing(LetterTokenizer):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, 2]}

    with pytest.raises(OptionError, match="piqa, item 0: 0 of the 2 tokens of its text belong to the choice"):
        zero_shot(model, Swallowing(), load_task(write(tmp_path, "piqa")))


def test_tasks_of_a_folder(tmp_path):
    for name in ("winogrande", "arc_easy"):
        write(tmp_path, name)
    (tmp_path / "notes.jsonl").write_text("no task")
    assert [task.name for task in load_tasks([tmp_path])] == ["arc_easy", "winogrande"]
    assert [task.name for task in load_tasks([tmp_path / "winogrande_test.jsonl"])] == ["winogrande"]
    with pytest.raises(OptionError, match="task winogrande is given twice"):
        load_tasks([tmp_path, tmp_path / "winogrande_test.jsonl"])
    empty = tmp_path / "empty"
    empty.mkdir()
    named = r"empty holds no task: its \.jsonl files are named after one of arc_challenge, arc_easy"
    with pytest.raises(OptionError, match=named):
        load_tasks([empty])


def test_limit(model, tmp_path):
    task = load_task(write(tmp_path, "arc_easy"))
    assert zero_shot(model, LetterTokenizer(), task, limit=2).items == 2
    with pytest.raises(OptionError, match="`limit` is 0"):
        zero_shot(model, LetterTokenizer(), task, limit=0)


def test_files_that_are_no_tasks(tmp_path):
    named = r"other\.jsonl names no task that is known; name it after one of arc_challenge, arc_easy"
    (tmp_path / "other.jsonl").write_text("{}")
    with pytest.raises(OptionError, match=named):
        load_task(tmp_path / "other.jsonl")
    with pytest.raises(OptionError, match=r"cannot read the task file .*: there is no such file or folder"):
        load_task(tmp_path / "piqa.jsonl")
    empty = tmp_path / "piqa_empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(OptionError, match="holds no items"):
        load_task(empty)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("arc_easy", {"question": "?", "choices": ["a", "b"], "gold": 2}),
        ("arc_easy", {"question": "?", "choices": ["a", ""], "gold": 0}),
        ("arc_easy", {"question": "?", "choices": "abc", "gold": 0}),
        ("arc_easy", {"question": "?", "choices": ["a", "b"], "gold": 1.5}),
        ("arc_easy", {"question": "?", "choices": ["a", 2], "gold": 0}),
        ("arc_challenge", {"question": "?", "choices": ["a", "b"]}),
        ("arc_challenge", {"question": "?", "choices": ["a", "b"], "answerKey": "A"}),
        ("arc_challenge", {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}),
        ("arc_challenge", {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "gold": 1}),
        ("arc_easy", {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}, "answerKey": "C"}),
        ("openbookqa", {"question": "?", "choices": ["a", "b"], "gold": 0}),
        ("social_iqa", {"context": "x", "question": "?", "answerA": "a", "answerB": "b", "answerC": "c", "label": 0}),
        ("piqa", {"goal": "?", "sol1": "a", "sol2": "b", "label": True}),
        ("piqa", {"goal": "?", "sol1": "a", "sol2": "b", "label": "٣"}),
        ("piqa", {"goal": "?", "sol1": "a", "label": 0}),
        ("winogrande", {"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}),
        ("winogrande", {"sentence": "a _ gap", "option1": "a", "option2": "b", "answer": "one"}),
    ],
)
def test_lines_that_are_no_items(tmp_path, name, record):
    path = write(tmp_path, name, [RECORDS[name][0], record])
    with pytest.raises(OptionError, match=rf"line 2: not an item of {name}"):
        load_task(path)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"text": ["a"], "label": ["A"]}, "choices.text is an array of 1; List should have at least 2 items"),
        ({"text": ["a", ""], "label": ["A", "B"]}, 'choices.text.1 is ""; '),
        ({"text": ["a", "b"], "label": [1, 2]}, "choices.label.0 is 1; it must be text"),
        ({"text": ["a", "b"]}, "choices.label is missing"),
        ({"text": ["a", "b", "c"], "label": ["A", "B"]}, "choices: 3 texts need as many labels, each another"),
        ({"text": ["a", "b"], "label": ["A", "A"]}, "choices: 2 texts need as many labels, each another"),
        (["a"], "choices is an array of 1; List should have at least 2 items"),
        ("ab", 'choices is "ab"; it must be an array'),
    ],
)
def test_what_is_wrong_with_choices(tmp_path, choices, message):
    record = {"question": "?", "choices": choices, "answerKey": "A", "gold": 0}
    with pytest.raises(OptionError, match=re.escape(f"line 1: not an item of arc_easy: {message}")):
        load_task(write(tmp_path, "arc_easy", [record]))


def test_nan(tmp_path):
    model = make_model("llama", "gqa")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="piqa: a log-likelihood is NaN"):
        zero_shot(model, LetterTokenizer(), load_task(write(tmp_path, "piqa")))
