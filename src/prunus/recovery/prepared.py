"""Everything about a recovery that is checked, and can be known, before weights are read."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.calibration import Calibration
from prunus.checkpoint import load_model, locate, resolve_device
from prunus.checkpoint.block_formats import format_in
from prunus.checkpoint.folder import read_small_files
from prunus.errors import OptionError, UnsupportedModelError
from prunus.installing import install_command
from prunus.machine.processes import is_first
from prunus.model.tokens import check_seq_len, check_token_ids
from prunus.recovery.card import card_without_figures
from prunus.recovery.job import RecoveryJob
from prunus.recovery.memory import check_memory
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.record import trainings_in
from prunus.recovery.step import Step
from prunus.recovery.teacher import bases_of, check_vocabulary, find_teacher
from prunus.recovery.text import MOST_SAMPLES, load_sequences, unwritten_sequences, wanted_sequences
from prunus.sweep.engine import model_name

__all__ = ["Prepared", "check_plain", "checkpoint_share", "require_packages", "training_device"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A recovery job with everything that it leaves open decided.

    Attributes:
        job: what was asked for.
        folder: of the pruned model.
        tokenizer: its tokenizer.
        teacher: folder of the dense model; None where the loss needs none.
        teacher_name: what a record calls it.
        writer: folder of the dense model; None where it writes none of the text.
        train_on: sequences to train on.
        held_out: sequences to measure on.
        steps: optimizer steps; None where only the clock ends the run.
        device: where.
        step: how large a step is.
    """

    job: RecoveryJob
    folder: Path
    tokenizer: Any
    teacher: Path | None
    teacher_name: str | None
    writer: Path | None
    train_on: Calibration
    held_out: Calibration
    steps: int | None
    device: torch.device
    step: Step

    @classmethod
    def of(
        cls,
        job: RecoveryJob,
        beside: Path | None = None,
        *,
        apart: torch.Tensor | None = None,
        progress: bool = True,
    ) -> Prepared:
        """Check what can be checked without weights, and draw the text, or have the dense model write it.

        Args:
            job: what is asked for.
            beside: folder in which text that is written is kept, and found again; None: none is written, as for a
                forecast.
            apart: sequences that nothing of the text may have in common with, see `prunus.recovery.text`.
            progress: show a bar on a terminal while text is written.

        Raises:
            PrunusError: whatever is wrong with options, models or text.
        """
        device, options = training_device(job.run.device), job.recovery
        folder = locate(job.model)
        config, tokenizer = read_small_files(folder)
        check_plain(folder)
        check_seq_len(config, job.text.seq_len)
        step = Step.of(options, job.text.seq_len, config, device)
        # Or the result of the training could not be described.
        card_without_figures(folder)
        trainings_in(folder)
        dense, name = _dense(job, folder, config, tokenizer)
        teacher, writer = dense if options.needs_teacher else None, dense if job.text.written else None
        tokens = step.micro_batch * job.text.seq_len
        check_memory(job, folder, teacher, device, bfloat16=step.bfloat16, tokens=tokens)
        train_on, held_out = _sequences(
            job, step.batch_size, config, tokenizer, writer, device, beside, apart, progress
        )
        steps = options.max_steps
        if steps is None and options.max_minutes is None:
            steps = len(train_on) // step.batch_size
        named = name if teacher is not None else None
        return cls(job, folder, tokenizer, teacher, named, writer, train_on, held_out, steps, device, step)

    @property
    def reads(self) -> tuple[Path, ...]:
        """Folders of dense models that are read, which no output may replace."""
        return tuple({folder for folder in (self.teacher, self.writer) if folder is not None})

    @property
    def expected_bytes(self) -> int:
        """Room that result and checkpoints take."""
        weights = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        return weights * (1 + checkpoint_share(self.job.recovery))


def require_packages() -> None:
    """Check that the packages of training are installed.

    Raises:
        OptionError: naming those that are not, and how to get them.
    """
    missing = [name for name in ("accelerate", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            f"recovery needs {' and '.join(missing)}, not installed here. Run: {install_command(*missing)}"
        )


def _dense(job: RecoveryJob, folder: Path, config: Any, tokenizer: Any) -> tuple[Path | None, str | None]:
    """The dense model's folder and name, if it teaches or writes."""
    if not (job.recovery.needs_teacher or job.text.written):
        return None, None
    if job.teacher is not None:
        dense, name = locate(job.teacher), model_name(job.teacher)
    else:
        dense, name = find_teacher(folder)
        if name != (first := bases_of(folder)[0]):
            logger.warning(
                "%s was first cut from %s, which is not here: it learns from %s, which was cut itself. Name a better "
                "one with `teacher`",
                *(folder, first, name),
            )
    check_plain(dense)
    dense_config, dense_tokenizer = read_small_files(dense)
    check_vocabulary(config, tokenizer, dense_config, dense_tokenizer, str(dense))
    check_seq_len(dense_config, job.text.seq_len)
    return dense, name


def _sequences(
    job: RecoveryJob,
    batch_size: int,
    config: Any,
    tokenizer: Any,
    writer: Path | None,
    device: torch.device,
    beside: Path | None,
    apart: torch.Tensor | None,
    progress: bool,
) -> tuple[Calibration, Calibration]:
    """Sequences to train on, and those that are held out, checked against the model."""
    options = job.recovery
    needed = options.max_steps * batch_size if options.max_steps else None
    wanted_sequences(job.text, needed)  # before a model is read that would write them
    if writer is not None and beside is None:
        return unwritten_sequences(job.text, needed)
    how: dict[str, Any] = {"keep": beside, "apart": apart, "progress": progress}
    if writer is not None:
        how["writer"] = load_model(str(writer), device=device)[0]
    train_on, held_out = load_sequences(job.text, tokenizer, needed, batch_size, **how)
    for part in (train_on, held_out):
        check_token_ids(config, part.input_ids)
    if len(train_on) == MOST_SAMPLES and job.text.samples is None and is_first():
        logger.warning("training goes through %d sequences of the text, the most where no number is said", MOST_SAMPLES)
    return train_on, held_out


def checkpoint_share(options: RecoveryOptions) -> int:
    """Room that two checkpoints take, in multiples of the model: weights and both moments, in float32, or adapters."""
    return 2 * (1 if options.train == "lora" else 6)


def check_plain(folder: Path) -> None:
    """Check that the weights in a folder can be trained, or learned from: that they are numbers by themselves.

    Raises:
        UnsupportedModelError: they are stored in blocks.
    """
    if (form := format_in(folder)) is not None:
        raise UnsupportedModelError(
            f"the weights in {folder} are stored in {form.title}, and training needs them as they are in the bf16 "
            "checkpoint: prune that, and train what is left of it"
        )


def training_device(device: str) -> torch.device:
    """Where a model is trained: a device of a kind, of which each process has its own.

    Raises:
        OptionError: it is named by its number.
    """
    place = resolve_device(device)
    if place.index is not None:
        raise OptionError(
            f"`device` {device!r}: recovery takes a kind of device. Choose one by CUDA_VISIBLE_DEVICES={place.index} "
            "and `device=cuda`"
        )
    # Of several processes each has been given its own.
    return torch.device("cuda", torch.cuda.current_device()) if place.type == "cuda" else place
