"""What the page says about a folder that prunus wrote: plain text, rows and charts. What is not there is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunus.errors import CheckpointError
from prunus.files.json_file import check_content, read_json
from prunus.files.user_path import expanded
from prunus.machine.byte_sizes import show_bytes
from prunus.report.charts import (
    TITLES,
    Chart,
    Rows,
    accuracy_chart,
    comparison_chart,
    keep_chart,
    percent,
    recovery_chart,
    score_charts,
    seconds_chart,
)
from prunus.results.card import MeasuredFacts
from prunus.results.comparison import DENSE
from prunus.results.result_content import ComparisonContent, RecipeContent, RecoveryContent
from prunus.results.result_folder import Result, compared_called, measured_facts, read_result, speed_notes
from prunus.results.settings import in_words, settings_used
from prunus.results.what_went import how_chosen, what_went
from prunus.scoring.routing import ROUTING_COLUMNS, routing_rows
from prunus.selection.plan import Plan

__all__ = ["Contents", "Section", "Tile", "WritingSample", "contents_of"]

#: fields of a provenance, in the order of the page
PROVENANCE = ("source", "kind", "samples", "seq_len", "tokens", "documents", "seed", "sha256")
#: fields of metrics.json that have a place of their own
PLACED = frozenset(
    ("prunus", "base_model", "command", "ratio", "parameters_before", "parameters_after", "calibration", "plan")
)

#: of scores that were taken in rounds
EARLIER_ROUNDS = (
    "The model was scored again after each cut. Groups that went in an earlier one stand below all others, in the "
    "order that they had: their scores are moved down, and say no more than that order."
)


@dataclass(frozen=True)
class Tile:
    """A figure of the summary: what it is, the figure, and a line below it."""

    title: str
    figure: str
    note: str


@dataclass(frozen=True)
class WritingSample:
    """A prompt, and what each model makes of it, by the name of the model."""

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: its anchor.
        title: its heading.
        notes: paragraphs.
        tables: tables, each with its title.
        charts: charts.
        commands: what to type.
        samples: what the models wrote.
    """

    name: str
    title: str
    notes: Sequence[str] = ()
    tables: Sequence[tuple[str, Rows]] = ()
    charts: Sequence[Chart] = ()
    commands: Sequence[str] = ()
    samples: Sequence[WritingSample] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to say."""
        return not (self.notes or self.tables or self.charts or self.commands or self.samples)


@dataclass(frozen=True)
class Contents:
    """Everything the page says.

    Attributes:
        title: of the page.
        summary: one or two sentences.
        prunus: version that made the result.
        tiles: figures of the summary.
        sections: in their order; empty ones do not appear.
    """

    title: str
    summary: str
    prunus: str
    tiles: Sequence[Tile]
    sections: Sequence[Section] = field(default=())


def contents_of(folder: str | Path) -> Contents:
    """Read a folder of `prunus prune`, `apply` or `compare`.

    Raises:
        CheckpointError: prunus did not write it, or a file in it is damaged.
        PlanError: a plan or table in it is malformed.
    """
    folder = expanded(folder)
    if (folder / "comparison.json").is_file():
        return _of_comparison(folder)
    if not (folder / "prunus" / "metrics.json").is_file():
        raise CheckpointError(
            f"{folder} is no folder that prunus wrote: a report needs prunus/metrics.json (of `prunus prune` or "
            "`prunus apply`) or comparison.json (of `prunus compare`)"
        )
    return _of_result(read_result(folder))


def _of_result(result: Result) -> Contents:
    metrics, name, trained = result.metrics, result.folder.resolve().name, _trained(result)
    before, after = metrics["parameters_before"], metrics["parameters_after"]
    widths = result.plan.widths, result.plan.kept_widths
    figures = measured_facts(metrics, result.evaluation)
    samples = _samples(result)
    scores = score_charts(result.table, result.plan) if result.table is not None else []
    sections = (
        Section("kept", "Layers", charts=[keep_chart({name: result.plan})]),
        Section("scores", "Scores", [EARLIER_ROUNDS] if scores and metrics.get("rounds", 1) > 1 else (), charts=scores),
        _removed(result),
        _routing(metrics.get("routing")),
        _measured(figures, result),
        _recovery(trained),
        Section(
            "samples",
            "What the models write",
            ["Continued greedily: the most likely token, again and again, at most 40."] * bool(samples),
            samples=samples,
        ),
        _calibration(metrics.get("calibration"), metrics.get("perplexity_by_source", ())),
        _settings(metrics),
        _commands(result, trained),
    )
    return Contents(
        title=f"{name}: {metrics['base_model']} without {1 - after / before:.1%} of its parameters",
        summary=(
            f"prunus removed {what_went(*widths)} from {metrics['base_model']}, "
            f"{how_chosen(*widths, by_scores='scoring' in metrics)}. "
            f"{before:,} parameters became {after:,}{_active(metrics)}."
        ),
        prunus=str(metrics.get("prunus", "")),
        tiles=_tiles(result, figures),
        sections=[section for section in sections if not section.is_empty],
    )


def _tiles(result: Result, figures: Sequence[MeasuredFacts]) -> list[Tile]:
    before, after = (result.metrics[f"parameters_{when}"] for when in ("before", "after"))
    tiles = [Tile("parameters", f"{after:,}", f"{after / before - 1:.1%} of {before:,}".replace("-", "−"))]
    tiles += [
        Tile(
            f"perplexity, {figure.dataset}",
            figure.show(figure.after),
            f"{figure.of} model {figure.show(figure.before)}",
        )
        for figure in figures
        if figure.metric == "perplexity" and figure.before is not None
    ]
    compared = [figure for figure in figures if figure.metric_name in ("acc", "acc_norm") and figure.before is not None]
    last = {figure.dataset: figure for figure in compared}  # acc_norm where there is one, as it comes after acc
    if last:
        means = [
            sum(values) / len(last)
            for values in ([f.before or 0.0 for f in last.values()], [f.after for f in last.values()])
        ]
        title = f"accuracy, mean of {len(last)} tasks" if len(last) > 1 else f"accuracy, {next(iter(last))}"
        kinds = {figure.of for figure in last.values()}
        beside = f"{kinds.pop()} model" if len(kinds) == 1 else "models that it was cut from"
        tiles.append(Tile(title, f"{means[1]:.1%}", f"{beside} {means[0]:.1%}"))
    speed = result.evaluation.get("speed")
    if speed and len(speed["results"]) > 1:
        prefill, decode = (speed["results"][-1][f"{part}_ratio"]["median"] for part in ("prefill", "decode"))
        beside = compared_called(speed["results"][0]["model"], result.metrics)
        tiles.append(Tile("decode speed", f"× {decode:.2f}", f"of {beside}; prefill × {prefill:.2f}"))
    if size := sum(path.stat().st_size for path in result.folder.glob("*.safetensors")):
        tiles.append(Tile("weights on disk", f"{size / 2**20:,.1f} MiB", ""))
    return tiles


def _removed(result: Result) -> Section:
    plan, table = result.plan, result.table
    rows = []
    for axis in plan.axes:
        total = sum(widths[axis] for widths in plan.widths)
        left = sum(len(kept[axis]) for kept in plan.layers)
        row = [TITLES[axis], f"{total:,}", f"{left:,}", f"{total - left:,}", f"{1 - left / total:.1%}" if total else ""]
        if table is not None:
            of_axis = table[table["group_type"] == axis]
            keys = zip(of_axis["layer_idx"], of_axis["group_idx"], of_axis["cost"], strict=True)
            kept_sets = [set(kept[axis]) for kept in plan.layers]
            row.append(f"{sum(int(cost) for layer, group, cost in keys if group not in kept_sets[layer]):,}")
        rows.append(row)
    target = (result.metrics.get("target") or {}).get("quantity", "parameters")
    columns = ["", "before", "kept", "removed", "share removed", *([f"{target} removed"] if table is not None else [])]
    gone = [i for i in range(len(plan.layers)) if i not in plan.surviving_layers]
    bare = {
        axis: [i for i in plan.surviving_layers if plan.widths[i][axis] and not plan.layers[i][axis]]
        for axis in plan.axes
    }
    notes = []
    if gone:
        notes.append(f"Nothing is left of {_layers(gone)}.")
    if bare["attention"]:
        notes.append(f"No attention is left in {_layers(bare['attention'])}.")
    if bare.get("mlp"):
        notes.append(f"No MLP is left in {_layers(bare['mlp'])}.")
    return Section("removed", "What was removed", notes, [("Groups over all layers", Rows(columns, rows))])


def _active(metrics: Mapping[str, Any]) -> str:
    active = metrics.get("active_parameters_after")
    return "" if active is None else f", of which {active:,} work on each token"


def _routing(routing: Mapping[str, Any] | None) -> Section:
    """What became of the tokens of removed experts."""
    if not routing or not routing["layers"]:
        return Section("routing", "Routing")
    idle, experts = routing["experts_without_tokens"], routing["experts"]
    notes = [
        "Moved: the share of a layer's calibration tokens, counted once for every expert that they went to, whose "
        "expert was removed; the router sends them to others. Tokens per expert: least, median, most; after the cut on "
        "the text of the repair, where there was one.",
        f"{idle:,} of {experts:,} experts got no token of the calibration text.",
    ]
    rows = Rows([*ROUTING_COLUMNS], [[*row] for row in routing_rows(routing)])
    return Section("routing", "Routing", notes, [("Tokens and experts", rows)])


def _layers(indices: Sequence[int]) -> str:
    return f"layer{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"


def _measured(figures: Sequence[MeasuredFacts], result: Result) -> Section:
    rows = [[f.dataset, f.metric_name, f.shown_before, f.show(f.after), f.protocol] for f in figures]
    tables = [("Quality", Rows(["data", "metric", "base model", "pruned", "protocol"], rows))] if rows else []
    accuracies = [
        (f"{f.dataset} {f.metric_name}" + f" (base: {f.of})" * (f.of != "base"), f.before, f.after)
        for f in figures
        if f.metric_name in ("acc", "acc_norm")
    ]
    charts = [accuracy_chart(accuracies)] if accuracies else []
    if speed := result.evaluation.get("speed"):
        tables.append(("Speed and memory on transformers", _speed(speed)))
    return Section("measured", "Measured", speed_notes(speed, result.metrics), tables, charts)


def _trained(result: Result) -> RecoveryContent:
    path = result.folder / "prunus" / "recovery.json"
    return check_content(RecoveryContent, read_json(path) if path.is_file() else {}, str(path))


def _recovery(content: RecoveryContent) -> Section:
    """What training won back, of a model that was trained after the cut or between its rounds."""
    points = content.curve
    if not points:
        return Section("recovery", "Recovery")
    # Not the last point of a round: its result is the best checkpoint.
    results = [each.held_out_loss for each in content.trainings]
    losses = (
        f"round {number}: {loss.before:.4f} before, {loss.after:.4f} after"
        for number, loss in enumerate(results, start=1)
        if loss is not None
    )
    end = points[-1]
    note = f"{end.tokens:,} tokens in {end.seconds:,.0f} s of training. Held-out loss: {'; '.join(losses)}"
    return Section("recovery", "Recovery", [f"{note}."], charts=[recovery_chart([p.model_dump() for p in points])])


def _speed(speed: Mapping[str, Any]) -> Rows:
    def spread(values: Mapping[str, float]) -> str:
        return f"{values['median']:,.1f} ({values['low']:,.1f}–{values['high']:,.1f})"

    def mebibytes(count: int | None) -> str:
        return "not known" if count is None else f"{count / 2**20:,.1f}"

    results = speed["results"]
    rows = [
        ["prefill, tokens/s", *(spread(result["prefill_tokens_per_second"]) for result in results)],
        ["decode, tokens/s", *(spread(result["decode_tokens_per_second"]) for result in results)],
        ["first token, s", *(f"{result['first_token_seconds']['median']:.3f}" for result in results)],
        ["peak memory, MiB", *(mebibytes((result["memory"] or {}).get("peak_bytes")) for result in results)],
        ["KV cache, bytes per token", *(f"{result['kv_cache_bytes_per_token']:,}" for result in results)],
    ]
    return Rows(["median (lowest–highest)", *(result["model"] for result in results)], rows)


def _samples(result: Result) -> list[WritingSample]:
    shown = {
        sample["prompt"]: WritingSample(sample["prompt"], {"base model": sample["dense"], "pruned": sample["pruned"]})
        for sample in result.samples
    }
    # Of other models only what was written beside the latest text of the pruned one.
    evaluation = result.evaluation
    compared = [figures for figures in (evaluation.get("dense"), *(evaluation.get("others") or {}).values()) if figures]
    beside: dict[str, dict[str, str]] = {}
    for figures in compared:
        for sample in figures.get("samples", ()):
            called = compared_called(sample.get("of", figures["model"]), result.metrics).removeprefix("the ")
            beside.setdefault(sample["prompt"], {})[called] = sample["text"]
    for sample in evaluation.get("samples", ()):
        prompt = sample["prompt"]
        if prompt in beside or prompt not in shown:
            shown[prompt] = WritingSample(prompt, {**beside.get(prompt, {}), "pruned": sample["text"]})
    return list(shown.values())


def _calibration(provenance: Mapping[str, Any] | None, measured: Sequence[Mapping[str, Any]] = ()) -> Section:
    """Where the calibration text came from.

    Args:
        provenance: of the text; None where there is none.
        measured: perplexities on held-out sequences of each source, as metrics.json has them.
    """
    if not provenance:
        return Section("calibration", "Calibration")
    names = [*PROVENANCE, *sorted(set(provenance) - {*PROVENANCE, "sources"})]
    rows = [[name, in_words(provenance[name])] for name in names if provenance.get(name) not in (None, "", [], {})]
    tables = [("The text that importance was measured on", Rows(["", ""], rows))]
    if sources := provenance.get("sources"):
        columns = ["source", "kind", "samples", "tokens", "sha256"]
        rows = [[in_words(source.get(name)) for name in columns] for source in sources]
        tables.append(("Its sources", Rows(columns, rows)))
    if measured:
        rows = [[one["source"], f"{one['before']:,.2f}", f"{one['after']:,.2f}"] for one in measured]
        tables.append(("Perplexity on held-out sequences", Rows(["source", "base model", "pruned"], rows)))
    return Section("calibration", "Calibration", tables=tables)


def _settings(metrics: Mapping[str, Any]) -> Section:
    used = {name: value for name, value in metrics.items() if name not in (*PLACED, "scoring", "stages")}
    if scoring := metrics.get("scoring"):
        used |= {"method": scoring["method"], **settings_used(metrics)}
    rows = [
        [name, show_bytes(value) if name == "peak_bytes" else in_words(value)]
        for name, value in used.items()
        if not name.startswith("perplexity_") and (isinstance(value, str) or in_words(value) != "none")
    ]
    tables = [("How it was made", Rows(["", ""], rows))] if rows else []
    if stages := metrics.get("stages"):
        took = [
            [each["stage"], in_words(each["seconds"]), show_bytes(each["peak_bytes"]) if each["peak_bytes"] else ""]
            for each in stages
        ]
        tables.append(("What each stage took", Rows(["stage", "seconds", "most memory"], took)))
    return Section("settings", "Settings", tables=tables)


def _commands(result: Result, trained: RecoveryContent) -> Section:
    made = result.metrics.get("command"), *trained.commands
    commands = [command for command in (*made, *result.evaluation.get("commands", ())) if command]
    again = "Needs the same versions, calibration text and seed." if commands else ""
    plan = "The cut alone, without measuring anything, is made again from the base model by its plan."
    return Section(
        "commands",
        "Make it again",
        [note for note in (again, plan) if note],
        commands=[*commands, "prunus apply BASE_MODEL prunus/plan.json --out AGAIN"],
    )


def _recipe_line(recipe: RecipeContent) -> str:
    """A recipe in a line."""
    rounds = f"{recipe.rounds} round{'s' * (recipe.rounds > 1)}"
    repaired = "repaired" if recipe.repair else "not repaired"
    return ", ".join([recipe.scoring.method, rounds, recipe.selection.shape, repaired])


def _of_comparison(folder: Path) -> Contents:
    path = folder / "comparison.json"
    content = check_content(ComparisonContent, read_json(path), str(path))
    shown, results, dense = content.model_extra or {}, content.results, content.dense
    files = [folder / "plans" / row.plan_file for row in results]
    plans = {file.stem: Plan.load(file) for file in files if file.is_file()}
    seconds = seconds_chart(content)
    settings = {name: _recipe_line(recipe) for name, recipe in (content.recipes or {}).items()}
    measured = content.evaluation
    sections = (
        Section(
            "comparison",
            "Quality",
            [f"Perplexity on {measured.text}: {measured.protocol}."] if measured else (),
            charts=[comparison_chart(content)] if results else (),
        ),
        Section("kept", "Layers", charts=[keep_chart(plans)] if plans else ()),
        Section("cost", "Cost", charts=[seconds] if seconds else ()),
        _calibration(content.calibration),
        _settings(settings),
        Section("commands", "Make it again", commands=[content.command] if content.command else ()),
    )
    start = "infinite" if dense.perplexity is None else f"{dense.perplexity:,.2f}"
    tiles = [Tile(DENSE, start, f"perplexity, {dense.parameters:,} parameters")]
    for ratio in sorted({row.ratio for row in results}):
        at_ratio = [row for row in results if row.ratio == ratio]
        finite = [(row.perplexity, content.title(row)) for row in at_ratio if row.perplexity is not None]
        if finite:
            best, name = min(finite, key=lambda found: found[0])
            tiles.append(Tile(f"best at {percent(ratio)}", f"{best:,.2f}", name))
    model = content.model or folder.resolve().name
    return Contents(
        title=f"Comparison on {model}",
        summary=f"{len(results)} results on {model}: recipes, each at the same shares.",
        prunus=str(shown.get("prunus", "")),
        tiles=tiles,
        sections=[section for section in sections if not section.is_empty],
    )
