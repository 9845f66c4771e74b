"""The stages of a long job: which one it is at, how long all of it will take, and what each stage took.

    stages = Stages({"loading": 2.0, "scoring": 40.0, "repair": 60.0}, "cpu", progress=True)
    with stages.enter("scoring"):  # 2 of 3: scoring, about 2 min left
        ...
    stages.costs["scoring"].seconds

Each stage is a line on stderr. Where stderr is no terminal, so that bars are not shown, a further line a minute says
how far the stage is.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from prunus.machine.bars import innermost
from prunus.machine.metering import Cost, metered
from prunus.machine.processes import is_first

__all__ = ["Stages", "show_seconds"]

#: seconds between two lines where there are no bars
BETWEEN_LINES = 60.0
#: share of a job that has to be over before its pace tells anything of the rest: reading files does not
TELLING = 0.05


class Stages:
    """The stages of one job, entered one after another.

    Args:
        names: of all stages, in order; as a mapping, with the seconds that each is expected to take.
        device: where the job runs, whose memory is measured.
        progress: whether to print.

    Attributes:
        costs: what each stage took that is over.
    """

    def __init__(
        self, names: Iterable[str] | Mapping[str, float], device: torch.device | str = "cpu", progress: bool = True
    ):
        self._expected = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names)
        self._device = device
        self.progress = progress
        self.costs: dict[str, Cost] = {}
        self._inside = False

    def __contains__(self, name: str) -> bool:
        return name in self._expected

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """Say that a stage begins, and measure it.

        Args:
            name: of the stage. One that is entered inside another is a part of it, and need not be among the names.
        """
        if self._inside:
            self._say(f"  {name}")
            with self._told_every_minute(name):
                yield
            return
        number = list(self._expected).index(name) + 1
        left = self._seconds_left(name)
        self._say(f"{number} of {len(self._expected)}: {name}" + (f", {show_seconds(left)} left" if left else ""))
        self._inside = True
        try:
            with metered(self._device) as cost, self._told_every_minute(name):
                yield
        finally:
            self._inside = False
        self.costs[name] = cost

    def _seconds_left(self, name: str) -> float | None:
        """Seconds from the beginning of a stage to the end: as expected, at the pace of the stages before it."""
        names = list(self._expected)
        ahead = [self._expected[each] for each in names[names.index(name) :]]
        if None in ahead:
            return None
        left = sum(seconds or 0.0 for seconds in ahead)
        expected = sum(self._expected[each] or 0.0 for each in self.costs)
        if expected < TELLING * (expected + left):
            return left
        return left * sum(cost.seconds for cost in self.costs.values()) / expected

    @contextmanager
    def _told_every_minute(self, name: str) -> Iterator[None]:
        if not self.progress or not is_first() or sys.stderr.isatty():
            yield
            return
        begun, over = time.monotonic(), threading.Event()

        def tell() -> None:
            while not over.wait(BETWEEN_LINES):
                self._say(_how_far(name, time.monotonic() - begun))

        teller = threading.Thread(target=tell, name="prunus-progress", daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()

    def _say(self, line: str) -> None:
        if self.progress and is_first():
            print(line, file=sys.stderr, flush=True)


def _how_far(name: str, seconds: float) -> str:
    bar = innermost()
    if bar is None:
        return f"{name}: since {show_seconds(seconds)}"
    left = bar.seconds_left
    what = name if bar.name in name else f"{name}, {bar.name}"
    line = f"{what}: {bar.done:,} of {bar.total:,}"
    return line if left is None else f"{line}, {show_seconds(left)} left"


def show_seconds(seconds: float) -> str:
    """A time for people: 8 s, 3 min, 2 h 5 min."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
