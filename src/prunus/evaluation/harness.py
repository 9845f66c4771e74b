"""Tasks by lm-evaluation-harness itself, on a model that is in memory.

The harness needs its data: of its own tasks from the Hub, of tasks that somebody wrote over local files from those. Its
log-softmax is told to be float32, as everywhere in prunus; else it is taken in the model's dtype.

Source: Gao et al., "A framework for few-shot language model evaluation", https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from prunus.errors import OptionError, PrunusError
from prunus.installing import install_command
from prunus.model.evaluation_mode import evaluation_mode

__all__ = ["HarnessResult", "check_harness", "run_harness"]


@dataclass(frozen=True)
class HarnessResult:
    """How a model did on a task of the harness.

    Attributes:
        task: the harness's name of it.
        items: that were run.
        few_shot: examples before each item; None where the harness does not say.
        metrics: by name, such as acc and acc_norm; with the name of the filter where it has one.
        stderr: standard errors, of the metrics that have one.
        harness: version of lm-evaluation-harness.
    """

    task: str
    items: int
    few_shot: int | None
    metrics: dict[str, float]
    stderr: dict[str, float]
    harness: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


def check_harness(tasks: Sequence[str], include: Sequence[Path] = ()) -> None:
    """Refuse tasks that the harness does not know, before any long work.

    Args:
        tasks: names of tasks, groups or tags.
        include: folders of task files, besides the harness's own.

    Raises:
        OptionError: lm-evaluation-harness is not installed, a folder is missing, or a task is unknown.
    """
    if find_spec("lm_eval") is None:
        raise OptionError(
            f"tasks of lm-evaluation-harness need it, not installed here. Run: {install_command('lm-eval')}"
        )
    for folder in include:
        if not folder.is_dir():
            raise OptionError(f"{folder} is no folder of task files")
    known = set(_manager(tuple(tasks), tuple(include)).all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise OptionError(
            f"lm-evaluation-harness knows no task {unknown[0]!r}; `lm_eval ls tasks` lists its own, and a folder of "
            "further task files is named by `harness_path`"
        )


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include: Sequence[Path] = (),
    limit: int | None = None,
    batch_size: int = 16,
) -> list[HarnessResult]:
    """Let lm-evaluation-harness evaluate a model.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        tasks: names of tasks, groups or tags.
        include: folders of task files (YAML), besides the harness's own.
        limit: only the first so many items of each task.
        batch_size: sequences per forward pass.

    Raises:
        OptionError: see `check_harness`; or the harness could not run, for example because a task's data is on the Hub
            and there is no network.
    """
    check_harness(tasks, include)
    from lm_eval import __version__ as version
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with evaluation_mode(model):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32)
            results = simple_evaluate(
                wrapped,
                tasks=list(tasks),
                limit=limit,
                log_samples=False,
                bootstrap_iters=0,
                task_manager=_manager(tuple(tasks), tuple(include)),
            )
    except (PrunusError, MemoryError, torch.OutOfMemoryError):
        raise  # not the harness's own
    except Exception as error:  # its tasks, metrics and data sets raise whatever they like
        raise OptionError(
            f"lm-evaluation-harness could not run {', '.join(tasks)} ({type(error).__name__}: {error}). Without a "
            "network only tasks over local files run, see docs/evaluation.md"
        ) from error
    return [_result(task, results, version) for task in results["results"] if task in results["n-samples"]]


@cache
def _manager(tasks: tuple[str, ...], include: tuple[Path, ...]) -> Any:
    """Where the harness finds tasks; its own, which are thousands of files, are read only if one is asked for."""
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [str(folder) for folder in include]
    if folders:
        manager = TaskManager(include_path=folders, include_defaults=False)
        if all(task in manager.all_tasks for task in tasks):
            return manager
    return TaskManager(include_path=folders or None)


def _result(task: str, results: dict[str, Any], version: str) -> HarnessResult:
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for name, value in results["results"][task].items():
        metric, comma, filtered = name.partition(",")
        if not comma or not isinstance(value, int | float):
            continue  # alias and sample count; standard errors that were not computed are words
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        if metric.endswith("_stderr"):
            stderr[label.replace("_stderr", "", 1)] = float(value)
        else:
            metrics[label] = float(value)
    few_shot = results["n-shot"].get(task)
    return HarnessResult(task, results["n-samples"][task]["effective"], few_shot, metrics, stderr, version)
