"""Everything `prunus eval` measures of a model, next to the dense one if that is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.calibration.embedded import embedded_documents
from prunus.calibration.loading import DEFAULT_SOURCE
from prunus.checkpoint import check_folder, locate
from prunus.errors import OptionError
from prunus.evaluation.harness import HarnessResult, check_harness, run_harness
from prunus.evaluation.perplexity import PerplexityResult, perplexity, read_text
from prunus.evaluation.samples import PROMPTS, Sample, continuations
from prunus.evaluation.speed import SpeedOptions, SpeedReport, bench
from prunus.evaluation.zero_shot import Task, ZeroShotResult, load_tasks, zero_shot
from prunus.pipeline.inputs import ModelOptions, load_or_open, model_name
from prunus.version import __version__

__all__ = ["EvalOptions", "Evaluation", "ModelFigures", "evaluate"]


@dataclass(frozen=True)
class EvalOptions:
    """What is measured.

    Attributes:
        text: UTF-8 text files for perplexity, each read as one string. Where nothing at all is asked for, perplexity is
            measured on the text that ships with Python.
        seq_len: tokens per window of a text; windows do not overlap.
        batch_size: windows, or choices of a task, per forward pass.
        max_windows: only the first so many windows of each text.
        begin_token: where the tokenizer puts a token before every text, as for Llama 3 and Gemma, begin each window
            with it. GPTQ and the tools after it do not.
        tasks: zero-shot tasks: JSON-lines files named after arc_easy, piqa or winogrande, or folders of them.
        items: only the first so many items of each task, also of the harness' tasks.
        harness: tasks by lm-evaluation-harness itself; needs `pip install 'prunus[eval]'`.
        harness_path: folders of task files (YAML) for the harness, besides its own.
        samples: continue a few prompts greedily.
        prompt: prompts to continue instead.
        speed: measure speed and memory, as `prunus bench` does.
        speed_prompt: prompt tokens of a run.
        speed_new: new tokens of a run.
        speed_repeats: runs that count.
        speed_memory: with speed, also measure peak memory, for which each model is loaded once more.
    """

    text: tuple[Path, ...] = ()
    seq_len: int = 2048
    batch_size: int = 1
    max_windows: int | None = None
    begin_token: bool = True
    tasks: tuple[Path, ...] = ()
    items: int | None = None
    harness: tuple[str, ...] = ()
    harness_path: tuple[Path, ...] = ()
    samples: bool = False
    prompt: tuple[str, ...] = ()
    speed: bool = False
    speed_prompt: int = SpeedOptions.prompt_tokens
    speed_new: int = SpeedOptions.new_tokens
    speed_repeats: int = SpeedOptions.repeats
    speed_memory: bool = SpeedOptions.memory

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_windows", "items"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}; it must be at least 1")
        names = [path.name for path in self.text]
        if twice := {name for name in names if names.count(name) > 1}:
            raise OptionError(f"two texts are called {min(twice)}, and results go by the file's name; rename one")

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts to continue; none if no samples are asked for."""
        return self.prompt or (PROMPTS if self.samples else ())

    @property
    def measures_text_of_python(self) -> bool:
        """Whether nothing at all is asked for."""
        return not (self.text or self.tasks or self.harness or self.prompts or self.speed)


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
    model_options: ModelOptions | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure a model, and another one by the same rules; one is in memory at a time, but for speed.

    Args:
        model: a folder, a Hub id, or `smollm2-135m`.
        options: what is measured.
        dense: the model to compare with.
        model_options: device, dtype and memory.
        progress: show progress bars on a terminal.

    Raises:
        PrunusError: whatever is wrong with options, files or models, as far as possible before any long work.
    """
    options, model_options = options or EvalOptions(), model_options or ModelOptions()
    texts = {path.name: read_text(path) for path in options.text}
    if options.measures_text_of_python:
        texts = {DEFAULT_SOURCE: "\n\n".join(embedded_documents())}
    tasks = load_tasks(options.tasks)
    if options.harness:
        check_harness(options.harness, options.harness_path)
    speed = SpeedOptions(
        prompt_tokens=options.speed_prompt,
        new_tokens=options.speed_new,
        repeats=options.speed_repeats,
        memory=options.speed_memory,
        device=model_options.device,
        dtype=model_options.dtype,
    )
    # Both are looked for before one is measured.
    compared = [name for name in (dense, model) if name is not None]
    for name in compared:
        check_folder(locate(name))
    figures = {name: _figures(name, texts, tasks, options, model_options, progress) for name in compared}
    report = bench(compared, speed, progress=progress) if options.speed else None
    return Evaluation(figures[model], figures[dense] if dense is not None else None, report)


def _figures(
    name: str,
    texts: Mapping[str, str],
    tasks: Sequence[Task],
    options: EvalOptions,
    model_options: ModelOptions,
    progress: bool,
) -> ModelFigures:
    live, tokenizer, _ = load_or_open(name, model_options, progress=progress)
    size = options.batch_size
    return ModelFigures(
        model_name(name),
        live.num_parameters(),
        str(live.dtype).removeprefix("torch."),
        {
            text: perplexity(
                live,
                tokenizer,
                content,
                seq_len=options.seq_len,
                batch_size=size,
                max_windows=options.max_windows,
                begin_token=options.begin_token,
                progress=progress,
            )
            for text, content in texts.items()
        },
        [zero_shot(live, tokenizer, task, limit=options.items, batch_size=size, progress=progress) for task in tasks],
        run_harness(
            live, tokenizer, options.harness, include=options.harness_path, limit=options.items, batch_size=size
        )
        if options.harness
        else [],
        continuations(live, tokenizer, options.prompts, progress=progress),
    )
