"""Everything `prunus eval` measures of a model, next to the dense one if that is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.calibration.embedded import embedded_documents
from prunus.calibration.loading import DEFAULT_SOURCE
from prunus.checkpoint import locate
from prunus.checkpoint.folder import read_small_files
from prunus.evaluation.eval_options import EvalOptions
from prunus.evaluation.harness import HarnessResult, check_harness, run_harness
from prunus.evaluation.perplexity import (
    cut_text,
    perplexity_of_text,
    read_text,
    warn_of_few_tokens,
    window_length,
)
from prunus.evaluation.samples import NEW_TOKENS, PROMPTS, Sample, check_prompt, continuations
from prunus.evaluation.speed import SpeedReport, bench, check_context, check_memory
from prunus.evaluation.speed_options import SpeedOptions
from prunus.evaluation.zero_shot import EncodedTask, Task, ZeroShotResult, encode_task, load_tasks, zero_shot_of
from prunus.files.user_path import expanded
from prunus.model.layers import layers_of
from prunus.model.tokens import check_tokens
from prunus.sweep.engine import ModelOptions, load_or_open, model_name
from prunus.sweep.estimate import Workload
from prunus.sweep.sequence_loss import PerplexityResult, Windows
from prunus.version import __version__

__all__ = ["EvalOptions", "Evaluation", "ModelFigures", "evaluate"]


@dataclass(frozen=True)
class ModelFigures:
    """What one model scored.

    Attributes:
        model: its name, of a folder the last part.
        parameters: tied ones counted once.
        dtype: that it ran in.
        perplexities: by the name of the text.
        zero_shot: one per task.
        harness: one per task of lm-evaluation-harness.
        samples: what it wrote.
    """

    model: str
    parameters: int
    dtype: str
    perplexities: Mapping[str, PerplexityResult]
    zero_shot: Sequence[ZeroShotResult]
    harness: Sequence[HarnessResult]
    samples: Sequence[Sample]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what was not measured is an empty list."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "dtype": self.dtype,
            "perplexities": [{"text": text, **result.to_dict()} for text, result in self.perplexities.items()],
            "zero_shot": [result.to_dict() for result in self.zero_shot],
            "harness": [result.to_dict() for result in self.harness],
            "samples": [sample.to_dict() for sample in self.samples],
        }


@dataclass(frozen=True)
class Evaluation:
    """A model's figures, and those of the dense one.

    Attributes:
        model: the model in question.
        dense: what it is compared with; None if nothing.
        speed: both, the dense one first; None if not measured.
    """

    model: ModelFigures
    dense: ModelFigures | None
    speed: SpeedReport | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the model's figures, `dense` the other's, `speed` of both."""
        return {
            "prunus": __version__,
            **self.model.to_dict(),
            "dense": self.dense.to_dict() if self.dense else None,
            "speed": self.speed.to_dict() if self.speed else None,
        }


def evaluate(
    model: str,
    options: EvalOptions | None = None,
    *,
    dense: str | None = None,
    speed: SpeedOptions | None = None,
    model_options: ModelOptions | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure a model, and another one by the same rules; one is in memory at a time, but for speed.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.
        options: what is measured.
        dense: the model to compare with.
        speed: what is run where `options.speed` asks for it.
        model_options: device, dtype, memory, and the windows (or choices of a task) per forward pass.
        progress: show progress bars on a terminal.

    Raises:
        PrunusError: whatever is wrong with options, files or models, as far as possible before any long work.
    """
    options, model_options = options or EvalOptions(), model_options or ModelOptions()
    speed = speed or SpeedOptions()
    model = model_options.named(model)
    texts = {Path(path).name: read_text(path) for path in options.text}
    if options.measures_text_of_python:
        texts = {DEFAULT_SOURCE: "\n\n".join(embedded_documents())}
    tasks = load_tasks(options.tasks)
    if options.harness:
        check_harness(options.harness, _folders(options))
    # Both are looked for, and everything is tokenised for both, before one is measured.
    compared = [name for name in (dense, model) if name is not None]
    asked = {name: _Asked.of(name, texts, tasks, options, speed if options.speed else None) for name in compared}
    for text, windows in asked[model].windows.items():
        warn_of_few_tokens(text, windows.ids.numel() - len(windows.ids))
    if options.speed:
        check_memory(compared, speed, model_options)
    figures = {name: _figures(name, asked[name], options, model_options, progress) for name in compared}
    report = bench(compared, speed, model_options, progress=progress) if options.speed else None
    return Evaluation(figures[model], figures[dense] if dense is not None else None, report)


@dataclass(frozen=True)
class _Asked:
    """What one model is asked, as its own tokens.

    Attributes:
        windows: by the name of the text.
        tasks: zero-shot tasks.
        longest: tokens of the longest sequence of all.
    """

    windows: Mapping[str, Windows]
    tasks: Sequence[EncodedTask]
    longest: int

    @classmethod
    def of(
        cls,
        name: str,
        texts: Mapping[str, str],
        tasks: Sequence[Task],
        options: EvalOptions,
        speed: SpeedOptions | None,
    ) -> _Asked:
        """Tokenise everything, with all checks that need no weights."""
        config, tokenizer = read_small_files(locate(name))
        if speed is not None:
            check_context(speed, config, model_name(name))
        length = window_length(config, options.seq_len)
        windows = {
            text: cut_text(
                tokenizer,
                content,
                seq_len=length,
                max_windows=options.windows,
                begin_token=options.begin_token,
            )
            for text, content in texts.items()
        }
        for each in windows.values():
            check_tokens(config, each.ids)
        prompts = [len(check_prompt(config, tokenizer, prompt)) + NEW_TOKENS for prompt in _prompts(options)]
        encoded = [encode_task(config, tokenizer, task, limit=options.items) for task in tasks]
        lengths = [each.ids.shape[1] for each in windows.values()] + prompts
        lengths += [len(ids) for task in encoded for ids, _ in task.pairs]
        return cls(windows, encoded, max(lengths, default=0))


def _figures(
    name: str, asked: _Asked, options: EvalOptions, model_options: ModelOptions, progress: bool
) -> ModelFigures:
    size = model_options.sequences_per_pass
    window = size * asked.longest
    tokens = max([windows.ids.numel() for windows in asked.windows.values()] + [window])
    workload = Workload(evaluation_tokens=tokens, evaluation_window=window)
    live, tokenizer, _ = load_or_open(name, model_options, workload=workload, progress=progress)
    figures = ModelFigures(
        model_name(name),
        live.num_parameters(),
        str(live.dtype).removeprefix("torch."),
        {
            text: perplexity_of_text(live, windows, batch_size=size, progress=progress)
            for text, windows in asked.windows.items()
        },
        [zero_shot_of(live, task, batch_size=size, progress=progress) for task in asked.tasks],
        run_harness(live, tokenizer, options.harness, include=_folders(options), limit=options.items, batch_size=size)
        if options.harness
        else [],
        continuations(live, tokenizer, _prompts(options), progress=progress),
    )
    layers_of(live).verify()
    return figures


def _prompts(options: EvalOptions) -> Sequence[str]:
    """The prompts to continue; none if nothing is to be generated."""
    return options.prompt or (PROMPTS if options.generate else ())


def _folders(options: EvalOptions) -> Sequence[Path]:
    """Folders of task files for the harness."""
    return [expanded(folder) for folder in options.harness_path]
