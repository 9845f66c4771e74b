"""How far a training run is, by steps or by the clock, and the learning rate that belongs there."""

from __future__ import annotations

import math

from prunus.recovery.options import Decay

__all__ = ["Pace"]

#: share of the peak that the first step gets at least: a step at a rate of 0 would be lost
FIRST_RATE = 0.1


class Pace:
    """A function steps done → factor on the learning rate, as `LambdaLR` takes it.

    All attributes are numbers: torch stores them with the scheduler, so that a run that goes on finds the clock, and
    the measurements that were due, where they were.

    Args:
        max_steps: steps of the run; None where only the clock ends it.
        max_seconds: seconds of training; None where only steps do.
        warmup: share of the run in which the rate rises in a line.
        decay: how it falls afterwards.
        marks: how many times in the run the model is measured.

    Attributes:
        seconds: time spent so far.
        reserved: time that the measurement at the end will take.
        mark: measurements that are behind.
    """

    def __init__(self, max_steps: int | None, max_seconds: float | None, warmup: float, decay: Decay, marks: int):
        self.max_steps = max_steps
        self.max_seconds = max_seconds
        self.warmup = warmup
        self.decay = decay
        self.marks = marks
        self.seconds = 0.0
        self.reserved = 0.0
        self.mark = 0

    def __call__(self, steps: int) -> float:
        """Factor on the learning rate of the step after `steps` steps."""
        return self.factor(self.share(steps, ahead=0.5))

    def share(self, steps: int, ahead: float = 0.0) -> float:
        """How much of the run is behind after `steps` steps, in [0, 1].

        Args:
            steps: steps done.
            ahead: look so many steps ahead.
        """
        by_steps = (steps + ahead) / self.max_steps if self.max_steps else 0.0
        return min(1.0, max(by_steps, self._by_clock(steps, ahead)))

    def _by_clock(self, steps: int, ahead: float) -> float:
        """How much of the time is gone, from 0; a step that is ahead takes as long as those before on average."""
        if not self.max_seconds:
            return 0.0
        per_step = self.seconds / steps if steps else 0.0
        return (self.seconds + ahead * per_step) / max(self.max_seconds - self.reserved, 1e-9)

    def factor(self, share: float) -> float:
        """The learning rate at a share of the run, relative to its peak."""
        if share < self.warmup:
            return max(FIRST_RATE, share / self.warmup)
        left = (1 - share) / (1 - self.warmup)
        if self.decay == "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        return left if self.decay == "linear" else 1.0

    def is_over(self, steps: int) -> bool:
        """Whether the run ends after `steps` steps: they are all done, or the time left is too short for another."""
        if self.max_steps and steps >= self.max_steps:
            return True
        return self._by_clock(steps, ahead=1.0) >= 1

    def passes_mark(self, steps: int) -> bool:
        """Whether a measurement is due after `steps` steps; each is due once."""
        due = self.marks if self.is_over(steps) else int(self.share(steps) * self.marks + 1e-9)
        passed = due > self.mark
        self.mark = max(due, self.mark)
        return passed
