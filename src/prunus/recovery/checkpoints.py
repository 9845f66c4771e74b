"""The folder beside an output in which a training run keeps what it goes on from after a kill.

OUT.work/
    checkpoint-N/            Trainer's, complete once it holds trainer_state.json
    recovery-inputs.json     what the run was started with
    recovery-trained.json    the run is over, and only the result is left to be written
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.errors import OptionError
from prunus.files.json_file import read_json_if_whole
from prunus.files.outputs import whole_file

__all__ = ["WEIGHTS_FILE", "Checkpoints"]

#: Trainer's name for weights; here those that are trained
WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "trainer_state.json"
INPUTS_FILE = "recovery-inputs.json"
TRAINED_FILE = "recovery-trained.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class Checkpoints:
    """Checkpoints of one run.

    Args:
        out: the command's output.
        work: the folder that the user names; None for `<out>.work`.
    """

    def __init__(self, out: str | Path, work: str | Path | None = None):
        out = Path(out).expanduser()
        self.path = out.with_name(out.name + ".work") if work is None else Path(work).expanduser()

    def check(self, resume: bool, overwrite: bool) -> None:
        """Check, before any work, that what lies there and what was asked for go together.

        Raises:
            OptionError: there is nothing to go on from, or there is and nobody asked for it.
        """
        there = self._inputs_path.is_file()
        if resume and not there:
            raise OptionError(
                f"`resume` goes on with an earlier run, and {self.path} holds no checkpoints of one; leave it out, or "
                "name their folder with `work`"
            )
        if there and not resume and not overwrite:
            raise OptionError(
                f"{self.path} holds the checkpoints of a run that did not finish: go on with `resume`, or begin anew "
                "with `overwrite`"
            )
        if self._found() and not there:
            raise OptionError(
                f"{self.path} holds checkpoints that are not of a recovery run; name another folder with `work`"
            )
        if self.path.exists() and not self.path.is_dir():
            raise OptionError(f"{self.path} is a file; checkpoints need a folder of that name, or `work` another one")

    def begin(self, inputs: Mapping[str, Any], resume: bool) -> None:
        """Make the folder ready: empty, or without half-written checkpoints. For one process.

        Args:
            inputs: what the result depends on, as JSON types.
            resume: whether to go on with what is there.

        Raises:
            OptionError: what is there was made from other inputs.
        """
        if not resume:
            self.remove()
            self.path.mkdir(parents=True, exist_ok=True)
            with whole_file(self._inputs_path) as partial:
                partial.write_text(json.dumps(inputs, indent=1) + "\n", encoding="utf-8")
            return
        before = read_json_if_whole(self.path / INPUTS_FILE) or {}
        for name in [*inputs, *before]:
            if before.get(name) != inputs.get(name):
                raise OptionError(
                    f"{self.path} was begun with `{name}` {before.get(name)}, now it is {inputs.get(name)}: a run goes "
                    "on with what it was begun with. Give the same options, or begin anew with `overwrite`"
                )
        for path in self._found().values():
            if not self._is_whole(path):
                shutil.rmtree(path, ignore_errors=True)

    def last(self) -> Path | None:
        """The last complete checkpoint."""
        found = self._found()
        return next((found[step] for step in sorted(found, reverse=True) if self._is_whole(found[step])), None)

    def at(self, step: int) -> Path:
        """The weights after a step."""
        return self.path / f"checkpoint-{step}" / WEIGHTS_FILE

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write down that training is over."""
        with whole_file(self.path / TRAINED_FILE) as partial:
            partial.write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def finished(self) -> dict[str, Any] | None:
        """What `finish` wrote; None while training is not over."""
        return read_json_if_whole(self.path / TRAINED_FILE)

    def remove(self) -> None:
        """Take away what this class and Trainer put there, and the folder if nothing else is in it."""
        for path in self._found().values():
            shutil.rmtree(path, ignore_errors=True)
        for name in (INPUTS_FILE, TRAINED_FILE):
            (self.path / name).unlink(missing_ok=True)
            for half in self.path.glob(f".{name}.partial-*"):
                half.unlink()
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _found(self) -> dict[int, Path]:
        """All checkpoints by step, whole or not."""
        matches = ((path, _NAME.fullmatch(path.name)) for path in self.path.glob("checkpoint-*"))
        return {int(match[1]): path for path, match in matches if match}

    @property
    def _inputs_path(self) -> Path:
        return self.path / INPUTS_FILE

    def _is_whole(self, checkpoint: Path) -> bool:
        # Trainer writes its state last.
        return read_json_if_whole(checkpoint / STATE_FILE) is not None
