"""Options of `prunus eval`: a file, single settings, and the settings used most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Group, Parameter

from prunus.cli.flags import split_commas
from prunus.cli.job_flags import SPELLING

__all__ = ["KEYS", "FileFlags", "MeasureFlags"]

#: option → the key that it sets; of two for one key, the one that the help lists comes last
KEYS = {
    "text": "evaluation.text",
    "max_windows": "evaluation.windows",
    "samples": "evaluation.generate",
    "model": "model",
    "compare": "compare",
    "eval_text": "evaluation.text",
    "seq_len": "evaluation.seq_len",
    "windows": "evaluation.windows",
    "tasks": "evaluation.tasks",
    "items": "evaluation.items",
    "harness": "evaluation.harness",
    "generate": "evaluation.generate",
    "prompt": "evaluation.prompt",
    "speed": "evaluation.speed",
    "batch_size": "run.batch_size",
    "device": "run.device",
    "max_memory": "run.max_memory",
    "dtype": "run.dtype",
    "revision": "run.revision",
}

_SEVERAL = Parameter(consume_multiple=True, negative="")
_SWITCH = Parameter(negative="")


@dataclass(frozen=True)
class _File:
    """All settings.

    Attributes:
        recipe: a YAML file of settings.
        set: any other setting, e.g. `--set evaluation.begin_token=false`; `prunus recipe --command eval` lists them.
    """

    recipe: str | None = None
    set: Annotated[tuple[str, ...], Parameter(negative="")] = ()


@dataclass(frozen=True)
class _Measure:
    """What is measured.

    Attributes:
        eval_text: UTF-8 text files to measure perplexity on, each read as one string. Where nothing at all is asked
            for, perplexity is measured on the text that ships with Python.
        seq_len: tokens per window of a text; windows do not overlap. By default 2048, or as many as the model has
            positions for if those are fewer.
        windows: at most this many windows of each text.
        tasks: zero-shot tasks: JSON-lines files named after a task, as in arc_easy_test.jsonl, or folders of them.
        items: at most this many items of each task, also of the harness's tasks.
        harness: tasks by lm-evaluation-harness itself; needs the package lm-eval.
        generate: continue a few prompts greedily.
        prompt: prompts to continue instead.
        speed: measure speed and memory, as `prunus bench` does.
        batch_size: windows, or choices of a task, per forward pass; 1 by default.
        text: as --eval-text.
        max_windows: as --windows.
        samples: as --generate.
    """

    eval_text: Annotated[tuple[str, ...], _SEVERAL] = ()
    seq_len: int | None = None
    windows: int | None = None
    tasks: Annotated[tuple[str, ...], _SEVERAL] = ()
    items: int | None = None
    harness: Annotated[tuple[str, ...], Parameter(converter=split_commas, negative="")] = ()
    generate: Annotated[bool | None, _SWITCH] = None
    prompt: Annotated[tuple[str, ...], _SEVERAL] = ()
    speed: Annotated[bool | None, _SWITCH] = None
    batch_size: int | None = None
    text: Annotated[tuple[str, ...], _SEVERAL, SPELLING] = ()
    max_windows: Annotated[int | None, SPELLING] = None
    samples: Annotated[bool | None, _SWITCH, SPELLING] = None


FileFlags = Annotated[_File, Parameter(name="*", group=Group("Recipe", sort_key=1))]
MeasureFlags = Annotated[_Measure, Parameter(name="*", group=Group("Evaluation", sort_key=2))]

NO_FILE, NO_MEASURE = _File(), _Measure()
