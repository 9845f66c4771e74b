"""The README of a pruned model, in the format of the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from prunus.errors import CheckpointError
from prunus.escaping import markdown_block, markdown_code, markdown_text, printable_values, yaml_block
from prunus.model.widths import LayerWidths
from prunus.results.what_went import how_chosen, what_went

__all__ = [
    "GIVEN_PLAN",
    "CalibrationFacts",
    "CardFacts",
    "MeasuredFacts",
    "OriginalFacts",
    "license_of",
    "model_card",
    "text_of_card",
    "updated_card",
]

logger = logging.getLogger(__name__)

LICENSE_FIELDS = ("license", "license_name", "license_link")
#: how a metric is shown
FORMATS = {"perplexity": "{:.2f}", "accuracy": "{:.1%}"}
#: what stands between these is written anew by every evaluation
EVALUATION_START, EVALUATION_END = "<!-- evaluation by prunus -->", "<!-- end of evaluation by prunus -->"
_EVALUATION = re.compile(f"^{EVALUATION_START}$.*?^{EVALUATION_END}$", re.MULTILINE | re.DOTALL)
#: what can be a model of the Hub; anything else is shown without a link
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class CalibrationFacts:
    """The text that importance was measured on.

    Attributes:
        source: data set or file.
        samples: number of sequences.
        seq_len: tokens per sequence.
        seed: of their choice.
        sha256: of the token ids.
    """

    source: str
    samples: int
    seq_len: int
    seed: int
    sha256: str


@dataclass(frozen=True)
class MeasuredFacts:
    """One figure before and after, and how it was measured.

    Attributes:
        dataset: text or task, for a reader.
        dataset_id: the Hub's id of it, or its name again.
        metric: the Hub's id of the metric: perplexity or accuracy.
        metric_name: the same for a reader; tells acc from acc_norm.
        protocol: windows, dtype, number of items.
        before: of the base model; None if it was not measured.
        after: of this model.
        dataset_config: which part of the data set, where the Hub's has several.
        of: the model that `before` is of: base, or original where the base had been cut from that one before.
    """

    dataset: str
    dataset_id: str
    metric: str
    metric_name: str
    protocol: str
    before: float | None
    after: float
    dataset_config: str | None = None
    of: str = "base"

    @property
    def shown_before(self) -> str:
        """`before` for a reader, with its model where that is not the base."""
        return self.show(self.before) + (f" ({self.of} model)" if self.before is not None and self.of != "base" else "")

    def show(self, value: float | None) -> str:
        """One of the two for a reader: perplexities with two decimals, accuracies in percent."""
        return "" if value is None else FORMATS.get(self.metric, "{:.4g}").format(value)


#: in a metric's name, before the model that it is of
OF_THE = " of the"
#: in the place of a method
GIVEN_PLAN = "a given plan"


@dataclass(frozen=True)
class OriginalFacts:
    """The model that was never cut, where the base model of the last cut had been cut before.

    Attributes:
        model: Hub id or name.
        parameters: tied ones counted once.
        on_hub: whether `model` is a Hub id.
    """

    model: str
    parameters: int
    on_hub: bool


@dataclass(frozen=True)
class CardFacts:
    """Everything a model card says.

    Attributes:
        name: of the pruned model, the card's title.
        base_model: Hub id or folder of the base model; of a folder only the last part is shown.
        method: importance method.
        ratio: share of all of `quantity` that was to be removed.
        parameters_before: of the base model, tied ones counted once.
        parameters_after: of this model.
        base_widths: groups per layer of the base model; of the original one, if there is one.
        widths: groups per layer that this one keeps of the layers in `base_widths`; a layer of which nothing is left
            has zeros on both axes.
        num_key_value_groups: query heads per key/value head.
        model_type: of this model's config.
        ragged: whether it needs the modelling files that lie beside the weights.
        repaired: whether weights that stayed were changed, too.
        command: what was typed to make it.
        version: of prunus.
        on_hub: whether `base_model` is a Hub id.
        license: license fields of the base model's card (`license`, `license_name`, `license_link`).
        calibration: None for a method that needs no text.
        measured: figures before and after.
        details: more settings, shown as they are (normalisation, repair, layer range, …).
        original: the model that was never cut; None if that is the base model.
        quantity: what `ratio` is a share of.
        around: parameters of a multimodal model beside its language model, which all else is about; None for a
            language model alone.
        active_before: of a mixture of experts, the base model's parameters that work on each token (of the original
            model's, if there is one); None of a dense model.
        active_after: of this model.
    """

    name: str
    base_model: str
    method: str
    ratio: float
    parameters_before: int
    parameters_after: int
    base_widths: Sequence[LayerWidths]
    widths: Sequence[LayerWidths]
    num_key_value_groups: int
    model_type: str
    ragged: bool
    command: str
    version: str
    repaired: bool = False
    on_hub: bool = False
    license: Mapping[str, str] = field(default_factory=dict)
    calibration: CalibrationFacts | None = None
    measured: Sequence[MeasuredFacts] = ()
    details: Mapping[str, str] = field(default_factory=dict)
    original: OriginalFacts | None = None
    quantity: str = "parameters"
    around: int | None = None
    active_before: int | None = None
    active_after: int | None = None


def license_of(folder: Path) -> dict[str, str]:
    """The license fields of the model card in a folder; empty if there is no card or it names none."""
    card = folder / "README.md"
    try:
        metadata: dict[str, Any] = (metadata_load(card) if card.is_file() else None) or {}
    except Exception as error:  # any YAML that somebody wrote by hand
        logger.warning("the front matter of %s cannot be read, so its license is not carried over: %s", card, error)
        return {}
    return {name: metadata[name] for name in LICENSE_FIELDS if isinstance(metadata.get(name), str)}


def model_card(facts: CardFacts) -> str:
    """README.md of a pruned model: YAML front matter for the Hub, then what was done and how to load it."""
    sections = [
        _front_matter(facts),
        f"# {markdown_text(facts.name)}",
        _summary(facts),
        "## How to load",
        _loading(facts),
        "## How it was made",
        _making(facts),
    ]
    if facts.measured:
        sections.append(_evaluation(facts.measured, ()))
    sections += ["## Widths", _widths(facts)]
    return "\n\n".join(sections) + "\n"


def updated_card(text: str, name: str, measured: Sequence[MeasuredFacts], notes: Sequence[str] = ()) -> str:
    """A model card with new figures, and everything else as it was, whoever wrote it.

    Args:
        text: the card.
        name: of the model, for a card that has no results yet.
        measured: all figures that the card shall show; results in its `model-index` for other data or metrics stay.
        notes: sentences below the table, as they are.

    Raises:
        CheckpointError: the card's front matter cannot be read.
    """
    try:
        card = ModelCard(text)
    except Exception as error:  # any YAML that somebody wrote by hand
        raise CheckpointError(
            f"the front matter of the model card cannot be read, so it stays as it is: {error}"
        ) from None
    new = _results(measured)
    kept = [old for old in card.data.eval_results or () if not any(_is_same_figure(old, result) for result in new)]
    if kept or new:
        card.data.eval_results = kept + new
        card.data.model_name = card.data.model_name or name
        card.data.metrics = sorted({*(card.data.metrics or ()), *(result.metric_type for result in new)})
    section = _evaluation(measured, notes)
    earlier = _EVALUATION.search(card.text)
    if earlier:
        card.text = f"{card.text[: earlier.start()]}{section}{card.text[earlier.end() :]}"
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    return text_of_card(card)


def text_of_card(card: ModelCard) -> str:
    """A card with its front matter, as README.md holds it."""
    return f"---\n{yaml_block(card.data.to_dict())}---\n{card.text}"


def _results(measured: Sequence[MeasuredFacts]) -> list[EvalResult]:
    """Figures as the Hub's `model-index` has them; what is no finite number is left out."""
    results = []
    for facts in measured:
        for name, value in (
            (facts.metric_name, facts.after),
            (f"{facts.metric_name}{OF_THE} {facts.of} model", facts.before),
        ):
            if value is not None and math.isfinite(value):
                results.append(
                    EvalResult(
                        task_type="text-generation",
                        task_name="Text Generation",
                        dataset_type=facts.dataset_id,
                        dataset_name=facts.dataset,
                        dataset_config=facts.dataset_config,
                        metric_type=facts.metric,
                        metric_name=name,
                        metric_value=value,
                        metric_args={"protocol": facts.protocol},
                    )
                )
    return results


def _is_same_figure(old: EvalResult, new: EvalResult) -> bool:
    # A figure of another model goes with the one that it stood beside.
    figures = (
        (each.dataset_type, each.dataset_config, each.metric_type, (each.metric_name or "").partition(OF_THE)[0])
        for each in (old, new)
    )
    first, second = (printable_values(figure) for figure in figures)  # as a card holds them
    return first == second


def _front_matter(facts: CardFacts) -> str:
    base, on_hub = (facts.original.model, facts.original.on_hub) if facts.original else (facts.base_model, facts.on_hub)
    # The Hub knows repositories; at which revision stands in the text.
    repository = base.partition("@")[0]
    on_hub = on_hub and _HUB_ID.fullmatch(repository) is not None
    fields: dict[str, Any] = {"base_model": repository} if on_hub else {}
    if on_hub and facts.repaired:
        # The Hub knows adapter, merge, quantized and finetune. Weights that were only cut are none of them.
        fields["base_model_relation"] = "finetune"
    if results := _results(facts.measured):
        metrics = sorted({result.metric_type for result in results})
        fields |= {"eval_results": results, "model_name": facts.name, "metrics": metrics}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation" if facts.around is None else "image-text-to-text",
        tags=["prunus", "pruned"],
        **{name: facts.license[name] for name in LICENSE_FIELDS if name in facts.license},
        **fields,
    )
    return f"---\n{yaml_block(data.to_dict())}---"


def _link(model: str, on_hub: bool) -> str:
    repository, _, revision = model.partition("@")
    if on_hub and _HUB_ID.fullmatch(repository) and re.fullmatch(r"[\w./-]*", revision):
        place = f"{repository}{'/tree/' if revision else ''}{revision}"
        return f"[{markdown_text(model)}](https://huggingface.co/{place})"
    return markdown_text(PurePath(model).name or model)


def _base(facts: CardFacts) -> str:
    return _link(facts.base_model, facts.on_hub)


def _summary(facts: CardFacts) -> str:
    whole, before = _base(facts), facts.parameters_before
    steps = ""
    if facts.original:
        whole, before = _link(facts.original.model, facts.original.on_hub), facts.original.parameters
        steps = (
            f" It was cut in steps: the base of this one was {_base(facts)}, with {facts.parameters_before:,} "
            "parameters left."
        )
    widths = facts.base_widths, facts.widths
    chosen = how_chosen(*widths, by_scores=facts.method != GIVEN_PLAN)
    went = f"{what_went(*widths)} were removed, {chosen}"
    of_what, parameters = "its parameters", f"| parameters | {before:,} | {facts.parameters_after:,} |\n"
    if facts.around is not None:
        of_what = "the parameters of its language model"
        counts = before + facts.around, facts.parameters_after + facts.around
        parameters = (
            f"| parameters of the language model | {before:,} | {facts.parameters_after:,} |\n"
            f"| parameters in all | {counts[0]:,} | {counts[1]:,} |\n"
        )
    return (
        f"{whole} without {1 - facts.parameters_after / before:.1%} of {of_what}: {went}, by "
        f"prunus.{steps}\n\n"
        f"| | {'original' if facts.original else 'base'} | this model |\n|---|---:|---:|\n"
        f"{parameters}"
        f"{_active(facts)}"
        f"| decoder layers | {len(facts.base_widths)} | {sum(map(bool, facts.widths))} |"
    )


def _active(facts: CardFacts) -> str:
    """A row on the parameters that work on each token, of a mixture of experts."""
    if facts.active_before is None or facts.active_after is None:
        return ""
    return f"| parameters active per token | {facts.active_before:,} | {facts.active_after:,} |\n"


def _loading(facts: CardFacts) -> str:
    name = json.dumps(facts.name)
    auto_class, reader, reader_class = "AutoModelForCausalLM", "tokenizer", "AutoTokenizer"
    if facts.around is not None:
        auto_class, reader, reader_class = "AutoModelForImageTextToText", "processor", "AutoProcessor"
    imports = f"from transformers import {', '.join(sorted((auto_class, reader_class)))}\n\n"
    model = f"model = {auto_class}.from_pretrained({name})\n"
    remote = f"model = {auto_class}.from_pretrained({name}, trust_remote_code=True)\n"
    with_prunus = f"import prunus\n{imports}"
    tokenizer = f"{reader} = {reader_class}.from_pretrained({name})"
    if not facts.ragged:
        return (
            f"All layers have equal widths, so it is an ordinary {markdown_code(facts.model_type)} model and loads "
            f"anywhere:\n\n"
            f"{markdown_block(imports + model + tokenizer, 'python')}"
        )
    return (
        "Its layers differ in width, which the stock classes of transformers cannot express. With the package prunus "
        f"installed:\n\n{markdown_block(with_prunus + model + tokenizer, 'python')}\n\n"
        "Without it, the two files `configuration_prunus.py` and `modeling_prunus.py` beside the weights define the "
        f"model:\n\n{markdown_block(imports + remote + tokenizer, 'python')}"
    )


def _making(facts: CardFacts) -> str:
    rows = {"base model": _base(facts)}
    if facts.original:
        rows["original model"] = _link(facts.original.model, facts.original.on_hub)
    rows |= {"method": markdown_code(facts.method), "ratio": f"{facts.ratio:g} of all {markdown_text(facts.quantity)}"}
    if calibration := facts.calibration:
        rows["calibration text"] = markdown_text(calibration.source)
        rows["calibration size"] = (
            f"{calibration.samples} sequences of {calibration.seq_len} tokens, seed {calibration.seed}"
        )
        rows["calibration tokens, SHA-256"] = markdown_code(calibration.sha256)
    else:
        rows["calibration text"] = "none"
    rows |= {markdown_text(name): markdown_text(value) for name, value in facts.details.items()}
    rows["prunus"] = markdown_text(facts.version)
    scores = "" if facts.method == GIVEN_PLAN else " and the scores"
    composed = (
        f" `prunus/plan_from_original.json` holds all steps as one plan, for {_link(facts.original.model, False)}."
        if facts.original
        else ""
    )
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    return (
        f"{table}\n\nThe command was\n\n{markdown_block(facts.command, 'sh')}\n\n"
        f"and the folder `prunus/` holds the plan{scores}: `prunus apply BASE prunus/plan.json --out DIR` cuts "
        "the base model again without measuring anything; the repair of the remaining weights is not part of a "
        f"plan.{composed}"
    )


def _evaluation(measured: Sequence[MeasuredFacts], notes: Sequence[str]) -> str:
    rows = ["| data | metric | base | this model | protocol |", "|---|---|---:|---:|---|"]
    for facts in measured:
        figures = (facts.shown_before, facts.show(facts.after))
        rows.append(
            f"| {markdown_text(facts.dataset)} | {markdown_text(facts.metric_name)} | {' | '.join(figures)} | "
            f"{markdown_text(facts.protocol)} |"
        )
    parts = [EVALUATION_START, "## Evaluation", *(["\n".join(rows)] if measured else []), *map(markdown_text, notes)]
    return "\n\n".join([*parts, EVALUATION_END])


def _widths(facts: CardFacts) -> str:
    of = "original" if facts.original else "base"
    experts = any(widths.num_experts for widths in facts.base_widths)
    titles = ["query heads", "key/value heads", "MLP channels", *(["experts"] if experts else [])]
    rows = [f"| layer of the {of} | {' | '.join(titles)} |", f"|---:|{'---:|' * len(titles)}"]
    for layer_idx, (before, after) in enumerate(zip(facts.base_widths, facts.widths, strict=True)):
        cells = ["removed"] * len(titles)
        if after:
            query = (widths.num_key_value_heads * facts.num_key_value_groups for widths in (after, before))
            cells = [_of(*query), _of(after.num_key_value_heads, before.num_key_value_heads)]
            cells.append(_of(after.intermediate_size, before.intermediate_size))
            cells += [_of(after.num_experts, before.num_experts)] if experts else []
        rows.append(f"| {layer_idx} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _of(after: int, before: int) -> str:
    return f"{after}" if after == before else f"{after} of {before}"
