"""The folder that a user gets: the model, its card, and what it was made by.

README.md              the model card
prunus/plan.json       the cut
prunus/recipe.yaml     everything that made it: `prunus prune --recipe` does it again
prunus/metrics.json    what was done, and what was measured on the way
prunus/groups.csv      the scores it was chosen from, with score.json
prunus/samples.json    what both models wrote, where both were at hand
prunus/evaluation.json what `prunus eval --update-card` measured since
report.html            all of it as a page, see `prunus.report`
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from prunus.checkpoint import is_ragged, locate, save_checkpoint
from prunus.errors import CheckpointError, PlanError
from prunus.files.json_file import check_content, read_json
from prunus.files.links import check_links
from prunus.files.outputs import claimed, whole_file
from prunus.files.user_path import expanded
from prunus.results.card import (
    GIVEN_PLAN,
    CalibrationFacts,
    CardFacts,
    MeasuredFacts,
    OriginalFacts,
    license_of,
    model_card,
    updated_card,
)
from prunus.results.lineage import COMPOSED_PLAN, Lineage, lineage_of
from prunus.results.result_content import EvaluationContent, MetricsContent, SamplesContent
from prunus.results.settings import settings_used
from prunus.scoring.score import Score
from prunus.selection.plan import Plan
from prunus.selection.table import load_table
from prunus.version import __version__

__all__ = [
    "AGAIN",
    "Result",
    "ResultRecords",
    "add_evaluation",
    "base_called",
    "check_updatable",
    "compared_called",
    "measured_facts",
    "read_metrics",
    "read_result",
    "save_result",
    "speed_notes",
]

logger = logging.getLogger(__name__)

#: file of the folder prunus/ from which the command can be given again
RECIPE = "recipe.yaml"
#: command that does a job again that nobody typed
AGAIN = f"prunus prune --recipe prunus/{RECIPE} --out AGAIN"

FOLDER, CARD = "prunus", "README.md"
#: the Hub's ids of the data sets that the zero-shot tasks are made from, and the part where a set has several
TASK_DATASETS = {
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "openbookqa": ("allenai/openbookqa", None),
    "piqa": ("ybisk/piqa", None),
    "social_iqa": ("allenai/social_i_qa", None),
    "winogrande": ("allenai/winogrande", None),
}
#: lists of an evaluation, and the field that tells their entries apart
EVALUATION_LISTS = {"perplexities": "text", "zero_shot": "task", "harness": "task", "samples": "prompt"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResultRecords:
    """What is written down beside a pruned model.

    Attributes:
        plan: the cut.
        metrics: what was done and measured; its `command` is what the user typed.
        scored: the table that the plan was chosen from; None for a plan that was given.
        samples: prompts with what both models made of them.
        recipe: what recipe.yaml says; None for a plan that was given.
        more: further files of the folder `prunus/`, by name.
        sections: what the card has to say at its end, in Markdown.
    """

    plan: Plan
    metrics: Mapping[str, Any]
    scored: Score | None = None
    samples: Sequence[Mapping[str, str]] = ()
    recipe: str | None = None
    more: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[str] = ()


def save_result(
    smaller: Any, tokenizer: Any, records: ResultRecords, out: str | Path, *, source: str, overwrite: bool
) -> dict[str, Any]:
    """Write a model folder with its card, and the plan, scores and metrics in its subfolder `prunus/`.

    If the base model is itself a folder that prunus cut, the subfolder also gets the composed plan, from the model that
    was never cut, and card and metrics name that one.

    Args:
        smaller: the pruned model.
        tokenizer: its tokenizer.
        records: what is written beside it.
        out: the folder to write.
        source: folder, Hub id or `smollm2-135m`: the base model, whose license is carried over.
        overwrite: replace an earlier result.

    Returns:
        The metrics as written: as given, and with `original` if the base model had been cut before.
    """
    plan = records.plan
    origin = _origin(locate(source), plan)
    metrics = {**records.metrics, **({"original": origin.to_dict()} if origin else {})}
    extras: dict[str, str | bytes] = {
        "plan.json": plan.to_json(),
        "metrics.json": json.dumps(metrics, indent=1) + "\n",
        **records.more,
    }
    if records.recipe is not None:
        extras[RECIPE] = records.recipe
    if origin is not None:
        extras[COMPOSED_PLAN] = origin.plan.to_json()
    if records.scored is not None:
        extras["groups.csv"] = records.scored.table.to_csv(index=False)
        extras["score.json"] = records.scored.to_json()
    if records.samples:
        extras["samples.json"] = json.dumps(records.samples, indent=1) + "\n"
    card = model_card(_card_facts(smaller, Path(out).name, plan, origin, metrics, source))
    card = "\n\n".join([card.rstrip(), *records.sections]) + "\n" if records.sections else card
    save_checkpoint(smaller, tokenizer, out, card=card, extras=extras, overwrite=overwrite)
    return metrics


def _origin(base: Path, plan: Plan) -> Lineage | None:
    """Where the result comes from, if its base model had been cut before."""
    earlier = lineage_of(base)
    try:
        return earlier.then(plan) if earlier else None
    except PlanError:
        logger.warning(
            "the plan in %s does not lead to the model that lies there, so no plan from the original model is written",
            base / "prunus",
        )
        return None


@dataclass(frozen=True)
class Result:
    """What a result folder says about itself.

    Attributes:
        folder: where it is.
        plan: the cut.
        metrics: what was done, and measured on the way.
        table: the scores it was chosen from; None for a plan that was given.
        samples: prompts with what both models made of them; empty if there are none.
        evaluation: what was measured since; empty if nothing.
    """

    folder: Path
    plan: Plan
    metrics: Mapping[str, Any]
    table: pd.DataFrame | None
    samples: Sequence[Mapping[str, str]]
    evaluation: Mapping[str, Any]


def read_result(folder: str | Path) -> Result:
    """Read what a result folder says about itself; the weights are not looked at.

    Raises:
        CheckpointError: prunus did not write the folder, or a file in it is damaged.
        PlanError: its plan or table is malformed.
    """
    folder = expanded(folder)
    check_links(folder)
    own = folder / FOLDER
    if not (own / "metrics.json").is_file() or not (own / "plan.json").is_file():
        raise CheckpointError(
            f"{folder} is no result of `prunus prune` or `prunus apply`: it has no {FOLDER}/metrics.json and "
            f"{FOLDER}/plan.json"
        )
    metrics = read_json(own / "metrics.json")
    check_content(MetricsContent, metrics, str(own / "metrics.json"))
    samples = read_json(own / "samples.json", list) if (own / "samples.json").is_file() else []
    check_content(SamplesContent, {"samples": samples}, str(own / "samples.json"))
    evaluation = read_json(own / "evaluation.json") if (own / "evaluation.json").is_file() else {}
    check_content(EvaluationContent, evaluation, str(own / "evaluation.json"))
    plan = Plan.load(own / "plan.json")
    table = load_table(own / "groups.csv") if (own / "groups.csv").is_file() else None
    if table is not None:
        listed = table.groupby(["layer_idx", "group_type"]).size().to_dict()
        scored = [axis for axis in plan.axes if (table["group_type"] == axis).any()]
        planned = {(i, axis): widths[axis] for i, widths in enumerate(plan.widths) for axis in scored if widths[axis]}
        if listed != planned:
            raise CheckpointError(f"{own / 'groups.csv'} lists other groups than {own / 'plan.json'} is about")
    return Result(folder, plan, metrics, table, samples, evaluation)


def read_metrics(folder: str | Path) -> dict[str, Any]:
    """What was done and measured, of a folder that prunus wrote.

    Raises:
        CheckpointError: the file cannot be read.
    """
    metrics: dict[str, Any] = read_json(expanded(folder) / FOLDER / "metrics.json")
    return metrics


def routing_in(folder: Path) -> dict[str, Any] | None:
    """What the cut of a mixture of experts did to its routing, of a folder that prunus wrote; None if it does not say.

    Raises:
        CheckpointError: the file that would say it cannot be read.
    """
    path = folder / FOLDER / "metrics.json"
    content = check_content(MetricsContent, read_json(path), str(path)) if path.is_file() else None
    return content.routing.model_dump() if content and content.routing else None


def check_updatable(folder: str | Path) -> None:
    """Refuse a folder whose card could not be updated, before any long work.

    Raises:
        CheckpointError: prunus did not write the folder, a file in it or its card cannot be read, or no permission.
        PlanError: its plan or table is malformed.
    """
    result = read_result(folder)
    _updated(result, result.evaluation)
    for place in (result.folder, result.folder / FOLDER):
        if not os.access(place, os.W_OK | os.X_OK):
            raise CheckpointError(f"the card in {folder} cannot be updated: no permission to write in {place}")


def add_evaluation(folder: str | Path, evaluation: Mapping[str, Any], command: str) -> None:
    """Keep figures in a result folder and its model card; figures of the same text or task are replaced.

    Args:
        folder: a folder that prunus wrote.
        evaluation: as `prunus.evaluation.evaluate.Evaluation.to_dict` gives it.
        command: what the user typed.

    Raises:
        CheckpointError: prunus did not write the folder, or its card's front matter cannot be read.
    """
    with claimed(folder):
        result = read_result(folder)
        merged = _merged(result.evaluation, evaluation, result.metrics)
        beside = (evaluation.get("dense") or {}).get("model")
        if beside is not None and base_called(beside, result.metrics) is None:
            logger.warning(
                "%s is not the model that %s was cut from (%s): its figures are kept in evaluation.json, and are not "
                "on the card",
                *(beside, folder, result.metrics["base_model"]),
            )
        merged["commands"] = list(dict.fromkeys([*result.evaluation.get("commands", []), command]))
        text = _updated(result, merged)
        with whole_file(result.folder / FOLDER / "evaluation.json") as partial:
            partial.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
        with whole_file(result.folder / CARD) as partial:
            partial.write_text(text, encoding="utf-8")


def _updated(result: Result, evaluation: Mapping[str, Any]) -> str:
    """The card of a result with these figures."""
    card = result.folder / CARD
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"{card} cannot be read, so it stays as it is: {error}") from error
    measured, notes = measured_facts(result.metrics, evaluation), speed_notes(evaluation.get("speed"), result.metrics)
    return updated_card(text, result.folder.resolve().name, measured, notes)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation with another one added; entries of the same text, task or prompt are the new ones.

    `dense` has the figures of the models that the result was cut from, each with its model as `of`; those of other
    models are in `others`, by name.
    """
    merged = {**old, **new, **_merged_lists(old, new), "speed": new.get("speed") or old.get("speed")}
    # A figure of another model stays only beside one of the pruned model that was measured in the same run.
    redone = {(name, entry[key]) for name, key in EVALUATION_LISTS.items() for entry in new.get(name, ())}
    compared = new.get("dense") or {}
    is_base = bool(compared) and base_called(compared["model"], metrics) is not None
    dense = _added(old.get("dense") or {}, redone, compared if is_base else {})
    others = {name: _added(figures, redone, {}) for name, figures in (old.get("others") or {}).items()}
    if compared and not is_base:
        others[compared["model"]] = _added(others.get(compared["model"], {}), set(), compared)
    return {**merged, "dense": dense or None, **({"others": others} if others else {})}


def _added(old: Mapping[str, Any], redone: set[tuple[str, Any]], new: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a compared model, or of several, without those that were measured again, and with new ones."""
    if not old and not new:
        return {}
    return {**old, **new, **_merged_lists(_marked(old, redone), _marked(new, set()))}


def _marked(figures: Mapping[str, Any], gone: set[tuple[str, Any]]) -> dict[str, list[Any]]:
    """The lists of figures, each with the model that it is of, without those that are gone."""
    return {
        name: [{"of": figures["model"], **entry} for entry in figures[name] if (name, entry[key]) not in gone]
        for name, key in EVALUATION_LISTS.items()
        if figures.get(name)
    }


def _merged_lists(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        name: list({entry[key]: entry for entry in (*old.get(name, ()), *new.get(name, ()))}.values())
        for name, key in EVALUATION_LISTS.items()
    }


def base_called(model: str | None, metrics: Mapping[str, Any]) -> str | None:
    """What a model is called that was measured beside a result.

    Args:
        model: its name; None for none.
        metrics: of the result.

    Returns:
        "base" if the result was cut from it, "original" if that had been cut from it before; None for any other.
    """
    if model is None:
        return None
    bases = {"base": metrics.get("base_model"), "original": (metrics.get("original") or {}).get("model")}
    # A Hub id and a folder of that name, which a download makes, are one.
    return next((name for name, base in bases.items() if base and _own_name(base) == _own_name(model)), None)


def compared_called(model: str, metrics: Mapping[str, Any]) -> str:
    """A compared model for a reader: "the base model", "the original model", or its name."""
    called = base_called(model, metrics)
    return f"the {called} model" if called else _own_name(model)


def _own_name(model: str) -> str:
    return model.rpartition("/")[2].partition("@")[0]


def measured_facts(metrics: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[MeasuredFacts]:
    """All figures of a result, those of a later evaluation instead of earlier ones on the same data."""
    figures: list[MeasuredFacts] = []
    if metrics.get("perplexity_after") is not None:
        text, protocol = metrics["perplexity_text"], metrics["perplexity_protocol"]
        before, after = metrics.get("perplexity_before"), metrics["perplexity_after"]
        of = base_called(metrics.get("perplexity_before_of") or metrics["base_model"], metrics)
        before = before if of else None
        figures.append(MeasuredFacts(text, text, "perplexity", "perplexity", protocol, before, after, of=of or "base"))
    dense = evaluation.get("dense") or {}

    def entry_of(name: str, entry: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        key = EVALUATION_LISTS[name]
        found: Mapping[str, Any] = next((other for other in dense.get(name, ()) if other[key] == entry[key]), {})
        of = base_called(found.get("of", dense.get("model")), metrics)
        return (found, of) if of else ({}, "base")

    for entry in evaluation.get("perplexities", ()):
        text, (other, of) = entry["text"], entry_of("perplexities", entry)
        values = other.get("perplexity"), entry["perplexity"]
        figures.append(MeasuredFacts(text, text, "perplexity", "perplexity", entry["protocol"], *values, of=of))
    for entry in evaluation.get("zero_shot", ()):
        task, (other, of) = entry["task"], entry_of("zero_shot", entry)
        dataset, part = TASK_DATASETS.get(task, (task, None))
        protocol = f"zero-shot, {entry['items']} items, by the rules of lm-evaluation-harness"
        # WinoGrande's choices are compared by one text, so its two accuracies are one.
        for metric, name in {"acc": "accuracy", "acc_norm": "accuracy_norm"}.items():
            if (task, metric) != ("winogrande", "acc_norm"):
                values = other.get(name), entry[name]
                figures.append(MeasuredFacts(task, dataset, "accuracy", metric, protocol, *values, part, of))
    for entry in evaluation.get("harness", ()):
        task, (other, of) = entry["task"], entry_of("harness", entry)
        before_of = other.get("metrics", {})
        shots = "" if entry["few_shot"] is None else f", {entry['few_shot']}-shot"
        protocol = f"lm-evaluation-harness {entry['harness']}{shots}, {entry['items']} items"
        for name, value in entry["metrics"].items():
            metric = "accuracy" if name.split(" ")[0] in ("acc", "acc_norm") else name
            figures.append(MeasuredFacts(task, task, metric, name, protocol, before_of.get(name), value, of=of))
    return list({(figure.dataset_id, figure.dataset_config, figure.metric_name): figure for figure in figures}.values())


def speed_notes(speed: Mapping[str, Any] | None, metrics: Mapping[str, Any]) -> list[str]:
    """Speed and memory in a sentence or two.

    Args:
        speed: as it was measured; None if it was not.
        metrics: of the result.
    """
    if not speed:
        return []
    options, last, first = speed["options"], speed["results"][-1], speed["results"][0]
    where = (
        f"On {speed['device']} with {speed['threads']} CPU threads, {options['prompt_tokens']} + "
        f"{options['new_tokens']} tokens, batch {options['batch_size']}, {last['dtype']}, torch {speed['torch']}: "
    )
    figures = (
        f"prefill {last['prefill_tokens_per_second']['median']:,.1f} and decode "
        f"{last['decode_tokens_per_second']['median']:,.1f} tokens/s"
    )
    if last is not first:
        ratios = " and ".join(f"{last[f'{part}_ratio']['median']:.2f}" for part in ("prefill", "decode"))
        beside = compared_called(first["model"], metrics)
        figures += f" ({ratios} times those of {beside})"
    figures += f", KV cache {last['kv_cache_bytes_per_token']:,} bytes per token"
    if last is not first:
        figures += f" ({beside}: {first['kv_cache_bytes_per_token']:,})"
    return [f"{where}{figures}."]


def _card_facts(
    smaller: Any, name: str, plan: Plan, origin: Lineage | None, metrics: Mapping[str, Any], source: str
) -> CardFacts:
    config = smaller.config
    provenance = metrics.get("calibration")
    facts = ("source", "samples", "seq_len", "seed", "sha256")
    return CardFacts(
        name=name,
        base_model=metrics["base_model"],
        method=metrics["scoring"]["method"] if "scoring" in metrics else GIVEN_PLAN,
        ratio=metrics["ratio"],
        quantity=metrics["target"]["quantity"] if "target" in metrics else "parameters",
        parameters_before=metrics["parameters_before"],
        parameters_after=metrics["parameters_after"],
        base_widths=(origin.plan if origin else plan).widths,
        widths=(origin.plan if origin else plan).kept_widths,
        original=OriginalFacts(origin.model, origin.parameters, "/" in origin.model) if origin else None,
        num_key_value_groups=config.num_attention_heads // config.num_key_value_heads,
        model_type=metrics["whole"]["model_type"] if "whole" in metrics else config.model_type,
        around=metrics["whole"]["parameters_after"] - metrics["parameters_after"] if "whole" in metrics else None,
        active_before=origin.active_parameters if origin else metrics.get("active_parameters_before"),
        active_after=metrics.get("active_parameters_after"),
        ragged=is_ragged(config),
        command=metrics["command"],
        version=__version__,
        repaired=bool(metrics.get("repair")),
        # The packaged model is a conversion of a Hub model, and has no page of its own.
        on_hub="/" in metrics["base_model"] and not expanded(source).is_dir(),
        license=license_of(locate(source)),
        calibration=CalibrationFacts(**{key: provenance[key] for key in facts}) if provenance else None,
        measured=measured_facts(metrics, {}),
        details=settings_used(metrics),
    )
