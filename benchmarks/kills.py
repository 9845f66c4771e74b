"""Kill -9 at random moments of the commands that write, half of the time with a second run of the same command beside.

After each kill: what lies under the output's name is whole, the old result or the new one, and nothing that was
complete is gone. The same command, given again, then ends with what an undisturbed run gives, byte for byte but for
times, and nothing else is left in the folder.

    python benchmarks/kills.py --kills 100 --out kills.json

Everything runs in processes that are forked from this one, which has imported what the commands need: a kill takes
about as long as the command itself. The models are tiny and random.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prunus.cli import main as prunus

TEXT = "".join(f"Line {i}: the quick brown fox jumps over the lazy dog, {i * i} times.\n" for i in range(400))
SIZES = ["--samples", "6", "--seq-len", "24"]
SHORT = ["--text", "default", "--seq-len", "32", "--batch-size", "4"]
SHORT += ["--set", "text.held_out=8", "--set", "recovery.micro_batch=4"]
#: fields and columns that say how long something took, or how it was called
CHANGING = ("seconds", "seconds_to_prune", "peak_bytes", "stages", "command")
#: how a second run, or one that comes too late, is turned away
REFUSALS = ("is being worked on by process", "is not empty", "exists; choose another")


@dataclass
class Job:
    """A command, and what became of its runs.

    Attributes:
        name: for the table.
        words: of the command line, without the output.
        others: words that give another result.
        out: name of the output.
        seconds: that an undisturbed run takes.
        expected: what it leaves.
        beside: the names in the output's folder then: a GGUF file has a Modelfile beside it.
        earlier: where the other result is; a copy lies in the output's place in the runs with --overwrite.
    """

    name: str
    words: list[str]
    others: list[str]
    out: str = "out"
    seconds: float = 0.0
    expected: dict[str, str] = field(default_factory=dict)
    beside: set[str] = field(default_factory=set)
    earlier: Path = Path()
    counts: Counter[str] = field(default_factory=Counter)


def make_jobs(place: Path) -> list[Job]:
    """The models and the text, and what is done with them."""
    dense, text, log = place / "dense", place / "text.txt", place / "log"
    text.write_text(TEXT, encoding="utf-8")
    assert run(lambda: save_model(dense), log) == 0, log.read_text()
    draw = ["--calibration", str(text), *SIZES]
    quick = ["--recipe", "original", "--set", "evaluation.held_out=0", "--set", "output.report=false"]
    pruned = [place / name for name in ("pruned", "pruned more")]
    for folder, ratio in zip(pruned, ("0.25", "0.4"), strict=True):
        words = ["prune", str(dense), "--out", str(folder), "--ratio", ratio, *draw, *quick]
        assert run(lambda words=words: command(words), log) == 0, log.read_text()
    few = ["--set", "evaluation.held_out=2"]
    prune = ["prune", str(dense), *draw, *few, "--set"]
    score = ["score", str(dense), *draw, "--set", "run.engine=streamed", "--method"]
    compare = ["compare", str(dense), *draw, *few, "--recipes", "original", "--methods"]
    recover = ["recover", str(pruned[0]), "--teacher", str(dense), *SHORT, "--samples", "32", "--max-steps"]
    export = [["export", str(folder), "--to"] for folder in pruned]

    def prunes(engine: str) -> Job:
        first, second = ([*prune, f"run.engine={engine}", "--ratio", ratio] for ratio in ("0.3", "0.1"))
        return Job(f"prune, {engine}", first, second)

    return [
        *(prunes(engine) for engine in ("resident", "streamed")),
        Job("score", [*score, "gate_fisher"], [*score, "wanda"]),
        Job("compare", [*compare, "taylor,wanda", "--ratios", "0.1,0.3"], [*compare, "random", "--ratios", "0.1"]),
        Job("recover", [*recover, "16", "--set", "recovery.checkpoints=4"], [*recover, "2"]),
        Job("export to gguf", [*export[0], "gguf"], [*export[1], "gguf"], "out.gguf"),
        Job("export to dense", [*export[0], "dense"], [*export[1], "dense"]),
    ]


def save_model(folder: Path) -> int:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return 0


# --- processes ---


def command(words: list[str]) -> int:
    sys.argv = ["prunus", *words]
    return prunus(words)


def start(work: Any, log: Path) -> int:
    """Do some work in a forked process; its id."""
    if child := os.fork():
        return child
    try:
        tqdm.set_lock(threading.RLock())  # a lock that is shared with other processes would stay taken after a kill
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = work()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        status = 99
    os._exit(status)


def run(work: Any, log: Path) -> int:
    """The same, to its end: the exit status."""
    return ended(start(work, log))


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def import_what_it_imports(job: Job, place: Path) -> None:
    """Have a child run a command, and import here what it had imported at its end."""
    names = place / "modules"

    def work() -> int:
        status = command([*job.words, "--out", str(place / job.out)])
        names.write_text("\n".join(name for name in sys.modules if not name.startswith("__")))
        return status

    assert run(work, place / "log") == 0, (place / "log").read_text()
    for name in names.read_text().split():
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # parts of other packages that only they can import
                continue


# --- what is there ---


def contents(path: Path) -> dict[str, str]:
    """A hash of every file, times and calls left out; empty if there is nothing."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(settled(file)).hexdigest() for file in sorted(files)}


def settled(file: Path) -> bytes:
    data = file.read_bytes()
    if file.suffix == ".json":
        return json.dumps(without_times(json.loads(data)), sort_keys=True).encode()
    if file.name == "comparison.csv":
        rows = [line.split(",") for line in data.decode().splitlines()]
        kept = [number for number, name in enumerate(rows[0]) if name not in CHANGING]
        return "\n".join(",".join(row[number] for number in kept) for row in rows).encode()
    if file.suffix == ".html":
        assert data.rstrip().endswith(b"</html>"), f"{file} is half-written"
        return re.sub(rb"\d[\d.,e+-]*", b"#", re.sub(rb" --overwrite", b"", data))
    if file.suffix == ".md":
        return re.sub(rb"(?m)^(prunus |\| seconds \|).*$", b"", data)
    return b"" if file.suffix == ".png" else data


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(inner) for name, inner in value.items() if name not in CHANGING}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def is_whole(path: Path, whole: dict[str, str]) -> bool:
    """Whether a result is this one; the report may be still to come."""
    return not differing(path, whole) - {"report.html"}


def differing(path: Path, whole: dict[str, str]) -> set[str]:
    """The files in which a result is another than this one."""
    return {name for name, _ in contents(path).items() ^ whole.items()}


def check(path: Path, *wholes: dict[str, str]) -> None:
    """Raise unless what lies there is one of these."""
    assert any(is_whole(path, whole) for whole in wholes), (
        f"half-written: {path}, {[differing(path, w) for w in wholes]}"
    )


# --- one kill ---


def kill_once(job: Job, place: Path, generator: random.Random, *, beside: bool, overwrite: bool) -> None:
    out, words = place / job.out, [*job.words, "--out", str(place / job.out)]
    old = contents(job.earlier) if overwrite else {}
    if overwrite:
        words.append("--overwrite")
        (shutil.copytree if job.earlier.is_dir() else shutil.copy)(job.earlier, out)
    # Half of the kills anywhere, half of them towards the end, where files are written.
    after = generator.uniform(*generator.choice([(0.0, 1.0), (0.6, 1.15)])) * job.seconds
    logs = place.with_name(place.name + "-logs")
    logs.mkdir()
    begun = time.monotonic()
    first = start(lambda: command(words), logs / "first")
    second = None
    if beside:
        time.sleep(generator.uniform(0, 1) * after)
        second = start(lambda: command(words), logs / "second")
    time.sleep(max(0.0, begun + after - time.monotonic()))
    os.kill(first, signal.SIGKILL)
    job.counts["killed" if ended(first) < 0 else "ended before"] += 1
    if second is None and out.exists():
        check(out, job.expected, old)
        job.counts["result in place"] += is_whole(out, job.expected)
    if overwrite and not out.exists():
        moved = list(place.glob(f".{job.out}.replaced-*"))
        assert moved or second is not None, f"a complete result is lost: {place}"
        for folder in moved:
            check(folder, old)
    if second is not None:
        job.counts["second: " + how_it_went(ended(second), logs / "second")] += 1
        if out.exists():
            check(out, job.expected, old)
    status = run(lambda: command(words), logs / "again")
    job.counts["again: " + how_it_went(status, logs / "again")] += 1
    assert not differing(out, job.expected), f"not what an undisturbed run gives: {differing(out, job.expected)}"
    assert set(os.listdir(place)) == job.beside, f"something is left: {place} holds {os.listdir(place)}"
    shutil.rmtree(place)
    shutil.rmtree(logs)


def how_it_went(status: int, log: Path) -> str:
    said = log.read_text(errors="replace")
    assert status in (0, 1), f"exit status {status}: {said}"
    assert "Traceback" not in said, said
    if status == 0:
        return "done"
    assert any(refusal in said for refusal in REFUSALS), said
    return "busy" if REFUSALS[0] in said else "complete already"


def show(jobs: list[Job]) -> None:
    names = sorted({name for job in jobs for name in job.counts})
    print("|", " | ".join(["command", "seconds", *names]), "|")
    print("|---" * (len(names) + 2), end="|\n")
    for job in jobs:
        print("|", " | ".join([job.name, f"{job.seconds:.1f}", *(str(job.counts[name]) for name in names)]), "|")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", default="", help="only commands whose name has this in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="prunus-kills-") as name:
        place = Path(name)
        jobs = [job for job in make_jobs(place) if options.only in job.name]
        for number, job in enumerate(jobs):
            for kind in ("imports", "timed", "earlier"):
                (place / f"{kind}-{number}").mkdir()
            import_what_it_imports(job, place / f"imports-{number}")
        for number, job in enumerate(jobs):
            calm, job.earlier = place / f"timed-{number}", place / f"earlier-{number}" / job.out
            begun = time.monotonic()
            status = run(lambda job=job, calm=calm: command([*job.words, "--out", str(calm / job.out)]), place / "log")
            assert status == 0, (place / "log").read_text()
            job.seconds, job.expected = time.monotonic() - begun, contents(calm / job.out)
            job.beside = set(os.listdir(calm))
            assert job.expected == contents(place / f"imports-{number}" / job.out), f"{job.name} is not repeatable"
            other = [*job.others, "--out", str(job.earlier)]
            assert run(lambda other=other: command(other), place / "log") == 0, (place / "log").read_text()
        for number in range(options.kills):
            job = jobs[number % len(jobs)]
            (place / str(number)).mkdir()
            lap = number // len(jobs)
            kill_once(job, place / str(number), generator, beside=lap % 2 == 1, overwrite=lap % 3 == 2)
            print(f"\r{number + 1} of {options.kills}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    show(jobs)
    if options.out:
        facts = [{"command": job.name, "seconds": round(job.seconds, 2), **job.counts} for job in jobs]
        options.out.write_text(
            json.dumps({"kills": options.kills, "seed": options.seed, "jobs": facts}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
