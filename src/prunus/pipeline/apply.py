"""A model cut by a plan that is there already."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import dtype_to_save, empty_model, locate, pruned_config
from prunus.files.outputs import check_output, claimed
from prunus.machine.placement import dtype_name, resolve_dtype
from prunus.model.geometry import Geometry
from prunus.model.saved_dtype import save_in_, saved_dtype
from prunus.model.whole import attach_whole_
from prunus.pipeline.multimodal import whole_metrics
from prunus.results.lineage import lineage_of
from prunus.results.result_folder import ResultRecords, read_metrics, save_result
from prunus.scoring.routing import active_parameters
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan
from prunus.sweep.engine import ModelOptions, config_of, load_or_open, model_name
from prunus.sweep.estimate import Workload
from prunus.version import __version__

__all__ = ["apply_checkpoint"]


def apply_checkpoint(
    model: str,
    plan: Plan,
    out: str | Path,
    *,
    model_options: ModelOptions | None = None,
    save_dtype: str = "auto",
    text_only: bool = False,
    overwrite: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Cut a model folder or Hub model by a plan and save the result; nothing is measured.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.
        plan: which groups stay.
        out: folder for the result.
        model_options: device and dtype; nothing is computed, so that auto is the checkpoint's own dtype.
        save_dtype: see `prunus.OutputOptions`.
        text_only: of a multimodal model, save the language model by itself.
        overwrite: replace an earlier result.
        command: what the user typed, for the model card.

    Returns:
        The metrics, as they are written to prunus/metrics.json.
    """
    model_options = model_options or ModelOptions()
    resolve_dtype(save_dtype, "save_dtype")
    model = model_options.named(model)
    asked = "apply", model, plan.fingerprint, model_options, save_dtype, text_only, overwrite
    with claimed(out, run=asked, command=command) as claim:
        if claim.finished:
            metrics = read_metrics(claim.path)
        else:
            check_output(out, overwrite, model)
            lineage_of(locate(model))  # damaged records are refused before the weights are read
            _check_plan(model, plan)
            stored = config_of(model).dtype
            if model_options.dtype == "auto":
                model_options = replace(model_options, dtype=dtype_name(stored))
            dense, tokenizer, _ = load_or_open(model, model_options, workload=Workload(cuts=True))
            save_in_(dense, dtype_to_save(stored, dense.dtype, save_dtype))
            if text_only:
                attach_whole_(dense, None)
            geometry = Geometry.of(dense)
            plan.check_fits(geometry)
            smaller = apply_plan(dense, plan)
            whole = whole_metrics(dense, smaller)
            del dense
            metrics = {
                "prunus": __version__,
                "base_model": model_name(model),
                "command": command or f"prunus apply {shlex.quote(model)} plan.json --out {shlex.quote(str(out))}",
                "ratio": 1 - smaller.num_parameters() / geometry.total_parameters,
                "parameters_before": geometry.total_parameters,
                "parameters_after": smaller.num_parameters(),
                **whole,
                **active_parameters(geometry, plan),
                "saved_dtype": dtype_name(saved_dtype(smaller)),
                "plan": plan.fingerprint,
            }
            metrics = save_result(
                smaller, tokenizer, ResultRecords(plan, metrics), out, source=model, overwrite=overwrite
            )
    return metrics


def _check_plan(model: str, plan: Plan) -> None:
    """Check, before the weights are read, that a plan fits a model, and that a class loads what it leaves.

    Raises:
        PlanError: see `Plan.check_fits`.
        UnsupportedModelError: see `pruned_config`.
    """
    config = config_of(model)
    plan.check_fits(Geometry.of(empty_model(config, torch.float32)))
    survivors = plan.surviving_layers
    pruned_config(config, [plan.layers[layer_idx].widths for layer_idx in survivors], survivors)
