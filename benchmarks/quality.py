r"""What pruning costs in quality: every method with and without repair, at several ratios, against the dense model.

Calibration text and evaluation text are of different kinds; a second calibration text, of the evaluation's own kind,
gives rows of its own. Each result is one row, written to disk as soon as it is there; a run that stops goes on where it
was when it is started again with the same options. Rows of high priority come first, so that `--minutes` can bound a
run.

    python benchmarks/quality.py --calibration c4-sample.jsonl --text wikitext2-test.raw.txt \
        --in-domain wikitext2-valid.txt --tasks zeroshot/ --out benchmarks/results/quality
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import prunus
from prunus.cli import DEFAULT_ROUNDS
from prunus.compensation import CompensationOptions
from prunus.evaluation.perplexity import PerplexityResult, perplexity, read_text
from prunus.evaluation.zero_shot import load_task, zero_shot
from prunus.packaged_model import PACKAGED_MODEL, resolve_model
from prunus.priors import PriorOptions
from prunus.scoring import Score, ScoringOptions, score_by_methods

REPAIR = CompensationOptions()


@dataclass(frozen=True)
class Recipe:
    """A way of pruning.

    Attributes:
        scoring: method and its options.
        repair: of the remaining weights; None = plain slicing.
        rounds: see `prunus.prune`.
    """

    scoring: ScoringOptions
    repair: CompensationOptions | None = None
    rounds: int = 1


def scorings() -> dict[str, ScoringOptions]:
    """Every way of scoring that has rows, by name."""
    return {
        "taylor": ScoringOptions(method="taylor"),
        "gate_fisher": ScoringOptions(method="gate_fisher"),
        "wanda, layer_sum": ScoringOptions(method="wanda", normalize="layer_sum"),
        "taylor_2nd": ScoringOptions(method="taylor_2nd"),
        "taylor_2nd, empirical_fisher": ScoringOptions(method="taylor_2nd", hessian="empirical_fisher"),
        "hybrid taylor+wanda": ScoringOptions(method="hybrid"),
        "hybrid gate_fisher+taylor": ScoringOptions(method="hybrid", hybrid=(("gate_fisher", 0.5), ("taylor", 0.5))),
        "adaptive": ScoringOptions(method="adaptive"),
        "wanda": ScoringOptions(method="wanda"),
        "magnitude": ScoringOptions(method="magnitude"),
        "random": ScoringOptions(method="random"),
        "gate_fisher, cosine prior": ScoringOptions(method="gate_fisher", priors=PriorOptions("cosine")),
        "taylor_2nd, sampled_fisher": ScoringOptions(method="taylor_2nd", hessian="sampled_fisher"),
        "gate_fisher, sampled_fisher": ScoringOptions(method="gate_fisher", hessian="sampled_fisher"),
    }


#: what a sweep takes together: the first of a group is scored, and its pass serves the others
SHARED = (
    ("taylor", "taylor_2nd", "hybrid taylor+wanda"),
    ("taylor_2nd, empirical_fisher",),
)


def recipes() -> dict[str, Recipe]:
    """All rows of one ratio, most wanted first."""
    found = {"default recipe": Recipe(ScoringOptions(method="gate_fisher"), REPAIR, DEFAULT_ROUNDS)}
    for name, scoring in scorings().items():
        found[name] = Recipe(scoring)
        found[f"{name}, repaired"] = Recipe(scoring, REPAIR)
    found["gate_fisher, reselected"] = Recipe(ScoringOptions(method="gate_fisher"), CompensationOptions(reselect=True))
    return found


def main() -> None:
    options = parse()
    bench = Bench(options)
    deadline = time.monotonic() + 60 * options.minutes
    for job in bench.jobs():
        if time.monotonic() > deadline:
            break
        bench.run(*job)
    bench.show()


class Bench:
    """The rows so far, and what is needed for more of them."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = Path(options.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "rows.jsonl"
        self.rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        self.model, self.tokenizer = prunus.load_model(resolve_model(options.model))
        self.text = read_text(options.text)
        self.tasks = [load_task(path) for path in sorted(Path(options.tasks).glob("*.jsonl"))] if options.tasks else []
        self._scores: dict[tuple[str, int, str], Score] = {}
        self._calibrations: dict[tuple[str, int], prunus.Calibration] = {}

    def jobs(self) -> Iterator[tuple[str, float, str, int]]:
        """(recipe, ratio, calibration, seed) of every row that is wanted and not there."""
        done = {(row["recipe"], row["ratio"], row["calibration"], row["seed"]) for row in self.rows}
        name = Path(self.options.calibration).name
        yield from self._missing(done, "dense", [0.0], name, self.options.seeds[:1])
        wanted = [name for name in recipes() if not self.options.recipes or name in self.options.recipes]
        for seed in self.options.seeds:
            for recipe in wanted:
                yield from self._missing(done, recipe, self.options.ratios, name, [seed])
        if self.options.in_domain:
            for recipe in ("default recipe", "taylor", "gate_fisher, repaired"):
                if recipe in wanted:
                    own = Path(self.options.in_domain).name
                    yield from self._missing(done, recipe, self.options.ratios, own, self.options.seeds[:1])

    def _missing(
        self, done: set[tuple[Any, ...]], recipe: str, ratios: list[float], calibration: str, seeds: list[int]
    ) -> Iterator[tuple[str, float, str, int]]:
        for seed in seeds:
            for ratio in ratios:
                if (recipe, ratio, calibration, seed) not in done:
                    yield recipe, ratio, calibration, seed

    def run(self, name: str, ratio: float, calibration: str, seed: int) -> None:
        """Prune, measure, and write the row."""
        if name == "dense":
            self._measure(self.model, recipe=name, ratio=ratio, calibration=calibration, seed=seed, seconds=0.0)
            return
        recipe = recipes()[name]
        sequences = self._calibration(calibration, seed)
        scored = self._score(name.removesuffix(", repaired"), recipe.scoring, calibration, seed, recipe.repair)
        start = time.perf_counter()
        result = prunus.prune(
            self.model,
            ratio,
            sequences,
            scoring=recipe.scoring,
            compensation=recipe.repair,
            rounds=recipe.rounds,
            scored=scored,
        )
        seconds = time.perf_counter() - start + scored.about["seconds"]
        self._measure(
            result.model,
            recipe=name,
            ratio=ratio,
            calibration=calibration,
            seed=seed,
            seconds=round(seconds, 1),
            plan=result.plan.fingerprint,
            findings=scored.about.get("adaptive"),
        )

    def _calibration(self, name: str, seed: int) -> prunus.Calibration:
        key = name, seed
        if key not in self._calibrations:
            paths = [self.options.calibration, self.options.in_domain]
            path = next(path for path in paths if path and Path(path).name == name)
            self._calibrations[key] = prunus.load_calibration(
                path, self.tokenizer, samples=self.options.samples, seq_len=self.options.seq_len, seed=seed
            )
        return self._calibrations[key]

    def _score(
        self, name: str, scoring: ScoringOptions, calibration: str, seed: int, repair: CompensationOptions | None
    ) -> Score:
        """The scores of a way of scoring: from memory, from the folder, or taken now and kept."""
        curvature = repair is not None and repair.reselect
        name = "gate_fisher" if name in ("default recipe", "gate_fisher, reselected") else name
        key = (calibration, seed, name)
        folder = self.folder / "scores" / f"{calibration}-{seed}" / name.replace(" ", "-")
        if curvature:
            sequences = self._calibration(calibration, seed)
            return prunus.score(self.model, sequences, self._with(scoring, seed), curvature=True)
        if key not in self._scores and (folder / "score.json").exists():
            self._scores[key] = Score.load(folder)
        if key not in self._scores:
            group = next((group for group in SHARED if name in group), (name,))
            # Shared passes are of one Hessian and normalisation; the first of a group says which.
            each = {member: self._with(scorings()[member], seed) for member in group}
            by_method = score_by_methods(self.model, self._calibration(calibration, seed), list(each.values()))
            for member, options in each.items():
                scored = by_method[options.method]
                self._scores[calibration, seed, member] = scored
                place = folder.with_name(member.replace(" ", "-"))
                Score(scored.table, scored.geometry, scored.about, prior=scored.prior).save(place)
        return self._scores[key]

    def _with(self, scoring: ScoringOptions, seed: int) -> ScoringOptions:
        return ScoringOptions(**{**scoring.__dict__, "batch_size": self.options.batch_size, "random_seed": seed})

    def _measure(self, model: Any, **row: Any) -> None:
        result: PerplexityResult = perplexity(
            model, self.tokenizer, self.text, seq_len=self.options.eval_seq_len, max_windows=self.options.windows
        )
        row |= {"parameters": model.num_parameters(), "perplexity": result.perplexity, "protocol": result.protocol}
        if row["recipe"] in self.options.zero_shot:
            row["zero_shot"] = [
                zero_shot(model, self.tokenizer, task, limit=self.options.items).to_dict() for task in self.tasks
            ]
        row |= {"prunus": prunus.__version__, "torch": torch.__version__, "machine": platform.machine()}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        what = f"{row['recipe']} {row['ratio']:g} seed {row['seed']}"
        Console(stderr=True).print(f"{what}: perplexity {row['perplexity']:.2f}, {row['seconds']} s")

    def show(self) -> None:
        """Print the rows, and write them as a Markdown table and a plot."""
        (self.folder / "table.md").write_text(markdown(self.rows), encoding="utf-8")
        plot(self.rows, self.folder / "quality.png")
        table = Table("recipe", "calibration", "seed", "ratio", "perplexity", "× dense", "seconds")
        dense = next(row["perplexity"] for row in self.rows if row["recipe"] == "dense")
        for row in self.rows:
            relative = row["perplexity"] / dense
            cells = (row["recipe"], row["calibration"], row["seed"], row["ratio"], f"{row['perplexity']:,.2f}")
            table.add_row(*map(str, cells), f"{relative:,.2f}", str(row["seconds"]))
        Console().print(table)


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line per recipe, calibration text and seed; multiples of the dense perplexity by ratio."""
    dense = next(row["perplexity"] for row in rows if row["recipe"] == "dense")
    ratios = sorted({row["ratio"] for row in rows} - {0.0})
    lines = [
        f"| recipe | calibration | seed | {' | '.join(f'{100 * ratio:g} %' for ratio in ratios)} | seconds |",
        f"|---|---|---|{'---|' * len(ratios)}---|",
    ]
    keys = dict.fromkeys((row["recipe"], row["calibration"], row["seed"]) for row in rows if row["recipe"] != "dense")
    for key in keys:
        found = {row["ratio"]: row for row in rows if (row["recipe"], row["calibration"], row["seed"]) == key}
        cells = [f"{found[r]['perplexity'] / dense:,.2f}" if r in found else "" for r in ratios]
        seconds = max(row["seconds"] for row in found.values())
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Multiples of the dense perplexity over the removed share, of the first seed and calibration text."""
    from matplotlib.figure import Figure

    dense = next(row for row in rows if row["recipe"] == "dense")
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    first = [row for row in rows if (row["calibration"], row["seed"]) == (dense["calibration"], dense["seed"])]
    for recipe in dict.fromkeys(row["recipe"] for row in first if row["recipe"] != "dense"):
        points = sorted(
            (row["ratio"], row["perplexity"] / dense["perplexity"]) for row in first if row["recipe"] == recipe
        )
        if min(multiple for _, multiple in points) < 30:
            style = {
                "linestyle": "--" if "repaired" in recipe else "-",
                "linewidth": 2.5 if "default" in recipe else 1.2,
            }
            axes.plot(
                [0, *(100 * r for r, _ in points)], [1, *(m for _, m in points)], marker="o", label=recipe, **style
            )
    axes.set(yscale="log", xlabel="parameters removed (%)", ylabel="perplexity, multiple of dense")
    axes.set_ylim(top=30)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [float(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--model", default=PACKAGED_MODEL)
    parser.add_argument("--calibration", required=True, help="text of another kind than the evaluation's")
    parser.add_argument("--in-domain", help="calibration text of the evaluation's own kind, for a separate column")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--tasks", help="folder of zero-shot files: arc_easy*.jsonl, piqa*.jsonl, winogrande*.jsonl")
    parser.add_argument("--items", type=int, default=500, help="zero-shot items of each task")
    parser.add_argument("--zero-shot", type=lambda text: text.split(";"), default=["dense", "taylor", "default recipe"])
    parser.add_argument("--recipes", type=lambda text: text.split(";"), help="only these, separated by semicolons")
    parser.add_argument("--ratios", type=numbers, default=[0.2, 0.4, 0.1, 0.3, 0.5])
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--eval-seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=20, help="windows of the evaluation text")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after so many minutes")
    parser.add_argument("--out", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
