#!/usr/bin/env python3
"""Prune a model by its original command.

    python llama3_global_pruning.py --base_model PATH --importance_method taylor --pruning_ratio 0.25 --num_samples 128

scores every attention group and MLP channel of the model, cuts the cheapest ones until a quarter of all parameters is
gone, and saves the result under `pruned/`. The work is done by the package; `prunus prune --help` lists all that it can
do. `collect_layer_activations` gives the activations that `core.methods.global_pruning` reads for wanda.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import core  # noqa: F401 (makes prunus importable from a checkout)
from prunus.calibration import Batch, calibration_from_tokens
from prunus.calibration.loading import DEFAULT_SOURCE
from prunus.cli.terminal import quiet_transformers, quoted_command, run_command, say
from prunus.errors import CalibrationError
from prunus.model.geometry import Geometry
from prunus.pipeline.job import Job, OutputOptions
from prunus.pipeline.options import CalibrationOptions, EvaluationOptions
from prunus.pipeline.prune import prune_job
from prunus.pipeline.recipe import Recipe
from prunus.selection.select import Constraints
from prunus.selection.table import NORMALIZATIONS
from prunus.statistics import ActivationStatistics
from prunus.statistics.activations import ActivationStatistic, read_activations
from prunus.sweep import sweep
from prunus.sweep.engine import ModelOptions

__all__ = ["collect_layer_activations", "main"]

#: option of the package → flag of this command, for messages
FLAGS = {
    "model": "--base_model",
    "method": "--importance_method",
    "ratio": "--pruning_ratio",
    "samples": "--num_samples",
    "out": "--output_dir",
    "calibration": "--dataset",
} | {
    name: f"--{name}"
    for name in (
        *("overwrite", "normalize", "layer_start", "layer_end", "seq_len", "batch_size", "seed", "eval_text"),
        *("device", "dtype"),
    )
}


def collect_layer_activations(
    model: Any,
    batches: Iterable[Any],
    device: str | torch.device | None = None,
    *,
    statistic: ActivationStatistic = "mean_abs",
    progress: bool = True,
) -> dict[int, dict[str, Tensor]]:
    """Average what enters each projection of each layer, over all tokens of all batches.

    Forward hooks on the projections see their inputs. Batches weigh by their tokens, and padding never counts.

    Args:
        model: a transformers causal language model.
        batches: a data loader or list of token batches: tensors (batch, seq_len), mappings with `input_ids` and perhaps
            `attention_mask`, pairs of the two, or batches of a `prunus.Calibration`.
        device: move the model there first; None = run it where it is.
        statistic: mean_abs for the mean of |x|; see `prunus.statistics.activations.read_activations` for others.
        progress: show a progress bar on a terminal.

    Returns:
        `{layer_idx: {projection name: float64 tensor on the CPU, (in_features,)}}` with q_proj, k_proj, v_proj, o_proj,
        gate_proj, up_proj and down_proj. A block that an earlier cut removed has no entries.

    Raises:
        CalibrationError: there are no batches, or one is not made of token sequences.
        UnsupportedModelError: the model's family is not described.
    """
    if device is not None:
        model.to(device)
    single = isinstance(batches, Tensor | Mapping | Batch)
    token_batches = [_token_batch(batch) for batch in ([batches] if single else batches)]
    seen = sweep(model, token_batches, [ActivationStatistics()], progress=progress)
    geometry = Geometry.of(model)
    return {
        layer_idx: {
            projection.name: read_activations(seen.layers[layer_idx], projection.name, statistic)
            for block in geometry.family.blocks
            if widths[block.axis]
            for projection in block.projections
        }
        for layer_idx, widths in enumerate(geometry.widths)
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Exit status: 0 success, 1 an error that the message explains, 130 interrupted. Wrong flags exit with 2.
    """
    options = _parser().parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    quiet_transformers()
    return run_command(lambda: _prune(options, quoted_command(f"python {Path(__file__).name}", words)), lambda: FLAGS)


def _prune(options: argparse.Namespace, command: str) -> None:
    out = options.output_dir or default_output(options.base_model, options.importance_method, options.pruning_ratio)
    plain = Recipe.original(options.importance_method)
    job = Job(
        options.base_model,
        options.pruning_ratio,
        replace(
            plain,
            scoring=replace(plain.scoring, normalize=options.normalize),
            selection=Constraints(layer_start=options.layer_start, layer_end=options.layer_end),
        ),
        CalibrationOptions(
            source=options.dataset, samples=options.num_samples, seq_len=options.seq_len, seed=options.seed
        ),
        EvaluationOptions(text=options.eval_text),
        ModelOptions(device=options.device, dtype=options.dtype, batch_size=options.batch_size),
        OutputOptions(save_dtype=options.dtype),
    )
    metrics = prune_job(job, out, overwrite=options.overwrite, command=command)
    before, after = metrics["parameters_before"], metrics["parameters_after"]
    say(f"parameters: {before:,} → {after:,} ({1 - after / before:.2%} removed)")
    if metrics["perplexity_after"] is not None:
        say(
            f"perplexity: {metrics['perplexity_before']:,.2f} → {metrics['perplexity_after']:,.2f} "
            f"({metrics['perplexity_text']})"
        )
    say(f"saved to {out}")


def default_output(model: str, method: str, ratio: float) -> Path:
    """Where a result goes that was not given a place: `pruned/<model>-<method>-<ratio>`."""
    folder = Path(model).expanduser()
    # Only a folder is resolved, so that `.` and `models/..` have names; a Hub id is one already.
    name = (folder.resolve() if folder.is_dir() else folder).name
    return Path("pruned") / f"{name}-{method}-{ratio:g}"


def _token_batch(batch: Any) -> Batch:
    """One batch in any of the forms that data loaders give, checked by the package."""
    if isinstance(batch, Batch):
        return batch
    mask = None
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise CalibrationError(f"a batch has {', '.join(map(str, batch)) or 'no entries'}; it needs input_ids")
        batch, mask = batch["input_ids"], batch.get("attention_mask")
    elif isinstance(batch, list | tuple):
        batch, mask = batch[0], batch[1] if len(batch) > 1 else None
    if not isinstance(batch, Tensor):
        raise CalibrationError(f"a batch holds a {type(batch).__name__} instead of a tensor of token ids")
    input_ids = torch.atleast_2d(batch)
    mask = torch.atleast_2d(mask) if mask is not None else None
    return next(calibration_from_tokens(input_ids, mask).batches(len(input_ids)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Prune attention groups and MLP channels of a language model in one global ranking.",
        allow_abbrev=False,
    )

    def add(flag: str, text: str, **settings: Any) -> None:
        shown = " (default: %(default)s)" if settings.get("default") is not None else ""
        parser.add_argument(flag, help=text + shown, **settings)

    methods = ["taylor", "taylor_2nd", "wanda"]
    add("--base_model", "model folder, Hub id, or smollm2-135m", required=True, metavar="PATH")
    add("--importance_method", "what a group is worth", choices=methods, default="taylor")
    add("--pruning_ratio", "share of all parameters to remove, in [0, 1)", type=float, default=0.25, metavar="SHARE")
    add("--num_samples", "calibration sequences", type=int, default=128, metavar="N")
    add("--output_dir", "folder for the result (default: pruned/<model>-<method>-<ratio>)", metavar="DIR")
    add("--overwrite", "replace an earlier result in the folder", action="store_true")
    add("--normalize", "makes scores of different layers comparable", choices=NORMALIZATIONS, default="none")
    add("--layer_start", "first decoder layer that may be cut", type=int, default=0, metavar="N")
    add("--layer_end", "one past the last decoder layer that may be cut (default: all)", type=int, metavar="N")
    add(
        "--dataset",
        "calibration text: a .txt, .jsonl or .parquet file; c4, wikitext2, ptb or owner/name from the Hub; default for "
        "the text that ships with Python; self for text that the model writes",
        default=DEFAULT_SOURCE,
        metavar="TEXT",
    )
    add("--seq_len", "tokens per calibration sequence", type=int, default=512, metavar="N")
    add("--batch_size", "calibration sequences per pass", type=int, default=1, metavar="N")
    add("--seed", "decides which calibration sequences are drawn", type=int, default=0, metavar="N")
    add("--eval_text", "text to measure perplexity on (default: held-out calibration sequences)", metavar="FILE")
    add("--device", "auto, cpu, cuda, cuda:1, mps", default="auto")
    add("--dtype", "auto (as the checkpoint), float32, bfloat16, float16", default="auto")
    return parser


if __name__ == "__main__":
    sys.exit(main())
