"""What a user decides about recovery training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from prunus.calibration.loading import SELF_SOURCE, check_counts
from prunus.calibration.sources import Source, read_sources
from prunus.errors import OptionError
from prunus.option_values import check_seed, check_whole

__all__ = ["Decay", "Precision", "RecoveryOptions", "TextOptions", "Trained"]

Trained = Literal["layers", "lora", "full"]
Decay = Literal["linear", "cosine", "constant"]
Precision = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True)
class TextOptions:
    """The text to train on.

    Attributes:
        source: a .txt, .jsonl or .parquet file; `mixture` of several kinds, c4 or another data set of the Hub;
            `default` for the text that ships with Python; `self` for text that the dense model writes. Several of them
            share the sequences, equally or by weight: `[FILE:2, self]`.
        samples: train on at most this many sequences; by default as many as the steps need, or as the text has. `self`
            needs it, or `recovery.max_steps`: it has no end.
        seq_len: tokens per sequence.
        held_out: sequences that are not trained on and choose the best checkpoint: of a file its last ones, in the
            order that `seed` draws.
        seed: decides which sequences are drawn, their order, and how adapters begin.
        order_seed: decides the order alone; by default `seed`.
        text_column: column that holds the text in .jsonl and .parquet files.
        chat_column: column that holds conversations in place of text: lists of {"role": …, "content": …} or of
            ShareGPT's {"from": …, "value": …}, or the instruction of Alpaca's rows; they become text by the tokenizer's
            chat template.
    """

    source: tuple[str, ...]
    samples: int | None = None
    seq_len: int = 512
    held_out: int = 16
    seed: int = 0
    order_seed: int | None = None
    text_column: str = "text"
    chat_column: str | None = None

    def __post_init__(self) -> None:
        check_counts(1 if self.samples is None else self.samples, self.seq_len)
        check_whole("held_out", self.held_out, why="without held-out sequences no checkpoint is the best")
        for name in ("seed", "order_seed"):
            if (seed := getattr(self, name)) is not None:
                check_seed(name, seed)
                if not 0 <= seed < 2**32:
                    raise OptionError(f"`{name}` is {seed}; training seeds NumPy, too, which takes 0 to {2**32 - 1:,}")
        if isinstance(self.source, str):
            object.__setattr__(self, "source", (self.source,) if self.source else ())
        if self.source:
            read_sources(self.source)

    @property
    def order(self) -> int:
        """The seed of the order."""
        return self.seed if self.order_seed is None else self.order_seed

    @property
    def sources(self) -> list[Source]:
        """The sources with their weights; none where no text is named yet."""
        return read_sources(self.source) if self.source else []

    @property
    def names(self) -> list[str]:
        """The sources without their weights."""
        return [source.name for source in self.sources]

    @property
    def written(self) -> float:
        """Share of the sequences that the dense model writes."""
        total = sum(source.weight for source in self.sources)
        return sum(source.weight for source in self.sources if source.name == SELF_SOURCE) / (total or 1.0)


@dataclass(frozen=True)
class RecoveryOptions:
    """How the pruned model is trained.

    Attributes:
        max_steps: optimizer steps.
        max_minutes: stop after this many minutes of training; the learning rate follows the clock. With neither limit,
            one pass over the text; with both, whichever comes first.
        train: layers = all weights but the embeddings; lora = adapters of low rank on every projection, merged at the
            end; full = all weights.
        lora_rank: rank of the adapters.
        lora_alpha: LoRA's alpha: adapters are scaled by alpha / rank; by default twice the rank.
        learning_rate: peak learning rate; by default 1e-3 for lora, and for weights 0.35 divided by the hidden size in
            steps of 2,048 tokens, in others times the root of tokens / 2,048, at most 1e-3.
        batch_size: sequences per optimizer step, over all processes; by default 1 on a CPU, 4 elsewhere, and at least
            one per process.
        micro_batch: sequences per forward pass; by default at most 2 on a CPU, at most 8 elsewhere. Fewer
            take less memory.
        kl_weight: share of the distillation loss: KL divergence of the model's next-token distribution from that of
            the dense model.
        ce_weight: share of the next-token loss on the text itself.
        temperature: temperature of both distributions in the distillation loss.
        vocabulary: this many entries of the vocabulary, drawn anew for every forward pass, stand for all of it in the
            loss; null = all of it. Held-out losses are of all.
        warmup: share of the run in which the learning rate rises.
        decay: how the learning rate falls after the warm-up: to 0 along a line or a cosine, or not at all.
        weight_decay: weight decay of AdamW.
        max_grad_norm: gradients are scaled down to this norm.
        checkpoints: how many times in the run the held-out loss is measured and a checkpoint is written.
        gradient_checkpointing: compute activations again in the backward pass: less memory, a third more time.
        precision: dtype of forward and backward passes; weights that are trained are float32 in any case. auto is
            bfloat16 where the model is in half precision and that is not slow here.
    """

    max_steps: int | None = None
    max_minutes: float | None = None
    train: Trained = "layers"
    lora_rank: int = 32
    lora_alpha: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    kl_weight: float = 0.5
    ce_weight: float = 0.5
    temperature: float = 1.0
    vocabulary: int | None = 8192
    warmup: float = 0.05
    decay: Decay = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpoints: int = 10
    gradient_checkpointing: bool = False
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for name in ("max_steps", "lora_rank", "batch_size", "micro_batch", "vocabulary", "checkpoints"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value)
        for name in ("max_minutes", "lora_alpha", "learning_rate", "temperature", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise OptionError(f"`{name}` is {value}; it must be a number above 0")
        for name in ("kl_weight", "ce_weight", "weight_decay"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise OptionError(f"`{name}` is {value}; it must be a number of at least 0")
        if not self.kl_weight + self.ce_weight:
            raise OptionError("`kl_weight` and `ce_weight` are both 0: there is nothing to learn from")
        if not 0 <= self.warmup < 1:
            raise OptionError(f"`warmup` is {self.warmup}; it is a share of the run, from 0 to below 1")
        if self.train != "lora" and self.lora_alpha is not None:
            raise OptionError(f"`lora_alpha` goes with `train=lora`, and `train` is {self.train}; leave it out")
        if self.micro_batch is not None and self.batch_size is not None and self.batch_size % self.micro_batch:
            raise OptionError(f"`micro_batch` is {self.micro_batch}; it must divide `batch_size`, {self.batch_size}")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss asks for the dense model."""
        return bool(self.kl_weight)

    @property
    def alpha(self) -> float:
        """The adapters' factor, times the rank."""
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * self.lora_rank
