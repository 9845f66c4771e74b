"""The first half of the job: from a model and text to the global table."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pandas as pd

from prunus.calibration import Calibration
from prunus.errors import CalibrationError, OptionError, PlanError
from prunus.groups import Geometry
from prunus.importance import MethodOptions, get_method, score_groups
from prunus.importance.registry import statistics_for
from prunus.metering import metered
from prunus.statistics import Statistics
from prunus.sweep import ENGINES, Engine, sweep
from prunus.table import NORMALIZATIONS, Normalization, build_table, load_table, save_table

__all__ = ["Score", "ScoringOptions", "score", "take_statistics"]

logger = logging.getLogger(__name__)

TABLE_FILE, ABOUT_FILE, STATISTICS_FILE = "groups.csv", "score.json", "statistics.safetensors"


@dataclass(frozen=True)
class ScoringOptions(MethodOptions):
    """How groups are scored.

    Attributes:
        method: importance method: taylor, taylor_2nd, gate_fisher, wanda, magnitude or random.
        normalize: how importances of different layers are made comparable.
        batch_size: calibration sequences per pass. It changes time and memory, and results only by rounding.
        engine: resident runs each sequence through the whole model; streamed runs all sequences through one layer at a
            time, which takes longer and holds the gradients of one layer only.
        fisher_scale: scale of the loss of a sequence, mean or sum over its tokens; weighs the second order against the
            first in taylor_2nd.
        activation: the statistic of activations that wanda multiplies weights with.
        random_seed: of the random control.
    """

    method: str = "taylor"
    normalize: Normalization = "none"
    batch_size: int = 1
    engine: Engine = "resident"

    def __post_init__(self) -> None:
        super().__post_init__()
        get_method(self.method)
        if self.normalize not in NORMALIZATIONS:
            raise OptionError(f"normalization {self.normalize!r} is unknown; choose one of {', '.join(NORMALIZATIONS)}")
        if self.engine not in ENGINES:
            raise OptionError(f"engine {self.engine!r} is unknown; choose one of {', '.join(ENGINES)}")
        if self.batch_size < 1:
            raise OptionError(f"batch size is {self.batch_size}; it must be at least 1")


@dataclass(frozen=True)
class Score:
    """The global table of a model, and what it was made from.

    Attributes:
        table: one row per group, see `prunus.table`.
        geometry: shape of the model.
        about: method, options, calibration provenance, loss and cost, as plain values.
        statistics: what the table was made from; None where the method needs none.
    """

    table: pd.DataFrame
    geometry: Geometry
    about: Mapping[str, Any]
    statistics: Statistics | None = None

    def save(self, folder: str | Path) -> None:
        """Write groups.csv, score.json and, if there are any, statistics.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.statistics is not None:
            self.statistics.save(folder / STATISTICS_FILE)
        save_table(self.table, folder / TABLE_FILE)
        (folder / ABOUT_FILE).write_text(self.to_json(), encoding="utf-8")

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
        try:
            about = json.loads(about_path.read_text(encoding="utf-8"))
            geometry = Geometry.from_dict(about.pop("geometry"))
        except OSError as error:
            raise PlanError(
                f"{about_path} is missing: a table alone does not say how large the model is. Keep groups.csv beside "
                "the score.json that `prunus score` wrote with it."
            ) from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise PlanError(f"{about_path} is malformed: {type(error).__name__} {error}") from error
        return cls(load_table(path), geometry, about)


def score(
    model: Any, calibration: Calibration | None = None, options: ScoringOptions | None = None, *, progress: bool = True
) -> Score:
    """Score every attention group and MLP channel of a model.

    Args:
        model: a transformers causal language model; it stays as it is.
        calibration: token sequences; may be None for methods that need none.
        options: method and normalisation.
        progress: show progress bars on a terminal.

    Raises:
        CalibrationError: the method needs calibration sequences.
        UnsupportedModelError: the model's family is not described.
        NonFiniteError: NaN or infinity in the loss or the importances.
    """
    options = options or ScoringOptions()
    method = get_method(options.method)
    with metered(model.device) as cost:
        statistics = take_statistics(model, calibration, [options.method], options, progress=progress)
        importance = score_groups(model, method, statistics, options)
    if not method.comparable and options.normalize == "none":
        logger.warning(
            "raw %s scores of different layers are not on one scale, and a global ranking of them cuts whole layers "
            "blindly; --normalize layer_sum makes them comparable",
            method.name,
        )
    geometry = Geometry.of(model)
    about = {
        "scoring": asdict(options),
        "calibration": calibration.provenance.to_dict() if calibration is not None and method.needs else None,
        "calibration_loss": statistics.loss if statistics else None,
        "seconds": round(cost.seconds, 2),
        "peak_bytes": cost.peak_bytes,
    }
    return Score(build_table(geometry, importance, options.normalize), geometry, about, statistics)


def take_statistics(
    model: Any,
    calibration: Calibration | None,
    methods: Sequence[str],
    options: ScoringOptions,
    *,
    progress: bool = True,
) -> Statistics | None:
    """One sweep that takes what several methods need together; None if they need nothing."""
    chosen = [get_method(name) for name in methods]
    wanted = statistics_for(chosen, options)
    if not wanted:
        return None
    if calibration is None:
        needy = ", ".join(method.name for method in chosen if method.needs)
        raise CalibrationError(f"method {needy} needs calibration sequences; give a calibration source")
    return sweep(
        model,
        list(calibration.batches(options.batch_size)),
        wanted,
        engine=options.engine,
        provenance=calibration.provenance.to_dict(),
        progress=progress,
    )
