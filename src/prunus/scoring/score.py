"""The first half of the job: from a model and text to the global table."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self

import pandas as pd
from pydantic import Field

from prunus.calibration import Calibration
from prunus.calibration.noise import check_noise, with_noise
from prunus.errors import CalibrationError, OptionError, PlanError
from prunus.files.json_file import Count, FileContent, check_content, read_json
from prunus.files.outputs import output_folder
from prunus.importance import COMPOSITES, METHODS, MethodOptions, get_method, score_groups
from prunus.importance.registry import statistics_for
from prunus.machine.metering import Cost, metered
from prunus.machine.placement import dtype_name
from prunus.model.families import Axis
from prunus.model.geometry import Geometry
from prunus.model.layers import layers_of
from prunus.model.live import live_model
from prunus.model.tokens import check_tokens
from prunus.option_values import check_positive
from prunus.scoring.adaptive import AdaptiveOptions, adapt, split_probe
from prunus.scoring.hybrid import DEFAULT_MIX, Weights, check_weights, mix
from prunus.scoring.mixing import mix_sources
from prunus.scoring.routing import check_enough_reached, tokens_of_experts, warn_of_idle_experts
from prunus.scoring.weighing import weigh_attention
from prunus.selection.constraints import Constraints
from prunus.selection.costs import Costs
from prunus.selection.plan import Plan
from prunus.selection.select import select
from prunus.selection.table import (
    NORMALIZATIONS,
    Normalization,
    build_table,
    load_table,
    rank_table,
    save_table,
    with_costs,
)
from prunus.selection.targets import TargetOptions
from prunus.statistics import Statistic, Statistics
from prunus.sweep import Engine, EngineChoice, sweep

__all__ = ["Score", "ScoringOptions", "score", "score_together", "seed_of", "take_statistics"]

logger = logging.getLogger(__name__)


class _HowScored(FileContent):
    method: str = ""
    attention_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class _Routing(FileContent):
    tokens_of_experts: list[list[Count]]


class _AboutContent(FileContent):
    geometry: dict[str, Any]
    scoring: _HowScored | None = None
    rounds: Annotated[Count, Field(ge=1)] = 1
    target: dict[str, Any] | None = None
    routing: _Routing | None = None


TABLE_FILE, ABOUT_FILE, STATISTICS_FILE = "groups.csv", "score.json", "statistics.safetensors"


@dataclass(frozen=True)
class ScoringOptions(MethodOptions):
    """How groups are scored.

    Attributes:
        method: importance method: taylor, taylor_2nd, gate_fisher, wanda, magnitude, random, hybrid or adaptive; for
            the experts of a mixture also reap and frequency.
        hybrid: what the hybrid method is made of, methods and their weights.
        adaptive: what the adaptive method chooses from.
        normalize: how importances of different layers are made comparable.
        attention_weight: factor on the scores of attention groups. Repair makes up for lost channels better than for
            lost attention, so that a factor above 1 goes with a repair.
        noise: share of the tokens that are replaced by random ones in half of the sequences, so that scores hold
            for other text as well.
        hessian: estimate of the Hessian's diagonal in taylor_2nd (and gate_fisher): mean_loss, empirical_fisher or
            sampled_fisher.
        activation: the statistic of activations that wanda multiplies weights with.
        random_seed: seed of noise, sampled labels and the random control; null = the seed that the calibration
            sequences were drawn with.
    """

    method: str = "gate_fisher"
    normalize: Normalization = "none"
    hybrid: Weights = DEFAULT_MIX
    adaptive: AdaptiveOptions = field(default_factory=AdaptiveOptions)
    attention_weight: float = 1.5
    noise: float = 0.3
    random_seed: int | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in COMPOSITES:
            get_method(self.method)
        check_weights(self.hybrid)
        for name in self.adaptive.candidates:
            get_method(name)
        if self.normalize not in NORMALIZATIONS:
            raise OptionError(f"`normalize` {self.normalize!r} is unknown; choose one of {', '.join(NORMALIZATIONS)}")
        check_positive("attention_weight", self.attention_weight)
        check_noise("noise", self.noise)

    @property
    def parts(self) -> tuple[str, ...]:
        """The methods whose importances are needed."""
        if self.method == "hybrid":
            return tuple(name for name, _ in self.hybrid)
        return self.adaptive.candidates if self.method == "adaptive" else (self.method,)

    @property
    def needs(self) -> frozenset[str]:
        """What these methods read of the statistics."""
        return frozenset[str]().union(*(get_method(name).needs for name in self.parts))

    def check_axes(self, geometry: Geometry, axes: Sequence[Axis] = ()) -> None:
        """Check that the methods score a model's groups.

        Args:
            geometry: shape of the model.
            axes: the kinds of group that are to be cut.

        Raises:
            OptionError: a method says nothing about any kind of group that the model has, or about one of `axes`; or
                parts of the hybrid method about other kinds than its other parts.
        """
        if self.method == "adaptive" and geometry.family.mixture is not None:
            raise OptionError(
                "`method` adaptive cuts layers unequally to try methods, which no class loads of a mixture of experts; "
                "choose another method"
            )
        scored = {name: get_method(name).axes_of(geometry) for name in self.parts}
        for name, found in scored.items():
            if missing := [axis for axis in axes if axis not in found]:
                others = [other.name for other in METHODS.values() if set(axes) <= set(other.axes)]
                raise OptionError(
                    f"`method` {name} says nothing about {missing[0]} groups, which are to be cut (`axes`); choose one "
                    f"of {', '.join(others)}"
                )
        if len(set(scored.values())) > 1:
            each = "; ".join(f"{name}: {', '.join(found)}" for name, found in scored.items())
            raise OptionError(f"the parts of `method` {self.method} score groups of different kinds ({each})")

    @property
    def takes_gradients(self) -> bool:
        """Whether the statistics need a backward pass."""
        return not self.needs <= {"activations", "routing"}

    @property
    def needs_calibration(self) -> bool:
        """Whether scoring needs calibration sequences."""
        return bool(self.needs) or self.method == "adaptive"


@dataclass(frozen=True)
class Score:
    """The global table of a model, and what it was made from.

    Attributes:
        table: one row per group, see `prunus.selection.table`.
        geometry: shape of the model.
        about: method, options, calibration provenance, loss and cost, as plain values; `target` where the table is not
            at parameters.
        statistics: what the table was made from, of each source of text; empty where the method needs none.
    """

    table: pd.DataFrame
    geometry: Geometry
    about: Mapping[str, Any]
    statistics: Sequence[Statistics] = ()

    @property
    def target(self) -> TargetOptions:
        """What the table's costs are of.

        Raises:
            PlanError: it is malformed.
        """
        return TargetOptions.from_dict(self.about.get("target") or {})

    def ranked(self, normalization: Normalization) -> Self:
        """The same importances, made comparable in another way; the factor on attention holds as before.

        Costs are parameters afterwards.

        Raises:
            OptionError: the table is of several rounds, whose importances are of different models.
            PlanError: the factor on attention is malformed.
        """
        if self.about.get("rounds", 1) != 1:
            raise OptionError(
                f"the table was made in {self.about['rounds']} rounds: importances of groups that went in different "
                "rounds are of different models and cannot be normalised together. Score the dense model with "
                "`prunus score`, and plan from that"
            )
        parameters = self.table["group_type"].map(dict(self.geometry.group_parameters))
        table = rank_table(self.table.assign(cost=parameters), normalization)
        try:
            attention_weight = self.about["scoring"].get("attention_weight", 1.0)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"malformed scores: how they were weighed ({type(error).__name__} {error})") from error
        table = weigh_attention(table, attention_weight)
        return replace(self, table=table, about={key: value for key, value in self.about.items() if key != "target"})

    def plan(self, ratio: float, constraints: Constraints, costs: Costs, *, last: bool = True) -> Plan:
        """What to cut by the table, see `prunus.selection.select.select`.

        Raises:
            CalibrationError: see `check_enough_reached`.
        """
        chosen = select(self.table, self.geometry, ratio, constraints, costs, last=last)
        check_enough_reached(self.about.get("routing"), chosen)
        return chosen

    def with_target(self, target: TargetOptions, plan: Plan) -> Self:
        """The table at the costs of a target, and in `about` what a plan leaves of it."""
        costs = target.costs(self.geometry)
        before, after = costs.total, costs.left(plan.kept_widths)
        about = {**target.to_dict(), "quantity": costs.quantity, "before": before, "after": after}
        return replace(self, table=with_costs(self.table, costs), about={**self.about, "target": about})

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write a folder with groups.csv, score.json and, if there are any, the statistics.

        They are in statistics.safetensors, those of a second source in statistics-2.safetensors, and so on.

        Args:
            folder: complete or not there at all.
            overwrite: replace an earlier result as a whole.

        Raises:
            CheckpointError: `folder` may not be written, see `prunus.files.outputs.check_output`.
        """
        with output_folder(folder, overwrite=overwrite) as place:
            for number, statistics in enumerate(self.statistics, start=1):
                name = Path(STATISTICS_FILE)
                statistics.save(place / (name if number == 1 else f"{name.stem}-{number}{name.suffix}"))
            save_table(self.table, place / TABLE_FILE)
            (place / ABOUT_FILE).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """What score.json holds: the model's geometry, and what the table was made from."""
        return json.dumps({"geometry": self.geometry.to_dict(), **self.about}, indent=1) + "\n"

    @classmethod
    def load(cls, table: str | Path) -> Self:
        """Read a table and the score.json beside it.

        Args:
            table: groups.csv, or the folder that holds it, or the folder of a result.

        Raises:
            PlanError: a file is missing or malformed.
        """
        path = Path(table)
        folders = [place for place in (path, path / "prunus") if (place / TABLE_FILE).is_file()]
        path = (folders or [path])[0] / TABLE_FILE if path.is_dir() else path
        about_path = path.with_name(ABOUT_FILE)
        if not about_path.exists():
            raise PlanError(
                f"{about_path} is missing: a table alone does not say how large the model is. Keep groups.csv beside "
                "the score.json that `prunus score` wrote with it."
            )
        about = read_json(about_path, error=PlanError)
        routing = check_content(_AboutContent, about, str(about_path), PlanError).routing
        try:
            geometry = Geometry.from_dict(about.pop("geometry"))
            TargetOptions.from_dict(about.get("target") or {})
        except PlanError as error:
            raise PlanError(f"{about_path}: {error}") from error
        if routing is not None and len(routing.tokens_of_experts) != len(geometry.widths):
            raise PlanError(
                f"{about_path}: routing.tokens_of_experts has {len(routing.tokens_of_experts)} entries, and there are "
                f"{len(geometry.widths)} layers"
            )
        ranked = load_table(path)
        # Before anything counts the groups one by one: a damaged file can name more than any memory holds.
        scored = [axis for axis in geometry.axes if (ranked["group_type"] == axis).any()]
        if len(ranked) != (groups := sum(widths[axis] for widths in geometry.widths for axis in scored)):
            raise PlanError(
                f"{path} lists {len(ranked):,} groups, {about_path} describes {groups:,}: they do not belong together"
            )
        return cls(ranked, geometry, about)


def score(
    model: Any,
    calibration: Calibration | None = None,
    options: ScoringOptions | None = None,
    *,
    batch_size: int = 1,
    engine: EngineChoice = "auto",
    work: Path | None = None,
    seed: int = 0,
    progress: bool = True,
    again: bool = False,
) -> Score:
    """Score every attention group and MLP channel of a model.

    Args:
        model: a transformers causal language model; it stays as it is.
        calibration: token sequences; may be None for methods that need none.
        options: method and normalisation.
        batch_size: sequences per pass. It changes time and memory, and results only by rounding.
        engine: resident runs each sequence through the whole model; streamed runs all sequences through one layer at a
            time, which takes longer, reads weights from disk when their turn comes and holds the gradients of one layer
            only; auto is resident for a model that is in memory.
        work: folder from which a killed run of the streamed engine goes on, see `prunus.sweep.sweep`.
        seed: of all that is random where there are no calibration sequences; else the seed is the one that they were
            drawn with.
        progress: show progress bars on a terminal.
        again: a later round of the same recipe: warnings about the recipe are not repeated.

    Raises:
        CalibrationError: the method needs calibration sequences.
        OptionError: the sequences are longer than the model's context, or hold token ids that it does not embed.
        UnsupportedModelError: the model is of another kind, or not in memory, see `prunus.model.live`.
        NonFiniteError: NaN or infinity in the loss or the importances.
    """
    ways = [options or ScoringOptions()]
    how: dict[str, Any] = {"engine": engine, "work": work, "seed": seed, "progress": progress, "again": again}
    return score_together(model, calibration, ways, batch_size=batch_size, **how)[0]


def score_together(
    model: Any,
    calibration: Calibration | None,
    each: Sequence[ScoringOptions],
    *,
    batch_size: int = 1,
    engine: EngineChoice = "auto",
    work: Path | None = None,
    seed: int = 0,
    progress: bool = True,
    again: bool = False,
) -> list[Score]:
    """Score a model in several ways; those that need the same kind of pass share it.

    Args:
        model: a transformers causal language model; it stays as it is.
        calibration: token sequences; may be None for methods that need none.
        each: the ways.
        batch_size: see `score`.
        engine: see `score`.
        work: folder from which a killed run of the streamed engine goes on.
        seed: see `score`.
        progress: show progress bars on a terminal.
        again: see `score`.

    Returns:
        One score for each of `each`. The seconds and the peak memory of a shared pass count for all that need it.

    Raises:
        CheckpointError: the files of an opened model changed meanwhile.
        PrunusError: see `score`.
    """
    model = live_model(model)
    if calibration is not None:
        check_tokens(model.config, calibration.input_ids)
    geometry = Geometry.of(model)
    for options in each:
        options.check_axes(geometry)
        if not again and geometry.family.mixture is None:
            _warn_of_scales(options)
    sharing: dict[tuple[Any, ...], list[int]] = {}
    seed = seed_of(calibration, otherwise=seed)
    each = [options if options.random_seed is not None else replace(options, random_seed=seed) for options in each]
    if engine == "auto":
        # The weights of a model in memory are there already, so that streaming has nothing to save.
        engine = "streamed" if layers_of(model).stored else "resident"
    for number, options in enumerate(each):
        sharing.setdefault(_pass(options), []).append(number)
    scores: dict[int, Score] = {}
    for (kind, *_), numbers in sharing.items():
        group = [each[number] for number in numbers]
        if calibration is None and any(options.needs_calibration for options in group):
            names = ", ".join(options.method for options in group if options.needs_calibration)
            raise CalibrationError(f"method {names} needs calibration sequences; give a calibration source")
        seen = split_probe(calibration)[0] if kind == "adaptive" and calibration is not None else calibration
        parts = list(dict.fromkeys(part for options in group for part in options.parts))
        with metered(model.device) as cost:
            statistics = take_statistics(
                model,
                seen,
                parts,
                group[0],
                batch_size=batch_size,
                engine=engine,
                work=work / f"statistics-{numbers[0]}" if work else None,
                progress=progress,
            )
        for number, options in zip(numbers, group, strict=True):
            scored = _score(model, calibration, options, statistics, cost, progress)
            ran = {"batch_size": batch_size, "engine": engine, "compute_dtype": dtype_name(model.dtype)}
            scores[number] = replace(scored, about={**scored.about, **ran})
    layers_of(model).verify()
    if not again:
        warn_of_idle_experts(scores[0].about.get("routing"))
    return [scores[number] for number in range(len(each))]


def _warn_of_scales(options: ScoringOptions) -> None:
    """Say, before anything takes time, that raw scores of a method do not compare."""
    if options.method not in COMPOSITES and options.normalize == "none" and not get_method(options.method).comparable:
        logger.warning(
            "raw %s scores of different layers are not on one scale, and a global ranking of them cuts whole layers "
            "blindly; `normalize=layer_sum` makes them comparable",
            options.method,
        )


def seed_of(calibration: Calibration | None, otherwise: int = 0) -> int:
    """The seed of a run: the one that its calibration sequences were drawn with, where there is one."""
    seed = None if calibration is None else calibration.provenance.seed
    return otherwise if seed is None else seed


def _pass(options: ScoringOptions) -> tuple[Any, ...]:
    """What has to be equal for two ways of scoring to share a pass over the sequences."""
    kind = "backward" if options.takes_gradients else "forward" if options.needs else "none"
    # The adaptive method keeps some sequences for its probes, so that its statistics are of others.
    kind = "adaptive" if options.method == "adaptive" else kind
    shared = options.hessian, options.activation, options.random_seed, options.noise
    return kind, *shared


def _score(
    model: Any,
    calibration: Calibration | None,
    options: ScoringOptions,
    statistics: Sequence[Statistics],
    shared: Cost,
    progress: bool,
) -> Score:
    """From the statistics to the table of one method."""
    geometry, findings = Geometry.of(model), {}
    with metered(model.device) as cost:
        tables = {name: _table_of(model, name, statistics, options) for name in options.parts}
        if options.method == "hybrid":
            table = rank_table(mix(tables, options.hybrid), options.normalize)
        elif options.method == "adaptive":
            assert calibration is not None
            table, findings["adaptive"] = adapt(
                model, tables, split_probe(calibration)[1], options.adaptive, progress=progress
            )
        else:
            table = tables[options.method]
        table = weigh_attention(table, options.attention_weight)
    peaks = [peak for peak in (shared.peak_bytes, cost.peak_bytes) if peak is not None]
    about = {
        "scoring": asdict(options),
        "calibration": calibration.provenance.to_dict()
        if calibration is not None and options.needs_calibration
        else None,
        "calibration_loss": _mean_loss(statistics),
        "seconds": round(shared.seconds + cost.seconds, 2),
        "peak_bytes": max(peaks, default=None),
        **findings,
    }
    if tokens := tokens_of_experts(statistics):
        about["routing"] = tokens
    return Score(table, geometry, about, statistics)


def _mean_loss(statistics: Sequence[Statistics]) -> float | None:
    """Mean loss per token over all sources, whose sequences are equally long."""
    losses = [each.loss for each in statistics if each.loss is not None]
    sequences = [each.sequences for each in statistics if each.loss is not None]
    if len(losses) < 2:
        return losses[0] if losses else None
    return sum(loss * number for loss, number in zip(losses, sequences, strict=True)) / sum(sequences)


def _table_of(model: Any, name: str, statistics: Sequence[Statistics], options: ScoringOptions) -> pd.DataFrame:
    """The global table of one method, on its own or as a part of another."""
    method = get_method(name)
    normalization = options.normalize
    if options.method in COMPOSITES:
        normalization = "none" if method.comparable else "layer_sum"
    each = [score_groups(model, method, source, options) for source in statistics]
    each = each or [score_groups(model, method, None, options)]
    importance = mix_sources(each, [source.sequences for source in statistics])
    return build_table(Geometry.of(model), importance, normalization)


def take_statistics(
    model: Any,
    calibration: Calibration | None,
    methods: Sequence[str],
    options: ScoringOptions,
    *,
    batch_size: int = 1,
    engine: Engine = "resident",
    work: Path | None = None,
    progress: bool = True,
) -> list[Statistics]:
    """What several methods need together: of each source of text one sweep; nothing if they need nothing."""
    has_experts = Geometry.of(model).family.mixture is not None

    def wanted() -> list[Statistic]:
        return statistics_for([get_method(name) for name in methods], options, experts=has_experts)

    if not wanted():
        return []
    if calibration is None:
        raise CalibrationError(
            f"method {', '.join(name for name in methods if get_method(name).needs)} needs calibration sequences; give "
            "a calibration source"
        )
    sources, seed = calibration.each_source(), options.random_seed or 0
    taken = []
    for number, source in enumerate(sources):
        batches = list(source.batches(batch_size))
        taken.append(
            sweep(
                model,
                with_noise(batches, options.noise, model.config.get_text_config().vocab_size, seed),
                wanted(),
                engine=engine,
                seed=seed,
                provenance=source.provenance.to_dict(),
                work=work / f"source-{number}" if work is not None and len(sources) > 1 else work,
                progress=progress,
            )
        )
    return taken
