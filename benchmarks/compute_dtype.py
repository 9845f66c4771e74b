"""Time of a pass in bfloat16, in float32 and in what prunus chooses, with the CPU's instructions and with some masked.

    python benchmarks/compute_dtype.py --out benchmarks/results/compute-dtype.json

oneDNN and ATen are told to use AVX2 alone, as on a CPU that has no more. A fresh process for every figure, repetitions
interleaved, one thread; CPU seconds, which other programs do not take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

CPUS = {"all instructions": {}, "AVX2 alone": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}}
DTYPES = ("bfloat16", "float32", "auto")
PROGRAM = """
import json, sys, time
import torch, prunus
asked = json.loads(sys.argv[1])
torch.set_num_threads(1)
model, tokenizer = prunus.load_model(asked["model"], dtype=asked["dtype"])
drawn = prunus.load_calibration("default", tokenizer, samples=asked["samples"], seq_len=asked["seq_len"])
begun = time.process_time()
prunus.score(model, drawn, prunus.ScoringOptions(method=asked["method"]), progress=False)
seconds = (time.process_time() - begun) / asked["samples"]
print(json.dumps({"seconds": seconds, "computed_in": str(model.dtype).removeprefix("torch.")}))
"""


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default="gate_fisher,taylor")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cases = [(cpu, method, dtype) for cpu in CPUS for method in options.methods.split(",") for dtype in DTYPES]
    runs: dict[tuple[str, str, str], list[dict]] = {case: [] for case in cases}
    for number in range(options.repetitions):
        for case in cases[::-1] if number % 2 else cases:
            runs[case].append(_run(options, *case))
    rows = []
    for (cpu, method, dtype), found in runs.items():
        seconds = [one["seconds"] for one in found]
        base = [one["seconds"] for one in runs[cpu, method, "float32"]]
        rows.append(
            {
                "cpu": cpu,
                "method": method,
                "dtype": dtype,
                "computed_in": sorted({one["computed_in"] for one in found}),
                "seconds": statistics.median(seconds),
                "to_float32": statistics.median(a / b for a, b in zip(seconds, base, strict=True)),
                "all": seconds,
            }
        )
    print("| CPU | method | `--dtype` | computed in | CPU s per sequence | to float32 |")
    print("|---|---|---|---|---:|---:|")
    for row in rows:
        chosen = ", ".join(row["computed_in"])
        figures = f"{row['seconds']:.2f} | {row['to_float32']:.2f}"
        print(f"| {row['cpu']} | `{row['method']}` | {row['dtype']} | {chosen} | {figures} |")
    if options.out:
        facts = {name: value for name, value in vars(options).items() if name != "out"}
        options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _run(options: argparse.Namespace, cpu: str, method: str, dtype: str) -> dict:
    asked = {"model": options.model, "samples": options.samples, "seq_len": options.seq_len}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps({**asked, "method": method, "dtype": dtype})],
        env={**os.environ, **CPUS[cpu], "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
