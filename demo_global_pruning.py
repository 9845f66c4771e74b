#!/usr/bin/env python3
"""Global pruning step by step on a small model, in about a minute; nothing is saved.

    python demo_global_pruning.py --importance_method taylor

shows what `llama3_global_pruning.py` does on its way: calibration text, the table of all groups, what would be cut, and
how well the smaller model still predicts text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

import core  # noqa: F401 (makes prunus importable from a checkout)
from core.methods.global_pruning import select_groups_to_prune
from prunus.calibration import load_calibration
from prunus.calibration.loading import DEFAULT_SOURCE
from prunus.checkpoint import load_model
from prunus.checkpoint.packaged_model import PACKAGED_MODEL
from prunus.cli.terminal import quiet_transformers, run_command, say
from prunus.importance import get_method
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.pipeline.recipe import Recipe
from prunus.scoring.score import score
from prunus.selection.select import check_reachable, select
from prunus.surgery import apply_plan
from prunus.sweep.sequence_loss import perplexity_of_windows

__all__ = ["main"]

#: option of the package → flag of this command, for messages
FLAGS = {
    "model": "--base_model",
    "method": "--importance_method",
    "ratio": "--pruning_ratio",
    "samples": "--num_samples",
    "calibration": "--dataset",
} | {name: f"--{name}" for name in ("seq_len", "seed", "device", "dtype")}
#: sequences that perplexity is measured on, kept out of calibration
HELD_OUT = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration.

    Returns:
        Exit status: 0 success, 1 an error that the message explains, 130 interrupted. Wrong flags exit with 2.
    """
    options = _parser().parse_args(argv)
    quiet_transformers()
    return run_command(lambda: demonstrate(options), lambda: FLAGS)


def demonstrate(options: argparse.Namespace) -> None:
    """Prune a model in memory and print every step.

    Raises:
        PrunusError: whatever is wrong with the options or the model.
    """
    _step(1, f"Load {options.base_model}")
    model, tokenizer = load_model(options.base_model, dtype=options.dtype, device=options.device)
    geometry = Geometry.of(model)
    check_reachable(geometry, options.pruning_ratio)
    say(f"{geometry.family.title}: {geometry.total_parameters:,} parameters in {len(geometry.widths)} decoder layers")
    say(
        f"an attention group is a key/value head with the {geometry.num_key_value_groups} query head(s) that read it: "
        f"{geometry.group_parameters['attention']:,} parameters"
    )
    say(f"an MLP group is one channel: {geometry.group_parameters['mlp']:,} parameters")

    _step(2, "Draw calibration text")
    drawn = load_calibration(
        options.dataset,
        tokenizer,
        samples=options.num_samples + HELD_OUT,
        seq_len=options.seq_len,
        seed=options.seed,
        model=model,
    )
    calibration, held_out = drawn.split(HELD_OUT)
    say(f"{len(calibration)} sequences of {options.seq_len} tokens from {calibration.provenance.source}")

    method = get_method(options.importance_method)
    _step(3, f"Score every group: {method.name}")
    say(method.summary)
    normalize = "none" if method.comparable else "layer_sum"
    if not method.comparable:
        say("Its raw scores are not on one scale over layers, so each is divided by its layer's sum (layer_sum).")
    table = score(model, calibration, replace(Recipe.original(method.name).scoring, normalize=normalize)).table

    _step(4, f"Rank all {len(table):,} groups by score = importance / cost")
    say("cut first:")
    say(_rows(table.head(options.rows)))
    say("kept longest:")
    say(_rows(table.tail(options.rows)))

    _step(5, f"Take the lowest scores until {options.pruning_ratio:.0%} of all parameters is reached")
    chosen = select_groups_to_prune(table, options.pruning_ratio, geometry.total_parameters)
    say(_cut_per_layer(chosen, geometry).to_string())
    removed = int(chosen["cost"].sum())
    say(
        f"in total {len(chosen):,} of {len(table):,} groups with {removed:,} of {geometry.total_parameters:,} "
        f"parameters: {removed / geometry.total_parameters:.2%}"
    )

    _step(6, "Cut a copy in memory, and compare on text that was held out")
    smaller = apply_plan(model, select(table, geometry, options.pruning_ratio))
    before, after = (perplexity_of_windows(m, held_out.input_ids).perplexity for m in (model, smaller))
    say(f"parameters: {model.num_parameters():,} → {smaller.num_parameters():,}")
    say(f"perplexity: {before:,.2f} → {after:,.2f}")
    say("\nNothing was saved. llama3_global_pruning.py and `prunus prune` save a model that loads and generates.")


def _rows(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format="{:.4g}".format)


def _cut_per_layer(chosen: pd.DataFrame, geometry: Geometry) -> pd.DataFrame:
    """How many groups of each axis, and how many parameters, go from each layer."""
    layers = pd.RangeIndex(len(geometry.widths), name="layer")
    counts = chosen.groupby(["layer_idx", "group_type"]).size().unstack(fill_value=0)
    counts = counts.reindex(index=layers, columns=list(AXES), fill_value=0)
    shown: dict[str, Any] = {
        axis: [f"{n} of {widths[axis]}" for n, widths in zip(counts[axis], geometry.widths, strict=True)]
        for axis in AXES
    }
    costs = chosen.groupby("layer_idx")["cost"].sum().reindex(layers, fill_value=0)
    return pd.DataFrame({**shown, "parameters": [f"{cost:,}" for cost in costs]}, index=layers)


def _step(number: int, title: str) -> None:
    say(f"\n{number}. {title}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Show global pruning step by step on a small model; nothing is saved.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base_model", default=PACKAGED_MODEL, metavar="PATH", help="model folder, Hub id, or smollm2-135m")
    add(
        "--importance_method",
        choices=["taylor", "taylor_2nd", "wanda"],
        default="taylor",
        help="what a group is worth",
    )
    add("--pruning_ratio", type=float, default=0.25, metavar="SHARE", help="share of all parameters to remove")
    add("--num_samples", type=int, default=16, metavar="N", help="calibration sequences")
    add("--seq_len", type=int, default=128, metavar="N", help="tokens per calibration sequence")
    add("--dataset", default=DEFAULT_SOURCE, metavar="TEXT", help="calibration text, as in llama3_global_pruning.py")
    add("--seed", type=int, default=0, metavar="N", help="decides which calibration sequences are drawn")
    add("--rows", type=int, default=8, metavar="N", help="rows of the table to print at each end")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", help="auto (as the checkpoint), float32, bfloat16, float16")
    return parser


if __name__ == "__main__":
    sys.exit(main())
