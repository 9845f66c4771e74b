"""A job: a model, a recipe, the texts, and where it runs; everything that `prunus prune` is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prunus.calibration.sources import read_sources
from prunus.errors import OptionError
from prunus.export.llama_cpp import as_files_hold_it
from prunus.machine.placement import dtype_name, resolve_dtype
from prunus.model.geometry import Geometry
from prunus.model.saved_dtype import saved_dtype
from prunus.model.whole import whole_of
from prunus.pipeline.options import CalibrationOptions, EvaluationOptions
from prunus.pipeline.recipe import Recipe
from prunus.selection.fit import FitOptions
from prunus.selection.select import check_ratio
from prunus.selection.targets import TargetOptions
from prunus.sweep.engine import ModelOptions

__all__ = ["DEFAULT_RATIO", "Job", "OutputOptions"]

DEFAULT_RATIO = 0.25


@dataclass(frozen=True)
class OutputOptions:
    """What is kept beside the result.

    Attributes:
        report: write report.html, with what both models make of a few prompts.
        save_dtype: float32, bfloat16 or float16, to save the result in; auto is the checkpoint's own, or the dtype that
            the run computes in if that has fewer bytes.
        work: folder from which an interrupted run resumes when the same command is given again; by default OUT.work,
            with the streamed engine or `recovery` only. Removed at the end.
        text_only: of a multimodal model, save the language model by itself.
    """

    report: bool = True
    save_dtype: str = "auto"
    work: str | None = None
    text_only: bool = False

    def __post_init__(self) -> None:
        resolve_dtype(self.save_dtype, "save_dtype")


@dataclass(frozen=True)
class Job:
    """Everything that decides a result.

    Attributes:
        model: folder, Hub id or `smollm2-135m`.
        ratio: share of all parameters to remove, or of what the recipe's target says, in [0, 1).
        recipe: how the model is pruned.
        calibration: the text that importance is measured on.
        evaluation: how the models before and after are compared.
        run: where and how the model is held.
        output: what is kept beside the result.
        fit: a size to fit in place of the ratio.
        experts: share of the experts to remove from each layer of a mixture of experts, in place of `ratio`: the same
            as that ratio with the target experts.
        made_by: of a job that was done: versions, and digests of the calibration sequences and of the plan.
    """

    model: str
    ratio: float = DEFAULT_RATIO
    recipe: Recipe = field(default_factory=Recipe)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    run: ModelOptions = field(default_factory=ModelOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    fit: FitOptions = field(default_factory=FitOptions)
    experts: float | None = None
    made_by: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.experts is not None:
            # One way to say it from here on.
            if self.ratio != DEFAULT_RATIO or self.recipe.target.name not in ("params", "experts"):
                raise OptionError(
                    f"`experts` {self.experts:g} is a share of the experts, and `ratio` {self.ratio:g} one of all "
                    f"{self.recipe.target.quantity}; give one of them"
                )
            check_ratio(self.experts, "experts", "experts")
            object.__setattr__(self, "ratio", self.experts)
            object.__setattr__(self, "recipe", replace(self.recipe, target=TargetOptions("experts")))
            object.__setattr__(self, "experts", None)
        check_ratio(self.ratio, self.recipe.target.quantity)
        if self.run.revision is not None:
            # One way to say it from here on, as part of the name.
            object.__setattr__(self, "model", self.run.named(self.model))
            object.__setattr__(self, "run", replace(self.run, revision=None))

    @property
    def reads(self) -> tuple[str | None, ...]:
        """The model and every text and task that the result is made from: names, folders and files."""
        trained_on = [source.name for source in read_sources(self.recipe.recovery.text or self.calibration.source)]
        texts = (*self.calibration.names, *trained_on, self.evaluation.text, *self.evaluation.tasks)
        return self.model, *texts

    def fitted(self, model: Any) -> Job:
        """The job with the ratio, the target and the constraints that its size to fit means; itself without one.

        Args:
            model: its model, without weights: in the dtype that it will be saved in, with what will be saved around it.

        Raises:
            OptionError: the target is no size, the model fits as it is, or files of llama.cpp's cannot hold what the
                job's shape leaves.
            UnsupportedModelError: the size is that of a GGUF file, and none can be written.
        """
        if not self.fit:
            return self
        if self.recipe.target.name not in ("params", "size", "memory"):
            raise OptionError(
                f"`target` {self.recipe.target.name}: a size to fit is one of bytes; leave `target` out, or give "
                "a `ratio` of it"
            )
        selection = self.recipe.selection
        if self.fit.in_gguf:
            selection = as_files_hold_it(model.config, selection)
        whole = whole_of(model)
        found = self.fit.solved(
            Geometry.of(model),
            dtype_name(saved_dtype(model)),
            selection,
            beside=whole.parameters if whole is not None else 0,
        )
        recipe = replace(self.recipe, target=found.target, selection=found.constraints)
        return replace(self, ratio=found.ratio, recipe=recipe, fit=FitOptions())
