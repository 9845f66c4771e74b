"""Closed-form repair: what is left of each block learns to answer like the whole one did, by least squares.

After a cut, the last projection of each block (`o_proj`, `down_proj`) is solved again, in layer order. Its inputs X are
those of the pruned model as it is by then, repaired up to this block; its target is what brings the residual stream
back to where the dense model has it:

    W' = argmin_W ‖X Wᵀ − T‖² + λ ‖W − W_S‖²,      T = B + α (R − R̂)
    W' = (XᵀX + λ I)⁻¹ (XᵀT + λ W_Sᵀ), transposed;   λ = damping · mean diag(XᵀX)

with B the dense block's output, R and R̂ the residual streams of the dense and the pruned model before the block, and
W_S the columns that were kept. α = 0 asks for the dense block's output, α = 1 for the dense residual stream after it,
so that each block also takes back what earlier blocks got wrong. No bias is added. Where the model multiplies what its
blocks add to the residual stream by a factor (Granite), R − R̂ is divided by it. Where a norm stands between the block
and the residual stream (Gemma), no answer of the projection makes up for a difference in the stream, and α is 0.

Source: He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", eq. 5 and section 3.2 (least
squares reconstruction of the remaining channels, in layer order, on the pruned network's own inputs).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunus.calibration import Batch
from prunus.digest import digest_batches, digest_model
from prunus.errors import OptionError
from prunus.evaluation.mode import evaluation_mode
from prunus.families import Axis, Block
from prunus.groups import Geometry, submodule
from prunus.layers import layers_of
from prunus.plan import Plan
from prunus.records import Records
from prunus.sweep.blocks import LayerCalls, StopForward, answering, layer_calls, run_layer, stopped

__all__ = ["Chooser", "CompensationOptions", "NormalEquations", "Repair", "compensate_", "solve_ridge"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompensationOptions:
    """How the remaining weights are repaired.

    Attributes:
        damping: ridge towards the old weights, as a share of the mean diagonal of XᵀX.
        residual: α, how far a block also takes back the error that earlier blocks left in the residual stream, 0 to 1.
        reselect: let the repair choose which MLP channels stay in a layer, of the number that the plan keeps there, see
            `prunus.reselection`; for methods that take gradients.
    """

    damping: float = 1e-1
    residual: float = 1.0
    reselect: bool = False

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise OptionError(f"damping is {self.damping}; it must be positive, or the solution may not exist")
        if not 0 <= self.residual <= 1:
            raise OptionError(f"residual is {self.residual}; it must lie in [0, 1]")


@dataclass(frozen=True)
class Repair:
    """What the repair of one block achieved on the calibration tokens.

    Attributes:
        layer_idx: decoder layer of the dense model.
        axis: attention or mlp.
        error_before: ‖X W_Sᵀ − T‖² / ‖T‖².
        error_after: the same with the new weights; equal to `error_before` where the old ones were kept.
        condition: condition number of the damped XᵀX, estimated by its Cholesky factor.
    """

    layer_idx: int
    axis: str
    error_before: float
    error_after: float
    condition: float


#: (layer of the dense model, axis, equations, weight) → inputs that stay, ascending; None = all
Chooser = Callable[[int, Axis, "NormalEquations", Tensor], Tensor | None]


@torch.no_grad()
def compensate_(
    pruned: Any,
    dense: Any,
    plan: Plan,
    batches: Sequence[Batch],
    options: CompensationOptions | None = None,
    *,
    choose: Chooser | None = None,
    work: Path | None = None,
    progress: bool = True,
) -> list[Repair]:
    """Repair a pruned model in place.

    Both models go through the calibration sequences one layer at a time; beside the two models, memory holds the hidden
    states of all sequences twice and one block's normal equations.

    Args:
        pruned: what `apply_plan(dense, plan)` gave, perhaps already repaired; in memory or opened.
        dense: the model before the cut; it stays as it is.
        plan: the cut.
        batches: calibration sequences.
        options: ridge and target.
        choose: says for a block which inputs of its last projection stay; the columns of the others become zero.
        work: folder for the weights that are solved. A run that was killed goes on after the last layer there, with the
            same result. Left in place: it is the caller's. Not together with `choose`.
        progress: show a progress bar on a terminal.

    Returns:
        One record per remaining block, in the order in which they were repaired.

    Raises:
        StatisticsError: `work` holds what was made from other inputs.
    """
    options = options or CompensationOptions()
    geometry = Geometry.of(dense)
    plan.check_fits(geometry)
    path, scale = geometry.family.layers, geometry.family.residual_scale(dense.config)
    records = Records(work, _made_from(pruned, dense, plan, batches, options) if work is not None else None)
    repairs: list[Repair] = []
    with evaluation_mode(dense), evaluation_mode(pruned):
        dense_calls = [layer_calls(dense, path, batch) for batch in batches]
        pruned_calls = [layer_calls(pruned, path, batch) for batch in batches]
        masks = [None if batch.attention_mask is None else batch.attention_mask.bool() for batch in batches]
        dense_hidden = [calls.hidden for calls in dense_calls]
        pruned_hidden = [calls.hidden for calls in pruned_calls]
        new_index = {old: new for new, old in enumerate(plan.surviving_layers)}
        dense_layers, pruned_layers = layers_of(dense), layers_of(pruned)
        for layer_idx in tqdm(
            range(len(dense_layers)), desc="compensation", unit="layer", disable=None if progress else True
        ):
            with dense_layers.hold(layer_idx, then=layer_idx + 1) as dense_layer:
                targets = _dense_targets(geometry, dense_layer, layer_idx, dense_calls, dense_hidden, scale)
            if layer_idx not in new_index:
                continue
            new = new_index[layer_idx]
            arguments = [calls.arguments[new] for calls in pruned_calls]
            kept = [block for block in geometry.family.blocks if plan.layers[layer_idx][block.axis]]
            with pruned_layers.hold(new, then=new + 1) as layer:
                known: list[dict[Block, Tensor]] = [{} for _ in batches]
                if layer_idx in records:
                    found = _restore(layer, records, layer_idx)
                else:
                    found = []
                    for block in kept:
                        # A generator: one batch's inputs exist at a time, but for those that later runs go on from.
                        inputs = (
                            _block_input(layer, block, seen, hidden, call, scale, remember=block is not kept[-1])
                            for hidden, call, seen in zip(pruned_hidden, arguments, known, strict=True)
                        )
                        module = submodule(layer, block.output.path)
                        pull = 0.0 if block.post_norm else options.residual / scale
                        equations = _normal_equations(module, inputs, targets[block.axis], masks, pull)
                        stay = choose(layer_idx, block.axis, equations, module.weight) if choose else None
                        found.append(_repair_(module, layer_idx, block, equations, stay, options))
                    if work is not None:
                        _record(layer, records, layer_idx, [block.output.path for block in kept], found)
                repairs += found
                pruned_layers.keep(new)
                for number, (hidden, call, seen) in enumerate(zip(pruned_hidden, arguments, known, strict=True)):
                    with answering(_answers(layer, seen)):
                        pruned_hidden[number] = run_layer(layer, hidden, call)
    return repairs


def _made_from(
    pruned: Any, dense: Any, plan: Plan, batches: Sequence[Batch], options: CompensationOptions
) -> dict[str, Any]:
    return {
        "model": digest_model(dense),
        "pruned model": digest_model(pruned),
        "plan": plan.fingerprint,
        "calibration tokens": digest_batches(batches),
        "sequences per batch": [len(batch.input_ids) for batch in batches],
        "compensation": asdict(options),
        "torch": torch.__version__,
    }


def _record(layer: nn.Module, records: Records, layer_idx: int, paths: Sequence[str], repairs: list[Repair]) -> None:
    """Note the weights of a repaired layer's last projections."""
    weights = {path: submodule(layer, path).weight.detach().cpu().clone() for path in paths}
    records.put(layer_idx, weights, {"repairs": [asdict(repair) for repair in repairs]})


def _restore(layer: nn.Module, records: Records, layer_idx: int) -> list[Repair]:
    """Put the weights that an earlier run solved into a layer."""
    for path, weight in records[layer_idx].items():
        submodule(layer, path).weight.copy_(weight)
    return [Repair(**values) for values in records.about(layer_idx)["repairs"]]


@dataclass
class NormalEquations:
    """Sums over calibration tokens, float32.

    Attributes:
        gram: XᵀX, (in_features, in_features).
        cross: XᵀT, (in_features, out_features).
        target_square: ‖T‖².
    """

    gram: Tensor
    cross: Tensor
    target_square: float = 0.0

    @classmethod
    def of(cls, module: nn.Linear) -> NormalEquations:
        """Empty sums for a projection."""
        zeros = partial(torch.zeros, dtype=torch.float32, device=module.weight.device)
        return cls(zeros(module.in_features, module.in_features), zeros(module.in_features, module.out_features))

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add tokens: x (tokens, in_features), target (tokens, out_features), both float32."""
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(x.T, target)
        self.target_square += float(target.double().square().sum())

    def error(self, weight: Tensor) -> float:
        """‖X Wᵀ − T‖² / ‖T‖² for a weight (out_features, in_features), float64."""
        gram, cross = self.gram.double(), self.cross.double()
        square = (weight @ gram).mul(weight).sum() - 2 * (weight * cross.T).sum() + self.target_square
        return float(square.clamp(min=0)) / max(self.target_square, torch.finfo(torch.float64).tiny)


def solve_ridge(gram: Tensor, cross: Tensor, weight: Tensor, damping: float) -> tuple[Tensor, float]:
    """Solve (G + λI) W'ᵀ = C + λ Wᵀ with λ = damping · mean diag(G), in float64.

    Args:
        gram: G = XᵀX, (in_features, in_features).
        cross: C = XᵀT, (in_features, out_features).
        weight: W, towards which the ridge pulls, (out_features, in_features).
        damping: see `CompensationOptions`.

    Returns:
        W' (out_features, in_features), float64, and an estimate of the condition number of G + λI: the squared ratio of
        the largest to the smallest diagonal entry of its Cholesky factor, a lower bound.

    Raises:
        torch.linalg.LinAlgError: G + λI is not positive definite to working precision.
    """
    damped, prior = gram.to(torch.float64, copy=True), weight.double()
    ridge = damping * float(damped.diagonal().mean())
    damped.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(damped)
    solution = torch.cholesky_solve(cross.double() + ridge * prior.T, factor).T
    diagonal = factor.diagonal()
    return solution, float((diagonal.max() / diagonal.min()).square())


def _dense_targets(
    geometry: Geometry,
    layer: nn.Module,
    layer_idx: int,
    calls: Sequence[LayerCalls],
    hidden: list[Tensor],
    scale: float,
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Run a dense layer on all batches: per axis, the residual stream before the block and the block's output.

    `hidden` is replaced by what leaves the layer. `scale` is the factor on what a block adds to the residual stream.
    """
    targets: dict[str, list[tuple[Tensor, Tensor]]] = {block.axis: [] for block in geometry.family.blocks}
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[path] = output

        return hook

    present = [block for block in geometry.family.blocks if geometry.widths[layer_idx][block.axis]]
    paths = {path for block in present for path in (block.output.path, block.adds)}
    handles = [submodule(layer, path).register_forward_hook(keep(path)) for path in paths]
    try:
        for number, call in enumerate(calls):
            residual = hidden[number]
            hidden[number] = run_layer(layer, residual, call.arguments[layer_idx])
            for block in present:
                targets[block.axis].append((residual, outputs[block.output.path]))
                residual = residual + scale * outputs[block.adds]
    finally:
        for handle in handles:
            handle.remove()
    return targets


def _normal_equations(
    module: nn.Linear,
    inputs: Iterable[tuple[Tensor, Tensor]],
    targets: Sequence[tuple[Tensor, Tensor]],
    masks: Sequence[Tensor | None],
    pull: float,
) -> NormalEquations:
    """Add up what the last projection of a block is solved from: its inputs in the pruned model, and its targets.

    `pull` is the share of the residual stream's error that the target takes back, in units of the projection's output.
    """
    equations = NormalEquations.of(module)
    for (x, residual), (dense_residual, dense_output), mask in zip(inputs, targets, masks, strict=True):
        target = dense_output.float() + pull * (dense_residual.float() - residual.float())
        if module.bias is not None:
            target -= module.bias.float()
        if mask is not None:
            x, target = x[mask.to(x.device)], target[mask.to(x.device)]
        equations.add(x.reshape(-1, module.in_features).float(), target.reshape(-1, module.out_features))
    return equations


def _repair_(
    module: nn.Linear,
    layer_idx: int,
    block: Block,
    equations: NormalEquations,
    stay: Tensor | None,
    options: CompensationOptions,
) -> Repair:
    """Solve the last projection of a block again, on the inputs that stay; None = all of them."""
    where = f"layer {layer_idx}, {block.axis}"
    stay = torch.arange(module.in_features) if stay is None else stay
    sliced = torch.zeros_like(module.weight, dtype=torch.float64)
    sliced[:, stay] = module.weight[:, stay].double()
    solution, condition, before = torch.zeros_like(sliced), float("inf"), equations.error(sliced)
    try:
        gram, cross = equations.gram[stay][:, stay], equations.cross[stay]
        solution[:, stay], condition = solve_ridge(gram, cross, sliced[:, stay], options.damping)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        logger.warning(
            "%s: kept as sliced, the normal equations cannot be solved (%s); a larger damping than %g may help",
            where,
            error,
            options.damping,
        )
        solution = sliced
    after = equations.error(solution)
    if solution is not sliced and not after < before:
        # The ridge optimum cannot be worse in exact arithmetic: this is rounding, or NaN.
        logger.warning(
            "%s: kept as sliced, least squares did not lower the error (%.3g → %.3g, condition %.1e)",
            where,
            before,
            after,
            condition,
        )
        solution, after = sliced, before
    module.weight.copy_(solution)
    return Repair(layer_idx, block.axis, before, after, condition)


def _block_input(
    layer: nn.Module,
    block: Block,
    known: dict[Block, Tensor],
    hidden: Tensor,
    arguments: dict[str, Any],
    scale: float,
    remember: bool,
) -> tuple[Tensor, Tensor]:
    """Input of a block's last projection, and the residual stream before the block, for one batch.

    The layer runs no further than that projection, and blocks before it only from their own last projections on, whose
    inputs are `known`; with `remember` this block's joins them.
    """
    residual = hidden
    seen: list[Tensor] = []

    def add_earlier_block(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal residual
        residual = residual + scale * output

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise StopForward

    handles = [submodule(layer, earlier.adds).register_forward_hook(add_earlier_block) for earlier in known]
    handles.append(submodule(layer, block.output.path).register_forward_pre_hook(stop))
    try:
        with stopped(), answering(_answers(layer, known)):
            run_layer(layer, hidden, arguments)
    finally:
        for handle in handles:
            handle.remove()
    if remember:
        known[block] = seen[0]
    return seen[0], residual


def _answers(layer: nn.Module, known: Mapping[Block, Tensor]) -> dict[nn.Module, Callable[..., Any]]:
    """Blocks that only have to put the known input of their last projection through it."""

    def answer(block: Block, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = submodule(layer, block.output.path)(x)
        # Attention modules of transformers answer with their weights, too; nobody asked for those.
        return (output, None) if block.axis == "attention" else output

    return {submodule(layer, block.module): partial(answer, block, x) for block, x in known.items()}
