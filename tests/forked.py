"""A process of its own for what is killed, interrupted or ends itself: forked, so that nothing is imported again.

A new interpreter takes five seconds to import torch and transformers, and the tests need dozens of processes.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, or the negated signal that killed it; and what it printed."""

    status: int
    out: str
    err: str


class Forked:
    """A running process.

    Attributes:
        pid: its number.
    """

    def __init__(self, work: Callable[[], Any]):
        """Start some work; what it returns is the exit status, None that of success."""
        self._out, self._err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 (closed at its end)
        self._ended: Ended | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                status = _run(work, self._out.fileno(), self._err.fileno())
            finally:
                os._exit(status)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def poll(self) -> Ended | None:
        """How it ended; None while it runs."""
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            return self._end(status) if pid else None
        return self._ended

    def wait(self) -> Ended:
        """Wait until it ends."""
        return self._ended or self._end(os.waitpid(self.pid, 0)[1])

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Wait until something is so; the process must still run then."""
        while not reached():
            assert self.poll() is None, self.poll()
            time.sleep(0.002)
        assert self.poll() is None, self.poll()

    def said(self) -> str:
        """What it has printed so far."""
        return os.pread(self._out.fileno(), 2**20, 0).decode()

    def _end(self, status: int) -> Ended:
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        self._ended = Ended(os.waitstatus_to_exitcode(status), *texts)
        return self._ended


def forked(work: Callable[[], Any]) -> Ended:
    """Do some work in a process of its own, and wait for its end."""
    return Forked(work).wait()


def together(number: int, work: Callable[[], Any]) -> Ended:
    """Do some work in processes that find each other as those of torchrun do; how the worst one ended, and all said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}

    def one(rank: int) -> Any:
        os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return work()

    processes = [Forked(partial(one, rank)) for rank in range(number)]
    ended = [process.wait() for process in processes]
    return Ended(max(e.status for e in ended), "".join(e.out for e in ended), "".join(e.err for e in ended))


@contextmanager
def another_process(work: Callable[[], Any]) -> Iterator[int]:
    """A process, by its number, that does some work and then waits; killed without mercy at the end."""

    def wait() -> None:
        work()
        print("ready", flush=True)
        time.sleep(60)

    process = Forked(wait)
    try:
        process.wait_until(lambda: process.said() == "ready\n")
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _run(work: Callable[[], Any], out: int, err: int) -> int:
    """What an interpreter does around a program, in the child."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    # pytest has put its own in the place of these.
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    logging.getLogger().handlers.clear()  # pytest's: a command would think that its messages have a place already
    # A shell that runs the tests in the background has them ignore it, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # torch makes its pool of threads anew in a child, and fails where two threads are the first to need it.
    torch.set_num_threads(torch.get_num_threads())
    try:
        status = work() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status
