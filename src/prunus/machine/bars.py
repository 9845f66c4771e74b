"""Progress bars on stderr, on a terminal; elsewhere only a count that `prunus.machine.stages` reads out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

__all__ = ["Bar", "innermost", "tracked"]

T = TypeVar("T")

#: the bars that are open, the innermost last; like the terminal, they are the process' own
_open: list[Bar] = []


class Bar:
    """A bar, as a context.

    Args:
        name: what is being done, as the docs call it.
        total: how many units there are to do.
        unit: of what is counted.
        progress: whether to show it, if stderr is a terminal.

    Attributes:
        name: as given.
        total: as given.
        unit: as given.
        done: units so far.
    """

    def __init__(self, name: str, *, total: int, unit: str, progress: bool = True):
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self._resumed, self._since = 0, time.monotonic()
        self._shown = tqdm(total=total, desc=name, unit=unit, disable=None if progress else True)

    def __enter__(self) -> Self:
        _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.remove(self)
        self._shown.close()

    def update(self, count: int = 1) -> None:
        """Count units as done."""
        self.done += count
        self._shown.update(count)

    def resume(self, count: int) -> None:
        """Count units as done that an earlier run did: the time left is not told by them."""
        self.update(count)
        self._resumed, self._since = self.done, time.monotonic()

    def note(self, text: str) -> None:
        """Show a text behind the bar."""
        self._shown.set_postfix_str(text)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all is done, at the pace so far; None before the first unit."""
        done = self.done - self._resumed
        return (time.monotonic() - self._since) / done * (self.total - self.done) if done > 0 else None


def tracked(items: Iterable[T], name: str, *, total: int, unit: str, progress: bool = True) -> Iterator[T]:
    """The items, with a bar that counts those that have been worked on."""
    with Bar(name, total=total, unit=unit, progress=progress) as bar:
        for item in items:
            yield item
            bar.update()


def innermost() -> Bar | None:
    """The bar that was opened last and is open still."""
    return _open[-1] if _open else None
