"""transformers' Trainer with the loss of recovery and a learning rate that follows steps or the clock."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, RandomSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prunus.errors import NonFiniteError, OptionError
from prunus.machine.bars import Bar
from prunus.machine.processes import add_up_, number_of_processes
from prunus.recovery.checkpoints import WEIGHTS_FILE, readable
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.pace import Pace
from prunus.recovery.step import Step
from prunus.recovery.student import Student

__all__ = ["AlreadyOver", "Interruption", "RecoveryTrainer", "interruptible", "training_arguments"]

#: more steps than any run has
ENDLESS = 10**9


class _Sequences(Dataset[dict[str, Tensor]]):
    """Rows of a matrix of tokens; a sequence is its own label."""

    def __init__(self, input_ids: Tensor):
        self.input_ids = input_ids

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.input_ids[index]}


class AlreadyOver(Exception):
    """The checkpoint to go on from is that of the last step."""


class Interruption:
    """Whether somebody asked the run to stop.

    Attributes:
        asked: by which signal; None so far.
    """

    def __init__(self) -> None:
        self.asked: int | None = None


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Ctrl-C, or the end of a job, asks the run to stop after the step it is in; a second one ends it at once."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(number: int, frame: Any) -> None:
        if interruption.asked is not None:
            raise KeyboardInterrupt
        interruption.asked = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def training_arguments(
    folder: Path,
    options: RecoveryOptions,
    step: Step,
    *,
    steps: int | None,
    seed: int,
    device: torch.device,
    held_out: int,
) -> TrainingArguments:
    """What Trainer needs to know.

    Args:
        folder: for checkpoints.
        options: of the run.
        step: how large a step is.
        steps: of the run; None where only the clock ends it.
        seed: of the order of sequences.
        device: cpu, cuda or mps.
        held_out: number of held-out sequences, a multiple of that of processes.
    """
    on_cpu, processes = device.type == "cpu", number_of_processes()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps or ENDLESS,
        per_device_train_batch_size=step.micro_batch,
        # Trainer takes a mean over batches: all have to be of one size, and each process to have as many.
        per_device_eval_batch_size=max(n for n in range(1, step.micro_batch + 1) if held_out // processes % n == 0),
        gradient_accumulation_steps=step.batch_size // (step.micro_batch * processes),
        learning_rate=step.learning_rate,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        adam_beta2=0.95,
        seed=seed,
        bf16=step.bfloat16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and processes > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        # When to measure and to write is decided by the pace; these only switch both on.
        eval_strategy="steps",
        eval_steps=ENDLESS,
        save_strategy="steps",
        save_steps=ENDLESS,
        save_total_limit=2,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=max(1, (steps or 0) // 200),
        logging_nan_inf_filter=False,
        report_to="none",
        log_level="error",
        log_level_replica="error",
        disable_tqdm=True,
    )
    # Not what `accelerate config` says of other work: the card, the recipe and the estimate of memory name the step's.
    arguments.mixed_precision = "bf16" if step.bfloat16 else "no"
    if processes == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process trains on one device; more of them are for torchrun
    return arguments


class _Keeper(TrainerCallback):
    """Keeps the pace: the clock, what is due, when to stop."""

    def __init__(self, pace: Pace, interruption: Interruption, progress: bool):
        self.pace = pace
        self.interruption = interruption
        self.progress = progress
        self._since = 0.0
        self._interrupted = False
        self._bar: Any = None
        self._open = ExitStack()

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before its end."""
        return self._interrupted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Of a run that goes on, the scheduler has brought the clock by now. Trainer itself would do one step too many.
        if state.global_step and self.pace.is_over(state.global_step):
            raise AlreadyOver
        self._since = time.monotonic()
        total = self.pace.max_steps or round(self.pace.max_seconds or 0)
        shown = self.progress and state.is_world_process_zero
        self._bar = self._open.enter_context(
            Bar("training", total=total, unit="step" if self.pace.max_steps else "s", progress=shown)
        )
        if state.global_step:
            self._bar.resume(state.global_step if self.pace.max_steps else round(self.pace.seconds))
        self._show(state)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Before the learning rate of the next step is set. All processes go by the slowest clock.
        now = time.monotonic()
        self.pace.seconds += now - self._since
        self._since = now
        own = [self.pace.seconds, self.pace.reserved, float(self.interruption.asked is not None)]
        told = torch.tensor(own, dtype=torch.float64)
        if number_of_processes() > 1:
            told = told.to(args.device)
            add_up_([(told, "max")])
        self.pace.seconds, self.pace.reserved, asked = told.tolist()
        self._interrupted = bool(asked)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        over = self.pace.is_over(state.global_step)
        due = self.pace.passes_mark(state.global_step)
        control.should_evaluate = due
        control.should_save = due or self._interrupted
        control.should_log = control.should_log or due
        control.should_training_stop = over or self._interrupted
        self._interrupted = self._interrupted and not over
        self._show(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.pace.reserved = metrics["eval_runtime"]
        self._bar.note(f"held-out loss {metrics['eval_loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()

    def _show(self, state: Any) -> None:
        done = state.global_step if self.pace.max_steps else round(self.pace.seconds)
        self._bar.update(done - self._bar.done)


class RecoveryTrainer(Trainer):
    """Trainer for a `Student`.

    Checkpoints hold the weights that are trained, and no others.

    Args:
        student: the model with its loss.
        arguments: from `training_arguments`.
        pace: learning rate, measurements and end of the run.
        train: sequences to train on, int64, (samples, seq_len).
        held_out: sequences to measure on.
        interruption: see `interruptible`.
        progress: show a bar on a terminal.

    Raises:
        OptionError: weights are sharded in a way in which checkpoints do not hold them whole.
    """

    def __init__(
        self,
        student: Student,
        arguments: TrainingArguments,
        pace: Pace,
        train: Tensor,
        held_out: Tensor,
        interruption: Interruption,
        *,
        progress: bool = True,
    ):
        self.pace = pace
        self.lr_scheduler: Any
        self.keeper = _Keeper(pace, interruption, progress)
        self._student, self._sequences = student, _Sequences(train)
        super().__init__(
            student,
            arguments,
            train_dataset=self._sequences,
            eval_dataset=_Sequences(held_out),
            callbacks=[self.keeper],
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            raise OptionError(
                "with FSDP, recovery needs whole weights in its checkpoints: set fsdp_state_dict_type FULL_STATE_DICT"
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> RandomSampler:
        # Trainer would end every pass over the text with a step of what is left, less than a batch.
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * number_of_processes()
        return RandomSampler(self._sequences, num_samples=len(self._sequences) // batch * batch)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate: that of the pace."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.pace)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of a batch.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            self._fail("the training loss", self.state.global_step + 1)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the held-out loss.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        loss = torch.tensor(metrics["eval_loss"])
        if not loss.isfinite():
            self._fail("the held-out loss", self.state.global_step)
        return metrics

    def _fail(self, what: str, step: int) -> None:
        raise NonFiniteError(
            f"{what} of step {step} is not finite (learning rate {self._get_learning_rate():.3g}, peak "
            f"{self.args.learning_rate:g}). Begin anew (`overwrite`) with a lower `learning_rate`, or more `warmup`; "
            "nothing was written to the output"
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._student.trained_state(state_dict), folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that are not trained are missing on purpose."""
