"""Closed-form repair: what is left of each block learns to answer like the whole one did, by least squares.

After a cut, the last projection of each block (`o_proj`, `down_proj`) is solved again, in layer order. Its inputs X are
those of the pruned model as it is by then, repaired up to this block; its target is what brings the residual stream
back to where the dense model has it:

    W' = argmin_W ‖X Wᵀ − T‖² + λ ‖W − W_S‖²,      T = B + α (R − R̂)
    W' = (XᵀX + λ I)⁻¹ (XᵀT + λ W_Sᵀ), transposed;   λ = damping · mean diag(XᵀX)

with B the dense block's output, R and R̂ the residual streams of the dense and the pruned model before the block, and
W_S the columns that were kept. α = 0 asks for the dense block's output, α = 1 for the dense residual stream after it,
so that each block also takes back what earlier blocks got wrong. Half of the sequences get some random tokens, see
`prunus.calibration.noise`, so that the solution holds for more than the calibration text. No bias is added. Where the
model multiplies what its blocks add to the residual stream by a factor (Granite), R − R̂ is divided by it. Where a norm
stands between the block and the residual stream (Gemma), no answer of the projection makes up for a difference in the
stream, and α is 0. Experts of a mixture are repaired each by itself, see `prunus.repair.expert_repair`.

Source: He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", eq. 5 and section 3.2 (least
squares reconstruction of the remaining channels, in layer order, on the pruned network's own inputs).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration import Batch
from prunus.calibration.made_from import made_from
from prunus.calibration.noise import check_noise, clean_sequences, with_noise
from prunus.checkpoint.stored_blocks import blocks_of
from prunus.errors import CalibrationError, OptionError, UnsupportedModelError
from prunus.files.records import Records
from prunus.machine.bars import tracked
from prunus.model.digest import digest_model
from prunus.model.evaluation_mode import evaluation_mode
from prunus.model.families import Block
from prunus.model.geometry import Geometry
from prunus.model.layers import layers_of
from prunus.model.live import live_model
from prunus.model.modules import submodule
from prunus.model.saved_dtype import saved_dtype
from prunus.model.tokens import check_tokens
from prunus.option_values import check_positive, check_share
from prunus.repair.block_walk import BlockWalk
from prunus.repair.expert_repair import EXPERT_REPAIRS, ExpertRepair, ExpertSums
from prunus.repair.least_squares import NormalEquations, TokenSums, solve_ridge_
from prunus.repair.temperature import fit_temperature_
from prunus.selection.plan import Plan
from prunus.sweep.spool import DiskSlots, Slots

__all__ = ["Cut", "Repair", "RepairOptions", "Repaired", "repair_", "repair_together_"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepairOptions:
    """How the remaining weights are repaired.

    Attributes:
        damping: ridge towards the old weights, as a share of the mean diagonal of XᵀX.
        residual: α, how much of the error of earlier blocks in the residual stream each block's target corrects, 0 to
            1.
        noise: share of the tokens that are replaced by random ones in half of the sequences, so that the repair
            holds for other text as well.
        experts: how the experts that stay take over from those that went: least_squares solves the last projection of
            each again, none leaves it.
        fit_logits: at the end, multiply the logits by the factor that minimises the loss.
    """

    damping: float = 1e-1
    residual: float = 1.0
    noise: float = 0.3
    fit_logits: bool = True
    experts: ExpertRepair = "least_squares"

    def __post_init__(self) -> None:
        check_positive("damping", self.damping)  # without it, the solution may not exist
        check_share("residual", self.residual, "it is a share of the error of earlier blocks")
        check_noise("noise", self.noise)
        if self.experts not in EXPERT_REPAIRS:
            raise OptionError(
                f"`repair.experts` {self.experts!r} is unknown; choose one of {', '.join(EXPERT_REPAIRS)}"
            )


@dataclass(frozen=True)
class Repair:
    """What the repair of one block achieved on the calibration tokens.

    Attributes:
        layer_idx: decoder layer of the dense model.
        axis: attention, mlp or expert.
        error_before: ‖X W_Sᵀ − T‖² / ‖T‖²; of experts, each with a target of its own, over all of them together.
        error_after: the same with the new weights; equal to `error_before` where the old ones were kept.
        condition: condition number of the damped XᵀX, estimated by its Cholesky factor; of experts the largest.
        tokens: of experts: how many tokens each that stays got.
    """

    layer_idx: int
    axis: str
    error_before: float
    error_after: float
    condition: float
    tokens: Sequence[int] = ()


@dataclass(frozen=True)
class Cut:
    """A pruned model that is to be repaired.

    Attributes:
        pruned: what `apply_plan(dense, plan)` gave, perhaps already repaired; in memory or opened.
        plan: the cut.
        work: folder for the weights that are solved. A run that was killed goes on after the last layer there, with the
            same result. Left in place: it is the caller's.
    """

    pruned: Any
    plan: Plan
    work: Path | None = None


@dataclass(frozen=True)
class Repaired:
    """What the repair of one model did.

    Attributes:
        repairs: one record per remaining block, in the order in which they were repaired.
        temperature: the factor on its logits; 1 where none was wanted, or nothing cut.
        seconds: wall-clock time of this model's repair and of the dense model's pass, which may have served others too.
    """

    repairs: list[Repair]
    temperature: float
    seconds: float


def repair_(
    pruned: Any,
    dense: Any,
    plan: Plan,
    batches: Sequence[Batch],
    options: RepairOptions | None = None,
    *,
    seed: int = 0,
    work: Path | None = None,
    progress: bool = True,
) -> list[Repair]:
    """Repair a pruned model in place; see `repair_together_` for several.

    Args:
        pruned: what `apply_plan(dense, plan)` gave, perhaps already repaired; in memory or opened.
        dense: the model before the cut; it stays as it is.
        plan: the cut.
        batches: calibration sequences.
        options: ridge and target.
        seed: of the random tokens of `repair_noise`.
        work: folder from which a killed run goes on, see `Cut`.
        progress: show a progress bar on a terminal.

    Returns:
        One record per remaining block, in the order in which they were repaired.

    Raises:
        CalibrationError: there are no sequences.
        StatisticsError: `work` holds what was made from other inputs.
    """
    cut = Cut(pruned, plan, work=work)
    return repair_together_([cut], dense, batches, options, seed=seed, progress=progress)[0].repairs


@torch.no_grad()
def repair_together_(
    cuts: Sequence[Cut],
    dense: Any,
    batches: Sequence[Batch],
    options: RepairOptions | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[Repaired]:
    """Repair several cuts of one model in place; the dense model goes through the calibration sequences once for all.

    All models go through the sequences one block at a time. Memory holds, beside the models, the hidden states of all
    sequences once for the dense model and, for each cut, its own, the inputs of `o_proj` while attention is repaired,
    and one block's normal equations. For an opened dense model, hidden states and inputs of cuts with a `work` folder
    (and the dense model's, if there is one) wait there.

    Args:
        cuts: the pruned models, each with a plan of the dense one. They do not touch each other: each gets the weights,
            bit for bit, that it would get alone.
        dense: the model before the cuts; it stays as it is.
        batches: calibration sequences.
        options: ridge and target.
        seed: of the random tokens of `repair_noise`.
        progress: show a progress bar on a terminal.

    Returns:
        What was done to each cut.

    Raises:
        CalibrationError: there are no sequences.
        OptionError: the model cannot read them, see `prunus.model.tokens.check_tokens`.
        StatisticsError: a `work` folder holds what was made from other inputs.
        UnsupportedModelError: the weights are stored in blocks.
    """
    if not batches:
        raise CalibrationError("there are no calibration batches; repair needs at least one sequence")
    if (blocks := blocks_of(dense)) is not None:
        raise UnsupportedModelError(
            f"the model's weights are stored in {blocks.title} and are saved as they are: repaired ones would have to "
            "be rounded to that again. Leave the repair out, or cut the bf16 checkpoint"
        )
    dense, cuts = live_model(dense), [replace(cut, pruned=live_model(cut.pruned)) for cut in cuts]
    options, geometry = options or RepairOptions(), Geometry.of(dense)
    for cut in cuts:
        cut.plan.check_fits(geometry)
    for batch in batches:
        check_tokens(dense.config, batch.input_ids)
    batches = with_noise(batches, options.noise, dense.config.get_text_config().vocab_size, seed)
    masks = [None if batch.attention_mask is None else batch.attention_mask.bool() for batch in batches]
    start = time.perf_counter()
    with ExitStack() as stack:
        for model in (dense, *(cut.pruned for cut in cuts)):
            stack.enter_context(evaluation_mode(model))
        wait = [stack.enter_context(_waiting(dense, cut.work)) for cut in cuts]
        reference = BlockWalk(dense, batches, wait[0]("dense") if wait else Slots())
        repairing = [_Repairing(cut, dense, batches, options, slots) for cut, slots in zip(cuts, wait, strict=True)]
        for layer_idx, widths in enumerate(
            tracked(geometry.widths, "repair", total=len(geometry.widths), unit="layer", progress=progress)
        ):
            with ExitStack() as held:
                held.enter_context(reference.at(layer_idx))
                for one in repairing:
                    held.enter_context(one.at(layer_idx))
                for block in reference.steps:
                    if not widths[block.axis]:
                        continue
                    for number, mask in enumerate(masks):
                        residual, output = reference.hidden[number], reference.output(block, number)
                        for one in repairing:
                            one.compare(block, number, residual, output, mask)
                        reference.leave(block, number, output)
                    for one in repairing:
                        one.repair(block)
                for one in repairing:
                    one.finish_layer()
        for one in repairing:
            one.finish(batches)
    shared = time.perf_counter() - start - sum(one.seconds for one in repairing)
    return [Repaired(one.repairs, one.temperature, shared + one.seconds) for one in repairing]


@contextmanager
def _waiting(dense: Any, work: Path | None) -> Iterator[Callable[[str], Slots]]:
    """Makes places for what waits between blocks: in memory, or in files if the dense model is opened, too."""
    if work is None or not layers_of(dense).stored:
        yield lambda name: Slots()
        return
    folder = work / "waiting"
    try:
        yield lambda name: DiskSlots(folder / name, dense.device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Repairing:
    """One cut on its way through the layers, beside the dense model."""

    def __init__(
        self,
        cut: Cut,
        dense: Any,
        batches: Sequence[Batch],
        options: RepairOptions,
        wait: Callable[[str], Slots],
    ):
        start = time.perf_counter()
        self.repairs: list[Repair] = []
        self.temperature = 1.0
        self._cut, self._options, self._saved = cut, options, saved_dtype(cut.pruned)
        self._records = Records()
        if cut.work is not None:
            pruned = {"pruned model": digest_model(cut.pruned), "plan": cut.plan.fingerprint}
            how = {"repair": asdict(options), "saved in": str(self._saved)}
            self._records = Records(cut.work, made_from(dense, batches, {**pruned, **how}))
        self._walk, self._inputs = BlockWalk(cut.pruned, batches, wait("hidden")), wait("inputs")
        self._sources = [batch.source for batch in batches]
        self._scale = Geometry.of(dense).family.residual_scale(dense.config)
        self._new_index = {old: new for new, old in enumerate(cut.plan.surviving_layers)}
        self._sums: TokenSums | None = None
        self._expert_sums: ExpertSums | None = None
        self.seconds = time.perf_counter() - start

    @contextmanager
    def at(self, layer_idx: int) -> Iterator[None]:
        """Hold a layer by its number in the dense model, if it is still there."""
        self._layer_idx, self._kept = layer_idx, self._cut.plan.layers[layer_idx]
        if layer_idx not in self._new_index:
            yield
            return
        with self._walk.at(self._new_index[layer_idx]):
            self._known = layer_idx in self._records
            if self._known:
                self._restore()
            yield

    def compare(self, block: Block, number: int, residual: Tensor, output: Tensor, mask: Tensor | None) -> None:
        """Add a batch to what a block is solved from.

        Args:
            block: of the held layer.
            number: of the batch.
            residual: the dense model's residual stream before the block.
            output: of the dense block's last projection.
            mask: true for tokens that are not padding; None = all.
        """
        if not self._kept[block.axis] or self._known:
            return
        start = time.perf_counter()
        pull = 0.0 if block.post_norm else self._options.residual / self._scale
        target = output.float() + pull * (residual.float() - self._walk.hidden[number].float())
        if block.experts:
            if self._options.experts != "none":
                module = submodule(self._walk.layer, block.experts)
                self._expert_sums = self._expert_sums or ExpertSums(module, self._saved)
                self._expert_sums.add(self._walk.routed(block, number), target, mask, self._sources[number])
            self.seconds += time.perf_counter() - start
            return
        module = self._walk.module(block)
        x = self._walk.enter(block, number)
        if self._remembers(block):
            self._inputs[number] = x
        if module.bias is not None:
            target -= module.bias.float()
        if mask is not None:
            x, target = x[mask.to(x.device)], target[mask.to(x.device)]
        self._sums = self._sums or TokenSums(module.in_features, module.out_features, module.weight.device)
        x = x.reshape(-1, module.in_features).float()
        self._sums.add(x, target.reshape(-1, module.out_features), self._sources[number])
        self.seconds += time.perf_counter() - start

    def repair(self, block: Block) -> None:
        """Solve a block, unless an earlier run did, and go on behind it."""
        if not self._kept[block.axis]:
            return
        start = time.perf_counter()
        if not self._known:
            self._solve(block)
        for number in range(len(self._sources)):
            if self._remembers(block) and not self._known:
                output = self._walk.module(block)(self._inputs[number])
                del self._inputs[number]
            else:
                output = self._walk.output(block, number)
            self._walk.leave(block, number, output)
        self.seconds += time.perf_counter() - start

    def _solve(self, block: Block) -> None:
        if block.experts:
            if self._expert_sums is not None:
                sums, self._expert_sums = self._expert_sums, None
                fit = sums.solve_(self._options.damping)
                self.repairs.append(Repair(self._layer_idx, block.axis, *fit, tokens=tuple(sums.tokens.tolist())))
            return
        assert self._sums is not None  # there is at least one batch
        module = self._walk.module(block)
        equations, self._sums = self._sums.equations(), None
        self.repairs.append(_repair_(module, self._layer_idx, block, equations, self._options, self._saved))

    def finish_layer(self) -> None:
        """Make what was solved in the held layer last."""
        if self._layer_idx not in self._new_index:
            return
        if not self._known and self._cut.work is not None:
            self._record()
        self._walk.layers.keep(self._new_index[self._layer_idx])

    def finish(self, batches: Sequence[Batch]) -> None:
        """Fit the logits of the repaired model."""
        start = time.perf_counter()
        plan = self._cut.plan
        if self._options.fit_logits and plan.kept_widths != plan.widths:
            clean = clean_sequences(sum(len(batch.input_ids) for batch in batches), self._options.noise)
            self.temperature = fit_temperature_(self._cut.pruned, batches, among=clean, residual=self._walk.hidden)
        self.seconds += time.perf_counter() - start

    def _remembers(self, block: Block) -> bool:
        """Whether a block's inputs wait until it is solved: those of the MLP are wide, and quickly found again."""
        return block.axis == "attention"

    def _solved(self, block: Block) -> Tensor:
        """The weights of the held layer that a block's repair changes."""
        module, _, name = _solved_in(block).rpartition(".")
        found: Tensor = (
            getattr(submodule(self._walk.layer, module), name) if block.experts else self._walk.module(block).weight
        )
        return found

    def _record(self) -> None:
        here = [block for block in self._walk.steps if self._kept[block.axis]]
        tensors = {_solved_in(block): self._solved(block).detach().cpu().clone() for block in here}
        repairs = [asdict(repair) for repair in self.repairs if repair.layer_idx == self._layer_idx]
        self._records.put(self._layer_idx, tensors, {"repairs": repairs})

    def _restore(self) -> None:
        """Put in place what an earlier run solved in the held layer."""
        found = self._records[self._layer_idx]
        for block in self._walk.steps:
            if _solved_in(block) in found:
                self._solved(block).copy_(found[_solved_in(block)])
        self.repairs += [
            Repair(**{**values, "tokens": tuple(values["tokens"])})
            for values in self._records.about(self._layer_idx)["repairs"]
        ]


def _solved_in(block: Block) -> str:
    """Path of what a block's repair changes: its last projection, or the tensor of those of all experts."""
    return f"{block.experts}.down_proj" if block.experts else block.output.path


def _repair_(
    module: nn.Linear,
    layer_idx: int,
    block: Block,
    equations: NormalEquations,
    options: RepairOptions,
    saved: torch.dtype,
) -> Repair:
    """Solve the last projection of a block again, rounded to the dtype that the model will be saved in.

    Blocks after it so make up for the rounding as well.
    """
    where = f"layer {layer_idx}, {block.axis}"
    weight, condition = module.weight, float("inf")
    before = after = equations.error(weight)
    try:
        solution = solve_ridge_(equations, weight, options.damping)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        logger.warning(
            "%s: kept as sliced, the normal equations cannot be solved (%s); a larger damping than %g may help",
            where,
            error,
            options.damping,
        )
    else:
        condition = solution.condition
        if solution.error < before:
            weight, after = solution.weight, solution.error
        elif before != 0:
            # The ridge optimum cannot be worse in exact arithmetic: this is rounding, or NaN.
            logger.warning(
                "%s: kept as sliced, least squares did not lower the error (%.3g → %.3g, condition %.1e)",
                where,
                before,
                solution.error,
                condition,
            )
    module.weight.copy_(weight.to(saved))
    return Repair(layer_idx, block.axis, before, after, condition)
