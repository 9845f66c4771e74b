"""Pruned models of every family in every shape that a cut can leave, and the same models at full size as oracles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from tiny_families import ONE_EACH, case_id, make_model, plan_keeping, zeroed
from torch import Tensor

from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan

LAYERS, GROUPS, CHANNELS = 4, 3, 20
WHOLE = {"attention": range(GROUPS), "mlp": range(CHANNELS)}
#: what is kept of each layer; all models here have three groups of heads and twenty channels
SHAPES: dict[str, list[dict[str, Any]]] = {
    "ragged": [
        {"attention": [1], "mlp": range(7)},
        {"attention": [0, 2], "mlp": range(3, 20)},
        WHOLE,
        {"attention": [2], "mlp": [0, 4, 9]},
    ],
    "no-attention": [{**WHOLE, "attention": []}, WHOLE, WHOLE, {**WHOLE, "attention": [0, 1]}],
    "no-mlp": [WHOLE, WHOLE, {**WHOLE, "mlp": []}, {**WHOLE, "attention": [1]}],
    "no-layer": [WHOLE, {"attention": [], "mlp": []}, WHOLE, WHOLE],
    "uniform": [{"attention": [i % 3, 2] if i % 3 < 2 else [0, 1], "mlp": range(i, i + 12)} for i in range(LAYERS)],
    "everything": [
        {"attention": [], "mlp": range(9)},
        {"attention": [0, 2], "mlp": []},
        {"attention": [], "mlp": []},
        {"attention": [1], "mlp": range(2, 20)},
    ],
}
#: shapes that fit the stock class
STOCK = ("no-layer", "uniform")


@dataclass(frozen=True)
class Shaped:
    """A model of a family in a shape. All that is made from it is shared: leave it as it is, or copy it."""

    case: tuple[str, str]
    shape: str

    @property
    def dense(self) -> Any:
        return dense_model(self.case)

    @property
    def plan(self) -> Plan:
        return plan_keeping(Geometry.of(self.dense), SHAPES[self.shape])

    @property
    def pruned(self) -> Any:
        return cut_model(self)

    @property
    def oracle(self) -> Any:
        """The model before the cut, with the output columns of the cut groups set to zero."""
        return zeroed_model(self)

    def __str__(self) -> str:
        return f"{case_id(self.case)}-{self.shape}"


@lru_cache(maxsize=32)
def dense_model(case: tuple[str, str]) -> Any:
    return make_model(*case, num_hidden_layers=LAYERS)


@lru_cache(maxsize=64)
def cut_model(shaped: Shaped) -> Any:
    return apply_plan(shaped.dense, shaped.plan)


@lru_cache(maxsize=64)
def zeroed_model(shaped: Shaped) -> Any:
    return zeroed(shaped.dense, shaped.plan.layers)


#: one per family, with all that is hard in one model
HARDEST = [Shaped(case, "everything") for case in ONE_EACH]
#: and one that fits the stock class, and every shape of three: as Llama is, with fused projections, with norms behind
EVERY = list(
    dict.fromkeys(
        [Shaped(case, shape) for case in ONE_EACH for shape in ("everything", "uniform")]
        + [Shaped(case, shape) for case in ONE_EACH if case[0] in ("llama", "phi3", "gemma2") for shape in SHAPES]
    )
)

PAD = 0


def left_padded(lengths: tuple[int, ...] = (9, 4, 1)) -> tuple[Tensor, Tensor]:
    """Prompts of several lengths as one batch: token ids and attention mask."""
    generator = torch.Generator().manual_seed(4)
    input_ids = torch.randint(3, 96, (len(lengths), max(lengths)), generator=generator)
    mask = torch.ones_like(input_ids)
    for row, length in enumerate(lengths):
        input_ids[row, : max(lengths) - length] = PAD
        mask[row, : max(lengths) - length] = 0
    return input_ids, mask
