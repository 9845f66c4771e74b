"""Training between and after the rounds of a cut, from which a killed run goes on.

OUT.work/round-N/
    made_from.json   what the other three were made from
    cut/             what the round left, as a model folder
    trained/         the same after training, by `prunus recover`
    trained.work/    checkpoints of a training that is not over
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from hashlib import file_digest
from pathlib import Path
from typing import Any

from torch import Tensor

from prunus.calibration import Calibration
from prunus.calibration.batches import hash_tokens
from prunus.calibration.loading import kind_of
from prunus.calibration.sources import read_sources
from prunus.checkpoint import load_model, locate, resolve_device, save_checkpoint, whole_around
from prunus.errors import OptionError, PrunusError
from prunus.files.json_file import read_json, read_json_if_whole
from prunus.files.outputs import whole_file
from prunus.files.user_path import expanded
from prunus.machine.processes import launched
from prunus.model.digest import digest_model
from prunus.model.loss import perplexity_of_loss
from prunus.model.saved_dtype import save_in_, saved_dtype
from prunus.model.tokens import check_seq_len
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.request import Request
from prunus.pipeline.rounds import Round
from prunus.pipeline.work_folder import of_round
from prunus.recovery.checkpoints import Checkpoints
from prunus.recovery.curve import curve
from prunus.recovery.job import RecoveryJob
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.prepared import require_packages
from prunus.recovery.result import RECORD
from prunus.recovery.run import recover_job
from prunus.recovery.step import sequences_per_step
from prunus.recovery.text import ENDLESS, load_sequences

__all__ = ["TrainedRounds", "check_training"]

MADE_FROM = "made_from.json"
#: option of recovery → its key in a recipe
KEYS = {each.name: f"recovery.training.{each.name}" for each in fields(RecoveryOptions)}
KEYS |= {name: f"recovery.{name}" for name in ("samples", "seq_len", "held_out")}
OPTION = re.compile(r"`(\w+)(?=[`=])")


def check_training(request: Request) -> None:
    """Check, before any long work, that a job's rounds can be trained; nothing where nothing is to be.

    Raises:
        OptionError: packages are missing, or the model is of a kind that is not trained here.
        CalibrationError: a text is missing.
    """
    job, recipe = request.job, request.recipes[0]
    if not recipe.recovery:
        return
    require_packages()
    if request.engine != "resident":
        raise OptionError(
            "`recovery` needs the resident engine: give `engine=resident` (a `max_memory` that suffices), or train the "
            "result by prunus recover"
        )
    if whole_around(locate(job.model)) is not None and not job.output.text_only:
        raise OptionError("`recovery` trains language models; of a multimodal one, save that alone with `text_only`")
    if launched() > 1:
        raise OptionError(
            "`recovery` within a cut is for one process; train a cut model by several with prunus recover"
        )
    for source in read_sources(recipe.recovery.text or job.calibration.source):
        kind_of(source.name)
    check_seq_len(request.empty.config, recipe.recovery.seq_len or request.seq_len)


@contextmanager
def _keys_of_a_recipe() -> Iterator[None]:
    """Have errors of recovery name its options as a recipe does: `recovery.training.batch_size` for `batch_size`."""
    try:
        yield
    except PrunusError as error:
        raise type(error)(OPTION.sub(lambda match: f"`{KEYS.get(match[1], match[1])}", str(error))) from error


class TrainedRounds:
    """Trains what each round of a job leaves.

    Args:
        request: the job, checked.
        recipe: its recipe.
        tokenizer: of the model.
        work: folder from which a killed run goes on.
        measured: sequences that the result will be measured on, which are not trained on; None without any.
        progress: show progress bars on a terminal.

    Attributes:
        facts: of the rounds that are over, what `prunus recover` writes down about each.
    """

    def __init__(
        self,
        request: Request,
        recipe: Recipe,
        tokenizer: Any,
        work: Path,
        measured: Calibration | None,
        progress: bool,
    ):
        self._request, self._recipe, self._tokenizer = request, recipe, tokenizer
        self._work, self._measured, self._progress = work, measured, progress
        self.facts: list[Mapping[str, Any]] = []
        self._check_text()

    def __call__(self, model: Any, step: Round) -> Any:
        """Train a model.

        Args:
            model: what a round left.
            step: the round.

        Returns:
            The trained model, in the dtype and on the device of the given one.
        """
        folder = self._work / of_round(step.number)
        cut, trained, checkpoints = folder / "cut", folder / "trained", Checkpoints(folder / "trained")
        job = self._job(step, cut)
        apart = self._apart
        made_from = {"model": digest_model(model), "job": repr(job), "files": _digests(job.text.names)}
        made_from["measured on"] = "nothing" if apart is None else hash_tokens(apart)
        if read_json_if_whole(folder / MADE_FROM) != made_from:
            self._begin(folder, trained, checkpoints, made_from)
        if not (trained / "config.json").is_file():
            save_checkpoint(model, self._tokenizer, cut, card=f"# {cut.name}\n", extras={}, overwrite=True)
            beside = self._request.beside  # where text for calibration is kept, too
            with _keys_of_a_recipe():
                recover_job(job, trained, beside=beside, apart=apart, progress=self._progress)
        self.facts.append({"parameters": model.num_parameters(), **read_json(trained / "prunus" / RECORD)})
        found = load_model(trained, dtype=model.dtype, device=model.device)[0]
        save_in_(found, saved_dtype(model))
        return found

    def _check_text(self) -> None:
        """Draw what the rounds will train on, before any long work, where that is in files.

        Raises:
            CalibrationError: a text is unreadable or too short.
        """
        (*_, last) = self._recipe.steps(self._request.job.ratio)
        job = self._job(last, self._work)
        if any(kind_of(name) in ENDLESS for name in job.text.names):
            return
        options, device = job.recovery, resolve_device(job.run.device)
        batch = sequences_per_step(options, device.type)
        needed = options.max_steps and options.max_steps * batch
        with _keys_of_a_recipe():
            load_sequences(job.text, self._tokenizer, needed, batch, apart=self._apart)

    @property
    def _apart(self) -> Tensor | None:
        return None if self._measured is None else self._measured.input_ids

    def _job(self, step: Round, cut: Path) -> RecoveryJob:
        job, recovery = self._request.job, self._recipe.recovery
        of = len(self._recipe.steps(job.ratio))
        calibration = replace(job.calibration, seq_len=self._request.seq_len)
        return recovery.job(step, of, str(cut), str(locate(job.model)), calibration, job.run)

    def _begin(self, folder: Path, trained: Path, checkpoints: Checkpoints, made_from: Mapping[str, Any]) -> None:
        """Make room for a round that was not begun, or was begun from something else."""
        checkpoints.remove()
        shutil.rmtree(trained, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / MADE_FROM) as partial:
            partial.write_text(json.dumps(made_from) + "\n", encoding="utf-8")

    @property
    def record(self) -> str:
        """What goes into prunus/recovery.json: the curve over all rounds, and each round as it was."""
        return json.dumps({"curve": curve(self.facts), "rounds": self.facts}, indent=1) + "\n"

    @property
    def section(self) -> str:
        """What the card says."""
        rows = [
            f"| {number} | {facts['tokens']:,} | {facts['seconds']:.0f} | "
            f"{perplexity_of_loss(facts['held_out_loss']['before']):.2f} | "
            f"{perplexity_of_loss(facts['held_out_loss']['after']):.2f} |"
            for number, facts in enumerate(self.facts, start=1)
        ]
        head = "| round | tokens | seconds | before | after |\n|---:|---:|---:|---:|---:|"
        return (
            "## Recovery\n\nThe model was trained after each round of the cut. Perplexity on held-out sequences of the "
            "training text:\n\n" + "\n".join([head, *rows]) + "\n\n`prunus/recovery.json` has all options and losses."
        )


def _digests(names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of each source that is a file."""
    digests = {}
    for name in names:
        if (path := expanded(name)).is_file():
            with path.open("rb") as file:
                digests[name] = file_digest(file, "sha256").hexdigest()
    return digests
