r"""Zero-shot tasks as files for `prunus eval --tasks`, from a clone of LLM-Adapters, which holds their test items.

    git clone https://github.com/AGI-Edgerunners/LLM-Adapters
    python benchmarks/task_files.py LLM-Adapters --out zeroshot

The repository has each question and its choices in one text, "Please choose the correct answer to the question: … \n\n
Answer1: … Answer2: …". Items that cannot be taken apart without doubt are left out, and counted.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

#: the repository's folder of each task
FOLDERS = {"arc_challenge": "ARC-Challenge", "openbookqa": "openbookqa", "social_iqa": "social_i_qa"}
_ASKED = re.compile(
    r"Please choose the correct answer to the question: (?P<question>.*)\n\n(?P<choices>Answer1: .*)\n\nAnswer format: "
    r"(?P<format>[\w/]+)\s*",
    re.DOTALL,
)
_LETTERS = "ABCDEFGH"


def taken_apart(row: dict[str, Any]) -> tuple[str, list[str], int] | None:
    """Question, choices and the number of the right one; None where that is in doubt."""
    said = _ASKED.fullmatch(row["instruction"])
    if said is None:
        return None
    names = said["format"].split("/")
    parts = re.split(r"\s*\bAnswer(\d): ", " " + said["choices"])
    numbers, choices = parts[1::2], [part.strip() for part in parts[2::2]]
    if [f"answer{number}" for number in numbers] != names or not all(choices) or row["answer"] not in names:
        return None
    return said["question"].strip(), choices, names.index(row["answer"])


def item(task: str, question: str, choices: list[str], gold: int) -> dict[str, Any] | None:
    """The item with the fields of the data set on the Hub."""
    if task == "social_iqa":
        # The last sentence asks; what stands before it is the situation.
        found = re.fullmatch(r"(?P<context>.*[.!?\"'])\s+(?P<question>[^.!?]+\?)", question, re.DOTALL)
        if found is None or len(choices) != 3:
            return None
        answers = {f"answer{letter}": choice for letter, choice in zip("ABC", choices, strict=True)}
        return {**found.groupdict(), **answers, "label": str(gold + 1)}
    stem = "question_stem" if task == "openbookqa" else "question"
    listed = {"text": choices, "label": list(_LETTERS[: len(choices)])}
    return {stem: question, "choices": listed, "answerKey": _LETTERS[gold]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", type=Path, help="clone of LLM-Adapters")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for task, folder in FOLDERS.items():
        rows = json.loads((options.clone / "dataset" / folder / "test.json").read_text(encoding="utf-8"))
        apart = [taken_apart(row) for row in rows]
        items = [item(task, *one) if one else None for one in apart]
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in items if one]
        (options.out / f"{task}_test.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{task}: {len(lines)} items, {len(rows) - len(lines)} left out", file=sys.stderr)


if __name__ == "__main__":
    main()
