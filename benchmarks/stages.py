r"""Where the time of a job goes, stage by stage: recipes against each other, or against an earlier state of the code.

    python benchmarks/stages.py smollm2-135m --cases default original --repetitions 3 -- --samples 16 --seq-len 512
    git worktree add ../before 4616da7
    python benchmarks/stages.py smollm2-135m --cases default default@../before/src -- --samples 16 --seq-len 512

What stands behind `--` goes to `prunus prune`; a case is a recipe, and behind an `@` the folder that prunus is
imported from. Every run is a fresh process, cases are interleaved, medians are shown, and the ratio to the last case.
Seconds are those of metrics.json, of the clock; start of Python and its libraries, and saving, during which the figures
are written down, are left out. CPU seconds are those of the whole process, which other programs do not take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import markdown_table, options_and_words, write_report

SUM, CPU = "all", "CPU seconds"


def main() -> None:
    options = parse()
    runs: dict[str, list[dict[str, Any]]] = {case: [] for case in options.cases}
    for number in range(options.repetitions):
        for case in options.cases[::-1] if number % 2 else options.cases:
            runs[case].append(run(case, options.model, options.words))
            print(f"{number + 1}/{options.repetitions} {case} {runs[case][-1]['stages']}", file=sys.stderr)
    seconds = {case: medians([each["stages"] for each in seen]) for case, seen in runs.items()}
    last = options.cases[-1]
    names = list(dict.fromkeys(name for found in seconds.values() for name in found if name not in (SUM, CPU)))
    table = markdown_table(
        ["stage"],
        {
            (name,): {case: found[name] for case, found in seconds.items() if name in found}
            for name in (*names, SUM, CPU)
        },
        options.cases,
    )
    report = {
        "command": " ".join(sys.argv[1:]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "compute dtype": runs[last][0]["compute_dtype"],
        "seconds": seconds,
        f"ratio to {last}": {
            case: {what: round(found[what] / seconds[last][what], 2) for what in (SUM, CPU)}
            for case, found in seconds.items()
        },
        "each": {case: [round(each["stages"][SUM], 1) for each in seen] for case, seen in runs.items()},
        "perplexity": {case: [each["perplexity_after"] for each in seen] for case, seen in runs.items()},
    }
    print(table, end="")
    print(json.dumps({name: value for name, value in report.items() if name != "seconds"}, indent=1))
    if options.out:
        write_report(options.out, report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cases", nargs="+", default=["default", "original"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return options_and_words(parser)


def run(case: str, model: str, words: list[str]) -> dict[str, Any]:
    """Metrics of one run, with the seconds of its stages by name."""
    recipe, _, source = case.partition("@")
    environment = {**os.environ, "PYTHONPATH": str(Path(source).resolve())} if source else dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = ["prune", model, *words, "--recipe", recipe, "--out", str(out)]
        program = f"import sys; from prunus.cli import main; sys.exit(main({command!r}))"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            sys.exit(done.stderr)
        metrics: dict[str, Any] = json.loads((out / "prunus" / "metrics.json").read_text())
    stages = {stage["stage"]: stage["seconds"] for stage in metrics["stages"]}
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**metrics, "stages": {**stages, SUM: sum(stages.values()), CPU: used}}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each stage."""
    return {name: statistics.median(each[name] for each in runs) for name in runs[0]}


if __name__ == "__main__":
    main()
