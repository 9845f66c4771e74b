"""What every command does around its work: logging, errors as one line, exit statuses, the command for the record."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from prunus.errors import PrunusError
from prunus.escaping import printable, terminal_line, terminal_text
from prunus.option_names import in_flags

__all__ = ["quiet_transformers", "quoted_command", "run_command", "say", "show_error"]

Flags = Callable[[], Mapping[str, str]]


def run_command(work: Callable[[], object], flags: Flags = dict) -> int:
    """Run a command's work for a person or a script at a terminal.

    Warnings and errors go to stderr, one line each; results, which `work` prints itself, to stdout.

    Args:
        work: the command, without arguments.
        flags: gives the flag of an option by the option's name in Python, so that messages name what was typed.

    Returns:
        Exit status: 0 success, 1 an error that the message explains, 130 interrupted by Ctrl-C.
    """
    _make_streams_writable()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(flags))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    sys.excepthook = _show_crash
    try:
        work()
        sys.stdout.flush()
    except PrunusError as error:
        show_error(in_flags(str(error), flags()))
        return 1
    except BrokenPipeError:
        # Whoever read the results has enough of them.
        _drop_what_is_left()
        return 1
    except OSError as error:
        # A full disk, no permission, a name too long: the message of the system names the file.
        show_error(error)
        _drop_what_is_left()
        return 1
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        message = (
            f"the device ran out of memory ({reason}). Use a smaller `batch_size` or `seq_len`, `dtype=bfloat16`, the "
            "streamed engine, or the CPU."
        )
        show_error(in_flags(message, flags()))
        return 1
    except KeyboardInterrupt:
        print("interrupted; no output folder was left half-written", file=sys.stderr)
        return 130
    return 0


def say(text: object) -> None:
    """Print a text for people on stdout, whatever is in it."""
    print(terminal_text(text))


def show_error(message: object) -> None:
    """Print an error on stderr, on one line, whatever is in it."""
    print(f"error: {terminal_line(message)}", file=sys.stderr)


def quiet_transformers() -> None:
    """Keep the messages and progress bars of transformers off the terminal; loading has errors of our own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _make_streams_writable() -> None:
    """Have results and messages go out whatever the terminal is, and nowhere if it is closed (`>&-`)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
        elif hasattr(stream, "reconfigure"):
            # What an encoding lacks is written as \\u2192: tables have arrows, file names may be no text at all.
            stream.reconfigure(errors="backslashreplace")


def _drop_what_is_left() -> None:
    """Have Python not try once more, when it ends, to write results that nobody could be given."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quoted_command(program: str, words: Sequence[str]) -> str:
    """A command as somebody else would type it: absolute paths, which mean nothing elsewhere, lose their folders."""
    return " ".join([program, *(_quoted(Path(word).name if Path(word).is_absolute() else word) for word in words)])


def _quoted(word: str) -> str:
    if printable(word) == word and "\n" not in word:
        return shlex.quote(word)
    # Line breaks, control characters and bytes that are no UTF-8, in the one form of quotes that is a single line.
    plain = set(range(0x20, 0x7F)) - set(b"\\'")
    return "$'" + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(word)) + "'"


def _is_out_of_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _show_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python prints of an error that nobody expected, with what the error quotes made safe."""
    print(terminal_text("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


class _Formatter(logging.Formatter):
    def __init__(self, flags: Flags):
        super().__init__("%(levelname)s: %(message)s")
        self._flags = flags

    def formatMessage(self, record: logging.LogRecord) -> str:
        return terminal_line(in_flags(super().formatMessage(record), self._flags()))

    def formatException(self, ei: Any) -> str:
        return terminal_text(super().formatException(ei))
