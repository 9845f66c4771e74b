"""The command line: one function per command, each a few calls of the package."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter, Token
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prunus.adaptive import AdaptiveOptions
from prunus.checkpoint import check_output
from prunus.comparison import compare as compare_methods
from prunus.compensation import CompensationOptions
from prunus.constraints import ALIGNMENTS, Constraints, Shape
from prunus.errors import OptionError
from prunus.evaluation.evaluate import EvalOptions, Evaluation
from prunus.evaluation.evaluate import evaluate as evaluate_model
from prunus.evaluation.profiling import profile as profile_model
from prunus.evaluation.speed import SpeedOptions, SpeedReport, SpeedResult, Spread
from prunus.evaluation.speed import bench as bench_models
from prunus.export import GgufType, export_dense, export_gguf
from prunus.families import AXES, Axis
from prunus.importance.hybrid import DEFAULT_MIX, Weights
from prunus.inputs import CalibrationOptions, EvaluationOptions, ModelOptions, draw_calibration, load_or_open
from prunus.inspection import inspect as inspect_model
from prunus.latency import PHASES, LatencyProfile
from prunus.packaged_model import resolve_model
from prunus.pipeline import apply_checkpoint, prune_checkpoint
from prunus.plan import Plan
from prunus.priors import PriorOptions
from prunus.recovery import RecoveryOptions, TextOptions, recover_checkpoint
from prunus.report import write_report
from prunus.report.page import FILE_NAME
from prunus.result_folder import add_evaluation, read_result
from prunus.scoring import Score, ScoringOptions
from prunus.scoring import score as score_model
from prunus.selection import select
from prunus.sweep.estimate import Workload
from prunus.sweep.processes import is_first, joined, launched
from prunus.table import Normalization
from prunus.targets import TargetOptions
from prunus.terminal import quoted_command, run_command
from prunus.version import __version__
from prunus.work_folder import WorkFolder

__all__ = ["app", "main"]

HELP = """Make Hugging Face language models smaller by global structured pruning.

Every attention group (a key/value head with its query heads) and every MLP channel of the whole model goes into one
ranking by importance per parameter; the cheapest are cut until a share of all parameters is gone.

MODEL is a folder, a Hub id, or `smollm2-135m` for the packaged SmolLM2-135M-Instruct.
"""

# main() answers Ctrl-C itself.
app = App(name="prunus", help=HELP, version=__version__, help_format="markdown", suppress_keyboard_interrupt=False)
out_console = Console()

#: the default recipe of `prunus prune`, beside its method: chosen on held-out calibration text, see benchmarks/LOG.md
DEFAULT_ROUNDS = 3
DEFAULT_ATTENTION_WEIGHT = 1.5


def _split_commas(type_: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    return tuple(part.strip() for token in tokens for part in token.value.split(",") if part.strip())


def _split_numbers(type_: Any, tokens: Sequence[Token]) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _split_commas(type_, tokens))
    except ValueError as error:
        raise OptionError(f"{error}; write numbers such as 0.1,0.2,0.4") from error


def _split_weights(type_: Any, tokens: Sequence[Token]) -> tuple[tuple[str, float], ...]:
    try:
        pairs = [part.split("=") for part in _split_commas(type_, tokens)]
        return tuple((name.strip(), float(weight)) for name, weight in pairs)
    except ValueError as error:
        raise OptionError(f"hybrid: {error}; write methods and weights such as taylor=0.5,wanda=0.5") from error


def _alignment(type_: Any, tokens: Sequence[Token]) -> int:
    text = tokens[0].value
    try:
        return ALIGNMENTS[text] if text in ALIGNMENTS else int(text)
    except ValueError:
        raise OptionError(f"align {text!r} is neither a number nor one of {', '.join(ALIGNMENTS)}") from None


def _profile(type_: Any, tokens: Sequence[Token]) -> LatencyProfile:
    return LatencyProfile.load(tokens[0].value)


def _join_weights(weights: Weights) -> str:
    return ",".join(f"{name}={weight:g}" for name, weight in weights)


@dataclass(frozen=True)
class _AdaptiveFlags(AdaptiveOptions):
    __doc__ = AdaptiveOptions.__doc__
    candidates: Annotated[tuple[str, ...], Parameter(converter=_split_commas, negative="")] = AdaptiveOptions.candidates


@dataclass(frozen=True)
class _ScoringFlags(ScoringOptions):
    __doc__ = ScoringOptions.__doc__
    hybrid: Annotated[
        Weights, Parameter(converter=_split_weights, n_tokens=1, negative="", show_default=_join_weights)
    ] = DEFAULT_MIX
    adaptive: Annotated[_AdaptiveFlags, Parameter(name="*")] = field(default_factory=_AdaptiveFlags)
    priors: Annotated[PriorOptions, Parameter(name="*")] = field(default_factory=PriorOptions)
    # One --seed for a run, that of the calibration options.
    random_seed: Annotated[int, Parameter(parse=False)] = 0


@dataclass(frozen=True)
class _RecipeFlags(_ScoringFlags):
    __doc__ = ScoringOptions.__doc__
    method: str = "gate_fisher"
    # An option of the command, whose default depends on others.
    attention_weight: Annotated[float, Parameter(parse=False)] = 1.0


@dataclass(frozen=True)
class _SelectionFlags(Constraints):
    __doc__ = Constraints.__doc__
    axes: Annotated[tuple[Axis, ...], Parameter(converter=_split_commas, negative="")] = AXES
    align: Annotated[int, Parameter(converter=_alignment)] = 1
    shape: Shape = "ragged"


@dataclass(frozen=True)
class _TargetFlags(TargetOptions):
    __doc__ = TargetOptions.__doc__
    profile: Annotated[
        LatencyProfile | None, Parameter(converter=_profile, n_tokens=1, negative="", accepts_keys=False)
    ] = None


@dataclass(frozen=True)
class _ProfileFlags(SpeedOptions):
    __doc__ = SpeedOptions.__doc__
    memory: Annotated[bool, Parameter(parse=False)] = False


@dataclass(frozen=True)
class _EvalFlags(EvalOptions):
    __doc__ = EvalOptions.__doc__
    text: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative="")] = ()
    tasks: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative="")] = ()
    harness: Annotated[tuple[str, ...], Parameter(converter=_split_commas, negative="")] = ()
    harness_path: Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative="")] = ()
    samples: Annotated[bool, Parameter(negative="")] = False
    prompt: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ()
    speed: Annotated[bool, Parameter(negative="")] = False


ModelName = Annotated[str, Parameter(name="MODEL")]
ModelFlags = Annotated[ModelOptions, Parameter(name="*", group=Group("Model", sort_key=1))]
CalibrationFlags = Annotated[CalibrationOptions, Parameter(name="*", group=Group("Calibration", sort_key=2))]
_SCORING = Group("Scoring", sort_key=3)
RecipeFlags = Annotated[_RecipeFlags, Parameter(name="*", group=_SCORING)]
ScoringFlags = Annotated[_ScoringFlags, Parameter(name="*", group=_SCORING)]
_SELECTION = Group("Selection", sort_key=4)
SelectionFlags = Annotated[_SelectionFlags, Parameter(name="*", group=_SELECTION)]
TargetFlags = Annotated[_TargetFlags, Parameter(name="*", group=_SELECTION)]
_COMPENSATION = Group("Compensation", sort_key=5)
CompensationFlags = Annotated[CompensationOptions, Parameter(name="*", group=_COMPENSATION)]
EvaluationFlags = Annotated[EvaluationOptions, Parameter(name="*", group=Group("Evaluation", sort_key=6))]
_GGUF = Group("GGUF", sort_key=7)
_RUNS = Group("Runs", sort_key=8)
SpeedFlags = Annotated[SpeedOptions, Parameter(name="*", group=_RUNS)]
ProfileFlags = Annotated[_ProfileFlags, Parameter(name="*", group=_RUNS)]
EvalFlags = Annotated[_EvalFlags, Parameter(name="*", group=Group("Evaluation", sort_key=6))]
TextFlags = Annotated[TextOptions, Parameter(name="*", group=Group("Text", sort_key=9))]
RecoveryFlags = Annotated[RecoveryOptions, Parameter(name="*", group=Group("Training", sort_key=10))]
Flag = Annotated[bool, Parameter(negative="")]
Rounds = Annotated[int, Parameter(group=_SELECTION)]


@app.command
def prune(
    model: ModelName,
    /,
    *,
    out: Path,
    ratio: float = 0.25,
    calibration: CalibrationFlags = CalibrationOptions(),
    scoring: RecipeFlags = _RecipeFlags(),
    attention_weight: Annotated[float | None, Parameter(group=_SCORING)] = None,
    selection: SelectionFlags = _SelectionFlags(),
    target: TargetFlags = _TargetFlags(),
    compensate: Annotated[bool, Parameter(group=_COMPENSATION)] = True,
    compensation: CompensationFlags = CompensationOptions(),
    rounds: Annotated[int | None, Parameter(group=_SELECTION)] = None,
    evaluation: EvaluationFlags = EvaluationOptions(),
    where: ModelFlags = ModelOptions(),
    work: Path | None = None,
    report: bool = True,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Prune a model and save the smaller one: score, plan, apply, repair and measure in one go.

    The defaults are a recipe that was measured, see benchmarks/RESULTS.md. `--method taylor --no-compensate --rounds 1`
    is plain first-order Taylor pruning.

    Args:
        model: folder, Hub id or `smollm2-135m`.
        out: folder for the result; it appears when it is complete.
        ratio: share of all parameters to remove, or of what --target says, in [0, 1).
        attention_weight: factor on the scores of attention groups; by default 1.5, as repair makes up for lost channels
            better than for lost attention, and 1 with
            `--no-compensate` or `--normalize zscore`.
        compensate: repair the remaining weights by least squares on the calibration sequences.
        rounds: cut in so many equal parts, scoring what is left (and repaired) before each next one; by default 3, but
            1 for `--shape uniform`, which knows no more.
        work: folder from which a killed run goes on when the same command is given again; by default OUT.work, with the
            streamed engine only. Removed at the end.
        report: write report.html, with what both models make of a few prompts.
        overwrite: replace an earlier result in the folder.
        json: print the metrics as JSON.
    """
    metrics = prune_checkpoint(
        model,
        out,
        ratio,
        calibration=calibration,
        scoring=replace(
            _seeded(scoring, calibration),
            attention_weight=_attention_weight(scoring, compensate) if attention_weight is None else attention_weight,
        ),
        constraints=selection,
        target=target,
        compensation=compensation if compensate else None,
        rounds=rounds or (1 if selection.shape == "uniform" else DEFAULT_ROUNDS),
        evaluation=evaluation,
        model_options=where,
        overwrite=overwrite,
        work=work,
        command=_typed_command(),
        report=report,
    )
    if json:
        _print_json(metrics)
        return
    _print_rows(
        f"{metrics['base_model']} → {out}",
        ("", "before", "after"),
        [
            ("parameters", f"{metrics['parameters_before']:,}", f"{metrics['parameters_after']:,}"),
            *_target_row(metrics["target"]),
            *_perplexity_row(metrics),
        ],
    )


@app.command
def score(
    model: ModelName,
    /,
    *,
    out: Path,
    calibration: CalibrationFlags = CalibrationOptions(),
    scoring: ScoringFlags = _ScoringFlags(),
    where: ModelFlags = ModelOptions(),
    work: Path | None = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Score every group of a model: writes groups.csv and what it was made from.

    Args:
        model: folder, Hub id or `smollm2-135m`.
        out: folder for groups.csv, score.json and statistics.safetensors.
        work: folder from which a killed run goes on when the same command is given again; by default OUT.work, with the
            streamed engine only. Removed at the end.
        overwrite: replace an earlier result in the folder.
        json: print what was done as JSON.
    """
    check_output(out, overwrite, model)
    folder = WorkFolder(out, work)
    needed = scoring.needs_calibration
    sequences = calibration.samples if needed else 0
    workload = Workload(scoring.needs, sequences, calibration.seq_len, scoring.batch_size)
    with joined():
        live, tokenizer, engine = load_or_open(resolve_model(model), where, scoring.engine, workload)
        drawn, _ = draw_calibration(live, tokenizer, calibration, held_out=0, needed=needed)
        options = replace(_seeded(scoring, calibration), engine=engine)
        result = score_model(live, drawn, options, work=folder.used_by(engine))
        first = is_first()
    if not first:
        return
    result.save(out)
    folder.remove()
    if json:
        _print_json({"groups": len(result.table), **result.about})
        return
    shown = [*result.table.head(5).itertuples(index=False), None, *result.table.tail(5).itertuples(index=False)]
    rows = [("…",) * 6 if row is None else tuple(_short(value) for value in row) for row in shown]
    _print_rows(f"{len(result.table):,} groups, cheapest first → {out}", tuple(result.table.columns), rows)


@app.command
def plan(
    table: Path,
    /,
    *,
    ratio: float,
    out: Path = Path("plan.json"),
    normalize: Normalization | None = None,
    selection: SelectionFlags = _SelectionFlags(),
    target: TargetFlags | None = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Choose what to cut from a table of scores; needs no model.

    Args:
        table: groups.csv, or the folder that `prunus score` wrote.
        ratio: share of all parameters to remove, or of what --target says, in [0, 1). Without --target it is what the
            table was made for.
        out: the plan file to write.
        normalize: make importances of different layers comparable in another way than when they were scored.
        overwrite: replace an existing file.
        json: print a summary as JSON.
    """
    if out.exists() and not overwrite:
        raise OptionError(f"{out} exists; choose another --out or add --overwrite")
    if out.is_dir():
        raise OptionError(f"{out} is a folder; --out is the plan file to write, e.g. {out / 'plan.json'}")
    result = Score.load(table)
    costs = (target or result.target).costs(result.geometry)
    if normalize is not None:
        result = result.ranked(normalize)
    chosen = select(result.table, result.geometry, ratio, selection, costs)
    out.parent.mkdir(parents=True, exist_ok=True)
    chosen.save(out)
    left = result.geometry.parameters_left(chosen.kept_widths)
    facts = {
        "parameters_before": result.geometry.total_parameters,
        "parameters_after": left,
        "removed": 1 - left / result.geometry.total_parameters,
        "quantity": costs.quantity,
        "quantity_before": costs.total,
        "quantity_after": costs.left(chosen.kept_widths),
        "layers_left": len(chosen.surviving_layers),
        "fingerprint": chosen.fingerprint,
    }
    if json:
        _print_json(facts)
        return
    rows = [
        (str(layer_idx), *(f"{len(kept[axis])} of {before[axis]}" for axis in AXES))
        for layer_idx, (before, kept) in enumerate(zip(chosen.widths, chosen.layers, strict=True))
    ]
    removed = 1 - facts["quantity_after"] / (facts["quantity_before"] or 1)
    _print_rows(f"{removed:.2%} of all {costs.quantity} go → {out}", ("layer", *AXES), rows)


@app.command
def apply(
    model: ModelName,
    plan: Path,
    /,
    *,
    out: Path,
    where: ModelFlags = ModelOptions(),
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Cut a model by a plan and save the result; nothing is measured.

    Args:
        model: folder, Hub id or `smollm2-135m`.
        plan: plan.json, from `prunus plan` or from the folder prunus/ of a pruned model.
        out: folder for the result; it appears when it is complete.
        overwrite: replace an earlier result in the folder.
        json: print the metrics as JSON.
    """
    metrics = apply_checkpoint(
        model, Plan.load(plan), out, model_options=where, overwrite=overwrite, command=_typed_command()
    )
    if json:
        _print_json(metrics)
    else:
        before, after = metrics["parameters_before"], metrics["parameters_after"]
        _print_rows(
            f"{metrics['base_model']} → {out}", ("", "before", "after"), [("parameters", f"{before:,}", f"{after:,}")]
        )


@app.command
def recover(
    model: ModelName,
    /,
    *,
    out: Path,
    text: TextFlags,
    options: RecoveryFlags = RecoveryOptions(),
    teacher: str | None = None,
    device: str = "auto",
    resume: Flag = False,
    work: Path | None = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Train a pruned model a little, so that it wins back part of what it lost; needs `pip install 'prunus[recover]'`.

    By default it learns the dense model's next-token distribution (distillation), with adapters that are merged at the
    end. The result is a folder of the same kind, with the weights that had the lowest loss on held-out text. It runs on
    one device, or on many under `torchrun` or `accelerate launch` with `-m prunus recover …`.

    Args:
        model: folder of a pruned model.
        out: folder for the result; it appears when it is complete.
        teacher: the dense model, folder or Hub id; by default the one that MODEL was cut from, if it is here.
        device: auto, cpu, cuda or mps.
        resume: go on from the last checkpoint of a run that was killed or interrupted; give the same options.
        work: folder for checkpoints; by default OUT.work. Removed at the end.
        overwrite: replace an earlier result in the folder, and earlier checkpoints.
        json: print what was done and measured as JSON.
    """
    facts = recover_checkpoint(
        model,
        out,
        text,
        options,
        teacher=teacher,
        device=device,
        resume=resume,
        work=work,
        overwrite=overwrite,
        command=_typed_command(),
    )
    if not facts:
        return  # another process prints
    if json:
        _print_json(facts)
        return
    rows = [(name, f"{exp(loss):.2f}") for name, loss in facts["held_out_loss"].items() if loss is not None]
    rows += [(name, _short(facts[name])) for name in ("best_step", "steps", "tokens", "seconds")]
    if facts["gap_closed"] is not None:
        rows.append(("gap in log perplexity closed", f"{facts['gap_closed']:.1%}"))
    _print_rows(f"{facts['model']} → {out}; perplexity on held-out sequences", ("", ""), rows)


@app.command
def export(
    model: ModelName,
    /,
    *,
    to: Literal["gguf", "dense"],
    out: Path,
    type: Annotated[GgufType, Parameter(group=_GGUF)] = "f16",
    mlp_multiple: Annotated[int, Parameter(group=_GGUF)] = 1,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Write a pruned model in a form that other programs load.

    `gguf` is one file for llama.cpp, Ollama, LM Studio and others; needs `pip install 'prunus[gguf]'`. `dense` is a
    model folder of a stock class, its layers filled up with zeros to the width of the widest, for loaders that need
    equal layers.

    Args:
        model: folder, Hub id or `smollm2-135m`, pruned or not.
        to: the form.
        out: the file (gguf) or folder (dense) to write; it appears when it is complete.
        type: of the matrices: f32, f16, bf16 or q8_0; norms and biases are f32 in each.
        mlp_multiple: fill MLP widths up to multiples of this with zeros, 256 for llama.cpp's K-quants.
        overwrite: replace an earlier result.
        json: print what was written as JSON.
    """
    if to == "gguf":
        facts = export_gguf(model, out, type=type, mlp_multiple=mlp_multiple, overwrite=overwrite)
    else:
        facts = export_dense(model, out, overwrite=overwrite)
    if json:
        _print_json(facts)
        return
    rows = [(name, _short(value)) for name, value in facts.items() if not isinstance(value, list)]
    _print_rows(f"{model} → {out}", ("", ""), rows)


@app.command(name="eval")
def evaluate(
    model: ModelName,
    /,
    *,
    compare: str | None = None,
    evaluation: EvalFlags = _EvalFlags(),
    where: ModelFlags = ModelOptions(),
    update_card: Flag = False,
    json: Flag = False,
) -> None:
    """Measure a model, pruned or not: perplexity, zero-shot accuracy, speed and memory, and what it writes.

    Args:
        model: folder, Hub id or `smollm2-135m`.
        compare: another model, such as the dense one, to measure by the same rules beside it.
        update_card: keep the figures in the pruned folder, its model card and its report.
        json: print the result as JSON.
    """
    if update_card:
        read_result(model)  # refuses a folder that is not ours before long work
    result = evaluate_model(model, evaluation, dense=compare, model_options=where)
    facts = result.to_dict()
    if update_card:
        add_evaluation(model, facts, _typed_command())
        if (Path(model) / FILE_NAME).is_file():
            write_report(model)
    if json:
        # Fields of the first text stand at the top as well, for programs that read one figure.
        _print_json({**(facts["perplexities"][0] if facts["perplexities"] else {}), **facts})
        return
    figures = [result.dense, result.model] if result.dense else [result.model]
    _print_rows(str(facts["model"]), ("", *(one.model for one in figures)), _evaluation_rows(result))
    if result.speed:
        names = [one.model for one in result.speed.results]
        _print_rows("speed and memory", ("", *names), _speed_rows(result.speed))


@app.command
def report(folder: Path, /, *, out: Path | None = None, json: Flag = False) -> None:
    """Write one self-contained HTML page about a result of `prune`, `apply` or `compare`.

    Args:
        folder: what prunus wrote.
        out: the file to write; by default report.html in the folder.
        json: print where it is as JSON.
    """
    path = write_report(folder, out)
    if json:
        _print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        print(path)


@app.command
def bench(*models: ModelName, speed: SpeedFlags = SpeedOptions(), json: Flag = False) -> None:
    """Measure how fast models are, and what memory they need, on transformers, against the first one.

    All are loaded, and run in turn, A, B, B, A, A, B, …, so that a slow moment of the machine falls on all alike.
    Ratios to the first model are taken within each round. Peak memory is measured afterwards, in a fresh process for
    each model.

    Args:
        models: folders, Hub ids or `smollm2-135m`, the dense model first. One that is named twice shows the noise.
        json: print the result as JSON.
    """
    report = bench_models(models, speed)
    if json:
        _print_json(report.to_dict())
        return
    title = (
        f"{speed.prompt_tokens} + {speed.new_tokens} tokens, batch {speed.batch_size}, median of {speed.repeats} "
        f"(lowest–highest), {report.device}, {report.threads} CPU threads"
    )
    _print_rows(title, ("", *(result.model for result in report.results)), _speed_rows(report))


@app.command
def profile(
    model: ModelName,
    /,
    *,
    out: Path = Path("profile.json"),
    speed: ProfileFlags = _ProfileFlags(),
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Measure on this machine how long a model's blocks take by their width, for `--target latency`.

    Blocks of all widths stand in one model with random weights, and run as in `prunus bench`; give it the prompt
    length, batch size, device and dtype that will be used.

    Args:
        model: folder, Hub id or `smollm2-135m`; its weights are not read.
        out: the profile file to write.
        overwrite: replace an existing file.
        json: print the profile as JSON.
    """
    if out.exists() and not overwrite:
        raise OptionError(f"{out} exists; choose another --out or add --overwrite")
    if out.is_dir():
        raise OptionError(f"{out} is a folder; --out is the profile file to write, e.g. {out / 'profile.json'}")
    measured = profile_model(model, speed)
    out.parent.mkdir(parents=True, exist_ok=True)
    measured.save(out)
    if json:
        _print_json(measured.to_dict())
        return
    rows = [("all else", "", *(f"{1e6 * measured.times(phase).fixed:,.1f}" for phase in PHASES))]
    for axis in AXES:
        for points in zip(*(measured.times(phase).points(axis) for phase in PHASES), strict=True):
            rows.append((axis, f"{points[0][0]:,}", *(f"{1e6 * seconds:,.1f}" for _, seconds in points)))
    title = (
        f"microseconds: {speed.prompt_tokens} prompt tokens, and each of {speed.new_tokens} after them, batch "
        f"{speed.batch_size}, {measured.dtype}, {measured.device}, {measured.threads} CPU threads → {out}"
    )
    _print_rows(title, ("", "groups", *PHASES), rows)


@app.command
def inspect(model: ModelName, /, *, ratio: float | None = None, json: Flag = False) -> None:
    """Show what a model consists of, what a ratio would remove, and what was removed from a pruned one.

    Args:
        model: folder, Hub id or `smollm2-135m`; its weights are not read.
        ratio: also say what removing this share of all parameters means.
        json: print the facts as JSON.
    """
    facts = inspect_model(model, ratio)
    if json:
        _print_json(facts)
        return
    layers, removed = facts.pop("layers"), facts.pop("removed", None)
    _print_rows(str(facts.pop("model")), ("", ""), [(name, _short(value)) for name, value in facts.items()])
    if removed is None:
        rows = [(str(i), *(f"{count:,}" for count in layer.values())) for i, layer in enumerate(layers)]
        _print_rows("groups per layer", ("layer", *AXES), rows)
    else:
        rows = [(str(row["layer_idx"]), *(f"{row[axis]:,} of {row['of'][axis]:,}" for axis in AXES)) for row in removed]
        _print_rows("groups removed, by layer of the base model", ("layer", *AXES), rows)


@app.command
def compare(
    model: ModelName,
    /,
    *,
    methods: Annotated[tuple[str, ...], Parameter(converter=_split_commas, negative="")],
    ratios: Annotated[tuple[float, ...], Parameter(converter=_split_numbers, negative="")],
    out: Path,
    calibration: CalibrationFlags = CalibrationOptions(),
    scoring: ScoringFlags = _ScoringFlags(),
    selection: SelectionFlags = _SelectionFlags(),
    target: TargetFlags = _TargetFlags(),
    compensate: Annotated[bool, Parameter(group=_COMPENSATION)] = False,
    compensation: CompensationFlags = CompensationOptions(),
    rounds: Rounds = 1,
    evaluation: EvaluationFlags = EvaluationOptions(),
    where: ModelFlags = ModelOptions(),
    report: bool = True,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Prune by several methods at several ratios and measure each: a table and a plot.

    Args:
        model: folder, Hub id or `smollm2-135m`.
        methods: importance methods, e.g. `taylor,wanda`; methods of one kind share their statistics pass.
        ratios: shares of all parameters to remove, or of what --target says, e.g. `0.1,0.2,0.4`.
        out: folder for comparison.csv, comparison.json, comparison.png and the plans.
        compensate: measure each result also with the remaining weights repaired by least squares.
        rounds: cut in so many equal parts, scoring what is left (and repaired) before each next one.
        report: write report.html.
        overwrite: replace an earlier comparison in the folder.
        json: print the rows as JSON.
    """
    comparison = compare_methods(
        model,
        methods,
        ratios,
        out,
        calibration=calibration,
        scoring=_seeded(scoring, calibration),
        constraints=selection,
        target=target,
        compensation=compensation if compensate else None,
        rounds=rounds,
        evaluation=evaluation,
        model_options=where,
        overwrite=overwrite,
        command=_typed_command(),
        report=report,
    )
    if json:
        _print_json(jsonlib.loads(comparison.to_json(orient="records")))
        return
    comparison["peak_bytes"] = (comparison["peak_bytes"] / 2**20).round()
    rows = [tuple(_short(value) for value in row) for row in comparison.itertuples(index=False)]
    _print_rows(f"{model} → {out}", tuple(comparison.columns.str.replace("peak_bytes", "peak MiB")), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 success, 1 an error that the message explains, 2 wrong usage, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    def work() -> object:
        if launched() > 1 and words[:1] not in (["score"], ["recover"]):
            raise OptionError(
                f"torchrun started {launched()} processes, and only `prunus score` shares its work out (and `prunus "
                "recover`): give its table to `prunus plan` and `prunus apply`, in one process"
            )
        return app(words, exit_on_error=False, print_error=True, result_action="return_value")

    try:
        return run_command(work)
    except CycloptsError:
        return 2


def _seeded(scoring: ScoringOptions, calibration: CalibrationOptions) -> ScoringOptions:
    # Weights for a mixture ask for one.
    method = "hybrid" if scoring.hybrid != DEFAULT_MIX else scoring.method
    if method != scoring.method and scoring.method != type(scoring).method:
        raise OptionError(f"--hybrid goes with --method hybrid, not with --method {scoring.method}")
    return ScoringOptions(**{**scoring.__dict__, "method": method, "random_seed": calibration.seed})


def _attention_weight(scoring: ScoringOptions, compensate: bool) -> float:
    # Standard scores may be negative, and take no factor.
    return DEFAULT_ATTENTION_WEIGHT if compensate and scoring.normalize != "zscore" else 1.0


def _typed_command() -> str:
    return quoted_command("prunus", sys.argv[1:])


def _target_row(target: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if target["target"] == "params":
        return []
    return [(target["quantity"], f"{target['before']:,.0f}", f"{target['after']:,.0f}")]


def _perplexity_row(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if metrics["perplexity_after"] is None:
        return []
    before, after = metrics["perplexity_before"], metrics["perplexity_after"]
    return [(f"perplexity, {metrics['perplexity_text']}", f"{before:.2f}", f"{after:.2f}")]


def _evaluation_rows(result: Evaluation) -> list[tuple[str, ...]]:
    """One column per model, the dense one first; every text, task and prompt is measured on all."""
    models = [result.dense, result.model] if result.dense else [result.model]
    rows = [("parameters", *(f"{one.parameters:,}" for one in models)), ("dtype", *(one.dtype for one in models))]
    for text in result.model.perplexities:
        rows.append((f"perplexity, {text}", *(f"{one.perplexities[text].perplexity:,.2f}" for one in models)))
    for number, task in enumerate(result.model.zero_shot):
        same = [one.zero_shot[number] for one in models]
        rows.append((f"{task.task} acc, {task.items} items", *(f"{one.accuracy:.2%}" for one in same)))
        rows.append((f"{task.task} acc_norm", *(f"{one.accuracy_norm:.2%}" for one in same)))
    for number, harness in enumerate(result.model.harness):
        for metric in harness.metrics:
            figures = [one.harness[number].metrics[metric] for one in models]
            label = f"lm_eval {harness.task} {metric}, {harness.items} items"
            rows.append((label, *(f"{figure:,.4f}" for figure in figures)))
    for number, sample in enumerate(result.model.samples):
        rows.append(tuple(map(escape, (sample.prompt, *(one.samples[number].text for one in models)))))
    return rows


def _speed_rows(report: SpeedReport) -> list[tuple[str, ...]]:
    def spread(values: Spread, scale: float = 1.0) -> str:
        return f"{values.median * scale:,.1f} ({values.low * scale:,.1f}–{values.high * scale:,.1f})"

    def ratio(values: Spread) -> str:
        return f"× {values.median:.2f} ({values.low:.2f}–{values.high:.2f})"

    def mebibytes(number: int | None) -> str:
        return "not known" if number is None else f"{number / 2**20:,.1f}"

    def memory(result: SpeedResult) -> dict[str, str]:
        if result.memory is None:
            return {}
        return {
            "peak memory, MiB": mebibytes(result.memory.peak_bytes),
            "… before loading": mebibytes(result.memory.before_bytes),
        }

    columns = [
        {
            "parameters": f"{result.parameters:,}",
            "dtype": result.dtype,
            "prefill, tokens/s": spread(result.prefill_tokens_per_second),
            "against the first": ratio(result.prefill_ratio),
            "decode, tokens/s": spread(result.decode_tokens_per_second),
            "against the first ": ratio(result.decode_ratio),
            "first token, ms": spread(result.first_token_seconds, 1000),
            **memory(result),
            "KV cache, bytes/token": f"{result.kv_cache_bytes_per_token:,}",
            "… of this run, MiB": mebibytes(result.kv_cache_bytes),
            "… of one full context, MiB": mebibytes(result.kv_cache_bytes_full),
        }
        for result in report.results
    ]
    return [(name, *(column[name] for column in columns)) for name in columns[0]]


def _print_json(values: Any) -> None:
    print(jsonlib.dumps(values, indent=1))


def _print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    out_console.print(table)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:,.5g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(inner)}" for name, inner in value.items())
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
