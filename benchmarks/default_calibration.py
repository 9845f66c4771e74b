"""Which text should stand in when the user has none: how prunus' offline calibration sources compare.

Prunes a model by one method with each source as calibration, and measures perplexity on texts of other kinds. Give
`--reference` a file of ordinary text to see what is lost by not having one.

    python benchmarks/default_calibration.py --text wiki.txt --text web.txt --reference c4.jsonl --out result.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import prunus
from prunus.checkpoint.packaged_model import PACKAGED_MODEL
from prunus.evaluation.perplexity import perplexity, read_text
from prunus.pipeline.recipe import Recipe
from prunus.scoring.score import score
from prunus.selection.select import select
from prunus.surgery import apply_plan


def main() -> None:
    options = parse()
    dense, tokenizer = prunus.load_model(options.model, dtype=options.dtype)
    texts = {Path(path).name: read_text(path) for path in options.text}

    def measure(model: Any) -> dict[str, float]:
        return {
            name: perplexity(
                model, tokenizer, text, seq_len=options.eval_seq_len, max_windows=options.windows
            ).perplexity
            for name, text in texts.items()
        }

    rows = [{"calibration": "(dense)", "ratio": 0.0, "seconds": 0.0, "perplexity": measure(dense)}]
    for source in [*options.sources, *options.reference]:
        start = time.perf_counter()
        calibration = prunus.load_calibration(
            source, tokenizer, samples=options.samples, seq_len=options.seq_len, seed=options.seed, model=dense
        )
        seconds = time.perf_counter() - start
        scored = score(dense, calibration, Recipe.original(options.method).scoring)
        for ratio in options.ratios:
            smaller = apply_plan(dense, select(scored.table, scored.geometry, ratio))
            rows.append(
                {
                    "calibration": Path(source).name,
                    "ratio": ratio,
                    "seconds": round(seconds, 1),
                    "perplexity": measure(smaller),
                    "provenance": calibration.provenance.to_dict(),
                }
            )
        if options.out:  # after every source: the runs are long
            save(rows, options)
    show(rows, list(texts), options)


def save(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    record = {
        "model": Path(options.model).name,
        "method": options.method,
        "dtype": options.dtype,
        "evaluation": {"seq_len": options.eval_seq_len, "windows": options.windows},
        "prunus": prunus.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    Path(options.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED_MODEL)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--method", default="taylor")
    parser.add_argument("--sources", nargs="+", default=["default", "self"], help="calibration sources to compare")
    parser.add_argument("--reference", action="append", default=[], help="a further source that users may not have")
    parser.add_argument("--text", action="append", required=True, help="text file to measure perplexity on")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=10, help="windows of each text to measure on")
    parser.add_argument("--out", help="JSON file for the figures")
    return parser.parse_args()


def show(rows: list[dict[str, Any]], texts: list[str], options: argparse.Namespace) -> None:
    table = Table(
        "calibration",
        "ratio",
        "seconds to make",
        *(f"perplexity on {name}" for name in texts),
        title=f"{options.method}, {options.samples} × {options.seq_len} tokens",
    )
    for row in rows:
        figures = (f"{row['perplexity'][name]:.2f}" for name in texts)
        table.add_row(row["calibration"], f"{row['ratio']:.0%}", f"{row['seconds']:.1f}", *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
