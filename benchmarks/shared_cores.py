"""What a run costs alone and beside another one, with threads that spin while they wait and with threads that sleep.

    python benchmarks/shared_cores.py --out benchmarks/results/shared-cores.json

`prunus score` in processes of their own, as a user starts them: one, then two at once; repetitions interleaved. "spin"
is what OpenMP does by itself, "sleep" what prunus asks for. Seconds until the last is done, and CPU seconds of each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: a setting of another OpenMP library says that the user has decided, and changes nothing here
SPIN = {"KMP_BLOCKTIME": "200"}
CASES = [(waiting, runs) for runs in (1, 2) for waiting in ("spin", "sleep")]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    measured: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in CASES}
    for number in range(options.repetitions):
        for case in CASES[::-1] if number % 2 else CASES:
            measured[case].append(_run(options, *case))
    rows = []
    for (waiting, runs), found in measured.items():
        seconds, used = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append({"runs": runs, "waiting": waiting, "seconds": seconds, "cpu_seconds": used, "all": found})
    print("| runs at once | threads that wait | seconds | CPU seconds of each |")
    print("|---:|---|---:|---:|")
    for row in rows:
        print(f"| {row['runs']} | {row['waiting']} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} |")
    if options.out:
        facts = {name: value for name, value in vars(options).items() if name != "out"}
        options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _run(options: argparse.Namespace, waiting: str, runs: int) -> tuple[float, float]:
    """Seconds until the last of several runs is done, and CPU seconds of each, on average."""
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= SPIN if waiting == "spin" else {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--calibration", "default", "--samples", str(options.samples), "--seq-len", str(options.seq_len)]
        before, begun = os.times(), time.perf_counter()
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "prunus", "score", options.model, "--out", f"{folder}/{number}", *sizes],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for number in range(runs)
        ]
        statuses = [process.wait() for process in started]
        if any(statuses):
            sys.exit("a run failed")
        after = os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return time.perf_counter() - begun, used / runs


if __name__ == "__main__":
    main()
