"""Which MLP channels stay, chosen by what is left of the error once the others have taken over.

The plan says how many channels each layer keeps. Which ones a layer can best do without depends on what the repair can
make of the rest, and that is known only when the repair reaches the layer: there the inputs X of down_proj are those of
the pruned, repaired model, with all channels still in place. With A = XᵀX + λI, W* the least-squares solution on all
channels, and F the output Fisher of the block, leaving out channel c and solving for the others again raises the
F-weighted error by

    w*_cᵀ F w*_c / [A⁻¹]_cc

The channels of the smallest rise go, a few at a time, and A⁻¹ and W* are updated for those that are left:

    A⁻¹ ← A⁻¹ − A⁻¹[:, P] (A⁻¹[P, P])⁻¹ A⁻¹[P, :],    W* ← W* − W*[:, P] (A⁻¹[P, P])⁻¹ A⁻¹[P, :]

Source: Hassibi & Stork 1992, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", eq. 5, for columns;
Frantar & Alistarh 2022, "Optimal Brain Compression", section 4 (updates of the inverse); the factors A and F are those
of Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from prunus.calibration import Batch
from prunus.errors import StatisticsError
from prunus.model.digest import digest_tensors
from prunus.model.families import Axis
from prunus.model.geometry import Geometry
from prunus.repair.compensation import CompensationOptions, Cut, Repair, compensate_together_
from prunus.repair.least_squares import NormalEquations
from prunus.selection.plan import Plan
from prunus.selection.table import rank_table
from prunus.statistics import Statistics
from prunus.surgery import apply_plan

__all__ = ["CHOSEN_BY", "choose_columns", "hand_out_scores", "reselect"]

#: the statistic that says what an error of an MLP's output costs
CHOSEN_BY = "output_fisher.mlp"

#: at most so many steps of elimination in a layer, so that wide layers take out more channels at a time
STEPS = 192


def reselect(
    model: Any,
    done: Plan,
    dense: Any,
    plan: Plan,
    statistics: Statistics | None,
    batches: Sequence[Batch],
    options: CompensationOptions,
    *,
    work: Path | None = None,
    progress: bool = True,
) -> tuple[Any, Plan, list[Repair]]:
    """Cut and repair a model, choosing anew which MLP channels of each layer stay.

    Args:
        model: the model before this cut: the dense one, or what earlier rounds left.
        done: what earlier rounds kept of the dense model.
        dense: the dense model.
        plan: what is to stay of the dense model; of its MLP channels only the number in each layer is read.
        statistics: of `model`, with `output_fisher.mlp`.
        batches: calibration sequences.
        options: ridge and target of the repair.
        work: folder from which a killed run goes on with the same result, see `prunus.repair.compensation.Cut`.
        progress: show a progress bar on a terminal.

    Returns:
        The smaller, repaired model; the plan with the channels that were chosen; one record per repaired block.

    Raises:
        StatisticsError: the statistics lack the output Fisher.
    """
    geometry, fisher = Geometry.of(dense), _output_fisher(statistics, done)
    # Attention is cut at once; the MLP channels stay until the repair reaches them, except where the whole block goes.
    wide = Plan.from_kept(
        geometry,
        [
            {"attention": wanted.attention, "mlp": before.mlp if wanted.mlp else ()}
            for wanted, before in zip(plan.layers, done.layers, strict=True)
        ],
    )
    smaller = apply_plan(model, wide.after(done, Geometry.of(model)))
    keep = [len(layer.mlp) for layer in plan.layers]

    def choose(layer_idx: int, axis: Axis, equations: NormalEquations, weight: Tensor) -> Tensor | None:
        if axis != "mlp" or keep[layer_idx] == weight.shape[1]:
            return None
        return choose_columns(equations, weight, fisher[layer_idx], keep[layer_idx], options.damping)

    chosen_by: dict[str, Any] = {}
    if work is not None:
        chosen_by = {"channels": keep, CHOSEN_BY: digest_tensors((str(i), fisher[i]) for i in sorted(fisher))}
    cut = Cut(smaller, wide, choose, chosen_by, work)
    repaired = compensate_together_([cut], dense, batches, options, progress=progress)[0]
    kept: list[dict[Axis, Iterable[int]]] = []
    for layer_idx, layer in enumerate(wide.layers):
        stay = repaired.chosen.get((layer_idx, "mlp"))
        mlp = layer.mlp if stay is None else np.asarray(layer.mlp)[stay.numpy()]
        kept.append({"attention": layer.attention, "mlp": mlp})
    final = Plan.from_kept(geometry, kept)
    return apply_plan(smaller, final.after(wide, Geometry.of(smaller))), final, repaired.repairs


def choose_columns(equations: NormalEquations, weight: Tensor, fisher: Tensor, keep: int, damping: float) -> Tensor:
    """The inputs of a projection that stay, by elimination.

    Args:
        equations: of all inputs.
        weight: W, towards which the ridge pulls, (out_features, in_features).
        fisher: F, (out_features, out_features).
        keep: how many inputs stay.
        damping: λ as a share of the mean diagonal of XᵀX.

    Returns:
        int64 on the CPU, (keep,), ascending.
    """
    gram = equations.gram.double()
    ridge = damping * float(gram.diagonal().mean())
    gram.diagonal().add_(ridge)
    inverse = torch.linalg.inv(gram)
    solution = inverse @ (equations.cross.double() + ridge * weight.double().T)
    # ‖F^½ w‖² for every column at once. float32 from here on: the order needs no more.
    values, vectors = torch.linalg.eigh(fisher.to(gram.device).double())
    root = values.clamp(min=0).sqrt()[:, None] * vectors.T
    weighed, inverse = (root @ solution.T).float(), inverse.float()
    left = torch.arange(gram.shape[0], device=gram.device)
    step = -(-len(left) // STEPS)
    while len(left) > keep:
        rise = weighed.square().sum(dim=0) / inverse.diagonal()
        goes = rise.topk(min(step, len(left) - keep), largest=False).indices
        rows = torch.linalg.solve(inverse[goes][:, goes].double(), inverse[goes].double()).float()
        weighed -= weighed[:, goes] @ rows
        inverse -= inverse[:, goes] @ rows
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[goes] = False
        left, weighed, inverse = left[stays], weighed[:, stays], inverse[stays][:, stays]
    return left.sort().values.cpu()


def hand_out_scores(table: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """The table with scores given anew within each layer and axis: the groups that stay get the higher ones.

    Which layer a score belongs to stays as it was, so that the same budget leads to this plan.

    Args:
        table: the table whose layers' numbers of groups the plan was made from.
        plan: as many groups in each layer as selection from the table keeps, but perhaps others.
    """
    parts = []
    for (layer_idx, axis), rows in table.groupby(["layer_idx", "group_type"], sort=False):
        rows = rows.sort_values(["score", "importance", "group_idx"], kind="stable")
        stays = rows["group_idx"].isin(plan.layers[layer_idx][axis]).to_numpy()
        groups = rows["group_idx"].to_numpy()
        parts.append(rows.assign(group_idx=np.concatenate([groups[~stays], groups[stays]])))
    handed_out = pd.concat(parts, ignore_index=True)
    return rank_table(handed_out, scores=handed_out["score"])


def _output_fisher(statistics: Statistics | None, done: Plan) -> Mapping[int, Tensor]:
    """The output Fisher of each MLP, by layer of the dense model."""
    layers = done.surviving_layers
    if statistics is None or not statistics.has(CHOSEN_BY):
        raise StatisticsError(
            f"choosing channels again needs the statistic {CHOSEN_BY} of every layer; take it, or repair without "
            "reselect"
        )
    if len(statistics.layers) != len(layers):
        raise StatisticsError(
            f"the statistics are of {len(statistics.layers)} layers, the model that is cut has {len(layers)}; take "
            "them of that model"
        )
    return {layer_idx: layer[CHOSEN_BY] for layer_idx, layer in zip(layers, statistics.layers, strict=True)}
