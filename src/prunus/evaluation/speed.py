"""How fast models are, against each other: all in memory at once, and their repetitions in turn.

A, B, then B, A, then A, B, …: a slow moment of the machine then falls on all models alike, none always runs right after
the same other one, and each is compared with the first one in the same round.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from prunus.checkpoint import check_folder, empty_model, load_model, locate, resolve_device, resolve_dtype
from prunus.errors import OptionError
from prunus.evaluation.greedy import greedy_run
from prunus.evaluation.kv_cache import kv_cache_bytes
from prunus.evaluation.memory import PeakMemory, peak_memory
from prunus.option_values import check_seed, check_whole
from prunus.sweep.engine import model_name

__all__ = ["SpeedOptions", "SpeedReport", "SpeedResult", "Spread", "Timing", "bench", "check_context", "time_in_turn"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpeedOptions:
    """What is run, and how often.

    Attributes:
        prompt_tokens: tokens of each prompt; random ones, the same for all models.
        new_tokens: tokens made after each prompt, greedily, past any end-of-text token.
        batch_size: prompts at a time.
        repeats: rounds that count; each runs every model once.
        warm_up: rounds before them that do not count.
        seed: of the prompts.
        memory: also measure peak memory, for which each model is loaded once more in a process of its own.
        device: auto, cpu, cuda, cuda:1, mps; auto is the first of cuda, mps, cpu that there is.
        dtype: float32, bfloat16 or float16; auto is each checkpoint's own, or float32 where half precision is slow.
    """

    prompt_tokens: int = 512
    new_tokens: int = 128
    batch_size: int = 1
    repeats: int = 5
    warm_up: int = 1
    seed: int = 0
    memory: bool = True
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, smallest, why in (
            ("prompt_tokens", 1, "a prompt has at least one token"),
            ("new_tokens", 2, "the first new token belongs to prefill, and decode needs one more"),
            ("batch_size", 1, "at least one prompt is run"),
            ("repeats", 1, "at least one round is measured"),
            ("warm_up", 0, "use 0 for no warm-up"),
        ):
            check_whole(name, getattr(self, name), smallest=smallest, why=why)
        check_seed("seed", self.seed)
        resolve_device(self.device)
        resolve_dtype(self.dtype)


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: from the prompt to the first new token, and for the tokens after it."""

    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class SpeedResult:
    """One model's figures.

    Attributes:
        model: as it was named, a folder by its last part.
        parameters: number of parameters, tied embeddings counted once.
        dtype: of the weights and of the cache.
        prefill_tokens_per_second: prompt tokens of the batch over the time of prefill.
        decode_tokens_per_second: new tokens of the batch, but the first of each, over the time of the steps.
        first_token_seconds: time to first token: prefill with the choice of its token, without tokenising.
        prefill_ratio: over rounds, this model's prefill speed over the first model's in the same round.
        decode_ratio: the same for decode.
        memory: peak of one run in a process of its own; None if it was not to be measured.
        kv_cache_bytes_per_token: what one more token of one sequence takes, before any sliding window is full.
        kv_cache_bytes: what the cache holds at the end of a run.
        kv_cache_bytes_full: what it holds of one sequence as long as the model's context.
    """

    model: str
    parameters: int
    dtype: str
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    first_token_seconds: Spread
    prefill_ratio: Spread
    decode_ratio: Spread
    memory: PeakMemory | None
    kv_cache_bytes_per_token: int
    kv_cache_bytes: int
    kv_cache_bytes_full: int


@dataclass(frozen=True)
class SpeedReport:
    """All models' figures, with what they hold for.

    Attributes:
        options: what was run.
        device: where it ran, an accelerator by its product name.
        threads: CPU threads of torch.
        torch: version.
        transformers: version.
        results: one per model, in the order in which they were named.
    """

    options: SpeedOptions
    device: str
    threads: int
    torch: str
    transformers: str
    results: tuple[SpeedResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


def bench(models: Sequence[str], options: SpeedOptions | None = None, *, progress: bool = True) -> SpeedReport:
    """Measure the speed and the memory of models on transformers, against the first of them.

    All models are in memory at once while they are timed. Peak memory is measured after that, with one fresh process
    per model, one after another. A model may be named twice: its ratio to itself shows how noisy the machine is.

    Args:
        models: folders, Hub ids or `smollm2-135m`.
        options: what is run, and how often.
        progress: show a bar on a terminal.

    Raises:
        OptionError: no model is given, or prompt and new tokens are more than a model's context.
        PrunusError: a model cannot be loaded, see `load_model`.
    """
    options = options or SpeedOptions()
    if not models:
        raise OptionError("no model was given; name at least one, and the dense one first to compare others with it")
    folders = [locate(model) for model in models]
    vocabulary = min(_check(folder, options) for folder in folders)
    names = [model_name(model) for model in models]
    figures = list(_loaded_and_timed(folders, vocabulary, options, progress))
    # The models are gone by now; on an accelerator their memory has to be given back for another process to have it.
    device = resolve_device(options.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    first = figures[0]["timings"]
    results = []
    for name, folder, figure in zip(names, folders, figures, strict=True):
        memory = None
        if options.memory:
            memory = peak_memory(
                folder,
                prompt_tokens=options.prompt_tokens,
                new_tokens=options.new_tokens,
                batch_size=options.batch_size,
                device=options.device,
                dtype=options.dtype,
            )
        results.append(_result(name, figure, first, memory, options))
    return SpeedReport(
        options,
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch.get_num_threads(),
        torch.__version__,
        transformers.__version__,
        tuple(results),
    )


def time_in_turn(
    models: Sequence[Any], input_ids: Tensor, options: SpeedOptions, *, progress: bool = True
) -> list[list[Timing]]:
    """Run all models in turn, again and again, every second round in reverse (A, B, B, A, A, B, …).

    Args:
        models: transformers causal language models on one device.
        input_ids: (batch, prompt_tokens) on that device.
        options: new tokens, rounds and warm-up; the other fields are not read.
        progress: show a bar on a terminal.

    Returns:
        For each model the timings of its repeats, without warm-up.
    """
    timings: list[list[Timing]] = [[] for _ in models]
    rounds = options.warm_up + options.repeats
    with tqdm(total=rounds * len(models), desc="bench", unit="run", disable=None if progress else True) as bar:
        for number in range(rounds):
            pairs = list(zip(models, timings, strict=True))
            for model, kept in reversed(pairs) if number % 2 else pairs:
                run = greedy_run(model, input_ids, options.new_tokens)
                if number >= options.warm_up:
                    kept.append(Timing(run.prefill_seconds, run.decode_seconds))
                # Or this model's cache would still be in memory while the next one runs.
                del run
                bar.update()
    return timings


def check_context(options: SpeedOptions, config: Any, name: str) -> None:
    """Check that a model's context holds the tokens of a run.

    Raises:
        OptionError: it does not.
    """
    needed, context = options.prompt_tokens + options.new_tokens, int(config.max_position_embeddings)
    if needed > context:
        raise OptionError(
            f"`prompt_tokens` {options.prompt_tokens} and `new_tokens` {options.new_tokens} make {needed} tokens, more "
            f"than the context of {name}, {context}; take fewer"
        )


def _check(folder: Path, options: SpeedOptions) -> int:
    """Check all that needs no weights; returns the size of the vocabulary."""
    config, _ = check_folder(folder)
    kv_cache_bytes(empty_model(config, torch.float32), 1)  # refuses what has no geometry
    check_context(options, config, folder.name)
    return int(config.vocab_size)


def _loaded_and_timed(
    folders: Sequence[Path], vocabulary: int, options: SpeedOptions, progress: bool
) -> Iterator[dict[str, Any]]:
    """Each model's timings, and what else is read off it; the models do not outlive the iteration."""
    models = [load_model(folder, dtype=options.dtype, device=options.device)[0] for folder in folders]
    if len(dtypes := {str(model.dtype) for model in models}) > 1:
        logger.warning("the models differ in dtype (%s): give one for all to compare them", ", ".join(sorted(dtypes)))
    prompts = torch.randint(
        vocabulary,
        (options.batch_size, options.prompt_tokens),
        generator=torch.Generator().manual_seed(options.seed),
    )
    timings = time_in_turn(models, prompts.to(models[0].device), options, progress=progress)
    for model, kept in zip(models, timings, strict=True):
        yield {
            "timings": kept,
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_cache_bytes_per_token": kv_cache_bytes(model, 1),
            # The last token that is made does not go through the model.
            "kv_cache_bytes": kv_cache_bytes(model, options.prompt_tokens + options.new_tokens - 1, options.batch_size),
            "kv_cache_bytes_full": kv_cache_bytes(model, int(model.config.max_position_embeddings)),
        }


def _result(
    name: str, figure: dict[str, Any], first: Sequence[Timing], memory: PeakMemory | None, options: SpeedOptions
) -> SpeedResult:
    timings: list[Timing] = figure.pop("timings")
    prompt = options.batch_size * options.prompt_tokens
    steps = options.batch_size * (options.new_tokens - 1)
    rounds = list(zip(first, timings, strict=True))
    return SpeedResult(
        model=name,
        prefill_tokens_per_second=Spread.of([prompt / timing.prefill_seconds for timing in timings]),
        decode_tokens_per_second=Spread.of([steps / timing.decode_seconds for timing in timings]),
        first_token_seconds=Spread.of([timing.prefill_seconds for timing in timings]),
        prefill_ratio=Spread.of([base.prefill_seconds / timing.prefill_seconds for base, timing in rounds]),
        decode_ratio=Spread.of([base.decode_seconds / timing.decode_seconds for base, timing in rounds]),
        memory=memory,
        **figure,
    )
