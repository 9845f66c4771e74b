"""What a recipe says about training between and after the rounds of a cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from prunus.calibration.loading import check_counts
from prunus.checkpoint import resolve_device
from prunus.errors import OptionError
from prunus.option_values import check_whole
from prunus.pipeline.options import CalibrationOptions
from prunus.pipeline.rounds import Round
from prunus.recovery.job import PlaceOptions, RecoveryJob
from prunus.recovery.options import RecoveryOptions, TextOptions
from prunus.recovery.step import sequences_per_step
from prunus.sweep.engine import ModelOptions

__all__ = ["RecoveryRounds"]

#: sequences that the dense model writes where nothing says how many
WRITTEN_SAMPLES = 256


@dataclass(frozen=True)
class RecoveryRounds:
    """Training after each round of a cut, within one budget; see `prunus recover` for a model that is cut already.

    Attributes:
        minutes: minutes of training, in all rounds together; with neither limit nothing is trained.
        tokens: tokens to train on, in all rounds together; with both limits, whichever comes first.
        before_last: share of the budget for the rounds before the last, in equal parts; the last one has the rest.
        text: sources to train on, as those of `calibration.source`; by default the same.
        samples: train on at most this many sequences; by default as many as `tokens` make, without that as many as the
            text has, or 256 where the model writes it.
        seq_len: tokens per sequence; by default as many as for calibration.
        held_out: sequences that are not trained on and choose the best checkpoint of each round.
        training: how. Its own limits are not used.
    """

    minutes: float | None = None
    tokens: int | None = None
    before_last: float = 1 / 3
    text: tuple[str, ...] | None = None
    samples: int | None = None
    seq_len: int | None = None
    held_out: int = 16
    training: RecoveryOptions = field(default_factory=RecoveryOptions)

    def __post_init__(self) -> None:
        if self.minutes is not None and not (self.minutes > 0 and math.isfinite(self.minutes)):
            raise OptionError(f"`recovery.minutes` is {self.minutes}; it must be a number above 0")
        if self.tokens is not None:
            check_whole("recovery.tokens", self.tokens)
        if not 0 < self.before_last < 1:
            raise OptionError(f"`recovery.before_last` is {self.before_last}; it is a share between 0 and 1")
        if isinstance(self.text, str):
            object.__setattr__(self, "text", (self.text,))
        for name in ("max_steps", "max_minutes"):
            if getattr(self.training, name) is not None:
                raise OptionError(
                    f"`recovery.training.{name}` limits one round; give `recovery.minutes` or `recovery.tokens`, which "
                    "limit all of them"
                )
        if self.seq_len is not None:
            check_counts(1, self.seq_len)
        TextOptions(self.text or (), self.samples, self.seq_len or 2, self.held_out)

    def __bool__(self) -> bool:
        """Whether anything is trained."""
        return self.minutes is not None or self.tokens is not None

    def share(self, step: Round, of: int) -> float:
        """Share of the budget that one of `of` rounds has."""
        if of == 1:
            return 1.0
        return 1 - self.before_last if step.last else self.before_last / (of - 1)

    def job(
        self, step: Round, of: int, model: str, dense: str, calibration: CalibrationOptions, run: ModelOptions
    ) -> RecoveryJob:
        """The training of one of `of` rounds.

        Sequences are the same in all rounds, so that those that are held out are never trained on; each round goes
        through the others in an order of its own.

        Args:
            step: the round.
            of: number of rounds.
            model: folder of what the round left.
            dense: the dense model, folder or Hub id.
            calibration: sources, length, seed and columns that are not named here; the length is one that was decided.
            run: where.
        """
        sources, share, options = self.text or calibration.source, self.share(step, of), self.training
        seq_len = self.seq_len or calibration.seq_len
        assert seq_len is not None
        text = TextOptions(
            sources,
            self.samples,
            seq_len,
            self.held_out,
            calibration.seed,
            calibration.seed + step.number,
            calibration.text_column,
            calibration.chat_column,
        )
        if text.written and text.samples is None and self.tokens is None:
            text = replace(text, samples=WRITTEN_SAMPLES)
        steps, batch = None, sequences_per_step(options, resolve_device(run.device).type)
        if self.tokens is not None:
            steps = max(1, round(share * self.tokens / (batch * seq_len)))
        if text.samples is None and self.tokens is not None:
            # As many in every round, or other sequences would be held out.
            text = replace(text, samples=max(batch, math.ceil(self.tokens / seq_len)))
        limits = replace(options, max_steps=steps, max_minutes=self.minutes and self.minutes * share)
        return RecoveryJob(model, dense, text, limits, PlaceOptions(run.device, run.max_memory))
