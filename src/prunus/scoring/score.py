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
from prunus.importance import COMPOSITES, MethodOptions, get_method, score_groups
from prunus.importance.registry import statistics_for
from prunus.machine.metering import Cost, metered
from prunus.machine.placement import dtype_name
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.model.layers import layers_of
from prunus.model.live import live_model
from prunus.model.tokens import check_tokens
from prunus.option_values import check_positive
from prunus.scoring.adaptive import AdaptiveOptions, adapt, split_probe
from prunus.scoring.hybrid import DEFAULT_MIX, Weights, check_weights, mix
from prunus.scoring.weighing import weigh_attention
from prunus.selection.plan import Plan
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
from prunus.statistics import Statistics
from prunus.sweep import Engine, EngineChoice, sweep

__all__ = ["Score", "ScoringOptions", "score", "score_together", "seed_of", "take_statistics"]

logger = logging.getLogger(__name__)


class _HowScored(FileContent):
    method: str = ""
    attention_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class _AboutContent(FileContent):
    geometry: dict[str, Any]
    scoring: _HowScored | None = None
    rounds: Annotated[Count, Field(ge=1)] = 1
    target: dict[str, Any] | None = None


TABLE_FILE, ABOUT_FILE, STATISTICS_FILE = "groups.csv", "score.json", "statistics.safetensors"


@dataclass(frozen=True)
class ScoringOptions(MethodOptions):
    """How groups are scored.

    Attributes:
        method: importance method: taylor, taylor_2nd, gate_fisher, wanda, magnitude, random, hybrid or adaptive.
        hybrid: what the hybrid method is made of, methods and their weights.
        adaptive: what the adaptive method chooses from.
        normalize: how importances of different layers are made comparable.
        attention_weight: factor on the scores of attention groups. Repair makes up for lost channels better than for
            lost attention, so that a factor above 1 goes with a repair.
        noise: share of the tokens that are replaced by random ones in half of the sequences, so that scores hold
            for other text as well, see `prunus.calibration.noise`.
        hessian: estimate of the Hessian's diagonal in taylor_2nd (and gate_fisher): mean_loss, empirical_fisher or
            sampled_fisher, see `prunus.MethodOptions`.
        activation: the statistic of activations that wanda multiplies weights with.
        random_seed: of noise, sampled labels and the random control; null = the seed that the calibration sequences
            were drawn with.
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

    @property
    def takes_gradients(self) -> bool:
        """Whether the statistics need a backward pass."""
        return not self.needs <= {"activations"}

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
        statistics: what the table was made from; None where the method needs none.
    """

    table: pd.DataFrame
    geometry: Geometry
    about: Mapping[str, Any]
    statistics: Statistics | None = None

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

    def with_target(self, target: TargetOptions, plan: Plan) -> Self:
        """The table at the costs of a target, and in `about` what a plan leaves of it."""
        costs = target.costs(self.geometry)
        before, after = costs.total, costs.left(plan.kept_widths)
        about = {**target.to_dict(), "quantity": costs.quantity, "before": before, "after": after}
        return replace(self, table=with_costs(self.table, costs), about={**self.about, "target": about})

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write a folder with groups.csv, score.json and, if there are any, statistics.safetensors.

        Args:
            folder: complete or not there at all.
            overwrite: replace an earlier result as a whole.

        Raises:
            CheckpointError: `folder` may not be written, see `prunus.files.outputs.check_output`.
        """
        with output_folder(folder, overwrite=overwrite) as place:
            if self.statistics is not None:
                self.statistics.save(place / STATISTICS_FILE)
            save_table(self.table, place / TABLE_FILE)
            (place / ABOUT_FILE).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """What score.json holds: the model's geometry, and what the table was made from."""
        return json.dumps({"geometry": self.geometry.to_dict(), **self.about}, indent=1) + "\n"

    @classmethod
    def load(cls, table: str | Path) -> Self:
        """Read a table and the score.json beside it.

        Args:
            table: groups.csv, or the folder that holds it.

        Raises:
            PlanError: a file is missing or malformed.
        """
        path = Path(table)
        path = path / TABLE_FILE if path.is_dir() else path
        about_path = path.with_name(ABOUT_FILE)
        if not about_path.exists():
            raise PlanError(
                f"{about_path} is missing: a table alone does not say how large the model is. Keep groups.csv beside "
                "the score.json that `prunus score` wrote with it."
            )
        about = read_json(about_path, error=PlanError)
        check_content(_AboutContent, about, str(about_path), PlanError)
        try:
            geometry = Geometry.from_dict(about.pop("geometry"))
            TargetOptions.from_dict(about.get("target") or {})
        except PlanError as error:
            raise PlanError(f"{about_path}: {error}") from error
        ranked = load_table(path)
        # Before anything counts the groups one by one: a damaged file can name more than any memory holds.
        if len(ranked) != (groups := sum(widths[axis] for widths in geometry.widths for axis in AXES)):
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
        progress: show progress bars on a terminal.
        again: a later round of the same recipe: warnings about the recipe are not repeated.

    Raises:
        CalibrationError: the method needs calibration sequences.
        OptionError: the sequences are longer than the model's context, or hold token ids that it does not embed.
        UnsupportedModelError: the model is of another kind, or not in memory, see `prunus.model.live`.
        NonFiniteError: NaN or infinity in the loss or the importances.
    """
    ways = [options or ScoringOptions()]
    passes: dict[str, Any] = {"batch_size": batch_size, "engine": engine, "work": work, "progress": progress}
    return score_together(model, calibration, ways, again=again, **passes)[0]


def score_together(
    model: Any,
    calibration: Calibration | None,
    each: Sequence[ScoringOptions],
    *,
    batch_size: int = 1,
    engine: EngineChoice = "auto",
    work: Path | None = None,
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
    for options in each if not again else ():
        _warn_of_scales(options)
    sharing: dict[tuple[Any, ...], list[int]] = {}
    seed = seed_of(calibration)
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
    return [scores[number] for number in range(len(each))]


def _warn_of_scales(options: ScoringOptions) -> None:
    """Say, before anything takes time, that raw scores of a method do not compare."""
    if options.method not in COMPOSITES and options.normalize == "none" and not get_method(options.method).comparable:
        logger.warning(
            "raw %s scores of different layers are not on one scale, and a global ranking of them cuts whole layers "
            "blindly; `normalize` layer_sum makes them comparable",
            options.method,
        )


def seed_of(calibration: Calibration | None) -> int:
    """The seed of a run: the one that its calibration sequences were drawn with; 0 where there is none."""
    seed = None if calibration is None else calibration.provenance.seed
    return 0 if seed is None else seed


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
    statistics: Statistics | None,
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
        "calibration_loss": statistics.loss if statistics else None,
        "seconds": round(shared.seconds + cost.seconds, 2),
        "peak_bytes": max(peaks, default=None),
        **findings,
    }
    return Score(table, geometry, about, statistics)


def _table_of(model: Any, name: str, statistics: Statistics | None, options: ScoringOptions) -> pd.DataFrame:
    """The global table of one method, on its own or as a part of another."""
    method = get_method(name)
    normalization = options.normalize
    if options.method in COMPOSITES:
        normalization = "none" if method.comparable else "layer_sum"
    importance = score_groups(model, method, statistics, options)
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
) -> Statistics | None:
    """One sweep that takes what several methods need together; None if they need nothing."""
    wanted = statistics_for([get_method(name) for name in methods], options)
    if not wanted:
        return None
    if calibration is None:
        needy = ", ".join(name for name in methods if get_method(name).needs)
        raise CalibrationError(f"method {needy} needs calibration sequences; give a calibration source")
    return sweep(
        model,
        with_noise(
            list(calibration.batches(batch_size)),
            options.noise,
            model.config.get_text_config().vocab_size,
            options.random_seed or 0,
        ),
        wanted,
        engine=engine,
        seed=options.random_seed or 0,
        provenance=calibration.provenance.to_dict(),
        work=work,
        progress=progress,
    )
