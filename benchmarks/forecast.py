r"""Is a job what its `--dry-run` said it would be? Time by stage and peak memory, forecast and measured.

    python benchmarks/forecast.py smollm2-135m --repetitions 3 -- --samples 16 --seq-len 256 --calibration text.jsonl

What stands behind `--` goes to `prunus prune`. Each repetition is a dry run and then the same job, both in fresh
processes, so that what else the machine does falls on both alike. Loading of Python and its libraries counts in
neither; saving, during which the figures are written down, is left out of the sums.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rows import options_and_words, write_report

SAVING = "saving"


def main() -> None:
    options = parse()
    pairs = [pair(options.model, options.words) for _ in range(options.repetitions)]
    rows = [row(name, pairs) for name in pairs[0]["forecast"]["stages"] if name != SAVING]
    sums = [{side: total(each, side) for side in ("forecast", "measured")} for each in pairs]
    memory = [(each["forecast"]["memory_bytes"], peak(each)) for each in pairs]
    report = {
        "command": " ".join(sys.argv[1:]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "dtype": pairs[0]["forecast"]["dtype"],
        "stages": rows,
        "seconds": sums,
        "time forecast / measured": [round(each["forecast"] / each["measured"], 2) for each in sums],
        "memory forecast / measured": [round(said / used, 2) for said, used in memory],
        "seconds of the dry run": [round(each["seconds"], 1) for each in pairs],
    }
    show(report, memory)
    if options.out:
        write_report(options.out, report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return options_and_words(parser)


def pair(model: str, words: list[str]) -> dict[str, Any]:
    """A dry run and the run."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["prune", model, *words, "--out", str(Path(folder) / "out"), "--json"]
        ahead = run([*command, "--dry-run"])
        done = run(command)
    stages = {stage["stage"]: stage for stage in done["output"]["stages"]}
    return {"forecast": ahead["output"], "stages": stages, "seconds": ahead["seconds"]}


def run(words: list[str]) -> dict[str, Any]:
    """What a command prints as JSON, and how long it took, start of Python included."""
    timed = f"import time; start = time.time(); from prunus.cli import main; status = main({words!r}); "
    timed += "import sys; print('SECONDS', time.time() - start, file=sys.stderr); sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    seconds = next(line.split()[1] for line in done.stderr.splitlines() if line.startswith("SECONDS"))
    return {"output": json.loads(done.stdout), "seconds": float(seconds)}


def row(name: str, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one stage."""
    return {
        "stage": name,
        "forecast": statistics.median(each["forecast"]["stages"][name] for each in pairs),
        "measured": statistics.median(each["stages"][name]["seconds"] for each in pairs),
    }


def total(each: dict[str, Any], side: str) -> float:
    names = [name for name in each["forecast"]["stages"] if name != SAVING]
    return sum(each["forecast"]["stages"][n] if side == "forecast" else each["stages"][n]["seconds"] for n in names)


def peak(each: dict[str, Any]) -> int:
    return max(stage["peak_bytes"] for stage in each["stages"].values())


def show(report: dict[str, Any], memory: list[tuple[int, int]]) -> None:
    table = Table(title=report["command"], title_justify="left")
    for number, name in enumerate(("", "forecast", "measured")):
        table.add_column(name, justify="right" if number else "left")
    for each in report["stages"]:
        table.add_row(each["stage"], f"{each['forecast']:.1f} s", f"{each['measured']:.1f} s")
    for number, (sums, (said, used)) in enumerate(zip(report["seconds"], memory, strict=True), start=1):
        table.add_row(f"all, {number}", f"{sums['forecast']:.0f} s", f"{sums['measured']:.0f} s")
        table.add_row(f"memory, {number}", f"{said / 2**20:,.0f} MiB", f"{used / 2**20:,.0f} MiB")
    Console().print(table)
    print(f"{report['machine']}; a dry run takes {report['seconds of the dry run']} s, start of Python included")


if __name__ == "__main__":
    main()
