"""What the files of a result and of a comparison hold, as far as anything reads them again.

Fields that are only shown, whatever they hold, are not named here.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from prunus.files.json_file import Count, FileContent, Number
from prunus.results.comparison import DENSE, plan_name
from prunus.selection.targets import QUANTITIES

__all__ = [
    "ComparisonContent",
    "ComparisonRow",
    "EvaluationContent",
    "MetricsContent",
    "RecipeContent",
    "RecoveryContent",
    "SamplesContent",
]

_OneOrMore = Annotated[Count, Field(ge=1)]
_Positive = Annotated[Number, Field(gt=0)]
_Share = Annotated[Number, Field(ge=0, le=1)]
_Name = Annotated[str, Field(min_length=1)]


class _Original(FileContent):
    model: _Name
    parameters: _OneOrMore
    active_parameters: Count | None = None


class _OfSource(FileContent):
    source: str
    before: _Positive
    after: _Positive


class _RoutingOfLayer(FileContent):
    layer_idx: Count
    experts: _OneOrMore
    kept: Count
    moved: _Share
    tokens_before: list[Count]
    tokens_after: list[Count] | None


class _Routing(FileContent):
    experts: Count
    experts_without_tokens: Count
    layers: list[_RoutingOfLayer]


class _Scoring(FileContent):
    method: str


class _Stage(FileContent):
    stage: str
    seconds: Annotated[Number, Field(ge=0)]
    peak_bytes: Count | None


class MetricsContent(FileContent):
    """prunus/metrics.json: what was done, and measured on the way."""

    base_model: _Name
    parameters_before: _OneOrMore
    parameters_after: _OneOrMore
    command: str | None = None
    original: _Original | None = None
    calibration: dict[str, Any] | None = None
    perplexity_before: _Positive | None = None
    perplexity_before_of: str | None = None
    perplexity_after: _Positive | None = None
    perplexity_by_source: tuple[_OfSource, ...] | list[_OfSource] = ()
    perplexity_text: str | None = None
    perplexity_protocol: str | None = None
    active_parameters_before: Count | None = None
    active_parameters_after: Count | None = None
    routing: _Routing | None = None
    scoring: _Scoring | None = None
    rounds: Annotated[Count, Field(ge=1)] = 1
    stages: list[_Stage] = Field(default_factory=list)

    @model_validator(mode="after")
    def _says_what_was_measured(self) -> MetricsContent:
        if self.perplexity_after is not None and None in (self.perplexity_text, self.perplexity_protocol):
            raise ValueError("perplexity_after needs perplexity_text and perplexity_protocol beside it")
        return self


class _Sample(FileContent):
    prompt: str
    dense: str
    pruned: str


class SamplesContent(FileContent):
    """prunus/samples.json: prompts with what both models made of them. The file holds the list alone."""

    samples: list[_Sample]


class _RecoveryPoint(FileContent):
    round: Count
    tokens: Count
    seconds: Annotated[Number, Field(ge=0)]
    held_out_loss: Number


class _HeldOutLoss(FileContent):
    before: Number
    after: Number


class _Training(FileContent):
    held_out_loss: _HeldOutLoss | None = None
    command: str | None = None


class RecoveryContent(_Training):
    """prunus/recovery.json: held-out losses over what training took, and of what came out.

    Of the last training, or of all that one command did in rounds; and of those before it.
    """

    curve: list[_RecoveryPoint] = Field(default_factory=list)
    rounds: list[_Training] = Field(default_factory=list)
    earlier: list[_Training] = Field(default_factory=list)

    @property
    def trainings(self) -> list[_Training]:
        """All trainings, in order."""
        return [*self.earlier, *(self.rounds or [self])]

    @property
    def commands(self) -> list[str]:
        """The commands that trained the model, in order; none where the one that cut it did."""
        return [each.command for each in self.trainings if each.command]


class _Perplexity(FileContent):
    text: str
    protocol: str
    perplexity: _Positive


class _ZeroShot(FileContent):
    task: str
    items: _OneOrMore
    accuracy: _Share
    accuracy_norm: _Share


class _Harness(FileContent):
    task: str
    items: Count
    few_shot: Count | None
    metrics: dict[str, Number]
    harness: str


class _Written(FileContent):
    prompt: str
    text: str


class _Figures(FileContent):
    perplexities: list[_Perplexity] = Field(default_factory=list)
    zero_shot: list[_ZeroShot] = Field(default_factory=list)
    harness: list[_Harness] = Field(default_factory=list)
    samples: list[_Written] = Field(default_factory=list)


class _Dense(_Figures):
    model: str


class _Spread(FileContent):
    median: Number
    low: Number
    high: Number


class _Memory(FileContent):
    peak_bytes: Count | None = None


class _SpeedOfModel(FileContent):
    model: str
    dtype: str
    prefill_tokens_per_second: _Spread
    decode_tokens_per_second: _Spread
    first_token_seconds: _Spread
    prefill_ratio: _Spread
    decode_ratio: _Spread
    memory: _Memory | None
    kv_cache_bytes_per_token: Count


class _SpeedOptions(FileContent):
    prompt_tokens: Count
    new_tokens: Count
    batch_size: Count


class _Speed(FileContent):
    options: _SpeedOptions
    device: str
    threads: Count
    torch: str
    results: Annotated[list[_SpeedOfModel], Field(min_length=1)]


class EvaluationContent(_Figures):
    """prunus/evaluation.json: what was measured since."""

    dense: _Dense | None = None
    others: dict[str, _Dense] = Field(default_factory=dict)
    speed: _Speed | None = None
    commands: list[str] = Field(default_factory=list)


class _Measured(FileContent):
    text: str
    protocol: str


class ComparisonRow(FileContent):
    """A result of a comparison, or the dense model; infinite figures are None."""

    recipe: _Name
    seed: Count = 0
    ratio: _Share
    parameters: _OneOrMore
    perplexity: _Positive | None
    relative: _Positive | None
    seconds: Annotated[Number, Field(ge=0)] | None = None
    peak_bytes: Annotated[Number, Field(ge=0)] | None = None

    @property
    def plan_file(self) -> str:
        """The file of its plan in the folder plans/."""
        return plan_name(self.recipe, self.ratio, self.seed)


class _Selection(FileContent):
    shape: str


class _Target(FileContent):
    target: str


class RecipeContent(FileContent):
    """What a comparison says about a recipe."""

    scoring: _Scoring
    selection: _Selection
    rounds: Count
    repair: dict[str, Any] | None
    target: _Target | None = None


class ComparisonContent(FileContent):
    """comparison.json: a row per result, the dense model's among them."""

    rows: list[ComparisonRow]
    recipes: dict[str, RecipeContent] | None = None
    model: str | None = None
    command: str | None = None
    calibration: dict[str, Any] | None = None
    evaluation: _Measured | None = None

    @model_validator(mode="after")
    def _has_the_dense_model(self) -> ComparisonContent:
        if missing := {row.seed for row in self.rows} - {row.seed for row in self.rows if row.recipe == DENSE}:
            of_seed = f" with seed {min(missing)}" * any(row.recipe == DENSE for row in self.rows)
            raise ValueError(f"it has no row of the dense model{of_seed}; run `prunus compare` again")
        return self

    @property
    def dense(self) -> ComparisonRow:
        """The row of the dense model, of several seeds that of the first."""
        return next(row for row in self.rows if row.recipe == DENSE)

    def dense_beside(self, row: ComparisonRow) -> ComparisonRow:
        """The row of the dense model on a result's own text: of held-out sequences each seed has others."""
        return next(each for each in self.rows if (each.recipe, each.seed) == (DENSE, row.seed))

    @property
    def share_removed(self) -> str:
        """What the ratios are: a share of what recipes' targets say, if that is the same in all."""
        targets = {recipe.target.target if recipe.target else "params" for recipe in (self.recipes or {}).values()}
        known = [quantity for name, quantity in QUANTITIES.items() if {name} == targets]
        return f"share of {known[0]} removed" if known else "share removed"

    @property
    def results(self) -> list[ComparisonRow]:
        """The rows of all results."""
        return [row for row in self.rows if row.recipe != DENSE]

    def title(self, row: ComparisonRow) -> str:
        """What tells the lines of a row from others: its recipe, and of several seeds its own."""
        several = len({each.seed for each in self.rows}) > 1
        return row.recipe + f", seed {row.seed}" * several
