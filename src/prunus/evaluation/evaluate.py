"""Everything `prunus eval` measures of a model, next to the dense one if that is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.calibration.embedded import embedded_documents
from prunus.calibration.loading import DEFAULT_SOURCE
from prunus.checkpoint import locate, resolve_device
from prunus.checkpoint.load import read_small_files
from prunus.errors import OptionError
from prunus.evaluation.harness import HarnessResult, check_harness, run_harness
from prunus.evaluation.perplexity import (
    TextWindows,
    cut_text,
    perplexity_of_text,
    read_text,
    warn_of_few_tokens,
    window_length,
)
from prunus.evaluation.samples import NEW_TOKENS, PROMPTS, Sample, check_prompt, continuations
from prunus.evaluation.speed import SpeedOptions, SpeedReport, bench, check_context
from prunus.evaluation.zero_shot import EncodedTask, Task, ZeroShotResult, encode_task, load_tasks, zero_shot_of
from prunus.machine.memory import resident_set
from prunus.model.layers import layers_of
from prunus.model.tokens import check_tokens
from prunus.option_names import options_named
from prunus.option_values import check_utf8, check_whole
from prunus.sweep.engine import ModelOptions, load_or_open, memory_needed, model_name
from prunus.sweep.estimate import Workload, parse_bytes, show_bytes
from prunus.sweep.sequence_loss import PerplexityResult
from prunus.version import __version__

__all__ = ["EvalOptions", "Evaluation", "ModelFigures", "evaluate"]


@dataclass(frozen=True)
class EvalOptions:
    """What is measured.

    Attributes:
        text: UTF-8 text files for perplexity, each read as one string. Where nothing at all is asked for, perplexity is
            measured on the text that ships with Python.
        seq_len: tokens per window of a text; windows do not overlap. By default 2048, or as many as the model has
            positions for if those are fewer.
        batch_size: windows, or choices of a task, per forward pass.
        max_windows: only the first so many windows of each text.
        begin_token: where the tokenizer puts a token before every text, as for Llama 3 and Gemma, begin each window
            with it. GPTQ and the tools after it do not.
        tasks: zero-shot tasks: JSON-lines files named after arc_easy, piqa or winogrande, or folders of them.
        items: only the first so many items of each task, also of the harness' tasks.
        harness: tasks by lm-evaluation-harness itself; needs the package lm-eval.
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
    seq_len: int | None = None
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
            if (value := getattr(self, name)) is not None:
                check_whole(name, value)
        if self.seq_len is not None:
            check_whole("seq_len", self.seq_len, smallest=2, why="a window needs at least 2 tokens to predict one")
        for path in self.text:
            check_utf8("text", str(path))
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
    model = model_options.named(model)
    texts = {path.name: read_text(path) for path in options.text}
    if options.measures_text_of_python:
        texts = {DEFAULT_SOURCE: "\n\n".join(embedded_documents())}
    tasks = load_tasks(options.tasks)
    if options.harness:
        check_harness(options.harness, options.harness_path)
    with options_named(prompt_tokens="speed_prompt", new_tokens="speed_new", repeats="speed_repeats"):
        speed = SpeedOptions(
            prompt_tokens=options.speed_prompt,
            new_tokens=options.speed_new,
            repeats=options.speed_repeats,
            memory=options.speed_memory,
            device=model_options.device,
            dtype=model_options.dtype,
        )
    # Both are looked for, and everything is tokenised for both, before one is measured.
    compared = [name for name in (dense, model) if name is not None]
    asked = {name: _Asked.of(name, texts, tasks, options, speed if options.speed else None) for name in compared}
    for text, windows in asked[model].windows.items():
        warn_of_few_tokens(text, windows.ids.numel() - len(windows.ids))
    if options.speed and model_options.max_memory is not None:
        _check_memory_of_speed(compared, speed, model_options)
    figures = {name: _figures(name, asked[name], options, model_options, progress) for name in compared}
    report = bench(compared, speed, progress=progress) if options.speed else None
    return Evaluation(figures[model], figures[dense] if dense is not None else None, report)


@dataclass(frozen=True)
class _Asked:
    """What one model is asked, as its own tokens.

    Attributes:
        windows: by the name of the text.
        tasks: zero-shot tasks.
        longest: tokens of the longest sequence of all.
    """

    windows: Mapping[str, TextWindows]
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
                max_windows=options.max_windows,
                begin_token=options.begin_token,
            )
            for text, content in texts.items()
        }
        for each in windows.values():
            check_tokens(config, each.ids)
        prompts = [len(check_prompt(config, tokenizer, prompt)) + NEW_TOKENS for prompt in options.prompts]
        encoded = [encode_task(config, tokenizer, task, limit=options.items) for task in tasks]
        lengths = [each.ids.shape[1] for each in windows.values()] + prompts
        lengths += [len(ids) for task in encoded for ids, _ in task.pairs]
        return cls(windows, encoded, max(lengths, default=0))


def _figures(
    name: str, asked: _Asked, options: EvalOptions, model_options: ModelOptions, progress: bool
) -> ModelFigures:
    size = options.batch_size
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
        run_harness(
            live, tokenizer, options.harness, include=options.harness_path, limit=options.items, batch_size=size
        )
        if options.harness
        else [],
        continuations(live, tokenizer, options.prompts, progress=progress),
    )
    layers_of(live).verify()
    return figures


def _check_memory_of_speed(models: Sequence[str], speed: SpeedOptions, options: ModelOptions) -> None:
    """Raise unless all models fit into `options.max_memory` together, as they are timed in turn."""
    limit = parse_bytes(str(options.max_memory))
    tokens = speed.batch_size * speed.prompt_tokens
    running = Workload(evaluation_tokens=tokens, evaluation_window=tokens)
    needed = [memory_needed(model, options, running).resident for model in models]
    # What the process has already is in every estimate.
    once = resident_set() if resolve_device(options.device).type == "cpu" else 0
    together = sum(needed) - once * (len(models) - 1)
    if together > limit:
        raise OptionError(
            f"`max_memory` is {show_bytes(limit)}, and `speed` holds {len(models)} models at once, which takes about "
            f"{show_bytes(together)}: leave `speed` out, or use `prunus bench` on a larger machine"
        )
