"""What every command does around its work: logging, errors as one line, exit statuses, the command for the record."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from prunus.errors import PrunusError

__all__ = ["quoted_command", "run_command"]


def run_command(work: Callable[[], object]) -> int:
    """Run a command's work for a person or a script at a terminal.

    Warnings and errors go to stderr, one line each; results, which `work` prints itself, to stdout.

    Args:
        work: the command, without arguments.

    Returns:
        Exit status: 0 success, 1 an error that the message explains, 130 interrupted by Ctrl-C.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        work()
        sys.stdout.flush()
    except PrunusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(
            f"error: the device ran out of memory ({str(error).splitlines()[0]}). Use a smaller batch size or sequence "
            "length, dtype bfloat16, the streamed engine, or the CPU.",
            file=sys.stderr,
        )
        return 1
    except BrokenPipeError:
        # Whoever read the results has enough of them. Nothing may be written when Python flushes at its end, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # A full disk, no permission, a name too long: the message of the system names the file.
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; no output folder was left half-written", file=sys.stderr)
        return 130
    return 0


def quoted_command(program: str, words: Sequence[str]) -> str:
    """A command as somebody else would type it: absolute paths, which mean nothing elsewhere, lose their folders."""
    return " ".join([program, *(shlex.quote(Path(word).name if Path(word).is_absolute() else word) for word in words)])
