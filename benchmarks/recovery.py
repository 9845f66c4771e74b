r"""What training a pruned model for some minutes wins back: perplexity and zero-shot accuracy, before and after.

Text that is trained on and text that is measured on are of different kinds. The pruned model is made by the default
recipe, or given with `--pruned`.

    python benchmarks/recovery.py --text c4-sample.jsonl --eval-text wikitext2-test.raw.txt --minutes 20 \
        --tasks zeroshot --out benchmarks/results/recovery

Options after `--` go to `prunus recover`, so that other ways of training can be measured: `-- --train full`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import prunus
from prunus.checkpoint import locate
from prunus.checkpoint.packaged_model import PACKAGED_MODEL
from prunus.evaluation.perplexity import perplexity, read_text
from prunus.evaluation.zero_shot import load_task, zero_shot


def main() -> None:
    options = parse()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    dense = str(locate(options.model))
    pruned = Path(options.pruned or out / "pruned")
    seconds = {}
    if not (pruned / "config.json").is_file():
        sizes = ["--samples", options.samples, "--seq-len", 512]
        sizes += ["--set", "run.batch_size=2", "--set", "evaluation.held_out=0"]
        words = ["prune", options.model, "--out", pruned, "--ratio", options.ratio, "--calibration", options.text]
        seconds["prune"] = command(*words, *sizes)
    recovered = out / "recovered"
    limit = ["--max-minutes", options.minutes]
    words = ["recover", pruned, "--out", recovered, "--teacher", dense, "--text", options.text, *limit, "--overwrite"]
    seconds["recover"] = command(*words, *options.more)
    rows = {name: measured(folder, options) for name, folder in models(dense, pruned, recovered).items()}
    result = {
        "model": options.model,
        "text": Path(options.text).name,
        "eval_text": Path(options.eval_text).name,
        "minutes": options.minutes,
        "options": options.more,
        "rows": rows,
        "gap_closed": gap_closed(*(rows[name]["perplexity"] for name in ("dense", "pruned", "recovered"))),
        "seconds": seconds,
        "recovery": json.loads((recovered / "prunus" / "recovery.json").read_text()),
        "prunus": prunus.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    (out / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)


def models(dense: str, pruned: Path, recovered: Path) -> dict[str, str]:
    """What is measured, by name."""
    return {"dense": dense, "pruned": str(pruned), "recovered": str(recovered)}


def gap_closed(dense: float, pruned: float, recovered: float) -> float | None:
    """Share of the gap in log perplexity between dense and pruned model that is closed; None where there is no gap."""
    gap = math.log(pruned) - math.log(dense)
    return (math.log(pruned) - math.log(recovered)) / gap if gap > 0 else None


def command(*words: Any) -> float:
    """Run a prunus command as a user would; the seconds that it took."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "prunus", *map(str, words)], check=True)
    return round(time.perf_counter() - begun, 1)


def measured(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and accuracies of a model."""
    model, tokenizer = prunus.load_model(folder)
    text = read_text(options.eval_text)
    found = perplexity(model, tokenizer, text, seq_len=options.eval_seq_len, max_windows=options.windows)
    row: dict[str, Any] = {"parameters": model.num_parameters(), "perplexity": found.perplexity}
    row["protocol"] = found.protocol
    tasks = [load_task(path) for path in sorted(Path(options.tasks).glob("*.jsonl"))] if options.tasks else []
    row["zero_shot"] = [zero_shot(model, tokenizer, task, limit=options.items).to_dict() for task in tasks]
    return row


def show(result: dict[str, Any]) -> None:
    """The rows as a table, and the share of the gap."""
    rows = result["rows"]
    tasks = [entry["task"] for entry in rows["dense"]["zero_shot"]]
    table = Table("", "parameters", f"perplexity, {result['eval_text']}", *tasks)
    for name, row in rows.items():
        accuracies = [f"{entry['accuracy_norm']:.1%}" for entry in row["zero_shot"]]
        table.add_row(name, f"{row['parameters']:,}", f"{row['perplexity']:.2f}", *accuracies)
    console = Console()
    console.print(table)
    share, recovery = result["gap_closed"], result["recovery"]
    closed = "there was no gap to close" if share is None else f"{share:.1%} of the gap in log perplexity closed"
    console.print(f"{closed}, in {recovery['seconds']:.0f} s of training, {recovery['steps']} steps")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED_MODEL)
    parser.add_argument("--pruned", help="a folder that is pruned already; otherwise the default recipe is run")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of 512 tokens")
    parser.add_argument(
        "--text", required=True, help="to calibrate and train on; of another kind than the evaluation's"
    )
    parser.add_argument("--eval-text", required=True)
    parser.add_argument("--eval-seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=20, help="windows of the evaluation text")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--tasks", help="folder of zero-shot files: arc_easy*.jsonl, piqa*.jsonl, winogrande*.jsonl")
    parser.add_argument("--items", type=int, default=500, help="zero-shot items of each task")
    parser.add_argument("--name", default="recovery", help="of the JSON file")
    parser.add_argument("--out", required=True, help="folder for the models and the JSON file")
    parser.add_argument("more", nargs="*", help="after --: further options of `prunus recover`")
    return parser.parse_args()


if __name__ == "__main__":
    main()
