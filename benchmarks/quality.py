r"""What pruning costs in quality: every method with and without repair, at several ratios, against the dense model.

Calibration text and evaluation text are of different kinds; a second calibration text, of the evaluation's own kind,
gives rows of its own. Each result is one row, written to disk as soon as it is there; a run that stops goes on where it
was when it is started again with the same options. Rows of high priority come first, so that `--minutes` can bound a
run. The seconds of a row are those after its scores; what scores cost says `benchmarks/engine.py`.

    python benchmarks/quality.py --calibration c4-sample.jsonl --text wikitext2-test.raw.txt \
        --in-domain wikitext2-valid.txt --tasks zeroshot/ --out benchmarks/results/quality
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from prunus.pipeline.budget_search import SearchOptions
from prunus.scoring.priors import PriorOptions
from rich.console import Console
from rich.table import Table

import prunus
from prunus.calibration.self_text import text_for_repair
from prunus.checkpoint.packaged_model import PACKAGED_MODEL
from prunus.cli.prune import DEFAULT_ATTENTION_WEIGHT, DEFAULT_ROUNDS, DEFAULT_SCORE_NOISE
from prunus.evaluation.perplexity import PerplexityResult, perplexity, read_text
from prunus.evaluation.zero_shot import load_task, zero_shot
from prunus.repair.compensation import CompensationOptions, Cut, compensate_together_
from prunus.scoring.score import Score, ScoringOptions, score_together
from prunus.surgery import apply_plan

#: of the default recipe
DEFAULT_REPAIR = CompensationOptions()
#: what methods are compared with: on the calibration text alone
REPAIR = replace(DEFAULT_REPAIR, self_text=0)
SEARCH_TRIALS = 24
#: the scoring of the default recipe, and of it with another method
DEFAULT = "gate_fisher, attention x 1.5, noise"
WANDA = "wanda, layer_sum, attention x 1.5, noise"


@dataclass(frozen=True)
class Recipe:
    """A way of pruning.

    Attributes:
        scoring: its name in `scorings`.
        repair: of the remaining weights; None = plain slicing.
        rounds: see `prunus.prune`.
        search: of the budget of axes and depth bands.
        main: whether all ratios and seeds are wanted, or 20 and 40 % of the first seed.
    """

    scoring: str
    repair: CompensationOptions | None = None
    rounds: int = 1
    search: SearchOptions | None = None
    main: bool = True

    @property
    def alone(self) -> bool:
        """Whether each ratio takes passes of its own."""
        return self.rounds > 1 or self.search is not None or (self.repair is not None and self.repair.reselect)


def scorings(seed: int = 0, batch_size: int = 1) -> dict[str, ScoringOptions]:
    """Every way of scoring that has rows, by name; those of one line share a pass over the sequences."""
    own = partial(ScoringOptions, random_seed=seed, batch_size=batch_size)
    both = (("gate_fisher", 0.5), ("taylor", 0.5))
    default = own(method="gate_fisher", attention_weight=DEFAULT_ATTENTION_WEIGHT, score_noise=DEFAULT_SCORE_NOISE)
    return {
        DEFAULT: default,
        WANDA: replace(default, method="wanda", normalize="layer_sum"),
        "gate_fisher": own(method="gate_fisher"),
        "gate_fisher, attention x 1.5": own(method="gate_fisher", attention_weight=DEFAULT_ATTENTION_WEIGHT),
        "taylor": own(method="taylor"),
        "hybrid taylor+wanda": own(method="hybrid"),
        "hybrid gate_fisher+taylor": own(method="hybrid", hybrid=both),
        "taylor_2nd": own(method="taylor_2nd"),
        "wanda, layer_sum": own(method="wanda", normalize="layer_sum"),
        "wanda": own(method="wanda"),
        "taylor_2nd, empirical_fisher": own(method="taylor_2nd", hessian="empirical_fisher"),
        "adaptive": own(method="adaptive"),
        "taylor_2nd, sampled_fisher": own(method="taylor_2nd", hessian="sampled_fisher"),
        "gate_fisher, sampled_fisher": own(method="gate_fisher", hessian="sampled_fisher"),
        "gate_fisher, cosine prior": own(method="gate_fisher", priors=PriorOptions("cosine")),
        "magnitude": own(method="magnitude"),
        "random": own(method="random"),
    }


#: scorings that are taken together, in the order in which their passes are run
PASSES = (
    (DEFAULT,),
    (WANDA,),
    (
        *("gate_fisher", "gate_fisher, attention x 1.5", "taylor", "hybrid taylor+wanda", "hybrid gate_fisher+taylor"),
        *("taylor_2nd", "wanda, layer_sum", "wanda", "magnitude", "random"),
    ),
    ("taylor_2nd, empirical_fisher",),
    ("adaptive",),
    ("taylor_2nd, sampled_fisher", "gate_fisher, sampled_fisher"),
    ("gate_fisher, cosine prior",),
)
#: rows that say how much a detail matters, and not which method to take
DETAILS = (WANDA, "taylor_2nd, sampled_fisher", "gate_fisher, sampled_fisher", "gate_fisher, cosine prior")

DETAIL_RATIOS = (0.2, 0.4)
#: recipes that have rows of calibration text of the evaluation's own kind
IN_DOMAIN = (
    *("default recipe", "default recipe, calibration text alone", "two rounds, calibration text alone, no noise"),
    *("gate_fisher, repaired", "taylor"),
)


def recipes() -> dict[str, Recipe]:
    """All rows of one ratio, most wanted first."""
    default = Recipe(DEFAULT, DEFAULT_REPAIR, DEFAULT_ROUNDS)
    search = replace(default, search=SearchOptions(search_trials=SEARCH_TRIALS), main=False)
    silent = Recipe("gate_fisher, attention x 1.5", replace(REPAIR, repair_noise=0), rounds=3, main=False)
    found = {
        "default recipe": default,
        "default recipe, one round": replace(default, rounds=1, main=False),
        "default recipe, three rounds": replace(default, rounds=3, main=False),
        "default recipe, budget searched": search,
        "default recipe, reselected": replace(default, repair=replace(DEFAULT_REPAIR, reselect=True), main=False),
        "three rounds with wanda, layer_sum": replace(default, scoring=WANDA, rounds=3, main=False),
        "default recipe, calibration text alone": replace(default, repair=REPAIR, main=False),
        "two rounds, calibration text alone, no noise": replace(silent, rounds=2),
        "three rounds, calibration text alone, no noise": silent,
    }
    for name in scorings():
        found[f"{name}, repaired"] = Recipe(name, REPAIR, main=name not in DETAILS)
        found[name] = Recipe(name, main=name not in DETAILS)
    return found


def main() -> None:
    options = parse()
    bench = Bench(options)
    deadline = time.monotonic() + 60 * options.minutes
    for jobs in bench.jobs():
        if time.monotonic() > deadline:
            break
        bench.run(jobs)
    bench.show()


@dataclass(frozen=True)
class Job:
    """One row that is wanted."""

    recipe: str
    ratio: float
    calibration: str
    seed: int


class Bench:
    """The rows so far, and what is needed for more of them."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.folder = Path(options.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "rows.jsonl"
        self.rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        self.model, self.tokenizer = prunus.load_model(options.model)
        self.text = read_text(options.text)
        self.tasks = [load_task(path) for path in sorted(Path(options.tasks).glob("*.jsonl"))] if options.tasks else []
        self._scores: dict[tuple[str, int, str], Score] = {}
        self._texts: dict[tuple[float, str, int], tuple[prunus.Calibration, float]] = {}
        self._calibrations: dict[tuple[str, int], prunus.Calibration] = {}

    def jobs(self) -> Iterator[list[Job]]:
        """The rows that are wanted and not there; those of one list are made together."""
        options, name = self.options, Path(self.options.calibration).name
        done = {(row["recipe"], row["ratio"], row["calibration"], row["seed"]) for row in self.rows}
        measured = any(row["recipe"] == "dense" for row in self.rows)
        lists = [] if measured else [[Job("dense", 0.0, name, options.seeds[0])]]
        wanted = {key: recipe for key, recipe in recipes().items() if not options.recipes or key in options.recipes}
        for seed in options.seeds:
            for recipe, what in wanted.items():
                few = [ratio for ratio in options.ratios if ratio in DETAIL_RATIOS]
                ratios = options.ratios if what.main and seed == options.seeds[0] else few
                if what.main or seed == options.seeds[0]:
                    lists.append([Job(recipe, ratio, name, seed) for ratio in ratios])
        if options.in_domain:
            own, seed = Path(options.in_domain).name, options.seeds[0]
            lists += [[Job(recipe, r, own, seed) for r in options.ratios] for recipe in IN_DOMAIN if recipe in wanted]
        for jobs in lists:
            left = [job for job in jobs if tuple(vars(job).values()) not in done]
            if jobs[0].recipe in wanted and wanted[jobs[0].recipe].alone:
                yield from ([job] for job in left)
            elif left:
                yield left

    def run(self, jobs: list[Job]) -> None:
        """Prune, measure, and write the rows of one recipe."""
        if jobs[0].recipe == "dense":
            self._measure(self.model, jobs[0], seconds=0.0)
            return
        recipe = recipes()[jobs[0].recipe]
        if recipe.alone:
            for job in jobs:
                self._run_alone(job, recipe)
        else:
            self._run_together(jobs, recipe)

    def _run_alone(self, job: Job, recipe: Recipe) -> None:
        """A recipe of several steps."""
        # Channels are chosen again by a statistic of the scores' pass, which is not kept.
        kept = recipe.repair is None or not recipe.repair.reselect
        scored = self._score(recipe.scoring, job.calibration, job.seed) if kept else None
        text, writing = self._text(recipe.repair, job)
        start = time.perf_counter()
        result = prunus.prune(
            self.model,
            job.ratio,
            self._calibration(job.calibration, job.seed),
            scoring=self._scoring(recipe.scoring, job.seed),
            compensation=recipe.repair,
            rounds=recipe.rounds,
            search=recipe.search,
            scored=scored,
            repair_text=text,
        )
        seconds = time.perf_counter() - start + writing
        facts = {"plan": result.plan.fingerprint, "budget_search": result.score.about.get("budget_search")}
        self._measure(result.model, job, seconds=seconds, **facts)

    def _run_together(self, jobs: list[Job], recipe: Recipe) -> None:
        """One cut for each ratio, from the same scores, and repaired in one go."""
        scored = self._score(recipe.scoring, jobs[0].calibration, jobs[0].seed)
        plans = {job: prunus.select(scored.table, scored.geometry, job.ratio) for job in jobs}
        new = [job for job in jobs if not self._measured_before(job, plans[job].fingerprint)]
        cuts = [Cut(apply_plan(self.model, plans[job]), plans[job]) for job in new]
        times = [0.0] * len(cuts)
        if recipe.repair is not None and cuts:
            text, writing = self._text(recipe.repair, jobs[0])
            assert text is not None  # as there is a repair
            batches = list(text.batches(self.options.batch_size))
            repaired = compensate_together_(cuts, self.model, batches, recipe.repair)
            times = [found.seconds + writing for found in repaired]
        findings = scored.about.get("adaptive")
        for job, cut, seconds in zip(new, cuts, times, strict=True):
            self._measure(cut.pruned, job, seconds=seconds, plan=cut.plan.fingerprint, findings=findings)

    def _measured_before(self, job: Job, plan: str) -> bool:
        """Whether another method led to the same plan; the row then is a copy, and says of which."""
        repair = recipes()[job.recipe].repair
        for row in self.rows:
            known = recipes().get(row["recipe"])
            if known is None or known.alone or known.repair != repair or row["plan"] != plan:
                continue
            if repair is not None and (row["calibration"], row["seed"]) != (job.calibration, job.seed):
                continue
            self._write({**row, **vars(job), "same_plan_as": row["recipe"]})
            return True
        return False

    def _calibration(self, name: str, seed: int) -> prunus.Calibration:
        key = name, seed
        if key not in self._calibrations:
            paths = [self.options.calibration, self.options.in_domain]
            path = next(path for path in paths if path and Path(path).name == name)
            self._calibrations[key] = prunus.load_calibration(
                path, self.tokenizer, samples=self.options.samples, seq_len=self.options.seq_len, seed=seed
            )
        return self._calibrations[key]

    def _text(self, repair: CompensationOptions | None, job: Job) -> tuple[prunus.Calibration | None, float]:
        """The sequences of a repair, and the seconds that writing them took."""
        if repair is None:
            return None, 0.0
        key = repair.self_text, job.calibration, job.seed
        if key not in self._texts:
            start, given = time.perf_counter(), self._calibration(job.calibration, job.seed)
            self._texts[key] = text_for_repair(self.model, given, repair, seed=job.seed), time.perf_counter() - start
        return self._texts[key]

    def _scoring(self, name: str, seed: int) -> ScoringOptions:
        return scorings(seed, self.options.batch_size)[name]

    def _score(self, name: str, calibration: str, seed: int) -> Score:
        """The scores of a way of scoring: from memory, from the folder, or taken now and kept."""
        together = next(names for names in PASSES if name in names)
        folders = {
            each: self.folder / "scores" / f"{calibration}-{seed}" / each.replace(",", "").replace(" ", "-")
            for each in together
        }
        if (calibration, seed, name) not in self._scores:
            if all((folder / "score.json").exists() for folder in folders.values()):
                found = [Score.load(folder) for folder in folders.values()]
            else:
                ways = [self._scoring(each, seed) for each in together]
                found = score_together(self.model, self._calibration(calibration, seed), ways)
            for each, scored in zip(together, found, strict=True):
                small = replace(scored, statistics=None)
                small.save(folders[each])
                self._scores[calibration, seed, each] = small
        return self._scores[calibration, seed, name]

    def _measure(self, model: Any, job: Job, *, seconds: float, **facts: Any) -> None:
        result: PerplexityResult = perplexity(
            model, self.tokenizer, self.text, seq_len=self.options.eval_seq_len, max_windows=self.options.windows
        )
        row = {**vars(job), "seconds": round(seconds, 1), **facts}
        row |= {"parameters": model.num_parameters(), "perplexity": result.perplexity, "protocol": result.protocol}
        if job.recipe in self.options.zero_shot:
            row["zero_shot"] = [
                zero_shot(model, self.tokenizer, task, limit=self.options.items).to_dict() for task in self.tasks
            ]
        self._write(row | {"prunus": prunus.__version__, "torch": torch.__version__, "machine": platform.machine()})

    def _write(self, row: dict[str, Any]) -> None:
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
    heads = " | ".join(f"{100 * ratio:g} %" for ratio in ratios)
    lines = [
        f"| recipe | calibration | seed | {heads} | seconds after scoring |",
        f"|---|---|---|{'---|' * len(ratios)}---|",
    ]
    keys = dict.fromkeys((row["recipe"], row["calibration"], row["seed"]) for row in rows if row["recipe"] != "dense")
    for key in keys:
        found = {row["ratio"]: row for row in rows if (row["recipe"], row["calibration"], row["seed"]) == key}
        cells = [f"{found[r]['perplexity'] / dense:,.2f}" if r in found else "" for r in ratios]
        seconds = max(row["seconds"] for row in found.values())
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


#: a recipe with fewer ratios than this is in the table, and no curve
POINTS = 4


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Multiples of the dense perplexity over the removed share, of the first seed and calibration text."""
    from matplotlib.figure import Figure

    dense = next(row for row in rows if row["recipe"] == "dense")
    first = [row for row in rows if (row["calibration"], row["seed"]) == (dense["calibration"], dense["seed"])]
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(first, key=lambda row: row["ratio"]):
        if row["recipe"] != "dense":
            curves.setdefault(row["recipe"], []).append((100 * row["ratio"], row["perplexity"] / dense["perplexity"]))
    curves = {recipe: points for recipe, points in curves.items() if len(points) >= POINTS}
    methods, known = sorted({recipe.removesuffix(", repaired") for recipe in curves}), scorings()
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, suffix in zip(
        panels, ("methods, plain slicing", "methods, repaired"), ("", ", repaired"), strict=True
    ):
        for number, method in enumerate(methods):
            # Recipes that are no method stand for themselves in both panels.
            points = curves.get(method + suffix) if method in known else curves[method]
            if points:
                width = 1.2 if method in known else 2.5
                x, y = zip((0, 1), *points, strict=True)
                axes.plot(x, y, color=f"C{number}", marker="os^v"[number % 4], linewidth=width, label=method)
        axes.set(yscale="log", xlabel="parameters removed (%)", title=title)
        axes.set_ylim(0.95, 15)
        axes.set_yticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity, multiple of dense")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize="small")
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
