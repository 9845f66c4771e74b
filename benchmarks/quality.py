r"""What pruning costs in quality: a list of recipes for `prunus.compare`, in parts; parts that are there are skipped.

Calibration text and evaluation text are of different kinds; a second calibration text, of the evaluation's own kind,
gives a part of its own. The seconds of a row are those of everything that led to it.

    python benchmarks/quality.py --calibration c4-sample.jsonl --text wikitext2-test.raw.txt \
        --in-domain wikitext2-valid.txt --tasks zeroshot/ --out benchmarks/results/quality
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rows import add_run_options, made_once, markdown_table

import prunus
from prunus.pipeline.compare import compare
from prunus.pipeline.job import Job
from prunus.pipeline.job_file import job_text
from prunus.pipeline.recipe import Recipe
from prunus.repair.block_repair import RepairOptions
from prunus.scoring.score import ScoringOptions

DEFAULT = Recipe()
REPAIR = RepairOptions()
ALL_RATIOS, FEW_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5), (0.2, 0.4)


def scored(**options: Any) -> ScoringOptions:
    """Scores as they are, by the options of a method."""
    return ScoringOptions(**{"attention_weight": 1.0, "noise": 0.0, **options})


METHODS: Mapping[str, ScoringOptions] = {
    "gate_fisher": scored(),
    "gate_fisher, attention x 1.5": scored(attention_weight=1.5),
    "taylor": scored(method="taylor"),
    "taylor_2nd": scored(method="taylor_2nd"),
    "hybrid taylor+wanda": scored(method="hybrid"),
    "hybrid gate_fisher+taylor": scored(method="hybrid", hybrid=(("gate_fisher", 0.5), ("taylor", 0.5))),
    "wanda, layer_sum": scored(method="wanda", normalize="layer_sum"),
    "wanda": scored(method="wanda"),
    "adaptive": scored(method="adaptive"),
    "magnitude": scored(method="magnitude"),
    "random": scored(method="random"),
}
DETAILS: Mapping[str, ScoringOptions] = {
    "taylor_2nd, empirical_fisher": scored(method="taylor_2nd", hessian="empirical_fisher"),
    "taylor_2nd, sampled_fisher": scored(method="taylor_2nd", hessian="sampled_fisher"),
    "gate_fisher, sampled_fisher": scored(hessian="sampled_fisher"),
}
SILENT = Recipe(scoring=scored(attention_weight=1.5), repair=replace(REPAIR, noise=0))


def plain(methods: Mapping[str, ScoringOptions]) -> dict[str, Recipe]:
    """Plain slicing."""
    return {name: Recipe(1, scoring, repair=None) for name, scoring in methods.items()}


def repaired(methods: Mapping[str, ScoringOptions]) -> dict[str, Recipe]:
    """One cut, repaired."""
    return {f"{name}, repaired": Recipe(1, scoring, repair=REPAIR) for name, scoring in methods.items()}


@dataclass(frozen=True)
class Part:
    """Recipes that are compared on the same text at the same ratios: the given one, or half of it and half `self`."""

    recipes: Mapping[str, Recipe]
    ratios: tuple[float, ...] = ALL_RATIOS
    every_seed: bool = False
    in_domain: bool = False
    own_text: bool = False
    tasks: bool = False


#: the most wanted first
PARTS: Mapping[str, Part] = {
    "default": Part({"default recipe": DEFAULT, "taylor": Recipe.original()}, every_seed=True, own_text=True),
    "tasks": Part({"default recipe": DEFAULT, "taylor": Recipe.original()}, FEW_RATIOS, own_text=True, tasks=True),
    "variants": Part(
        {
            "default recipe, one round": replace(DEFAULT, rounds=1),
            "default recipe, three rounds": replace(DEFAULT, rounds=3),
            "three rounds with wanda, layer_sum": replace(
                DEFAULT, rounds=3, scoring=ScoringOptions(method="wanda", normalize="layer_sum")
            ),
        },
        FEW_RATIOS,
        own_text=True,
    ),
    "given-text": Part(
        {
            "default recipe": DEFAULT,
            "two rounds, no noise": SILENT,
            "three rounds, no noise": replace(SILENT, rounds=3),
        },
        FEW_RATIOS,
    ),
    "methods": Part(plain(METHODS)),
    "methods-repaired": Part(repaired(METHODS)),
    "details": Part({**plain(DETAILS), **repaired(DETAILS)}, FEW_RATIOS),
    "in-domain": Part(
        {
            "default recipe": DEFAULT,
            "two rounds, no noise": SILENT,
            **repaired({"gate_fisher": scored()}),
            "taylor": Recipe.original(),
        },
        in_domain=True,
    ),
}


def main() -> None:
    options = parse()
    for name, part in PARTS.items():
        out = options.out / name
        text = options.in_domain if part.in_domain else options.calibration
        wanted = text and (options.tasks or not part.tasks) and (not options.parts or name in options.parts)
        ratios = [ratio for ratio in part.ratios if not options.ratios or ratio in options.ratios]
        if not wanted or not ratios:
            continue
        sources = (str(text), "self") if part.own_text else (str(text),)
        job = Job(
            options.model,
            calibration=prunus.CalibrationOptions(sources, options.samples, options.seq_len),
            evaluation=prunus.EvaluationOptions(
                str(options.text),
                seq_len=options.eval_seq_len,
                windows=options.windows,
                tasks=(str(options.tasks),) if part.tasks else (),
                items=options.items,
            ),
            run=prunus.ModelOptions(batch_size=options.batch_size),
        )
        seeds = options.seeds if part.every_seed else options.seeds[:1]
        made_once(out, [job_text(job), ratios, seeds], partial(compare, job, part.recipes, ratios, out, seeds=seeds))
    table = markdown(options.out)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")


def markdown(folder: Path) -> str:
    """One line per part, recipe and seed; multiples of the dense perplexity by ratio."""
    lines: dict[tuple[str, ...], dict[float, float]] = {}
    for name in PARTS:
        path = folder / name / "comparison.json"
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else ():
            if row["recipe"] != "dense":
                lines.setdefault((name, row["recipe"], str(row["seed"])), {})[row["ratio"]] = row["relative"]
    ratios = sorted({ratio for found in lines.values() for ratio in found})
    shown = {key: {f"{100 * ratio:g} %": figure for ratio, figure in found.items()} for key, found in lines.items()}
    return markdown_table(("part", "recipe", "seed"), shown, [f"{100 * ratio:g} %" for ratio in ratios])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--calibration", type=Path, required=True, help="text of another kind than the evaluation's")
    parser.add_argument("--in-domain", type=Path, help="calibration text of the evaluation's own kind")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text")
    parser.add_argument("--tasks", type=Path, help="folder of zero-shot files")
    parser.add_argument("--items", type=int, default=500, help="zero-shot items of each task")
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="only these")
    parser.add_argument("--eval-seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=20, help="windows of the evaluation text")
    return parser.parse_args()


if __name__ == "__main__":
    main()
