"""Damage to every file that prunus reads, thousands of times: an error that says so, or a right result.

    python tests/fuzz.py --cases 2000 --seed 0     # all kinds of files; `make fuzz`
    python tests/fuzz.py --kinds plan,score --cases 100

A case copies a folder that a command reads, damages one file in it, and runs the command in this process, with a clock
and a bound on memory. It is a finding if an exception gets through, the clock runs out, a message names nothing, or the
command takes the damaged file and gives a model that is not what plan, config and tensors say together.

`KINDS` is data: a file, the command that reads it, and what has to hold when the command succeeds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import logging
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import pandas as pd
import torch
import yaml
from tiny_families import make_model
from tiny_folder import TEXT, byte_tokenizer

from prunus.checkpoint import load_model
from prunus.cli import main
from prunus.errors import PrunusError
from prunus.model.widths import layer_widths_of
from prunus.report.page import drawing_library
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan

#: of the process itself; the clock may show eight times as many, as other work may run beside it
SECONDS = 20
PATIENCE = 8
#: on top of what the process has mapped when it begins
MEMORY = 3 * 2**30
SHORT = ["--samples", "4", "--seq-len", "16"]
EVALUATED = ["--seq-len", "16", "--windows", "1"]


# --- damage ---

Damage = Callable[[random.Random, bytes], bytes]

NUMBERS = [0, -1, 1, 2, 3.5, 10**9, 10**12, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e300, 1e-320, 0.1, -0.0]
NONFINITE = [float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    " ",
    "0",
    "3",
    "-1",
    "1e9",
    "nan",
    "ä→\u202e",
    "\x00",
    "\x1b[31mred",
    "../../x",
    "a" * 5000,
    "\ud800",
    "[b]",
    "_",
]
LEAVES = [*NUMBERS, *NONFINITE, *TEXTS, None, True, False, [], {}, [[]], {"a": 1}, [1, 2], ["0-5"]]


def nested(depth: int) -> Any:
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


def changed_values(random_: random.Random, values: Any) -> Any:
    """One to three nodes of a JSON value replaced, removed, doubled, renamed or exchanged."""
    for _ in range(random_.choice([1, 1, 1, 2, 3])):
        places = list(nodes(values))
        if not places:
            return random_.choice(LEAVES)
        parent, key = random_.choice(places)
        change = random_.choice(
            ["replace", "replace", "replace", "nudge", "remove", "rename", "double", "exchange", "deep"]
        )
        if change == "replace":
            parent[key] = copy.deepcopy(random_.choice(LEAVES))
        elif change == "nudge" and type(parent[key]) in (int, float):
            parent[key] = random_.choice(
                [parent[key] + 1, parent[key] - 1, -parent[key], parent[key] * 2, float(parent[key])]
            )
        elif change == "nudge" and isinstance(parent[key], str):
            parent[key] = altered_text(random_, parent[key])
        elif change == "remove":
            del parent[key]
        elif change == "rename" and isinstance(parent, dict):
            parent[random_.choice(TEXTS)[:50]] = parent.pop(key)
        elif change == "double" and isinstance(parent, list):
            with contextlib.suppress(RecursionError):  # of what an earlier change has nested deeply
                parent.insert(key, copy.deepcopy(parent[key]))
        elif change == "exchange":
            other, place = random_.choice(places)
            try:
                parent[key] = copy.deepcopy(other[place])
            except (KeyError, IndexError, RecursionError):
                continue
        elif change == "deep":
            parent[key] = nested(random_.choice([20, 90, 150, 600]))
    return values


def nodes(values: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: its parent and key."""
    waiting = [values]
    while waiting:
        parent = waiting.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        for key in keys:
            yield parent, key
            waiting.append(parent[key])


def altered_text(random_: random.Random, text: str) -> str:
    at = random_.randrange(len(text) + 1)
    return (
        text[:at]
        + random_.choice(["9", "99999999", ",", "-", "0-", " ", "é", "\x00", "/", "a"])
        + text[at + random_.choice([0, 1]) :]
    )


def damage_json(random_: random.Random, content: bytes) -> bytes:
    if random_.random() < 0.3:
        return damage_bytes(random_, content)
    values = changed_values(random_, json.loads(content))
    text = json.dumps(values)
    if random_.random() < 0.1 and isinstance(values, dict) and values:  # a key twice
        key = random_.choice(list(values))
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(random_.choice(LEAVES))}}}"
    return text.encode("utf-8", "surrogatepass")


def damage_bytes(random_: random.Random, content: bytes) -> bytes:
    change = random_.choice(
        ["flip", "flip", "flip", "cut", "empty", "utf-16", "bom", "nested", "another", "insert", "noise", "huge"]
    )
    if change == "cut":
        return content[: random_.randrange(len(content) + 1)]
    if change == "empty":
        return random_.choice([b"", b"\n", b"{}", b"[]", b"null", b"0", b'""'])
    if change == "utf-16":
        return content.decode("latin-1").encode("utf-16")
    if change == "bom":
        return b"\xef\xbb\xbf" + content
    if change == "nested":
        return random_.choice([b"[", b'{"a":']) * random_.choice([50, 500, 100_000])
    if change == "another":
        return random_.choice(
            [
                b"PK\x03\x04" + bytes(50),
                b"PAR1" + bytes(40) + b"PAR1",
                b"\x80\x04\x95",
                b"GGUF\x03\0\0\0",
                TEXT.encode(),
            ]
        )
    if change == "noise":
        return random_.randbytes(random_.choice([1, 8, 200]))
    if change == "huge":
        return content + b" " * 300_000
    damaged = bytearray(content)
    for _ in range(random_.choice([1, 1, 2, 5])):
        at = random_.randrange(len(damaged) + 1)
        if change == "insert":
            damaged[at:at] = random_.choice(
                [b"9" * 12, b"-", b"NaN", b"1e999", b'"', b",", b"\xff", b"\x00", b"\n", b"\\ud800"]
            )
        elif at < len(damaged):
            damaged[at] ^= 1 << random_.randrange(8)
    return bytes(damaged)


def damage_lines(random_: random.Random, content: bytes) -> bytes:
    """JSON lines, one of which is damaged."""
    if random_.random() < 0.3:
        return damage_bytes(random_, content)
    lines = content.splitlines()
    number = random_.randrange(len(lines))
    lines[number] = damage_json(random_, lines[number]) or b"{"
    return b"\n".join(lines) + b"\n"


def damage_table(random_: random.Random, content: bytes) -> bytes:
    """A CSV, cells, rows or columns of which are damaged."""
    if random_.random() < 0.3:
        return damage_bytes(random_, content)
    rows = [line.split(",") for line in content.decode().splitlines()]
    for _ in range(random_.choice([1, 1, 2, 4])):
        row = random_.choice(rows)
        change = random_.choice(["cell", "cell", "cell", "drop", "double", "column", "swap"])
        if change == "cell":
            values = [
                *map(str, NUMBERS),
                "nan",
                "inf",
                "",
                "x",
                "attention",
                "mlp",
                "True",
                '"',
                "1e999",
                "9" * 30,
                "0x10",
                "1_0",
            ]
            row[random_.randrange(len(row))] = random_.choice(values)
        elif change == "drop" and len(rows) > 2:
            rows.remove(row)
        elif change == "double":
            rows.append(list(row))
        elif change == "column":
            row.pop(random_.randrange(len(row)))
            row = row or [""]
        elif change == "swap":
            random_.shuffle(row)
        rows = [row or [""] for row in rows]
    return ("\n".join(",".join(row) for row in rows) + "\n").encode()


def damage_tensors(random_: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header, or bytes of its front damaged."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    change = random_.choice(["header", "header", "length", "bytes", "cut"])
    if change == "header":
        text = json.dumps(changed_values(random_, json.loads(header))).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text + data
    if change == "length":
        return struct.pack("<Q", random_.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])) + content[8:]
    if change == "cut":
        return content[: random_.randrange(len(content))]
    return damage_bytes(random_, content[: 8 + length]) + data


def damage_yaml(random_: random.Random, content: bytes) -> bytes:
    """YAML, values or bytes of which are damaged."""
    if random_.random() < 0.3:
        return damage_bytes(random_, content)
    values = changed_values(random_, yaml.safe_load(content))
    try:
        text = yaml.safe_dump(values)
    except RecursionError:
        text = json.dumps(values)  # which is YAML, too
    if random_.random() < 0.1:
        text += random_.choice(["a: &x [1]\nb: *x\n", "? [1]\n: 2\n", "!!python/object:os.system {}\n", "---\n"])
    return text.encode("utf-8", "surrogatepass")


# --- what has to hold ---


def finite(folder: Path) -> None:
    """A model folder loads, its config is what its tensors are, and its logits are numbers."""
    model, _ = load_model(folder)
    config = model.config
    for widths, layer in zip(layer_widths_of(config), model.model.layers, strict=True):
        attention, mlp = (getattr(layer, name, None) for name in ("self_attn", "mlp"))
        if widths["mlp"]:
            assert mlp.down_proj.in_features == widths["mlp"], "config and tensors differ"
        if widths["attention"]:
            assert attention.k_proj.out_features == widths["attention"] * config.head_dim, "config and tensors differ"
    with torch.no_grad():
        logits = model(torch.arange(10)[None] % model.get_input_embeddings().num_embeddings).logits
    assert bool(logits.isfinite().all()), "logits are not finite"


def cut_by(case: Case) -> None:
    """The result is the model cut by the plan that was given, and no other."""
    plan = Plan.load(case.damaged)
    dense, _ = load_model(case.folder / "model")
    expected, found = apply_plan(dense, plan).eval(), load_model(case.out)[0]
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(expected(ids).logits, found(ids).logits), "the result is not what the plan says"
    finite(case.out)


def planned(case: Case) -> None:
    """A plan for the model of the table that removes what was asked for."""
    from prunus.scoring.score import Score

    score, plan = Score.load(case.folder / "scores"), Plan.load(case.out)
    plan.check_fits(score.geometry)
    dense, _ = load_model(case.folder / "model")
    if score.geometry.widths == layer_widths_of(dense.config):
        smaller = apply_plan(dense, plan)
        if score.geometry.to_dict() == json.loads((case.whole / "scores" / "score.json").read_text())["geometry"]:
            assert smaller.num_parameters() == score.geometry.parameters_left(plan.kept_widths)


def pruned(case: Case) -> None:
    finite(case.out)
    plan = Plan.load(case.out / "prunus" / "plan.json")
    widths = tuple(plan.kept_widths[i] for i in plan.surviving_layers)
    assert layer_widths_of(load_model(case.out)[0].config) == widths, "plan and shapes differ"


def recovered(case: Case) -> None:
    finite(case.out)


def same_page(case: Case) -> None:
    page = (case.out).read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")


def is_json(case: Case) -> None:
    values = json.loads(case.said)
    for parent, key in nodes(values):
        assert not isinstance(parent[key], float) or math.isfinite(parent[key]), f"{key} is {parent[key]}"


# --- the kinds ---


@dataclass(frozen=True)
class Kind:
    """A file and what reads it.

    Attributes:
        path: of the file in the folder of a case.
        command: that reads it; `{}` stands for the folder, `OUT` for its output.
        damage: how.
        holds: what has to hold when the command succeeds.
        weight: cases of this kind, relative to others.
    """

    path: str
    command: Sequence[str]
    damage: Damage = damage_json
    holds: Callable[[Case], None] | None = None
    weight: float = 1.0


@dataclass
class Case:
    """One run of a command."""

    kind: Kind
    folder: Path
    whole: Path
    said: str = ""

    @property
    def damaged(self) -> Path:
        return self.folder / self.kind.path

    @property
    def out(self) -> Path:
        return self.folder / "out"


PLAIN = ["--recipe", "original", "--method", "wanda", "--ratio", "0.1", *SHORT]
PLAIN += ["--set", "evaluation.held_out=0", "--set", "output.report=false", "--set", "scoring.normalize=layer_sum"]
PRUNE = ["prune", "{}/model", "--out", "OUT", *PLAIN, "--calibration"]
BY_RECIPE = ["prune", "{}/model", "--out", "OUT", "--ratio", "0.1", *SHORT, "--calibration", "{}/text.txt", "--recipe"]
AGAIN = ["prune", "{}/small", "--out", "OUT", *PLAIN, "--calibration", "{}/text.txt"]
STREAMED = ["prune", "{}/model", "--out", "OUT", *PLAIN, "--set", "run.engine=streamed", "--calibration", "{}/text.txt"]
PLANS = ["plan", "{}/scores", "--ratio", "0.2", "--out", "OUT"]
REPORT = ["report", "{}/small", "--out", "OUT"]
CARD = ["eval", "{}/small", "--update-card", "--text", "{}/text.txt", *EVALUATED]
ASK = ["eval", "{}/model", "--items", "2", "--json", "--tasks"]

RECOVER = ["recover", "{}/small", "--out", "OUT", "--text", "{}/text.txt", "--teacher", "{}/model", "--seq-len", "16"]
RECOVER += ["--set", "text.held_out=2", "--set", "recovery.micro_batch=2", "--set", "recovery.checkpoints=2"]
RECOVER += ["--batch-size", "2", "--max-steps", "4", "--set"]
FINISHED, UNFINISHED = [*RECOVER, "output.work={}/finished"], [*RECOVER, "output.work={}/unfinished"]
LAST = "unfinished/checkpoint-2"

KINDS: dict[str, Kind] = {
    "config": Kind("model/config.json", [*PRUNE, "{}/text.txt"], holds=pruned, weight=2),
    "config, streamed": Kind("model/config.json", STREAMED, holds=pruned),
    "config of a cut model": Kind(
        "small/config.json",
        ["export", "{}/small", "--to", "dense", "--out", "OUT"],
        holds=lambda case: finite(case.out),
        weight=2,
    ),
    "generation config": Kind("model/generation_config.json", [*PRUNE, "{}/text.txt"], holds=pruned),
    "tokenizer": Kind("model/tokenizer.json", [*PRUNE, "{}/text.txt"], holds=pruned),
    "tokenizer config": Kind("model/tokenizer_config.json", [*PRUNE, "{}/text.txt"], holds=pruned),
    "safetensors": Kind("model/model.safetensors", [*PRUNE, "{}/text.txt"], damage_tensors, pruned),
    "safetensors, streamed": Kind("model/model.safetensors", STREAMED, damage_tensors, pruned),
    "index": Kind(
        "sharded/model.safetensors.index.json",
        ["prune", "{}/sharded", "--out", "OUT", *PLAIN, "--calibration", "{}/text.txt"],
        holds=pruned,
    ),
    "index, streamed": Kind(
        "sharded/model.safetensors.index.json",
        ["prune", "{}/sharded", "--out", "OUT", *PLAIN, "--set", "run.engine=streamed", "--calibration", "{}/text.txt"],
        holds=pruned,
    ),
    "plan": Kind("plan.json", ["apply", "{}/model", "{}/plan.json", "--out", "OUT"], holds=cut_by, weight=3),
    "table": Kind("scores/groups.csv", PLANS, damage_table, planned, weight=3),
    "score": Kind("scores/score.json", PLANS, holds=planned, weight=3),
    "statistics": Kind("scores/statistics.safetensors", ["statistics"], damage_tensors),
    "profile": Kind(
        "profile.json",
        [*PLANS, "--target", "latency", "--set", "target.profile={}/profile.json"],
        holds=planned,
        weight=2,
    ),
    "metrics, report": Kind("small/prunus/metrics.json", REPORT, holds=same_page, weight=2),
    "metrics, again": Kind("small/prunus/metrics.json", AGAIN, holds=pruned),
    "metrics, card": Kind("small/prunus/metrics.json", CARD),
    "plan, report": Kind("small/prunus/plan.json", REPORT, holds=same_page),
    "plan, again": Kind("small/prunus/plan.json", AGAIN, holds=pruned),
    "table, report": Kind("small/prunus/groups.csv", REPORT, damage_table, same_page),
    "samples": Kind("small/prunus/samples.json", REPORT, holds=same_page),
    "evaluation, report": Kind("small/prunus/evaluation.json", REPORT, holds=same_page, weight=2),
    "evaluation, card": Kind("small/prunus/evaluation.json", CARD, weight=2),
    "card": Kind("small/README.md", CARD, damage_bytes),
    "comparison": Kind(
        "comparison/comparison.json", ["report", "{}/comparison", "--out", "OUT"], holds=same_page, weight=3
    ),
    "plan of a comparison": Kind(
        "comparison/plans/wanda-0.2-seed0.json", ["report", "{}/comparison", "--out", "OUT"], holds=same_page
    ),
    "parquet": Kind("text.parquet", [*PRUNE, "{}/text.parquet"], damage_bytes, pruned),
    "jsonl": Kind("text.jsonl", [*PRUNE, "{}/text.jsonl"], damage_lines, pruned),
    "text": Kind("text.txt", [*PRUNE, "{}/text.txt"], damage_bytes, pruned),
    "arc_easy": Kind("tasks/arc_easy.jsonl", [*ASK, "{}/tasks/arc_easy.jsonl"], damage_lines, is_json),
    "piqa": Kind("tasks/piqa.jsonl", [*ASK, "{}/tasks/piqa.jsonl"], damage_lines, is_json),
    "openbookqa": Kind("tasks/openbookqa.jsonl", [*ASK, "{}/tasks/openbookqa.jsonl"], damage_lines, is_json),
    "social_iqa": Kind("tasks/social_iqa.jsonl", [*ASK, "{}/tasks/social_iqa.jsonl"], damage_lines, is_json),
    "winogrande": Kind("tasks/winogrande.jsonl", [*ASK, "{}/tasks/winogrande.jsonl"], damage_lines, is_json),
    "recovery inputs": Kind("finished/recovery-inputs.json", FINISHED, holds=recovered, weight=0.5),
    "recovery trained": Kind("finished/recovery-trained.json", FINISHED, holds=recovered),
    "trainer state": Kind(f"{LAST}/trainer_state.json", UNFINISHED, holds=recovered),
    "trainer optimizer": Kind(f"{LAST}/optimizer.pt", UNFINISHED, damage_bytes, recovered, weight=0.5),
    "trainer schedule": Kind(f"{LAST}/scheduler.pt", UNFINISHED, damage_bytes, recovered, weight=0.5),
    "trainer random": Kind(f"{LAST}/rng_state.pth", UNFINISHED, damage_bytes, recovered, weight=0.5),
    "trainer weights": Kind(f"{LAST}/model.safetensors", UNFINISHED, damage_tensors, recovered),
    "recipe": Kind("recipe.yaml", [*BY_RECIPE, "{}/recipe.yaml"], damage_yaml, pruned, weight=2),
    "recipe of a result": Kind("small/prunus/recipe.yaml", AGAIN, damage_yaml, pruned, weight=0.5),
    "inspect": Kind("small/prunus/plan.json", ["inspect", "{}/small", "--json"], holds=is_json),
}


# --- running ---


class Killed(BaseException):
    """Nothing that a command handles."""


class OutOfTime(BaseException):
    """Nothing that a command handles."""


@dataclass
class Finding:
    """What should not have happened."""

    kind: str
    number: int
    what: str
    detail: str


@dataclass
class Tally:
    """What came of the cases."""

    cases: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def add(self, other: Tally) -> None:
        self.cases += other.cases
        self.refused += other.refused
        self.findings += other.findings
        self.slowest = max(self.slowest, other.slowest)


def build(place: Path) -> Path:
    """A folder with everything that the kinds damage."""
    whole = place / "whole"
    whole.mkdir(parents=True)
    (whole / "text.txt").write_text(TEXT[:6000], encoding="utf-8")
    (whole / "text.jsonl").write_text(
        "".join(json.dumps({"text": TEXT[i : i + 200]}) + "\n" for i in range(0, 4000, 200))
    )
    pd.DataFrame({"text": [TEXT[i : i + 200] for i in range(0, 4000, 200)]}).to_parquet(whole / "text.parquet")
    model = make_model("llama", "gqa", num_hidden_layers=2, vocab_size=260)
    model.save_pretrained(whole / "model")
    model.save_pretrained(whole / "sharded", max_shard_size="40KB")
    for name in ("model", "sharded"):
        byte_tokenizer().save_pretrained(whole / name)
    assert (whole / "sharded" / "model.safetensors.index.json").is_file()
    tasks = whole / "tasks"
    tasks.mkdir()
    records = {
        "arc_easy": {"question": "What is wet?", "choices": ["water", "sand", "air"], "gold": 0},
        "openbookqa": {
            "question_stem": "Ice is",
            "choices": {"text": ["cold", "hot"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "social_iqa": {
            "context": "It was cold.",
            "question": "What now?",
            "answerA": "a coat",
            "answerB": "a swim",
            "answerC": "sand",
            "label": "1",
        },
        "piqa": {"goal": "cut bread", "sol1": "use a knife", "sol2": "use a spoon", "label": 0},
        "winogrande": {
            "sentence": "The cup did not fit as _ was big.",
            "option1": "it",
            "option2": "he",
            "answer": "1",
        },
    }
    for name, record in records.items():
        (tasks / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 3)
    calibration = ["--calibration", "{}/text.txt", *SHORT]
    say = [
        ["score", "{}/model", "--out", "{}/scores", "--method", "wanda", *calibration],
        ["plan", "{}/scores", "--ratio", "0.3", "--out", "{}/plan.json"],
        ["prune", "{}/model", "--out", "{}/small", "--ratio", "0.15", *calibration, "--set", "evaluation.held_out=2"],
        ["eval", "{}/small", "--compare", "{}/model", "--update-card", "--text", "{}/text.txt", *EVALUATED, "--tasks",
         "{}/tasks", "--generate", "--speed", "--set", "speed.prompt_tokens=4", "--set", "speed.new_tokens=2",
         "--set", "speed.repeats=1", "--set", "speed.memory=false"],
        ["compare", "{}/model", "--out", "{}/comparison", "--methods", "wanda,magnitude", "--ratios", "0.1,0.2",
         "--eval-text", "{}/text.txt", "--set", "evaluation.seq_len=16", "--set", "evaluation.windows=1",
         *calibration],
        ["profile", "{}/model", "--out", "{}/profile.json", "--prompt-tokens", "4", "--new-tokens", "2",
         "--repeats", "1"],
    ]  # fmt: skip
    for words in say:
        status, _, err = said(words, whole)
        assert status == 0, f"{' '.join(words)}: {err}"
    from prunus.pipeline.job_file import job_text, read_job

    (whole / "recipe.yaml").write_text(
        job_text(read_job("original", ["evaluation.held_out=0", "output.report=false"], {}))
    )
    # A run that was killed before its result was written, and one that was killed half-way.
    with mock.patch("prunus.recovery.result.save_checkpoint", side_effect=Killed), contextlib.suppress(Killed):
        said(FINISHED, whole)
    shutil.copytree(whole / "finished", whole / "unfinished")
    (whole / "unfinished" / "recovery-trained.json").unlink()
    shutil.rmtree(whole / "unfinished" / "checkpoint-4")
    evaluation = whole / "small" / "prunus" / "evaluation.json"
    figures = json.loads(evaluation.read_text())
    run = {
        "task": "mmlu",
        "items": 5,
        "few_shot": 5,
        "metrics": {"acc": 0.4},
        "stderr": {"acc": 0.1},
        "harness": "0.4.9",
    }
    figures["harness"] = figures["dense"]["harness"] = [run]
    evaluation.write_text(json.dumps(figures, indent=1))
    return whole


def said(words: Sequence[str], folder: Path) -> tuple[int, str, str]:
    """Exit status, output and messages of a command on a folder."""
    out, err = io.StringIO(), io.StringIO()
    typed = [word.replace("{}", str(folder)).replace("OUT", str(folder / "out")) for word in words]
    for handler in list(logging.root.handlers):
        logging.root.removeHandler(handler)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = _read_statistics(folder) if typed == ["statistics"] else main(typed)
    return status, out.getvalue(), err.getvalue()


def _read_statistics(folder: Path) -> int:
    """Statistics are read by Python calls alone."""
    from prunus.statistics import Statistics

    try:
        Statistics.load(folder / "scores" / "statistics.safetensors")
    except PrunusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_case(
    name: str, number: int, seed: int, whole: Path, place: Path, *, keep: bool = False
) -> tuple[Finding | None, bool, float]:
    """One case: what was found, whether the file was refused, and the seconds it took."""
    kind = KINDS[name]
    random_ = random.Random(f"{seed}/{name}/{number}")
    folder = place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder, copy_function=os.link)
    case = Case(kind, folder, whole)
    content = case.damaged.read_bytes()
    case.damaged.unlink()
    case.damaged.write_bytes(kind.damage(random_, content) if number >= 0 else content)
    begun = time.monotonic()

    def find(what: str, detail: str) -> tuple[Finding, bool, float]:
        return Finding(name, number, what, detail), False, time.monotonic() - begun

    def ring(*_: Any) -> None:
        raise OutOfTime

    def wait(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)

    signal.signal(signal.SIGPROF, ring)
    signal.signal(signal.SIGALRM, ring)
    wait(SECONDS)
    try:
        status, case.said, err = said(kind.command, folder)
        if status == 0:
            wait(SECONDS)
            if kind.holds is not None:
                try:
                    kind.holds(case)
                except (AssertionError, PrunusError) as error:
                    return find("wrong result", f"{type(error).__name__}: {error}"[:600])
            return None, False, time.monotonic() - begun
    except OutOfTime:
        return find("hang", traceback.format_exc()[-900:])
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return find("traceback", traceback.format_exc()[-1500:])
    finally:
        wait(0)
    if number < 0:
        return find("whole file refused", err[-500:])
    if status != 1 or "error: " not in err or "Traceback" in err:
        return find("no message", f"status {status}: {err[-500:]}")
    if case.out.exists():
        return find("left behind", f"{sorted(path.name for path in case.out.parent.iterdir())}: {err[-300:]}")
    if len(err) > 20_000:
        return find("endless message", err[:300])
    return None, True, time.monotonic() - begun


def in_child(work: Callable[[], Any]) -> tuple[Any, str]:
    """What a function returns in a process of its own, which begins as a copy of this one; or how that ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            faulthandler.dump_traceback_later(
                3 * PATIENCE * SECONDS, exit=True
            )  # of a loop in which Python hears no signal
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(work(), pipe)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (pickle.loads(answer), "") if answer and not status else (None, f"the process ended with {status}")


def run_share(names: Sequence[tuple[str, int]], seed: int, whole: Path, place: Path, show: bool = False) -> Tally:
    """Many cases, one after another, each in a process of its own, as a fault may end the process."""
    place.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tally = Tally()
    for done, (name, number) in enumerate(names):
        if show and done and done % 200 == 0:
            print(f"{done} of {len(names)} cases, {len(tally.findings)} findings", file=sys.stderr, flush=True)
        answer, ended = in_child(lambda name=name, number=number: run_case(name, number, seed, whole, place))
        finding, refused, seconds = answer or (Finding(name, number, "crash", ended), False, 0.0)
        tally.cases[name] += 1
        tally.refused[name] += refused
        tally.slowest = max(tally.slowest, (seconds, f"{name} {number}"))
        if finding is not None:
            tally.findings.append(finding)
            if show:
                print(
                    f"--- {finding.kind} {finding.number}: {finding.what}\n{finding.detail}",
                    file=sys.stderr,
                    flush=True,
                )
    return tally


def cases_of(total: int, kinds: Sequence[str], whole: bool) -> list[tuple[str, int]]:
    """So many cases over all kinds by their weight; with `whole` one more of each, whose file is not damaged (-1)."""
    weight = sum(KINDS[name].weight for name in kinds)
    counts = {name: max(1, round(total * KINDS[name].weight / weight)) for name in kinds}
    return [(name, number) for name in kinds for number in range(-1 if whole else 0, counts[name])]


def bound_memory() -> None:
    """No more than `MEMORY` beyond what the process holds already; of address space that nobody uses, any amount."""
    status = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def fuzz(
    total: int,
    seed: int,
    kinds: Sequence[str],
    place: Path,
    workers: int = 1,
    *,
    whole_files: bool = True,
    show: bool = False,
) -> Tally:
    """Damage files `total` times, and tell what came of it; with `whole_files`, a refused whole file is a finding."""
    drawing_library()  # takes a process of its own, and that seconds: once, and not in every case with a report
    whole, ended = in_child(lambda: build(place))
    assert whole is not None, ended
    listed = cases_of(total, kinds, whole_files)
    random.Random(seed).shuffle(listed)
    if workers == 1:
        return run_share(listed, seed, whole, place / "0", show)
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(workers, bound_memory) as pool:
        shares = [(listed[i::workers], seed, whole, place / str(i), show) for i in range(workers)]
        tally = Tally()
        for part in pool.starmap(run_share, shares, chunksize=1):
            tally.add(part)
    return tally


def run(argv: Sequence[str] | None = None) -> int:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS).replace(", ", ";"), help="by comma; ';' for ', ' in a name")
    parser.add_argument("--workers", type=int, default=1)
    asked = parser.parse_args(argv)
    kinds = [name.replace(";", ", ") for name in asked.kinds.split(",")]
    bound_memory()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        tally = fuzz(asked.cases, asked.seed, kinds, Path(place), asked.workers, show=True)
    print(f"{'file':26} {'cases':>6} {'refused':>8} {'taken':>6} {'findings':>9}")
    for name in kinds:
        found = sum(finding.kind == name for finding in tally.findings)
        cases, refused = tally.cases[name], tally.refused[name]
        print(f"{name:26} {cases:6} {refused:8} {cases - refused:6} {found:9}")
    whats = Counter(finding.what for finding in tally.findings)
    print(f"{tally.cases.total()} cases, {len(tally.findings)} findings {dict(whats)}; slowest {tally.slowest}")
    return 1 if tally.findings else 0


if __name__ == "__main__":
    raise SystemExit(run())
