"""Options of `prunus recover`: a file, single settings, and the settings used most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Group, Parameter

from prunus.cli.job_flags import UNLISTED

__all__ = ["KEYS", "FileFlags", "PlaceFlags", "TextFlags", "TrainingFlags"]

#: option → the key that it sets
KEYS = {
    "model": "model",
    "teacher": "teacher",
    "text": "text.source",
    "samples": "text.samples",
    "seq_len": "text.seq_len",
    "seed": "text.seed",
    "chat_column": "text.chat_column",
    "max_steps": "recovery.max_steps",
    "max_minutes": "recovery.max_minutes",
    "train": "recovery.train",
    "learning_rate": "recovery.learning_rate",
    "batch_size": "recovery.batch_size",
    "device": "run.device",
    "max_memory": "run.max_memory",
}


@dataclass(frozen=True)
class _File:
    """All settings.

    Attributes:
        recipe: a YAML file, such as prunus/recovery.yaml of an earlier result.
        set: any other setting, e.g. `--set recovery.lora_rank=16`; `prunus recipe --command recover` lists the keys.
    """

    recipe: str | None = None
    set: Annotated[tuple[str, ...], Parameter(negative="")] = ()


@dataclass(frozen=True)
class _Text:
    """The text to train on.

    Attributes:
        text: a .txt, .jsonl or .parquet file; `mixture` of several kinds, c4 or another data set of the Hub; `default`
            for the text that ships with Python; `self` for text that the dense model writes. Repeat it for several,
            which share the sequences equally, or by weight: `--text FILE:2 --text self`. Required, unless a recipe
            names one.
        samples: train on at most this many sequences; by default as many as the steps need, or as the text has.
        seq_len: tokens per sequence; 512 by default.
        seed: decides which sequences are drawn, their order, and how adapters begin.
        chat_column: column that holds conversations in place of text.
    """

    text: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    samples: Annotated[int | None, UNLISTED] = None
    seq_len: int | None = None
    seed: int | None = None
    chat_column: Annotated[str | None, UNLISTED] = None


@dataclass(frozen=True)
class _Training:
    """How the pruned model is trained.

    Attributes:
        max_steps: optimizer steps.
        max_minutes: stop after this many minutes of training. With neither limit, one pass over the text; with both,
            whichever comes first.
        train: layers = all weights but the embeddings, the default; lora = adapters of low rank on every projection,
            merged at the end; full = all weights.
        learning_rate: peak learning rate; by default 1e-3 for lora, and for weights by the model's width and the tokens
            per step.
        batch_size: sequences per optimizer step, over all processes; by default 1 on a CPU, 4 elsewhere.
    """

    max_steps: int | None = None
    max_minutes: float | None = None
    train: str | None = None
    learning_rate: float | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class _Place:
    """Where the model is trained.

    Attributes:
        device: auto, cpu, cuda or mps; auto is the first of cuda, mps, cpu that there is.
        max_memory: memory that each process may use, e.g. 8GB. Jobs estimated to exceed it are rejected, naming the
            smallest sufficient limit.
    """

    device: str | None = None
    max_memory: str | None = None


FileFlags = Annotated[_File, Parameter(name="*", group=Group("Recipe", sort_key=1))]
TextFlags = Annotated[_Text, Parameter(name="*", group=Group("Text", sort_key=2))]
TrainingFlags = Annotated[_Training, Parameter(name="*", group=Group("Training", sort_key=3))]
PlaceFlags = Annotated[_Place, Parameter(name="*", group=Group("Model", sort_key=4))]

NO_FILE, NO_TEXT, NO_TRAINING, NO_PLACE = _File(), _Text(), _Training(), _Place()
