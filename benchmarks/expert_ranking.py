r"""Experts ranked in one list against the same number in every layer, on the small mixture of `experts.py`.

Removed experts are masked in the router, which computes what a model without them would, whatever their number in each
layer: no class loads a mixture with unequal layers. Perplexity on the last part of the text, as there.

    python benchmarks/experts.py --text c4-sample.jsonl --out OUT        # trains the model
    python benchmarks/expert_ranking.py --text c4-sample.jsonl --out OUT
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from experts import read, windows_of
from torch import Tensor
from torch.nn import functional

import prunus
from prunus.model.geometry import Geometry
from prunus.repair.block_repair import RepairOptions, repair_
from prunus.scoring.score import ScoringOptions, score
from prunus.selection.plan import Plan
from prunus.sweep.sequence_loss import perplexity_of_windows

METHODS = ("frequency", "reap", "gate_fisher", "taylor")


def masked(model: Any, kept: Sequence[Sequence[int]]) -> Any:
    """A copy of a qwen3_moe model whose routers see only some experts of each layer."""
    smaller = copy.deepcopy(model)
    for layer, experts in zip(smaller.model.layers, kept, strict=True):
        gate = layer.mlp.gate
        hidden = torch.full((gate.num_experts,), -torch.inf).index_fill(0, torch.tensor(experts), 0.0)

        def forward(x: Tensor, gate: Any = gate, hidden: Tensor = hidden) -> tuple[Tensor, Tensor, Tensor]:
            logits = functional.linear(x.reshape(-1, gate.hidden_dim), gate.weight) + hidden
            weights, chosen = torch.topk(logits.float().softmax(dim=-1), gate.top_k, dim=-1)
            if gate.norm_topk_prob:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            return logits, weights.to(logits.dtype), chosen

        gate.forward = forward
    return smaller


def uniform(importance: Sequence[Tensor], removed: int) -> list[list[int]]:
    """The most important experts of each layer, as many in every one."""
    stay = len(importance[0]) - removed // len(importance)
    return [sorted(layer.argsort(descending=True)[:stay].tolist()) for layer in importance]


def ranked(importance: Sequence[Tensor], removed: int, least: int) -> list[list[int]]:
    """The most important experts of all layers together; at least so many of each stay."""
    safe = [{*layer.argsort(descending=True)[:least].tolist()} for layer in importance]
    others = [
        (float(value), layer_idx, expert)
        for layer_idx, layer in enumerate(importance)
        for expert, value in enumerate(layer)
        if expert not in safe[layer_idx]
    ]
    gone = {(layer_idx, expert) for _, layer_idx, expert in sorted(others)[:removed]}
    return [
        [expert for expert in range(len(layer)) if (layer_idx, expert) not in gone]
        for layer_idx, layer in enumerate(importance)
    ]


def plan_of(geometry: Geometry, kept: Sequence[Sequence[int]]) -> Plan:
    """The plan that keeps these experts and everything else."""
    layers = zip(geometry.widths, kept, strict=True)
    return Plan.from_kept(
        geometry,
        [{axis: own if axis == "expert" else range(widths[axis]) for axis in geometry.axes} for widths, own in layers],
    )


def importance_of(table: Any, geometry: Geometry) -> list[Tensor]:
    """Importance of the experts of each layer."""
    experts = table[table["group_type"] == "expert"].sort_values("group_idx")
    return [
        torch.tensor(experts[experts["layer_idx"] == layer_idx]["importance"].to_numpy())
        for layer_idx in range(len(geometry.widths))
    ]


def main() -> None:
    """Score, mask, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="the text that `experts.py` was given")
    parser.add_argument("--out", type=Path, required=True, help="its folder, with the trained model")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--held-out", type=int, default=None, help="windows to measure on; all by default")
    arguments = parser.parse_args()
    text = read(arguments.text)
    cut = int(len(text) * 0.95)
    model, tokenizer = prunus.load_model(arguments.out / "model")
    windows, held_out = (windows_of(tokenizer, part) for part in (text[:cut], text[cut:]))
    held_out = held_out[: arguments.held_out]
    geometry = Geometry.of(model)
    rows: list[dict[str, Any]] = [
        {"method": "dense", "perplexity": perplexity_of_windows(model, held_out, progress=False).perplexity}
    ]
    print(rows[0], flush=True)
    for seed in arguments.seeds:
        drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[: arguments.samples]
        calibration = prunus.calibration_from_tokens(windows[drawn])
        for method in arguments.methods:
            options = ScoringOptions(method=method, attention_weight=1.0, noise=0.0, random_seed=seed)
            table = score(model, calibration, options, batch_size=16, progress=False).table
            importance = importance_of(table, geometry)
            for share in arguments.shares:
                removed = round(share * geometry.widths[0].num_experts) * len(geometry.widths)
                least = geometry.least("expert")
                ways = {"uniform": uniform(importance, removed), "global": ranked(importance, removed, least)}
                for way, kept in ways.items():
                    smaller = masked(model, kept)
                    facts = {"method": method, "share": share, "ranking": way, "seed": seed, "kept": [*map(len, kept)]}
                    for name in ("plain", "repaired"):
                        if name == "repaired":
                            batches = list(calibration.batches(16))
                            repair_(smaller, model, plan_of(geometry, kept), batches, RepairOptions(), progress=False)
                        perplexity = perplexity_of_windows(smaller, held_out, progress=False).perplexity
                        rows.append({**facts, "repair": name, "perplexity": perplexity})
                        print(json.dumps(rows[-1]), flush=True)
    facts = {
        "command": "python benchmarks/expert_ranking.py --text TEXT --out OUT",
        "machine": platform.processor() or platform.machine(),
        "options": {name: str(value) for name, value in vars(arguments).items()},
        "rows": rows,
    }
    (arguments.out / "expert-ranking.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
