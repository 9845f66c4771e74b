"""Recovery from end to end: check, load, train, merge, measure, save."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import math
import os
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prunus.calibration import Calibration
from prunus.checkpoint import (
    fast_dtype,
    load_model,
    locate,
    resolve_device,
    save_checkpoint,
)
from prunus.checkpoint.load import read_small_files
from prunus.errors import OptionError
from prunus.files.json_file import read_json, read_json_if_whole
from prunus.files.outputs import check_disk, check_output, claimed
from prunus.installing import install_command
from prunus.machine.compute_dtype import HALF
from prunus.machine.processes import agreed, is_first, joined, number_of_processes, wait_for_all
from prunus.model.digest import digest_model
from prunus.model.saved_dtype import round_weights_
from prunus.model.tokens import check_seq_len, check_token_ids
from prunus.recovery.card import card_with_recovery, card_without_figures
from prunus.recovery.checkpoints import Checkpoints, readable
from prunus.recovery.options import RecoveryOptions, TextOptions
from prunus.recovery.pace import Pace
from prunus.recovery.student import Student, Teacher, add_adapters, merge_adapters
from prunus.recovery.teacher import check_vocabulary, find_teacher, layers_behind
from prunus.recovery.text import MOST_SAMPLES, load_sequences
from prunus.sweep.sequence_loss import PerplexityResult, perplexity_of_windows
from prunus.version import __version__

__all__ = ["recover_checkpoint"]

logger = logging.getLogger(__name__)

#: sequences per forward pass, at most, by kind of device
MICRO_BATCHES = {"cpu": 2}
MICRO_BATCHES_ELSEWHERE = 8
#: file of the folder prunus/ in which the run is described
RECORD = "recovery.json"
#: files in it about the pruned model that say nothing about the recovered one
MEASURED_BEFORE = ("evaluation.json", "samples.json")


def recover_checkpoint(
    model: str,
    out: str | Path,
    text: TextOptions,
    options: RecoveryOptions | None = None,
    *,
    teacher: str | None = None,
    device: str = "auto",
    resume: bool = False,
    work: str | Path | None = None,
    overwrite: bool = False,
    command: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a pruned model a little, and save the result as a folder of the same kind.

    Of all checkpoints, and the model as it came, the one with the lowest held-out loss is kept. Several processes
    (torchrun, `accelerate launch`) train together; the first one writes.

    Args:
        model: folder of a pruned model (any model of a described family will do).
        out: folder for the result; complete or not there at all.
        text: what to train on.
        options: how.
        teacher: the dense model, folder or Hub id; None = the base model that the folder names, if it is here.
        device: auto, cpu, cuda or mps.
        resume: go on from the last checkpoint of a run that was killed or interrupted, begun with the same options.
        work: folder for checkpoints; None for `<out>.work`. Removed at the end.
        overwrite: replace an earlier result, and earlier checkpoints.
        command: what the user typed, for the model card.
        progress: show progress bars on a terminal.

    Returns:
        What was done and measured, as it is written to prunus/recovery.json; nothing in other processes than the first.

    Raises:
        PrunusError: whatever is wrong with options, models, text or folders; a loss that is not finite.
        KeyboardInterrupt: somebody pressed Ctrl-C; `resume` goes on from there.
    """
    asked = {name: value for name, value in locals().items() if name not in ("out", "command", "progress", "resume")}
    options = options or RecoveryOptions()
    _require_packages()
    checkpoints = Checkpoints(out, work)
    with joined(), claimed(out, checkpoints.path, run=("recover", asked), command=command) as claim:
        if agreed(claim.finished):
            facts = read_json(claim.path / "prunus" / RECORD) if is_first() else {}
        else:
            check_output(out, overwrite, model, text.text)
            checkpoints.check(resume, overwrite)
            wait_for_all()  # before the first process changes what the others check
            run = _Run.prepared(model, text, options, teacher, device)
            if run.teacher is not None:
                check_output(out, overwrite, run.teacher)
            check_disk(out, run.expected_bytes)
            try:
                trained = run.train(checkpoints, resume, progress=progress)
            except KeyboardInterrupt:
                if is_first() and (last := checkpoints.last()) is not None:
                    logger.warning(
                        "interrupted; %s is saved in %s, and the same command with `resume` goes on from there",
                        last.name,
                        last.parent,
                    )
                raise
            if not is_first():
                wait_for_all()
                return {}
            result = run.result(checkpoints, trained["best_step"])
            after = perplexity_of_windows(result, run.held_out.input_ids, progress=progress)
            facts = run.facts(trained, after)
            command = command or f"prunus recover {shlex.quote(model)} --out {shlex.quote(str(out))} --text {text.text}"
            facts["command"] = command
            card = card_with_recovery(run.folder, Path(out).name, facts, command)
            extras = {**_extras(run.folder, facts), RECORD: json.dumps(facts, indent=1) + "\n"}
            save_checkpoint(result.cpu(), run.tokenizer, out, card=card, extras=extras, overwrite=overwrite)
        if is_first():
            checkpoints.remove()
        wait_for_all()
    return facts


@dataclass(frozen=True)
class _Run:
    """Everything that was checked before training, and the steps that follow.

    Attributes:
        folder: of the pruned model.
        tokenizer: its tokenizer.
        teacher: folder of the dense model; None where the loss needs none.
        layers: the dense model's layer behind each of the pruned model's.
        options: how to train.
        text: what was asked for.
        train_on: sequences to train on.
        held_out: sequences to measure on.
        steps: optimizer steps; None where only the clock ends the run.
        device: where.
        bfloat16: dtype of forward and backward passes; else float32.
        micro_batch: sequences per forward pass.
    """

    folder: Path
    tokenizer: Any
    teacher: Path | None
    layers: tuple[int, ...]
    options: RecoveryOptions
    text: TextOptions
    train_on: Calibration
    held_out: Calibration
    steps: int | None
    device: torch.device
    bfloat16: bool
    micro_batch: int

    @classmethod
    def prepared(
        cls, model: str, text: TextOptions, options: RecoveryOptions, teacher: str | None, device: str
    ) -> _Run:
        """Check what can be checked without weights, and draw the text."""
        place = _place(device)
        micro_batch = _micro_batch(options, place)
        folder = locate(model)
        config, tokenizer = read_small_files(folder)
        check_seq_len(config, text.seq_len)
        card_without_figures(folder)  # or the result of the training could not be described
        dense: Path | None = None
        layers: tuple[int, ...] = ()
        if options.needs_teacher:
            dense = locate(teacher) if teacher is not None else Path(find_teacher(folder))
            dense_config, dense_tokenizer = read_small_files(dense)
            check_vocabulary(config, tokenizer, dense_config, dense_tokenizer, str(dense))
            check_seq_len(dense_config, text.seq_len)
            if options.hidden_weight:
                layers = layers_behind(folder, config, dense_config, str(dense))
        needed = options.max_steps * options.batch_size if options.max_steps else None
        train_on, held_out = load_sequences(text, tokenizer, needed, options.batch_size)
        for part in (train_on, held_out):
            check_token_ids(config, part.input_ids)
        if len(train_on) == MOST_SAMPLES and text.samples is None and is_first():
            logger.warning("training goes through %d sequences of the text; more with `samples`", MOST_SAMPLES)
        steps = options.max_steps
        if steps is None and options.max_minutes is None:
            steps = len(train_on) // options.batch_size
        return cls(
            folder,
            tokenizer,
            dense,
            layers,
            options,
            text,
            train_on,
            held_out,
            steps,
            place,
            _fast_in_bfloat16(place, config) if options.precision == "auto" else options.precision == "bfloat16",
            micro_batch,
        )

    @property
    def expected_bytes(self) -> int:
        """Room that result and checkpoints take: of the checkpoints, two with weights and both moments in float32."""
        weights = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        return weights * (1 + 2 * (6 if self.options.train == "full" else 1))

    def train(self, checkpoints: Checkpoints, resume: bool, *, progress: bool) -> dict[str, Any]:
        """Train, or go on training; what was measured on the way."""
        from prunus.recovery.trainer import AlreadyOver, RecoveryTrainer, interruptible, training_arguments

        options = self.options
        model, dense = self._load_model(), self._load_teacher()
        inputs = self._inputs(model, dense)
        if is_first():
            checkpoints.begin(inputs, resume)
        wait_for_all()
        if (trained := checkpoints.finished()) is not None:
            return trained
        begun = time.monotonic()
        before = perplexity_of_windows(model, self.held_out.input_ids, progress=progress).nll
        pace = Pace(
            self.steps,
            60 * options.max_minutes if options.max_minutes else None,
            options.warmup,
            options.decay,
            options.checkpoints,
        )
        pace.reserved = time.monotonic() - begun
        dense_loss = None
        if dense is not None:
            dense_loss = perplexity_of_windows(dense, self.held_out.input_ids, progress=progress).nll
        self._add_adapters(model)
        student = Student(model, options, Teacher(dense, self.layers) if dense is not None else None)
        arguments = training_arguments(
            checkpoints.path,
            options,
            seed=self.text.seed,
            device=self.device,
            bfloat16=self.bfloat16,
            micro_batch=self.micro_batch,
            held_out=len(self.held_out),
            steps=self.steps,
        )
        last = checkpoints.last() if resume else None
        with interruptible() as interruption:
            trainer = RecoveryTrainer(
                student,
                arguments,
                pace,
                self.train_on.input_ids,
                self.held_out.input_ids,
                interruption,
                progress=progress and is_first(),
            )
            with suppress(AlreadyOver):
                trainer.train(resume_from_checkpoint=str(last) if last else None)
        state = trainer.state
        if trainer.keeper.interrupted:
            raise KeyboardInterrupt
        best_loss = state.best_metric if state.best_metric is not None else float("inf")
        best_step = state.best_global_step if best_loss < before else 0
        trained = {
            "steps": state.global_step,
            "best_step": best_step,
            "seconds": pace.seconds,
            "before": before,
            "dense": dense_loss,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "history": [
                {"step": entry["step"], "held_out_loss": entry["eval_loss"]}
                for entry in state.log_history
                if "eval_loss" in entry
            ],
            "training_losses": [
                {"step": entry["step"], "loss": entry["loss"]} for entry in state.log_history if "loss" in entry
            ],
        }
        if not best_step and is_first():
            logger.warning(
                "no checkpoint has a lower held-out loss than the model had before (%.4f, best afterwards %.4f): the "
                "result is the model as it was. Try a lower `learning_rate`, more steps, or more text",
                before,
                best_loss,
            )
        if is_first():
            checkpoints.finish(trained)
        del trainer, student, model, dense
        gc.collect()
        return trained

    def result(self, checkpoints: Checkpoints, best_step: int) -> Any:
        """The plain model with the weights of a step, rounded to the pruned model's dtype; step 0 is no training."""
        model, _ = load_model(self.folder, device=self.device)
        if not best_step:
            return model
        adapted = self._add_adapters(model)
        with readable(checkpoints.at(best_step)):
            Student(model, self.options).load_trained_state_(load_file(checkpoints.at(best_step)))
        whole = (merge_adapters(adapted) if adapted is not None else model).eval()
        round_weights_(whole)
        return whole

    def facts(self, trained: Mapping[str, Any], measured: PerplexityResult) -> dict[str, Any]:
        """What goes into prunus/recovery.json, but for the command."""
        before, dense, after = trained["before"], trained["dense"], measured.nll
        closed = (before - after) / (before - dense) if dense is not None and before > dense else None
        earlier = read_json_if_whole(self.folder / "prunus" / RECORD)
        return {
            "prunus": __version__,
            "model": self.folder.name,
            "teacher": self.teacher.name if self.teacher else None,
            "options": {
                **asdict(self.options),
                "learning_rate": self.options.peak_rate,
                "lora_alpha": self.options.alpha if self.options.train == "lora" else None,
                "micro_batch": self.micro_batch,
                "precision": "bfloat16" if self.bfloat16 else "float32",
            },
            "text": self.train_on.provenance.to_dict(),
            "held_out": self.held_out.provenance.to_dict(),
            "device": str(self.device),
            "processes": number_of_processes(),
            "trained_parameters": trained["trained_parameters"],
            "steps": trained["steps"],
            "best_step": trained["best_step"],
            "tokens": trained["steps"] * self.options.batch_size * self.text.seq_len,
            "seconds": round(trained["seconds"], 1),
            "held_out_loss": {"before": before, "after": after, "dense": dense},
            "protocol": measured.protocol,
            "gap_closed": closed,
            "history": trained["history"],
            "training_losses": trained["training_losses"],
            **({"earlier": earlier} if earlier else {}),
        }

    def _load_model(self) -> Any:
        # FSDP wants one dtype in everything that it shards together.
        sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        whole = self.options.train == "full" or sharded or not self.bfloat16
        model, _ = load_model(self.folder, dtype="float32" if whole else "bfloat16", device=self.device)
        return model

    def _add_adapters(self, model: Any) -> Any:
        """In place; the model in the adapters' wrapper, or None where all weights are trained."""
        if self.options.train == "full":
            return None
        return add_adapters(model, self.options.lora_rank, self.options.alpha, self.text.seed)

    def _load_teacher(self) -> Any:
        if self.teacher is None:
            return None
        model, _ = load_model(self.teacher, dtype="bfloat16" if self.bfloat16 else "float32", device=self.device)
        return model.requires_grad_(False)

    def _inputs(self, model: Any, dense: Any) -> dict[str, Any]:
        """What the result depends on."""
        named = {name: value for name, value in asdict(self.options).items() if name != "micro_batch"}
        return {
            "model": digest_model(model),
            "teacher": digest_model(dense) if dense is not None else None,
            "training text": self.train_on.provenance.sha256,
            "held-out text": self.held_out.provenance.sha256,
            "seed": self.text.seed,
            **named,
        }


def _require_packages() -> None:
    missing = [name for name in ("accelerate", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            f"recovery needs {' and '.join(missing)}, not installed here. Run: {install_command(*missing)}"
        )


def _place(device: str) -> torch.device:
    place = resolve_device(device)
    if place.index is not None:
        raise OptionError(
            f"`device` {device!r}: recovery takes a kind of device. Choose one by CUDA_VISIBLE_DEVICES={place.index} "
            "and `device` cuda"
        )
    # Of several processes each has been given its own.
    return torch.device("cuda", torch.cuda.current_device()) if place.type == "cuda" else place


def _micro_batch(options: RecoveryOptions, device: torch.device) -> int:
    processes = number_of_processes()
    own, left = divmod(options.batch_size, processes)
    if left:
        raise OptionError(f"`batch_size` is {options.batch_size}; it must be a multiple of the {processes} processes")
    if options.micro_batch is not None:
        if own % options.micro_batch:
            raise OptionError(
                f"`micro_batch` is {options.micro_batch}; it must divide the {own} sequences per step of each process"
            )
        return options.micro_batch
    most = MICRO_BATCHES.get(device.type, MICRO_BATCHES_ELSEWHERE)
    return max(size for size in range(1, own + 1) if own % size == 0 and size <= most)


def _fast_in_bfloat16(device: torch.device, config: Any) -> bool:
    """Whether to train in bfloat16; many processes agree."""
    if config.dtype not in HALF:
        return False
    return not agreed(fast_dtype(config, torch.bfloat16, device) != torch.bfloat16)


def _extras(folder: Path, facts: Mapping[str, Any]) -> dict[str, str | bytes]:
    """Plan, scores and metrics of the pruned model, without what was measured on it or written by it since.

    Perplexity in the metrics becomes that of the recovered model; what was there stays under `before_recovery`.
    """
    extras: dict[str, str | bytes] = {
        path.name: path.read_bytes()
        for path in sorted((folder / "prunus").glob("*"))
        if path.is_file() and path.name not in MEASURED_BEFORE
    }
    if metrics := read_json_if_whole(folder / "prunus" / "metrics.json"):
        loss = facts["held_out_loss"]
        new = {
            "perplexity_before": None if loss["dense"] is None else math.exp(loss["dense"]),
            "perplexity_after": math.exp(loss["after"]),
            "perplexity_text": f"held-out sequences ({facts['held_out']['source']})",
            "perplexity_protocol": facts["protocol"],
        }
        old = {name: metrics.get(name) for name in new}
        extras["metrics.json"] = json.dumps({**metrics, **new, "before_recovery": old}, indent=1) + "\n"
    return extras
