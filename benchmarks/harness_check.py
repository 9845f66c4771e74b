"""Does `prunus eval --tasks` answer every item as lm-evaluation-harness itself does?

    python benchmarks/harness_check.py DIR --tasks zeroshot --items 50

Writes task files for the harness that read the local JSON lines, runs its own command (`lm_eval run --model hf`,
offline, without importing prunus) on the model folder, runs ours on the same items, and compares them one by one. The
exit status is 1 if a single verdict differs. Needs `pip install 'prunus[eval]'`.

The harness is told `softmax_dtype=float32`, as ours takes it; `--softmax-dtype model` leaves it at its default.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prunus.checkpoint import load_model
from prunus.evaluation.zero_shot import Task, answers, load_tasks

#: choices as the data sets have them, or as a list with the right one by number
LISTED = {
    "doc_to_target": "{{gold if answerKey is not defined or answerKey is none else "
    "choices.label.index(answerKey.strip())}}",
    "doc_to_choice": "{{choices if choices is not mapping else choices.text}}",
}
#: the harness' own definitions of these tasks, but for where the items come from
PROMPTS: dict[str, dict[str, Any]] = {
    "arc_challenge": {"doc_to_text": "Question: {{question}}\nAnswer:", **LISTED},
    "arc_easy": {"doc_to_text": "Question: {{question}}\nAnswer:", **LISTED},
    "openbookqa": {"doc_to_text": "{{question_stem}}", **LISTED},
    "social_iqa": {
        "doc_to_text": "Q: {{context}} {{question}}\nA:",
        "doc_to_target": "{{label | int - 1}}",
        "doc_to_choice": "{{[answerA, answerB, answerC]}}",
    },
    "piqa": {
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
    },
    "winogrande": {
        "doc_to_text": "{{answer | int - 1}}",
        "doc_to_target": "{{sentence[sentence.index('_') + 1:].strip()}}",
        "doc_to_choice": "{{[sentence[:sentence.index('_')] + option1, sentence[:sentence.index('_')] + option2]}}",
    },
}
#: the harness defines no acc_norm for two of them
METRICS = {name: ("acc",) if name in ("social_iqa", "winogrande") else ("acc", "acc_norm") for name in PROMPTS}


def write_task(folder: Path, name: str, items: Path) -> str:
    """Write a task of the harness over a local file; returns its name, which no task of its own has."""
    config = {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items.resolve())}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in METRICS[name]
        ],
        **PROMPTS[name],
    }
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return f"local_{name}"


def run_harness(options: argparse.Namespace, tasks: dict[str, Path], work: Path) -> dict[str, list[dict[str, Any]]]:
    """The harness' record of every item, by task, in the order of the file."""
    names = [write_task(work, name, path) for name, path in tasks.items()]
    softmax = ",softmax_dtype=float32" if options.softmax_dtype == "float32" else ""
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--include_path", str(work)),
        *("--model_args", f"pretrained={options.model},dtype={options.dtype},trust_remote_code=True{softmax}"),
        *("--tasks", ",".join(names), "--limit", str(options.items), "--batch_size", str(options.batch_size)),
        *("--device", "cpu", "--log_samples", "--output_path", str(work / "out")),
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / "cache"),
        "HF_MODULES_CACHE": str(work / "modules"),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the harness failed:\n{done.stderr[-4000:]}")
    records = {}
    for name, task in zip(tasks, names, strict=True):
        (path,) = (work / "out").rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        records[name] = sorted(lines, key=lambda line: line["doc_id"])
    return records


def compare(task: Task, ours: list[tuple[bool, bool]], theirs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per metric: both accuracies, and the items that were answered in two ways."""
    if len(ours) != len(theirs):
        sys.exit(f"{task.name}: {len(ours)} items here, {len(theirs)} there")
    rows = []
    for number, metric in enumerate(METRICS[task.name]):
        mine, other = [right[number] for right in ours], [bool(record[metric]) for record in theirs]
        rows.append(
            {
                "task": task.name,
                "metric": metric,
                "items": len(ours),
                "prunus": sum(mine) / len(mine),
                "lm_eval": sum(other) / len(other),
                "differing": [item for item, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]],
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of task files for `prunus eval`")
    parser.add_argument("--items", type=int, default=50, help="first so many items of each task")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float32", help="of the model, for both")
    parser.add_argument("--softmax-dtype", choices=["float32", "model"], default="float32", help="of the harness")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    options = parser.parse_args()
    options.model = str(Path(options.model).resolve())
    files = {load_tasks([path])[0].name: path for path in sorted(options.tasks.glob("*.jsonl"))}
    with tempfile.TemporaryDirectory() as work:
        theirs = run_harness(options, files, Path(work))
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    rows = []
    for task in load_tasks(list(files.values())):
        ours = answers(model, tokenizer, task, limit=options.items, batch_size=options.batch_size)
        rows += compare(task, ours, theirs[task.name])
    print(f"{Path(options.model).name}, {options.dtype}, lm_eval {version('lm_eval')}, softmax {options.softmax_dtype}")
    for row in rows:
        print(
            "{task:12s} {metric:9s} {items:5d} items  prunus {prunus:.4f}  lm_eval {lm_eval:.4f}".format(**row), end=""
        )
        print(f"  {len(row['differing'])} differ")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"model": Path(options.model).name, "dtype": options.dtype, "lm_eval": version("lm_eval"), "rows": rows}
        options.out.write_text(json.dumps({**facts, "softmax_dtype": options.softmax_dtype}, indent=1) + "\n")
    return int(any(row["differing"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
