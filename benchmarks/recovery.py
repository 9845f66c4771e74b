r"""What training a pruned model for some minutes wins back: perplexity and zero-shot accuracy, before and after.

Text that is trained on and text that is measured on are of different kinds. The pruned model is made by the default
recipe, or given with `--pruned`.

    python benchmarks/recovery.py --text c4-sample.jsonl --eval-text wikitext2-test.raw.txt --minutes 20 60 120 \
        --tasks zeroshot --out benchmarks/results/recovery

Several numbers of minutes are as many runs, since the learning rate falls to 0 in each; a curve through their ends, or
of a single run through what it logged, says what more tokens would give (recovery_curve.py). `--progressive` adds cuts
by `prunus prune` that train after each of two rounds, in the same minutes all together.

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
from recovery_curve import fit, points_of_run
from rich.console import Console
from rich.table import Table
from rows import made_once, write_report

import prunus
from prunus.checkpoint import locate
from prunus.checkpoint.packaged_model import PACKAGED_MODEL
from prunus.evaluation.perplexity import perplexity, read_text
from prunus.evaluation.zero_shot import load_tasks, zero_shot


def main() -> None:
    options = parse()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    dense = str(locate(options.model))
    pruned = Path(options.pruned or out / f"pruned-{options.ratio:g}")
    seconds: dict[str, float] = {}
    if options.pruned is None:
        cut = ["prune", options.model, *cutting(options)]
        made_once(pruned, cut, lambda: seconds.update(prune=command(*cut, "--out", pruned)))
    runs = []
    for minutes in sorted(options.minutes):
        for way in ("recovered", *(["progressive"] if options.progressive else [])):
            name = way if len(options.minutes) == 1 else f"{way}, {minutes:g} min"
            folder = out / name.replace(", ", "-").replace(" ", "-")
            if way == "recovered":
                words = ["recover", pruned, "--teacher", dense, "--text", options.text, "--max-minutes", minutes]
                words += options.more
            else:
                words = ["prune", options.model, *cutting(options), "--rounds", 2]
                words += ["--set", f"recovery.minutes={minutes:g}", "--set", f"recovery.text={options.text}"]
            made_once(folder, words, lambda: seconds.update({name: command(*words, "--out", folder)}))  # noqa: B023
            facts = json.loads((folder / "prunus" / "recovery.json").read_text())
            runs.append({"name": name, "way": way, "minutes": minutes, "folder": folder, "recovery": facts})
    folders = {"dense": dense, "pruned": str(pruned), **{run["name"]: str(run.pop("folder")) for run in runs}}
    rows = {name: measured(folder, options) for name, folder in folders.items()}
    for run in runs:
        run["gap_closed"] = gap_closed(*(rows[name]["perplexity"] for name in ("dense", "pruned", run["name"])))
    longest = [run for run in runs if run["way"] == "recovered"][-1]
    result = {
        "model": options.model,
        "text": Path(options.text).name,
        "eval_text": Path(options.eval_text).name,
        "minutes": options.minutes,
        "options": options.more,
        "rows": rows,
        "gap_closed": longest["gap_closed"],
        "curve": curve([run for run in runs if run["way"] == "recovered"], options),
        "runs": runs,
        "seconds": seconds,
        "recovery": longest["recovery"],
        "prunus": prunus.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    write_report(out / f"{options.name}.json", result)
    show(result)


def cutting(options: argparse.Namespace) -> list[Any]:
    """Options of `prunus prune`."""
    sizes = ["--samples", options.samples, "--seq-len", options.calibration_seq_len]
    sizes += ["--set", "run.batch_size=2", "--set", "evaluation.held_out=0"]
    return ["--ratio", options.ratio, "--calibration", options.text, *sizes]


def curve(runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Share of the gap over tokens and minutes, with a fit.

    Through the ends of several runs, by the evaluation text; through what a single run logged, by its held-out
    sequences, where the learning rate has not fallen yet at any but the last point.
    """
    logged = {run["name"]: points_of_run(run["recovery"]) for run in runs}
    ends = [(run["recovery"]["tokens"], run["gap_closed"]) for run in runs if run["gap_closed"] is not None]
    through = "ends of runs, evaluation text"
    found = fit(ends)
    if found is None:
        through = "points of one run, held-out sequences"
        found = fit([(point["tokens"], point["gap_closed"]) for point in logged[runs[-1]["name"]]])
    return {
        "logged": logged,
        "through": through,
        "fit": found and found.to_dict(),
        "at": [found.at(tokens) for tokens in options.tokens] if found else [],
    }


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
    row["zero_shot"] = [zero_shot(model, tokenizer, task, limit=options.items).to_dict() for task in options.tasks]
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
    for run in result["runs"]:
        share, rounds = run["gap_closed"], run["recovery"].get("rounds", [run["recovery"]])
        closed = "there was no gap to close" if share is None else f"{share:.1%} of the gap in log perplexity closed"
        seconds, steps = (sum(each[name] for each in rounds) for name in ("seconds", "steps"))
        console.print(f"{run['name']}: {closed}, in {seconds:.0f} s of training, {steps} steps")
    for name, points in result["curve"]["logged"].items():
        table = Table("tokens", "minutes", "gap closed, held-out", title=name)
        for point in points:
            table.add_row(f"{point['tokens']:,}", f"{point['minutes']:.2f}", f"{point['gap_closed']:.1%}")
        console.print(table)
    if found := result["curve"]["fit"]:
        console.print(
            f"fit through {result['curve']['through']}: 1 - (1 + tokens / {found['c']:.3g})^-{found['b']:.3g}, "
            f"error of log {found['error']:.3f}"
        )
    for point in result["curve"]["at"]:
        mark = " (extrapolation)" if point["extrapolation"] else ""
        console.print(f"{point['tokens']:,.0f} tokens: {point['gap_closed']:.1%}{mark}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED_MODEL)
    parser.add_argument("--pruned", help="a folder that is pruned already; otherwise the default recipe is run")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--calibration-seq-len", type=int, default=512, help="tokens in each of them")
    parser.add_argument(
        "--text", required=True, help="to calibrate and train on; of another kind than the evaluation's"
    )
    parser.add_argument("--eval-text", required=True)
    parser.add_argument("--eval-seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=20, help="windows of the evaluation text")
    parser.add_argument(
        "--minutes", type=float, nargs="+", default=[20.0], help="of training; several are several runs"
    )
    parser.add_argument(
        "--progressive", action="store_true", help="also cut and train in two rounds, in as many minutes"
    )
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e6, 1e8], help="that the fit is shown at")
    parser.add_argument("--tasks", help="folder of zero-shot files, as `prunus eval` takes")
    parser.add_argument("--items", type=int, default=500, help="zero-shot items of each task")
    parser.add_argument("--name", default="recovery", help="of the JSON file")
    parser.add_argument("--out", required=True, help="folder for the models and the JSON file")
    parser.add_argument("more", nargs="*", help="after --: further options of `prunus recover`")
    options = parser.parse_args()
    options.tasks = load_tasks([options.tasks] if options.tasks else [])  # before training
    return options


if __name__ == "__main__":
    main()
