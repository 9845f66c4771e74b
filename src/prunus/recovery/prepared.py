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
from prunus.checkpoint.folder import read_small_files
from prunus.errors import OptionError
from prunus.installing import install_command
from prunus.machine.processes import is_first
from prunus.model.tokens import check_seq_len, check_token_ids
from prunus.recovery.card import card_without_figures
from prunus.recovery.job import RecoveryJob
from prunus.recovery.memory import check_memory
from prunus.recovery.step import Step
from prunus.recovery.teacher import check_vocabulary, find_teacher
from prunus.recovery.text import MOST_SAMPLES, load_sequences, unwritten_sequences, wanted_sequences

__all__ = ["Prepared", "require_packages"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A recovery job with everything that it leaves open decided.

    Attributes:
        job: what was asked for.
        folder: of the pruned model.
        tokenizer: its tokenizer.
        teacher: folder of the dense model; None where the loss needs none.
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
        device, options = _place(job.run.device), job.recovery
        folder = locate(job.model)
        config, tokenizer = read_small_files(folder)
        check_seq_len(config, job.text.seq_len)
        step = Step.of(options, job.text.seq_len, config, device)
        card_without_figures(folder)  # or the result of the training could not be described
        dense = _dense(job, folder, config, tokenizer)
        teacher, writer = dense if options.needs_teacher else None, dense if job.text.written else None
        tokens = step.micro_batch * job.text.seq_len
        check_memory(job, folder, teacher, device, bfloat16=step.bfloat16, tokens=tokens)
        train_on, held_out = _sequences(
            job, step.batch_size, config, tokenizer, writer, device, beside, apart, progress
        )
        steps = options.max_steps
        if steps is None and options.max_minutes is None:
            steps = len(train_on) // step.batch_size
        return cls(job, folder, tokenizer, teacher, writer, train_on, held_out, steps, device, step)

    @property
    def reads(self) -> tuple[Path, ...]:
        """Folders of dense models that are read, which no output may replace."""
        return tuple({folder for folder in (self.teacher, self.writer) if folder is not None})

    @property
    def expected_bytes(self) -> int:
        """Room that result and checkpoints take: of the checkpoints, two with weights and both moments in float32."""
        weights = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        return weights * (1 + 2 * (1 if self.job.recovery.train == "lora" else 6))


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


def _dense(job: RecoveryJob, folder: Path, config: Any, tokenizer: Any) -> Path | None:
    """The dense model's folder, if it teaches or writes."""
    if not (job.recovery.needs_teacher or job.text.written):
        return None
    dense = locate(job.teacher) if job.teacher is not None else Path(find_teacher(folder))
    dense_config, dense_tokenizer = read_small_files(dense)
    check_vocabulary(config, tokenizer, dense_config, dense_tokenizer, str(dense))
    check_seq_len(dense_config, job.text.seq_len)
    return dense


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
        logger.warning("training goes through %d sequences of the text; more with `samples`", MOST_SAMPLES)
    return train_on, held_out


def _place(device: str) -> torch.device:
    place = resolve_device(device)
    if place.index is not None:
        raise OptionError(
            f"`device` {device!r}: recovery takes a kind of device. Choose one by CUDA_VISIBLE_DEVICES={place.index} "
            "and `device=cuda`"
        )
    # Of several processes each has been given its own.
    return torch.device("cuda", torch.cuda.current_device()) if place.type == "cuda" else place
