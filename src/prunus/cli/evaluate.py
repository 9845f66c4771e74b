"""`prunus eval`: what a model is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunus.cli.bench import speed_rows
from prunus.cli.eval_flags import KEYS, NO_FILE, NO_MEASURE, FileFlags, MeasureFlags
from prunus.cli.flags import Flag, OptionalModel
from prunus.cli.job_flags import NO_DEVICE, DeviceFlags, given
from prunus.cli.values import check_given

if TYPE_CHECKING:
    from prunus.evaluation.evaluate import Evaluation

__all__ = ["evaluate"]


def evaluate(
    model: OptionalModel = None,
    /,
    *,
    compare: str | None = None,
    file: FileFlags = NO_FILE,
    measure: MeasureFlags = NO_MEASURE,
    device: DeviceFlags = NO_DEVICE,
    update_card: Flag = False,
    json: Flag = False,
) -> None:
    """Measure a model, pruned or not: perplexity, zero-shot accuracy, speed and memory, and sample text.

    Args:
        model: folder, Hub id or `smollm2-135m`.
        compare: another model, such as the dense one, to measure by the same rules beside it.
        update_card: write the figures to the pruned folder, its model card and its report.
        json: print the result as JSON.
    """
    from prunus.cli.printing import typed_command
    from prunus.evaluation.evaluate import evaluate as evaluate_model
    from prunus.evaluation.job import EVALUATION
    from prunus.files.user_path import expanded
    from prunus.report import try_report
    from prunus.report.page import FILE_NAME
    from prunus.results.result_folder import add_evaluation, check_updatable

    direct = {"model": model, "compare": compare, **given(measure, device, keys=KEYS)}
    job = EVALUATION.read(file.recipe, file.set, direct)
    check_given(MODEL=job.model)
    if update_card:
        check_updatable(job.model)
    result = evaluate_model(job.model, job.evaluation, dense=job.compare, speed=job.speed, model_options=job.run)
    try:
        if update_card:
            add_evaluation(job.model, result.to_dict(), typed_command())
            if (expanded(job.model) / FILE_NAME).is_file():
                try_report(job.model)
    finally:  # what was measured is shown, also where it could not be kept
        _show(result, json)


def _show(result: Evaluation, json: bool) -> None:
    from prunus.cli.printing import print_json, print_rows

    facts = result.to_dict()
    if json:
        # Fields of the first text stand at the top as well, for programs that read one figure.
        print_json({**(facts["perplexities"][0] if facts["perplexities"] else {}), **facts})
        return
    figures = [result.dense, result.model] if result.dense else [result.model]
    print_rows(str(facts["model"]), ("", *(one.model for one in figures)), _rows(result))
    if result.speed:
        names = [one.model for one in result.speed.results]
        print_rows("speed and memory", ("", *names), speed_rows(result.speed))


def _rows(result: Evaluation) -> list[tuple[str, ...]]:
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
        rows.append((sample.prompt, *(one.samples[number].text for one in models)))
    return rows
