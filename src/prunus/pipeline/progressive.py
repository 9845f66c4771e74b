"""Training between and after the rounds of a cut, from which a killed run goes on.

OUT.work/round-N/
    made_from.json   what the other three were made from: settings, texts, and the model that the round left
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
from dataclasses import asdict, fields, replace
from hashlib import file_digest
from itertools import compress
from pathlib import Path
from typing import Any

from torch import Tensor

from prunus.calibration import Calibration
from prunus.calibration.batches import hash_tokens
from prunus.calibration.loading import check_sources, kind_of
from prunus.calibration.sources import read_sources, sequences_of
from prunus.checkpoint import load_model, locate, model_bytes, resolve_device, save_checkpoint, whole_around
from prunus.errors import OptionError, PrunusError
from prunus.files.json_file import read_json, read_json_if_whole
from prunus.files.outputs import whole_file
from prunus.files.user_path import expanded
from prunus.machine.byte_sizes import parse_bytes
from prunus.machine.processes import launched
from prunus.model.digest import digest_model
from prunus.model.loss import perplexity_of_loss
from prunus.model.saved_dtype import save_in_, saved_dtype
from prunus.model.tokens import check_seq_len
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.request import Request
from prunus.pipeline.rounds import Round
from prunus.pipeline.work_folder import of_round
from prunus.recovery.checkpoints import Checkpoints, check_same
from prunus.recovery.curve import curve
from prunus.recovery.job import RecoveryJob
from prunus.recovery.memory import training_bytes
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.prepared import check_plain, require_packages, training_device
from prunus.recovery.record import RECORD
from prunus.recovery.run import recover_job
from prunus.recovery.step import Step, sequences_per_step
from prunus.recovery.text import ENDLESS, load_sequences, wanted_sequences
from prunus.sweep.estimate import check_limit

__all__ = ["TrainedRounds", "check_training", "training_peak"]

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
    check_plain(locate(job.model))
    training_device(job.run.device)
    if request.engine != "resident":
        raise OptionError(
            "`recovery` needs the resident engine: give `engine=resident` (a `max_memory` that suffices), or train the "
            "result by prunus recover"
        )
    if whole_around(locate(job.model)) is not None and not job.output.text_only:
        raise OptionError(
            "`recovery` within a cut trains language models; of a multimodal one, save that alone with `text_only`, or "
            "cut it without `recovery` and train it by prunus recover"
        )
    if launched() > 1:
        raise OptionError(
            "`recovery` within a cut is for one process; train a cut model by several with prunus recover"
        )
    texts = read_sources(recipe.recovery.text or job.calibration.source)
    check_sources(texts, job.calibration.chat_column)
    check_seq_len(request.empty.config, recipe.recovery.seq_len or request.seq_len)
    if job.run.max_memory is not None:
        less = ". A smaller `recovery.seq_len`, `recovery.training.gradient_checkpointing` or "
        less += "`recovery.training.train=lora` needs less"
        check_limit(training_peak(request), parse_bytes(job.run.max_memory), "training needs", less)


def training_peak(request: Request) -> int:
    """Memory, in bytes, while a round is trained: the models that the cut holds, and what training takes besides.

    The model that is trained is taken as large as the dense one, which it is before any cut.
    """
    recipe, dense = request.recipes[0], locate(request.job.model)
    job = _job_of(request, recipe, recipe.steps(request.job.ratio)[0], dense)
    device, options = training_device(job.run.device), job.recovery
    step = Step.of(options, job.text.seq_len, request.empty.config, device)
    how: dict[str, Any] = {"bfloat16": step.bfloat16, "tokens": step.micro_batch * job.text.seq_len}
    teacher = dense if options.needs_teacher else None
    return 2 * model_bytes(request.empty) + training_bytes(job, dense, teacher, device, **how)


def _job_of(request: Request, recipe: Recipe, step: Round, cut: Path) -> RecoveryJob:
    """The training of a round."""
    job, of = request.job, len(recipe.steps(request.job.ratio))
    calibration = replace(job.calibration, seq_len=request.seq_len)
    return recipe.recovery.job(step, of, str(cut), job.model, calibration, job.run)


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
        overwrite: train anew what was trained with other settings or on other text.
        progress: show progress bars on a terminal.

    Raises:
        OptionError: a round was trained with other settings or on other text, and must not be overwritten.
        CalibrationError: a text is unreadable or too short.

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
        *,
        overwrite: bool,
        progress: bool,
    ):
        self._request, self._recipe, self._tokenizer = request, recipe, tokenizer
        self._work, self._measured, self._overwrite, self._progress = work, measured, overwrite, progress
        self.facts: list[Mapping[str, Any]] = []
        self._made_from = self._inputs()
        for step in recipe.steps(request.job.ratio):
            self._check_begun(self._work / of_round(step.number), self._made_from)
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
        made_from = {**self._made_from, "model": digest_model(model)}
        self._check_begun(folder, made_from)
        if read_json_if_whole(folder / MADE_FROM) != made_from:
            self._begin(folder, trained, checkpoints, made_from)
        if not (trained / "config.json").is_file():
            save_checkpoint(model, self._tokenizer, cut, card=f"# {cut.name}\n", extras={}, overwrite=True)
            beside = self._request.beside  # where text for calibration is kept, too
            with _keys_of_a_recipe():
                recover_job(job, trained, beside=beside, apart=apart, progress=self._progress)
        facts = read_json(trained / "prunus" / RECORD)
        del facts["command"]  # it names folders that are gone in the end
        self.facts.append({"parameters": model.num_parameters(), **facts})
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
        text, options, device = job.text, job.recovery, resolve_device(job.run.device)
        batch = sequences_per_step(options, device.type)
        needed = options.max_steps and options.max_steps * batch
        in_files = [kind_of(source.name) not in ENDLESS for source in text.sources]
        with _keys_of_a_recipe():
            wanted = wanted_sequences(text, needed)
            if not all(in_files):
                # Of the text that is there already as much as will be used of it; of the rest nothing is known.
                own = list(compress(text.sources, in_files))
                if not own:
                    return
                parts = [compress(sequences_of(text.sources, number), in_files) for number in (wanted, text.held_out)]
                samples, held_out = map(sum, parts)
                names = tuple(f"{source.name}:{source.weight:g}" for source in own)
                text, batch = replace(text, source=names, samples=samples, held_out=held_out), 1
            load_sequences(text, self._tokenizer, needed, batch, apart=self._apart)

    @property
    def _apart(self) -> Tensor | None:
        return None if self._measured is None else self._measured.input_ids

    def _job(self, step: Round, cut: Path) -> RecoveryJob:
        return _job_of(self._request, self._recipe, step, cut)

    def _inputs(self) -> dict[str, Any]:
        """What training depends on beside the model, by the keys of a recipe; as JSON has it."""
        job, recipe = self._request.job, self._recipe
        # A text is known by its content, wherever it lies; the dense model by what the rounds leave of it.
        texts = {
            "calibration.source": _contents(job.calibration.source),
            "recovery.text": _contents(recipe.recovery.text or job.calibration.source),
        }
        # How many sequences go through a pass changes results by rounding only.
        training = replace(recipe.recovery.training, micro_batch=None)
        recipe = replace(recipe, recovery=replace(recipe.recovery, training=training))
        settings: dict[str, Any] = {
            **_flat({"ratio": job.ratio, **asdict(recipe), "calibration": asdict(job.calibration)}),
            **texts,
            "sequences to measure on": None if self._apart is None else hash_tokens(self._apart),
        }
        found: dict[str, Any] = json.loads(json.dumps(settings, default=repr))
        return found

    def _check_begun(self, folder: Path, made_from: Mapping[str, Any]) -> None:
        """Check that a round was not trained from something else, unless that may be overwritten.

        Raises:
            OptionError: it was.
        """
        before = read_json_if_whole(folder / MADE_FROM)
        if before is not None and not self._overwrite:
            check_same({name: before[name] for name in before if name in made_from}, made_from, folder)

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


def _contents(sources: Sequence[str]) -> list[tuple[str, float]]:
    """Sources with their weights: SHA-256 of those that are files, of others their names."""
    found = []
    for source in read_sources(sources):
        name, path = source.name, expanded(source.name)
        if path.is_file():
            with path.open("rb") as file:
                name = file_digest(file, "sha256").hexdigest()
        found.append((name, source.weight))
    return found


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by their keys: {"scoring": {"noise": 0.3}} as {"scoring.noise": 0.3}."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return found
