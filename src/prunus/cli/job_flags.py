"""Options of the commands that prune, score, plan and compare: a recipe, single settings, the settings used most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated

from cyclopts import Group, Parameter

__all__ = [
    "KEYS",
    "SPELLING",
    "UNLISTED",
    "CalibrationFlags",
    "DeviceFlags",
    "EvaluationFlags",
    "FileFlags",
    "FitFlags",
    "PassFlags",
    "SaveFlags",
    "ScoringFlags",
    "SelectionFlags",
    "given",
]

#: taken, and not listed by --help: a recipe key and `owner/name@revision` say the same
UNLISTED = Parameter(show=False)
#: another spelling of an option that is listed
SPELLING = Parameter(show=False, help="another spelling")
#: option → the key that it sets
KEYS = {
    "method": "scoring.method",
    "rounds": "rounds",
    "shape": "selection.shape",
    "align": "selection.align",
    "target": "target.name",
    "calibration": "calibration.source",
    "samples": "calibration.samples",
    "seq_len": "calibration.seq_len",
    "seed": "calibration.seed",
    "chat_column": "calibration.chat_column",
    "eval_text": "evaluation.text",
    "fit": "fit.size",
    "fit_memory": "fit.memory",
    "context": "fit.context",
    "batch": "fit.batch",
    "device": "run.device",
    "max_memory": "run.max_memory",
    "dtype": "run.dtype",
    "save_dtype": "output.save_dtype",
    "batch_size": "run.batch_size",
    "revision": "run.revision",
}


@dataclass(frozen=True)
class _File:
    """All settings.

    Attributes:
        recipe: default, original (plain slicing by first-order Taylor scores), fast, or a YAML file, such as
            prunus/recipe.yaml of an earlier result.
        set: any other setting, as KEY=VALUE; `prunus recipe` lists the keys.
    """

    recipe: str | None = None
    set: Annotated[tuple[str, ...], Parameter(negative="")] = ()


@dataclass(frozen=True)
class _Scoring:
    """How groups are scored.

    Attributes:
        method: gate_fisher, taylor, taylor_2nd, wanda, magnitude, random, hybrid or adaptive; for experts also reap
            and frequency.
    """

    method: str | None = None


@dataclass(frozen=True)
class _Selection:
    """Which groups are cut.

    Attributes:
        shape: ragged cuts wherever the score is lowest; uniform leaves all layers equally wide; depth removes whole
            layers.
        align: kept MLP widths are multiples of this: a number, gpu (64), gpu128 (128) or gguf (256).
        target: what the ratio is a share of: params, flops, kv_cache, latency, size, memory, or
            experts of a mixture of experts.
    """

    shape: str | None = None
    align: Annotated[str | None, UNLISTED] = None
    target: Annotated[str | None, UNLISTED] = None


@dataclass(frozen=True)
class _Fit:
    """A size that the result has to fit into, in place of --ratio.

    Attributes:
        fit: size of the weights: 300MB in the dtype that they are saved in, 90MB:Q4_K_M as llama.cpp quantises them.
            With the KV cache instead: `--fit-memory 6GB --context 8192 --batch 4`.
        fit_memory: size of the weights and the KV cache together.
        context: tokens of each sequence in the KV cache.
        batch: sequences in the KV cache.
    """

    fit: str | None = None
    fit_memory: Annotated[str | None, UNLISTED] = None
    context: Annotated[int | None, UNLISTED] = None
    batch: Annotated[int | None, UNLISTED] = None


@dataclass(frozen=True)
class _Calibration:
    """The text that importance is measured on.

    Attributes:
        calibration: a .txt, .jsonl or .parquet file; `mixture` of several kinds, c4 or another data set of the
            Hub; `default` for the text that ships with Python; `self` for text that the model writes. Repeat it for
            several, which share the sequences equally, or by weight: `--calibration FILE:2 --calibration self`.
        samples: number of sequences.
        seq_len: tokens per sequence.
        seed: decides which sequences are drawn, and everything else that is random.
        chat_column: column that holds conversations in place of text.
    """

    calibration: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    samples: int | None = None
    seq_len: int | None = None
    seed: Annotated[int | None, UNLISTED] = None
    chat_column: Annotated[str | None, UNLISTED] = None


@dataclass(frozen=True)
class _Evaluation:
    """How the models before and after are compared.

    Attributes:
        eval_text: a text file to measure perplexity on, before and after; without it, calibration sequences that were
            held out.
    """

    eval_text: str | None = None


@dataclass(frozen=True)
class _Device:
    """Where the model is held.

    Attributes:
        device: auto, cpu, cuda, cuda:1, mps; auto is the first of cuda, mps, cpu that there is.
        max_memory: memory that may be used, e.g. 8GB. Jobs estimated to exceed it are rejected, naming the smallest
            sufficient limit.
        dtype: float32, bfloat16 or float16, to compute in; auto is the checkpoint's own, or float32 where half
            precision is slow.
        revision: branch, tag or commit of a model on the Hub; `owner/name@revision` says the same.
    """

    device: str | None = None
    max_memory: str | None = None
    dtype: str | None = None
    revision: Annotated[str | None, UNLISTED] = None


@dataclass(frozen=True)
class _Passes:
    """How sequences pass through it.

    Attributes:
        batch_size: calibration sequences per pass; auto is 1, and on CUDA as many as fit, up to 16,384 tokens.
    """

    batch_size: Annotated[str | None, UNLISTED] = None


@dataclass(frozen=True)
class _Save:
    """How it is saved.

    Attributes:
        save_dtype: what the result is saved in; auto is the checkpoint's own.
    """

    save_dtype: Annotated[str | None, UNLISTED] = None


_RECIPE, _MODEL = Group("Recipe", sort_key=1), Group("Model", sort_key=4)

FitFlags = Annotated[_Fit, Parameter(name="*", group="Parameters")]
FileFlags = Annotated[_File, Parameter(name="*", group=_RECIPE)]
ScoringFlags = Annotated[_Scoring, Parameter(name="*", group=_RECIPE)]
SelectionFlags = Annotated[_Selection, Parameter(name="*", group=_RECIPE)]
CalibrationFlags = Annotated[_Calibration, Parameter(name="*", group=Group("Calibration", sort_key=2))]
EvaluationFlags = Annotated[_Evaluation, Parameter(name="*", group=Group("Evaluation", sort_key=3))]
DeviceFlags = Annotated[_Device, Parameter(name="*", group=_MODEL)]
PassFlags = Annotated[_Passes, Parameter(name="*", group=_MODEL)]
SaveFlags = Annotated[_Save, Parameter(name="*", group=_MODEL)]

NO_FILE, NO_SCORING, NO_SELECTION, NO_FIT = _File(), _Scoring(), _Selection(), _Fit()
NO_CALIBRATION, NO_EVALUATION = _Calibration(), _Evaluation()
NO_DEVICE, NO_PASSES, NO_SAVE = _Device(), _Passes(), _Save()


def given(*flags: object, keys: Mapping[str, str] = KEYS) -> dict[str, object]:
    """Key → value of the options that were given.

    Args:
        flags: of one command, each a dataclass.
        keys: option → the key that it sets; options that set none are left out.
    """
    options = [(field.name, getattr(each, field.name)) for each in flags for field in fields(each)]  # type: ignore[arg-type]
    return {keys[name]: value for name, value in options if name in keys and value not in (None, ())}
