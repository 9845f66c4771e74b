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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from prunus.errors import CheckpointError, OptionError
from prunus.files.json_file import Count, FileContent, Number, check_content, read_json, read_json_if_whole
from prunus.files.outputs import whole_file
from prunus.files.user_path import expanded

__all__ = ["WEIGHTS_FILE", "Checkpoints", "check_same", "readable"]

#: Trainer's name for weights; here those that are trained
WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "trainer_state.json"
INPUTS_FILE = "recovery-inputs.json"
TRAINED_FILE = "recovery-trained.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class _TrainedContent(FileContent):
    steps: Count
    best_step: Count
    seconds: Annotated[Number, Field(ge=0)]
    before: Number
    dense: Number | None
    trained_parameters: Count
    history: list[dict[str, Any]]
    training_losses: list[dict[str, Any]]


class _Logged(FileContent):
    step: Count
    eval_loss: Number | None = None
    loss: Number | None = None


class _Callbacks(FileContent):
    #: Trainer writes its control under this name again, and fails where it is not there
    TrainerControl: dict[str, Any]


class _StateContent(FileContent):
    """What Trainer's state must hold for a run to go on."""

    global_step: Count
    max_steps: Count
    epoch: Number
    log_history: list[_Logged]
    best_metric: Number | None
    best_global_step: Count | None
    best_model_checkpoint: str | None
    total_flos: Number
    num_input_tokens_seen: Count
    num_train_epochs: Count
    train_batch_size: Count | None
    logging_steps: Number
    eval_steps: Number
    save_steps: Number
    is_local_process_zero: bool
    is_world_process_zero: bool
    is_hyper_param_search: bool
    stateful_callbacks: _Callbacks


@contextmanager
def readable(path: str | Path | None) -> Iterator[None]:
    """Name the checkpoint in whatever goes wrong while it is read.

    Raises:
        CheckpointError: in the place of any other exception.
    """
    try:
        yield
    except Exception as error:  # of torch, safetensors, pickle, json or Trainer: a damaged file ends in any of them
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {str(error).strip()[:200]}); remove that checkpoint to go "
            "on from the one before it, or all of that folder to begin anew"
        ) from error


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Check that a run goes on with what it was begun with.

    Args:
        before: what it was begun with.
        now: what is given now.
        path: where it was begun.

    Raises:
        OptionError: something differs.
    """
    for name in [*now, *before]:
        old, new = ("none" if value is None else value for value in (before.get(name), now.get(name)))
        if old != new:
            raise OptionError(
                f"{path} was begun with `{name}` {old}, now it is {new}: a run goes on with what it was begun with. "
                "Give the same options, or take what is there away with `overwrite`"
            )


class Checkpoints:
    """Checkpoints of one run.

    Args:
        out: the command's output.
        work: the folder that the user names; None for `<out>.work`.
    """

    def __init__(self, out: str | Path, work: str | Path | None = None):
        out = expanded(out)
        self.path = out.with_name(out.name + ".work") if work is None else expanded(work)

    def check(self) -> None:
        """Check, before any work, that nothing else lies there.

        Raises:
            OptionError: the folder is a file, or holds checkpoints of another program.
        """
        if self._found() and not self._inputs_path.is_file():
            raise OptionError(
                f"{self.path} holds checkpoints that are not of a recovery run; name another folder with `work`"
            )
        if self.path.exists() and not self.path.is_dir():
            raise OptionError(f"{self.path} is a file; checkpoints need a folder of that name, or `work` another one")

    def begin(self, inputs: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder ready: empty, or of a run from the same inputs without half-written checkpoints.

        For one process.

        Args:
            inputs: what the result depends on, as JSON types.
            overwrite: take away what is there from other inputs.

        Raises:
            OptionError: what is there was made from other inputs.
        """
        before = read_json_if_whole(self._inputs_path)
        if before is None and self._inputs_path.is_file() and not overwrite:
            raise OptionError(f"{self._inputs_path} is damaged; remove {self.path} to begin anew")
        if before is None or (overwrite and before != inputs):
            self.remove()
            self.path.mkdir(parents=True, exist_ok=True)
            with whole_file(self._inputs_path) as partial:
                partial.write_text(json.dumps(inputs, indent=1) + "\n", encoding="utf-8")
            return
        check_same(before, inputs, self.path)
        for path in self._found().values():
            if not self._is_whole(path):
                shutil.rmtree(path, ignore_errors=True)

    def last(self) -> Path | None:
        """The last complete checkpoint.

        Raises:
            CheckpointError: its state is damaged.
        """
        found = self._found()
        checkpoint = next((found[step] for step in sorted(found, reverse=True) if self._is_whole(found[step])), None)
        if checkpoint is not None:
            from transformers import TrainerState

            path = checkpoint / STATE_FILE
            step = check_content(_StateContent, read_json(path), str(path)).global_step
            with readable(path):  # Trainer itself fails at a field that it does not know, and at a byte order mark
                TrainerState.load_from_json(str(path))
            if found.get(step) != checkpoint:
                raise CheckpointError(
                    f"{path}: global_step is {step}, which is not its folder's; remove that checkpoint"
                )
        return checkpoint

    def at(self, step: int) -> Path:
        """The weights after a step."""
        return self.path / f"checkpoint-{step}" / WEIGHTS_FILE

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write down that training is over."""
        with whole_file(self.path / TRAINED_FILE) as partial:
            partial.write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def finished(self) -> dict[str, Any] | None:
        """What `finish` wrote; None while training is not over.

        Raises:
            CheckpointError: it is damaged, or names weights that are not there.
        """
        path = self.path / TRAINED_FILE
        if not path.is_file():
            return None
        trained: dict[str, Any] = read_json(path)
        if check_content(_TrainedContent, trained, str(path)).best_step and not self.at(trained["best_step"]).is_file():
            raise CheckpointError(
                f"{path} names {self.at(trained['best_step'])}, which is not there; remove the folder to begin anew"
            )
        return trained

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
