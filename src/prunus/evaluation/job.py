"""Everything that `prunus eval` is told, as an object and as a file, see `prunus.settings`."""

from __future__ import annotations

from dataclasses import dataclass, field

from prunus.evaluation.eval_options import EvalOptions
from prunus.evaluation.speed_options import SpeedOptions
from prunus.settings import Sheet
from prunus.sweep.engine import ModelOptions

__all__ = ["EVALUATION", "EvalJob"]


@dataclass(frozen=True)
class EvalJob:
    """What is measured, of which model.

    Attributes:
        model: folder, Hub id or `smollm2-135m`.
        compare: another model, such as the dense one, to measure by the same rules beside it.
        evaluation: what is measured.
        speed: what is run where speed is measured.
        run: where and how the models run.
    """

    model: str
    compare: str | None = None
    evaluation: EvalOptions = field(default_factory=EvalOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    run: ModelOptions = field(default_factory=ModelOptions)


#: the settings of `prunus eval`
EVALUATION = Sheet(
    EvalJob(""), command="prunus eval", listing="prunus recipe --command eval", example="evaluation.windows=20"
)
