"""Layer priors: what a whole layer or block is worth, to weigh the scores of its groups with.

    score' = score · B^T,   B = ln(1 + prior),   prior = τ · prior(layer) + (1 − τ) · prior(block)

with temperature T. The prior of a layer or block is what its loss costs the model:

    skip_loss   rise of the loss when it is skipped
    cosine      1 − cosine(input, output) of the hidden states, averaged over tokens

Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", eq. 1 (cosine);
Kim et al. 2024, "Shortened LLaMA", section 3.1 (the loss of a model without a block).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunus.calibration import Calibration
from prunus.errors import OptionError, PlanError
from prunus.evaluation.perplexity import perplexity_of_windows
from prunus.model.evaluation_mode import evaluation_mode
from prunus.model.families import AXES, Axis
from prunus.model.geometry import Geometry, submodule
from prunus.scoring.weighing import weigh_scores

__all__ = ["PRIORS", "Prior", "PriorKind", "PriorOptions", "measure_prior", "weigh"]

PriorKind = Literal["none", "skip_loss", "cosine"]
PRIORS: tuple[PriorKind, ...] = get_args(PriorKind)
#: calibration sequences that a prior is measured on: it takes up to three forward passes per layer
SEQUENCES = 8


@dataclass(frozen=True)
class PriorOptions:
    """How layer priors weigh scores.

    Attributes:
        prior: skip_loss, the rise of the loss when a layer or block is skipped; cosine, how far it turns the hidden
            states; none.
        temperature: T; 0 is no prior, larger sharpens it.
        tau: 0 weighs each block by its own prior, 1 by that of its layer.
    """

    prior: PriorKind = "none"
    temperature: float = 1.0
    tau: float = 0.0

    def __post_init__(self) -> None:
        if self.prior not in PRIORS:
            raise OptionError(f"prior {self.prior!r} is unknown; choose one of {', '.join(PRIORS)}")
        if not 0 <= self.temperature < float("inf"):
            raise OptionError(f"temperature is {self.temperature}; it must be 0 or positive")
        if not 0 <= self.tau <= 1:
            raise OptionError(f"tau is {self.tau}; it must lie in [0, 1]")


@dataclass(frozen=True)
class Prior:
    """Measured priors, one entry per decoder layer; that of a block that is not there is 0.

    Attributes:
        layer: of whole layers.
        attention: of attention blocks.
        mlp: of MLP blocks.
    """

    layer: tuple[float, ...]
    attention: tuple[float, ...]
    mlp: tuple[float, ...]

    def weight(self, axis: Axis, options: PriorOptions) -> np.ndarray:
        """B^T of one axis, float64 (layers,)."""
        block = np.asarray(self.attention if axis == "attention" else self.mlp)
        prior = options.tau * np.asarray(self.layer) + (1 - options.tau) * block
        # A layer whose loss falls when it is skipped is worth nothing, not less.
        weight: np.ndarray = np.log1p(np.maximum(prior, 0.0)) ** options.temperature
        return weight

    def to_dict(self) -> dict[str, list[float]]:
        """Plain values, ready for JSON."""
        return {"layer": list(self.layer), **{axis: list(getattr(self, axis)) for axis in AXES}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            PlanError: fields are missing or hold no numbers.
        """
        try:
            return cls(*(tuple(float(value) for value in values[name]) for name in ("layer", *AXES)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise PlanError(f"malformed layer priors: {type(error).__name__} {error}") from error


def weigh(table: pd.DataFrame, prior: Prior, options: PriorOptions) -> pd.DataFrame:
    """Weigh the scores of a table by layer priors; importances stay as they are.

    Raises:
        OptionError: a score is negative, so that a factor would turn the order around.
        PlanError: the priors are of a model with another number of layers.
    """
    if table["layer_idx"].max() >= len(prior.layer):
        raise PlanError(f"the priors are of {len(prior.layer)} layers, the table of {table['layer_idx'].max() + 1}")
    return weigh_scores(table, {axis: prior.weight(axis, options).tolist() for axis in AXES})


@torch.no_grad()
def measure_prior(model: Any, calibration: Calibration, kind: PriorKind, *, progress: bool = True) -> Prior:
    """Measure what each layer and block is worth, on the first few calibration sequences.

    Args:
        model: a transformers causal language model; it stays as it is.
        calibration: token sequences.
        kind: skip_loss or cosine.
        progress: show a progress bar on a terminal.
    """
    few, geometry = calibration.first(SEQUENCES), Geometry.of(model)
    with evaluation_mode(model):
        measured = (_skip_losses if kind == "skip_loss" else _cosines)(model, geometry, few, progress)
    return Prior(*(tuple(measured[name]) for name in ("layer", *AXES)))


def _skip_losses(model: Any, geometry: Geometry, few: Calibration, progress: bool) -> dict[str, list[float]]:
    def loss() -> float:
        return perplexity_of_windows(model, few.input_ids, few.attention_mask, progress=False).nll

    layers = submodule(model, geometry.family.layers)
    whole = loss()
    rises: dict[str, list[float]] = {"layer": [], **{axis: [] for axis in AXES}}
    for layer_idx, layer in enumerate(tqdm(layers, desc="layer priors", disable=None if progress else True)):
        present = [block for block in geometry.family.blocks if geometry.widths[layer_idx][block.axis]]
        for block in geometry.family.blocks:
            with _silent(layer, [block.output.path] if block in present else []):
                rises[block.axis].append(loss() - whole if block in present else 0.0)
        if len(present) == 1:
            rises["layer"].append(rises[present[0].axis][-1])
            continue
        with _silent(layer, [block.output.path for block in present]):
            rises["layer"].append(loss() - whole)
    return rises


@contextmanager
def _silent(layer: nn.Module, paths: list[str]) -> Iterator[None]:
    """Projections answer with zeros while the context lasts: their blocks add nothing to the residual stream."""
    handles = [
        submodule(layer, path).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cosines(model: Any, geometry: Geometry, few: Calibration, progress: bool) -> dict[str, list[float]]:
    layers = submodule(model, geometry.family.layers)
    sums = {name: np.zeros(len(layers)) for name in ("layer", *AXES)}
    # Of the sequence at hand: true for tokens that are not padding; None = all.
    real: Tensor | None = None
    stream: dict[int, list[Tensor]] = {}
    scale = geometry.family.residual_scale(model.config)

    def enter(layer_idx: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            stream[layer_idx] = [args[0] if args else kwargs["hidden_states"]]

        return hook

    def add(layer_idx: int, axis: Axis) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            before = stream[layer_idx][-1]
            after = before + scale * output
            stream[layer_idx].append(after)
            sums[axis][layer_idx] += _turn(before, after, real)

        return hook

    handles = []
    for layer_idx, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(enter(layer_idx), with_kwargs=True))
        for block in geometry.family.blocks:
            if geometry.widths[layer_idx][block.axis]:
                handles.append(submodule(layer, block.adds).register_forward_hook(add(layer_idx, block.axis)))
    try:
        for batch in tqdm(list(few.batches(1)), desc="layer priors", disable=None if progress else True):
            ids, mask = batch.input_ids.to(model.device), batch.attention_mask
            real = None if mask is None else mask.bool().to(model.device)
            model.base_model(input_ids=ids, attention_mask=real, use_cache=False)
            for layer_idx, (first, *_, last) in stream.items():
                sums["layer"][layer_idx] += _turn(first, last, real)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(batch.tokens for batch in few.batches(1))
    return {name: (values / tokens).tolist() for name, values in sums.items()}


def _turn(before: Tensor, after: Tensor, real: Tensor | None) -> float:
    """1 − cosine, summed over tokens; over those that are `real`, if that is given."""
    turns = 1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)
    return float((turns if real is None else turns[real.to(turns.device)]).sum())
