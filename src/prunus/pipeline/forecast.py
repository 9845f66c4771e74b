"""What a job will remove, and what it will take, before it starts.

Memory is the estimate by which the engine is chosen, see `prunus.sweep.estimate`. Time is that of a probe, see
`prunus.pipeline.probe`, times the tokens, layers and rounds of the job; of reading, writing and tokenising, which the
probe does not do, by typical speeds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from prunus.calibration.loading import SELF_SOURCE
from prunus.calibration.self_text import AT_ONCE, FEWEST_NEW, LONGEST_PROMPT, MOST_NEW
from prunus.checkpoint import model_bytes
from prunus.evaluation.samples import NEW_TOKENS, PROMPTS
from prunus.machine.byte_sizes import show_bytes
from prunus.machine.placement import dtype_name
from prunus.machine.processes import number_of_processes
from prunus.machine.stages import Stages, show_seconds
from prunus.model.families import AXES, Axis
from prunus.model.saved_dtype import saved_dtype
from prunus.model.widths import LayerWidths
from prunus.pipeline.probe import Probe
from prunus.pipeline.progressive import training_peak
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.request import Request
from prunus.pipeline.rounds import Round
from prunus.pipeline.stages import (
    LOADING,
    MEASURING,
    SAMPLES,
    SAVING,
    WRITING,
    comparing,
    cutting,
    scoring,
    stages_of_job,
    training,
)
from prunus.recovery.prepared import checkpoint_share
from prunus.repair.temperature import PASSES, TOKENS
from prunus.scoring.adaptive import SCALE_SHARES
from prunus.scoring.score import ScoringOptions
from prunus.selection.costs import Costs
from prunus.selection.select import reachable
from prunus.sweep.estimate import expert_width

__all__ = ["Forecast", "Removal", "begun", "forecast", "seconds_to_write"]

#: bytes per second of reading weights and checking them, and of writing them to a disk
READING, WRITING_SPEED = 400e6, 400e6
#: tokens per second of a tokenizer, and characters of a token
TOKENISING, CHARACTERS = 200_000, 4
#: seconds to read a tokenizer and to set up a model, and to write the small files of a result
SMALL_FILES = 1.0
#: tokens of a prompt of the samples
PROMPT_TOKENS = 8


@dataclass(frozen=True)
class Removal:
    """What one cut will remove, as far as that is known before groups are ranked.

    Attributes:
        ratio: share of the quantity.
        quantity: what the ratio is a share of, "parameters" for instance.
        before: how much of it the model takes.
        removed: how much of that goes.
        most: how much could go at most under the recipe's constraints.
        groups: per axis about how many groups go, if both axes lose the same share of what they may lose.
    """

    ratio: float
    quantity: str
    before: float
    removed: float
    most: float
    groups: Mapping[Axis, int]


@dataclass(frozen=True)
class Forecast:
    """What a job will remove, and what it will take.

    Attributes:
        family: of the model, for people.
        parameters: of the model.
        groups: per axis.
        removals: of each ratio by each recipe; none where nothing is cut.
        engine: resident or streamed.
        device: where it runs.
        dtype: of the model.
        memory_bytes: peak memory.
        free_bytes: memory that there is; None where that is not known.
        disk_bytes: of the result, and of what waits on disk meanwhile.
        stages: the stages in order, with the seconds that each takes.
    """

    family: str
    parameters: int
    groups: Mapping[Axis, int]
    removals: Sequence[Removal]
    engine: str
    device: str
    dtype: str
    memory_bytes: int
    free_bytes: int | None
    disk_bytes: int
    stages: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "seconds": self.seconds}

    def lines(self) -> list[str]:
        """What people read before a job starts."""
        counts = ", ".join(f"{count:,} {_GROUPS[axis]}" for axis, count in self.groups.items())
        free = "" if self.free_bytes is None else f" of {show_bytes(self.free_bytes)}"
        longest = sorted(self.stages, key=lambda name: -self.stages[name])[:3]
        parts = ", ".join(f"{name} {show_seconds(self.stages[name])}" for name in self.stages if name in longest)
        return [
            f"{self.family}: {self.parameters:,} parameters, {counts}",
            *(_removal_line(removal) for removal in self.removals),
            f"engine {self.engine}: about {show_bytes(self.memory_bytes)}{free} of memory, on {self.device} in "
            f"{self.dtype}; {show_bytes(self.disk_bytes)} of disk",
            f"about {show_seconds(self.seconds)}: {parts}",
        ]


_GROUPS: Mapping[Axis, str] = {"attention": "attention groups", "mlp": "MLP channels", "expert": "experts"}


def _removal_line(removal: Removal) -> str:
    counts = " and ".join(f"{count:,} {_GROUPS[axis]}" for axis, count in removal.groups.items() if count)
    share = removal.removed / removal.most if removal.most else 0.0
    return (
        f"removes {removal.ratio:.1%}: {removal.removed:,.0f} of {removal.before:,.0f} {removal.quantity}, "
        f"{share:.0%} of what can go: {f'{counts}, for example; the scores decide' if counts else 'no groups'}"
    )


def forecast(request: Request) -> Forecast:
    """What a job will remove, and what it will take.

    Runs passes for at most about five seconds, with random weights; reads and writes nothing.

    Args:
        request: the job, checked.
    """
    geometry, job = request.geometry, request.job
    removals = [_removal(request, recipe, ratio) for recipe, ratio in product(request.recipes, request.ratios)]
    return Forecast(
        family=geometry.family.title,
        parameters=geometry.total_parameters,
        groups={axis: sum(widths[axis] for widths in geometry.widths) for axis in geometry.axes},
        removals=removals,
        engine=request.engine,
        device=str(request.device),
        dtype=_dtypes(request.empty),
        memory_bytes=_memory(request),
        free_bytes=request.holding.limit or request.holding.free,
        disk_bytes=_disk(request),
        stages=_Timetable(
            request, Probe(request.empty, request.device, job.run.sequences_per_pass, request.engine)
        ).stages(),
    )


def begun(request: Request, progress: bool) -> Stages:
    """The stages of a job that begins, after saying what is ahead.

    Args:
        request: the job, checked.
        progress: whether to say it; processes that share a job out say nothing.
    """
    if progress and number_of_processes() == 1:
        ahead = forecast(request)
        print(*ahead.lines(), sep="\n", file=sys.stderr, flush=True)
        return Stages(ahead.stages, request.device)
    return Stages(stages_of_job(request), request.device, progress)


def _removal(request: Request, recipe: Recipe, ratio: float) -> Removal:
    costs = recipe.target.costs(request.geometry)
    most = reachable(request.geometry, recipe.selection, costs)
    share = ratio * costs.total / most if most else 0.0
    cuttable = _cuttable(request, recipe, costs)
    groups = {axis: round(share * count) for axis, count in cuttable.items()}
    return Removal(ratio, costs.quantity, costs.total, ratio * costs.total, most, groups)


def _cuttable(request: Request, recipe: Recipe, costs: Costs) -> dict[Axis, int]:
    """Groups of each axis that may go."""
    widths, constraints = request.geometry.widths, recipe.selection.of(request.geometry)
    return {
        axis: sum(
            max(0, widths[layer_idx][axis] - constraints.least(axis))
            for layer_idx in constraints.layers(len(widths))
            if axis in constraints.axes and costs.group[layer_idx][axis]
        )
        for axis in request.geometry.axes
    }


def _memory(request: Request) -> int:
    """Peak of the passes, or of training if that is more."""
    passes = request.holding.needed.of(request.engine)
    return max(passes, training_peak(request)) if request.recipes[0].recovery else passes


def _disk(request: Request) -> int:
    """Bytes of the result, and of what waits on disk: in the streamed order, and of rounds that are trained."""
    whole, waiting = model_bytes(request.empty), 0
    if request.engine == "streamed" and request.work is not None:
        tokens = request.workload.sequences * request.seq_len
        waiting = 3 * tokens * request.geometry.hidden_size * request.empty.dtype.itemsize
    result = int(whole * (1 - min(request.ratios, default=0))) if request.saves else 0
    changed = result if request.engine == "streamed" else 0
    if (recipe := request.recipes[0]).recovery:
        # Of each round the model before and after; of the one that is trained, two checkpoints.
        kept = 2 * len(recipe.steps(request.ratios[0])) + checkpoint_share(recipe.recovery.training)
        waiting += int(kept * whole)
    return result + changed + waiting


def seconds_to_write(probe: Probe, tokens: float, seq_len: int, reading: float = 0.0) -> float:
    """Seconds that a model needs to write text, see `prunus.calibration.self_text`.

    Args:
        probe: of the model.
        tokens: of the text.
        seq_len: of the sequences that it will be cut into.
        reading: seconds of reading the model's weights, for a model that is read once for every token.
    """
    length = (min(FEWEST_NEW, seq_len) + min(MOST_NEW, seq_len)) // 2
    passes = math.ceil(tokens / (AT_ONCE * length)) * (length + LONGEST_PROMPT // 2)
    return passes * (probe.writing(AT_ONCE, length // 2, True) + reading)


class _Timetable:
    """Seconds of each stage of a job, from a probe."""

    def __init__(self, request: Request, probe: Probe):
        self._request, self._probe = request, probe
        self._layers = len(request.geometry.widths)
        self._groups = sum(widths[axis] for widths in request.geometry.widths for axis in request.geometry.axes)
        self._bytes = model_bytes(request.empty)
        self._forward = probe.forward(request.seq_len) if request.calibrates else 0.0

    def stages(self) -> dict[str, float]:
        """The stages of the job, in order."""
        request = self._request
        ratio = min(request.ratios, default=0.0)
        # Made only of those that there are: some take a probe of their own.
        around = {
            LOADING: self.loading,
            WRITING: self.writing,
            MEASURING: lambda: self.measuring(0.0) + self.measuring(ratio),
            SAMPLES: lambda: self.samples(0.0) + self.samples(ratio),
            SAVING: lambda: SMALL_FILES + self._bytes * (1 - ratio) / WRITING_SPEED,
        }
        if not request.ratios:
            work = {scoring(1, 1): self.scoring(request.recipes[0], 1.0, 1.0)}
        elif not request.saves:
            work = dict.fromkeys((comparing(seed, request.seeds) for seed in request.seeds), self.comparing())
        else:
            work = self.pruning(request.recipes[0], ratio)
        return {name: around[name]() if name in around else work[name] for name in stages_of_job(request)}

    def loading(self) -> float:
        """Reading weights, and tokenising texts."""
        request = self._request
        texts = request.workload.sequences + request.held_out
        tokens = texts * request.seq_len + len(request.text or "") / CHARACTERS
        weights = self._bytes if request.engine == "resident" else self._bytes / 10
        return SMALL_FILES + weights / READING + tokens / TOKENISING

    def pruning(self, recipe: Recipe, ratio: float) -> dict[str, float]:
        """Scoring, cutting and repairing, in rounds."""
        steps, sequences = recipe.steps(ratio), self._request.workload.sequences
        stages, gone = {}, 0.0
        for step in steps:
            part = step.scored_on(sequences) / max(sequences, 1)
            stages[scoring(step.number, len(steps))] = self.scoring(recipe, 1 - gone, part)
            part = step.repaired_on(sequences) / max(sequences, 1)
            gone = step.share
            stages[cutting(step.number, len(steps), recipe.repair is not None)] = self.cutting(recipe, gone, part)
            if recipe.recovery:
                stages[training(step.number, len(steps))] = self.training(recipe, step, len(steps))
        return stages

    def training(self, recipe: Recipe, step: Round, of: int) -> float:
        """Training what a round left."""
        recovery, probe = recipe.recovery, self._probe
        limits = [] if recovery.minutes is None else [60 * recovery.minutes]
        if recovery.tokens is not None:
            seq_len = recovery.seq_len or self._request.seq_len
            passes = probe.scoring(ScoringOptions(method="taylor", noise=0.0), seq_len) + probe.head_backward
            teacher = probe.forward(seq_len) + probe.head_forward
            limits.append(recovery.tokens * (passes * (1 - step.share) + teacher))
        return recovery.share(step, of) * min(limits)

    def scoring(self, recipe: Recipe, left: float, part: float) -> float:
        """One pass over a part of the sequences, through what is left of the model, and the table."""
        request, options = self._request, recipe.scoring
        tokens = part * request.workload.sequences * request.seq_len
        layers = self._probe.scoring(options, request.seq_len)
        head = self._probe.head_backward if options.takes_gradients else 0.0
        if request.engine == "streamed" and options.takes_gradients:
            layers += self._forward
        reading = 2 * self._bytes / READING if request.engine == "streamed" else 0.0
        seconds = tokens * (left * layers + head) + reading + self._groups * self._probe.selection / 2
        if options.method == "adaptive":
            probes = 1 + len(AXES) * (len(options.adaptive.candidates) + len(SCALE_SHARES))
            seconds += probes * tokens / 8 * (self._forward + self._probe.head_forward)
        return seconds

    def writing(self) -> float:
        """Text that the model writes, if none is kept."""
        request = self._request
        sources = request.job.calibration.sources
        share = sum(source.weight for source in sources if source.name == SELF_SOURCE)
        share /= sum(source.weight for source in sources)
        wanted = share * (request.workload.sequences + request.held_out) * request.seq_len
        reading = self._bytes / READING if request.engine == "streamed" else 0.0
        return seconds_to_write(self._probe, wanted, request.seq_len, reading)

    def cutting(self, recipe: Recipe, gone: float, part: float) -> float:
        """Selecting, cutting, and repairing what is left on a part of the sequences."""
        request, geometry, probe = self._request, self._request.geometry, self._probe
        seconds = self._groups * probe.selection + self._bytes / READING
        if recipe.repair is None:
            return seconds
        kept = self._kept(recipe, gone)
        tokens = part * request.workload.sequences * request.seq_len
        solved = 0.0
        experts = max(widths.num_experts for widths in geometry.widths)
        if experts:
            width = expert_width(geometry)
            solved += tokens * geometry.experts_per_token * probe.sums(width, geometry.hidden_size, request.seq_len)
            solved += kept["expert"] * probe.solution(width, geometry.hidden_size)
        for block in geometry.family.blocks_of(experts):
            if block.experts or block.beside_experts:
                continue
            inputs = round(kept[block.axis]) * geometry.unit(block.output.inputs)
            solved += tokens * probe.sums(inputs, geometry.hidden_size, request.seq_len)
            solved += probe.solution(inputs, geometry.hidden_size)
        # The dense model goes through once; of the smaller one, whose inputs of MLPs are made twice, about 1.5 times.
        walked = tokens * self._forward * (1 + 1.5 * (1 - gone))
        reading = 3 * self._bytes / READING if request.engine == "streamed" else 0.0
        clean = tokens / 2 if recipe.repair.noise else tokens
        fitted = PASSES * min(clean, TOKENS) * probe.head_forward if recipe.repair.fit_logits else 0.0
        return seconds + walked + self._layers * solved + reading + fitted

    def measuring(self, gone: float) -> float:
        """Perplexity of the model when a share of it is gone."""
        request = self._request
        if request.text is not None:
            window = request.workload.evaluation_window
            tokens = min(len(request.text) / CHARACTERS, request.workload.evaluation_tokens)
        else:
            window, tokens = request.seq_len, float(request.held_out * request.seq_len)
        if not tokens:
            return 0.0
        forward = self._forward if window == request.seq_len else self._probe.forward(window)
        return tokens * (forward * (1 - gone) + self._probe.head_forward)

    def samples(self, gone: float) -> float:
        """Continuations of the prompts by a model of which a share is gone."""
        rows = len(PROMPTS)
        return NEW_TOKENS * self._probe.writing(rows, PROMPT_TOKENS + NEW_TOKENS // 2, False) * (1 - gone)

    def comparing(self) -> float:
        """All results of a comparison, for one seed."""
        request = self._request
        passes = {(recipe.scoring.takes_gradients, recipe.scoring.noise): recipe for recipe in request.recipes}
        seconds = self.measuring(0.0) + sum(self.scoring(recipe, 1.0, 1.0) for recipe in passes.values())
        for recipe, ratio in product(request.recipes, request.ratios):
            own = self.pruning(recipe, ratio)
            own.pop(next(iter(own)))  # the first scoring is shared
            seconds += sum(own.values()) + self.measuring(ratio)
        return seconds

    def _kept(self, recipe: Recipe, gone: float) -> dict[Axis, float]:
        """Mean width of a layer on each axis when a share is gone."""
        removal = _removal(self._request, recipe, gone)
        widths: Sequence[LayerWidths] = self._request.geometry.widths
        return {
            axis: (sum(w[axis] for w in widths) - removal.groups[axis]) / len(widths)
            for axis in self._request.geometry.axes
        }


def _dtypes(empty: Any) -> str:
    """The dtype that passes compute in, and the one of the result where it is another."""
    computed, saved = dtype_name(empty.dtype), dtype_name(saved_dtype(empty))
    return computed if computed == saved else f"{computed}, saved in {saved}"
