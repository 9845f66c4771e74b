"""The README of a pruned model, in the format of the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import metadata_load

from prunus.groups import LayerWidths

__all__ = ["CalibrationFacts", "CardFacts", "OriginalFacts", "PerplexityFacts", "license_of", "model_card"]

logger = logging.getLogger(__name__)

LICENSE_FIELDS = ("license", "license_name", "license_link")


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
class PerplexityFacts:
    """Perplexity before and after, and how it was measured.

    Attributes:
        text: what was read.
        protocol: windows, dtype, loss.
        before: of the base model; None if it was not measured.
        after: of this model.
    """

    text: str
    protocol: str
    before: float | None
    after: float


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
        command: what was typed to make it.
        version: of prunus.
        on_hub: whether `base_model` is a Hub id.
        license: license fields of the base model's card (`license`, `license_name`, `license_link`).
        calibration: None for a method that needs no text.
        perplexities: measurements.
        details: more settings, shown as they are (normalisation, compensation, frozen layers, …).
        original: the model that was never cut; None if that is the base model.
        quantity: what `ratio` is a share of.
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
    on_hub: bool = False
    license: Mapping[str, str] = field(default_factory=dict)
    calibration: CalibrationFacts | None = None
    perplexities: Sequence[PerplexityFacts] = ()
    details: Mapping[str, str] = field(default_factory=dict)
    original: OriginalFacts | None = None
    quantity: str = "parameters"


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
        f"# {_text(facts.name)}",
        _summary(facts),
        "## How to load",
        _loading(facts),
        "## How it was made",
        _making(facts),
    ]
    if facts.perplexities:
        sections += ["## Perplexity", _perplexities(facts)]
    sections += ["## Widths", _widths(facts)]
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    # A JSON string is a YAML string, whatever is in it.
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- prunus", "- pruned"]
    base, on_hub = (facts.original.model, facts.original.on_hub) if facts.original else (facts.base_model, facts.on_hub)
    if on_hub:
        lines.append(f"base_model: {json.dumps(base)}")
    lines += [f"{name}: {json.dumps(facts.license[name])}" for name in LICENSE_FIELDS if name in facts.license]
    return "\n".join([*lines, "---"])


def _link(model: str, on_hub: bool) -> str:
    if on_hub:
        return f"[{_text(model)}](https://huggingface.co/{model})"
    return _text(PurePath(model).name or model)


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
    return (
        f"{whole} without {1 - facts.parameters_after / before:.1%} of its parameters: whole attention groups (a "
        "key/value head with its query heads) and MLP channels were removed, chosen in one ranking over all layers by "
        f"prunus.{steps}\n\n"
        f"| | {'original' if facts.original else 'base'} | this model |\n|---|---:|---:|\n"
        f"| parameters | {before:,} | {facts.parameters_after:,} |\n"
        f"| decoder layers | {len(facts.base_widths)} | {sum(map(_is_left, facts.widths))} |"
    )


def _loading(facts: CardFacts) -> str:
    name = json.dumps(facts.name)
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    model = f"model = AutoModelForCausalLM.from_pretrained({name})\n"
    remote = f"model = AutoModelForCausalLM.from_pretrained({name}, trust_remote_code=True)\n"
    with_prunus = f"import prunus\n{imports}"
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({name})"
    if not facts.ragged:
        return (
            f"All layers have equal widths, so it is an ordinary `{facts.model_type}` model and loads anywhere:\n\n"
            f"{_block(imports + model + tokenizer, 'python')}"
        )
    return (
        "Its layers differ in width, which the stock classes of transformers cannot express. With the package prunus "
        f"installed:\n\n{_block(with_prunus + model + tokenizer, 'python')}\n\n"
        "Without it, the two files `configuration_prunus.py` and `modeling_prunus.py` beside the weights define the "
        f"model:\n\n{_block(imports + remote + tokenizer, 'python')}"
    )


def _making(facts: CardFacts) -> str:
    rows = {"base model": _base(facts)}
    if facts.original:
        rows["original model"] = _link(facts.original.model, facts.original.on_hub)
    rows |= {"method": _code(facts.method), "ratio": f"{facts.ratio:g} of all {facts.quantity}"}
    if calibration := facts.calibration:
        rows["calibration text"] = _text(calibration.source)
        rows["calibration size"] = (
            f"{calibration.samples} sequences of {calibration.seq_len} tokens, seed {calibration.seed}"
        )
        rows["calibration tokens, SHA-256"] = _code(calibration.sha256)
    else:
        rows["calibration text"] = "none: the method needs no text"
    rows |= {_text(name): _text(value) for name, value in facts.details.items()}
    rows["prunus"] = _text(facts.version)
    composed = (
        f" `prunus/plan_from_original.json` holds all steps as one plan, for {_link(facts.original.model, False)}."
        if facts.original
        else ""
    )
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    return (
        f"{table}\n\nThe command was\n\n{_block(facts.command, 'sh')}\n\n"
        "and the folder `prunus/` holds the plan and the scores: `prunus apply BASE prunus/plan.json --out DIR` cuts "
        "the base model again without measuring anything; a compensation of the remaining weights is not part of a "
        f"plan.{composed}"
    )


def _perplexities(facts: CardFacts) -> str:
    rows = ["| text | base | this model | protocol |", "|---|---:|---:|---|"]
    for measured in facts.perplexities:
        before = "" if measured.before is None else f"{measured.before:.2f}"
        rows.append(f"| {_text(measured.text)} | {before} | {measured.after:.2f} | {_text(measured.protocol)} |")
    return "\n".join(rows)


def _widths(facts: CardFacts) -> str:
    of = "original" if facts.original else "base"
    rows = [f"| layer of the {of} | query heads | key/value heads | MLP channels |", "|---:|---:|---:|---:|"]
    for layer_idx, (before, after) in enumerate(zip(facts.base_widths, facts.widths, strict=True)):
        if not _is_left(after):
            rows.append(f"| {layer_idx} | removed | removed | removed |")
            continue
        query = _of(*(widths.num_key_value_heads * facts.num_key_value_groups for widths in (after, before)))
        key_value = _of(after.num_key_value_heads, before.num_key_value_heads)
        rows.append(
            f"| {layer_idx} | {query} | {key_value} | {_of(after.intermediate_size, before.intermediate_size)} |"
        )
    return "\n".join(rows)


def _is_left(widths: LayerWidths) -> bool:
    return bool(widths.num_key_value_heads or widths.intermediate_size)


def _of(after: int, before: int) -> str:
    return f"{after}" if after == before else f"{after} of {before}"


def _text(value: str) -> str:
    """Any string as text of a paragraph or a table cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!])", r"\\\1", " ".join(value.split()))


def _code(value: str) -> str:
    """Any string as inline code of a table cell."""
    value = " ".join(value.split()).replace("|", "\\|")
    fence = _fence(value, "`")
    padding = " " if "`" in value else ""
    return f"{fence}{padding}{value}{padding}{fence}"


def _block(value: str, language: str) -> str:
    fence = _fence(value, "```")
    return f"{fence}{language}\n{value}\n{fence}"


def _fence(value: str, shortest: str) -> str:
    """A run of backticks longer than any in `value`."""
    longest = max(map(len, re.findall("`+", value)), default=0)
    return "`" * max(len(shortest), longest + 1)
