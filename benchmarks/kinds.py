r"""What pruning costs on text of several kinds: multiples of the dense perplexity, and their geometric mean.

Scores and repair hold best for text of the calibration's kind, so one evaluation text tells little. Kinds are files
that are named by `--kind` (`python` for the source code of Python's standard library), and of each `--calibration` the
last fifth of its documents, which no recipe sees.

    python benchmarks/kinds.py --calibration c4=c4-sample.jsonl --kind wikitext2=wikitext2-test.raw.txt \
        --kind code=python --kind stories=stories.txt --kind chat=chat.jsonl:conversations --out results/kinds

Text files are read from their beginning, as `prunus eval` does; of JSON lines, documents are drawn with a fixed seed
and joined; `FILE:COLUMN` names a column of conversations, which become text by the model's chat template. Each row is
written when it is measured, to rows.jsonl, and rows that are there are not made again. The seconds of a row are those
of what it did not share with rows before it.

`--recipes default default,repair.noise=0 mine.yaml` compares recipes, `--calibrations c4 self c4:2+self` the texts they
are calibrated on: names given by `--calibration`, or what `prunus prune --calibration` takes, of which `default` is the
manual of Python alone, and `self+default` what is taken where no text is given. What the model writes is kept in the
folder. `--recover 600` also trains each pruned model for so many steps on the text that it was calibrated on.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rows import add_run_options, markdown_table, named_place

import prunus
from prunus.calibration import Calibration, Reading, calibration_from_texts, calibration_from_tokens, load_calibration
from prunus.evaluation.perplexity import cut_text, read_text
from prunus.machine.stages import Stages
from prunus.pipeline.cutting import Passes, PruneResult, cut, first_scores
from prunus.pipeline.inputs import draw_calibration
from prunus.pipeline.job import Job
from prunus.pipeline.job_file import job_text, read_job
from prunus.pipeline.options import CalibrationOptions
from prunus.pipeline.stages import stages_of
from prunus.recovery import RecoveryJob, RecoveryOptions, TextOptions, recover_job
from prunus.scoring.score import Score
from prunus.sweep.engine import model_name
from prunus.sweep.sequence_loss import perplexity_of_windows

#: share of a calibration file's documents that no recipe sees
HELD_OUT = 5
#: stands for the source code of Python's standard library
STANDARD_LIBRARY = "python"
DENSE, MEAN = "dense", "mean"
#: the settings in which recipes differ; all others are options of this program
OF_A_RECIPE = ("scoring", "selection", "repair", "rounds", "target")
#: what `prunus prune` takes without --calibration
DEFAULT = "+".join(CalibrationOptions().source)


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    given = {name: split_documents(place, options.out, name) for name, place in options.calibration.items()}
    model, tokenizer = prunus.load_model(options.model, device="auto")
    kinds = kinds_of_text(options, given, tokenizer)
    rows = Rows(options.out, {name: kind.provenance.sha256 for name, kind in kinds.items()}, model_name(options.model))
    asked: list[tuple[str, str, float, int, str]] = [(DENSE, "", 0.0, 0, "")]
    dense = rows.have(*asked[0]) or rows.add(*asked[0], measure(model, kinds))
    for source, seed in itertools.product(options.calibrations or given or [DEFAULT], options.seeds):
        shared: dict[str, Any] = {}
        for recipe in options.recipes:
            job = job_of(recipe, source, given, seed, options)
            # The path of a file that was parted here would differ with the folder; `kinds` tells its content.
            named_alike = replace(job, ratio=0.0, calibration=replace(job.calibration, source=(source,)))
            digest = hashlib.sha256(job_text(named_alike).encode()).hexdigest()[:16]
            for ratio in options.ratios:
                after = f"{recipe}, {options.recover} steps of recovery"
                names = [recipe, after] if options.recover else [recipe]
                asked += [(name, source, ratio, seed, digest) for name in names]
                missing = [name for name in names if not rows.have(name, source, ratio, seed, digest)]
                if not missing:
                    continue
                stages = Stages(stages_of(job.recipe, ratio), progress=False)
                passes = Passes(options.batch_size, stages=stages)
                start = time.perf_counter()
                calibration, scored = prepare(model, tokenizer, job, passes, shared, options.out)
                result = cut(model, ratio, scored, job.recipe, passes, calibration)
                seconds = time.perf_counter() - start
                more: dict[str, Any] = {"seconds": round(seconds, 1), "plan": result.plan.fingerprint}
                if recipe in missing:
                    found = measure(result.model, kinds, dense["perplexity"])
                    rows.add(recipe, source, ratio, seed, digest, found, **more)
                if after in missing:
                    trained, seconds = recovered(result, tokenizer, job, options)
                    found = measure(trained, kinds, dense["perplexity"])
                    rows.add(after, source, ratio, seed, digest, found, **{**more, "seconds": round(seconds, 1)})
    table = rows.table(asked, list(kinds))
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")


def sources_of(words: str, given: Mapping[str, Text]) -> tuple[tuple[str, ...], str | None]:
    """The sources of `c4:2+self`, with the file in the place of a name that was given, and the files' chat column."""
    names = [word.partition(":") for word in words.split("+")]
    columns = {given[name].column for name, _, _ in names if name in given}
    if len(columns) > 1:
        raise SystemExit(f"{words}: files with and without conversations cannot be mixed; they are read by one column")
    sources = tuple((given[name].path if name in given else name) + colon + rest for name, colon, rest in names)
    return sources, next(iter(columns), None)


def job_of(recipe: str, words: str, given: Mapping[str, Text], seed: int, options: argparse.Namespace) -> Job:
    """The job of a row: a recipe with its settings, `default,repair.noise=0`, on a calibration text."""
    name, *settings = recipe.split(",")
    for setting in settings:
        if not setting.startswith(OF_A_RECIPE):
            raise SystemExit(f"{recipe}: recipes differ in {', '.join(OF_A_RECIPE)}; not in {setting}")
    source, column = sources_of(words, given)
    said: dict[str, Any] = {"calibration.source": source, "calibration.seed": seed, "calibration.chat_column": column}
    said |= {"calibration.samples": options.samples, "calibration.seq_len": options.seq_len}
    job = read_job(name, settings, {"model": options.model, **said})
    if job.recipe.recovery:
        raise SystemExit(f"{recipe}: its training is not done here; compare without `recovery`, or with --recover")
    return job


def prepare(
    model: Any, tokenizer: Any, job: Job, passes: Passes, shared: dict[str, Any], keep: Path
) -> tuple[Calibration | None, Score]:
    """The text of a job and the scores of the dense model; what was made for others is not made again."""
    if (text := f"text {job.calibration}") not in shared:
        drawn = draw_calibration(model, tokenizer, job.calibration, held_out=0, needed=True, keep=keep)
        shared[text] = drawn[0]
    if (score := f"score {job.recipe.scoring} on {job.calibration}") not in shared:
        shared[score] = first_scores(model, shared[text], max(job.ratio, 0.1), job.recipe, passes)
    return shared[text], shared[score]


def recovered(result: PruneResult, tokenizer: Any, job: Job, options: argparse.Namespace) -> tuple[Any, float]:
    """A pruned model after training on its calibration text, as `prunus recover` does it, and the seconds of that."""
    chosen = job.calibration
    text = TextOptions(chosen.source, seq_len=options.seq_len, seed=chosen.seed, chat_column=chosen.chat_column)
    with tempfile.TemporaryDirectory(dir=options.out) as work:
        pruned, trained = (str(Path(work) / name) for name in ("pruned", "trained"))
        prunus.save_checkpoint(result.model, tokenizer, pruned, card="", extras={"plan.json": result.plan.to_json()})
        training = RecoveryJob(pruned, options.model, text, RecoveryOptions(max_steps=options.recover))
        facts = recover_job(training, trained, beside=options.out, progress=False)
        return prunus.load_model(trained, device="auto")[0], facts["seconds"]


def measure(model: Any, kinds: Mapping[str, Calibration], dense: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Perplexity on each kind of text; beside the dense model's also multiples of it, and their geometric mean."""
    found = {name: perplexity_of_windows(model, kind.input_ids).perplexity for name, kind in kinds.items()}
    if dense is None:
        return {"perplexity": found}
    relative = {name: perplexity / dense[name] for name, perplexity in found.items()}
    mean = math.exp(sum(map(math.log, relative.values())) / len(relative))
    return {"perplexity": found, "relative": relative, MEAN: mean}


def kinds_of_text(options: argparse.Namespace, given: Mapping[str, Text], tokenizer: Any) -> dict[str, Calibration]:
    """The windows of every kind of text."""
    sizes: dict[str, Any] = {"samples": options.windows, "seq_len": options.eval_seq_len}
    files = {name: replace(text, path=held_out_file(text.path)) for name, text in given.items()}
    files |= {name: Text.named(place) for name, place in options.kind.items()}
    kinds = {}
    for name, text in files.items():
        path = text.path
        if path == STANDARD_LIBRARY:
            kinds[name] = calibration_from_texts(standard_library(), tokenizer, **sizes, source=path)
        elif Path(path).suffix == ".txt":
            windows = cut_text(tokenizer, read_text(path), seq_len=options.eval_seq_len, max_windows=options.windows)
            kinds[name] = calibration_from_tokens(windows.ids, source=Path(path).name)
        else:
            kinds[name] = load_calibration(path, tokenizer, **sizes, reading=Reading(chat_column=text.column))
    return kinds


def standard_library() -> list[str]:
    """Python's own modules, without packages and tests."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    return [file.read_text(encoding="utf-8") for file in files]


@dataclass(frozen=True)
class Text:
    """A file, and the column of it that holds conversations; None where it holds text."""

    path: str
    column: str | None = None

    @classmethod
    def named(cls, place: str) -> Text:
        """That of `FILE` or `FILE:COLUMN`."""
        path, _, column = place.partition(":")
        return cls(path, column or None)


def split_documents(place: str, folder: Path, name: str) -> Text:
    """Part a JSON lines file into what recipes are calibrated on, which is returned, and the last fifth."""
    text = Text.named(place)
    # Not splitlines: a JSON string may hold other ends of lines as they are.
    lines = [line for line in Path(text.path).read_text(encoding="utf-8").split("\n") if line.strip()]
    cut_at = len(lines) - len(lines) // HELD_OUT
    path = folder / f"{name}-calibration.jsonl"
    path.write_text("\n".join(lines[:cut_at]) + "\n", encoding="utf-8")
    Path(held_out_file(str(path))).write_text("\n".join(lines[cut_at:]) + "\n", encoding="utf-8")
    return replace(text, path=str(path))


def held_out_file(path: str) -> str:
    return path.replace("-calibration.jsonl", "-held-out.jsonl")


@dataclass
class Rows:
    """The rows of a folder, on disk after each measurement.

    Attributes:
        folder: with rows.jsonl.
        kinds: hash of the windows of each kind of text; rows that were measured on others do not count.
        model: name of the model.
    """

    folder: Path
    kinds: Mapping[str, Any]
    model: str

    def __iter__(self) -> Iterator[dict[str, Any]]:
        path = self.folder / "rows.jsonl"
        whole, _, rest = path.read_text(encoding="utf-8").rpartition("\n") if path.exists() else ("", "", "")
        if rest:  # of a run that was killed while it wrote
            path.write_text(whole + "\n" * bool(whole), encoding="utf-8")
        for line in filter(None, whole.split("\n")):
            row = json.loads(line)
            if (row["kinds"], row["model"]) == (self.kinds, self.model):
                yield row

    def have(self, recipe: str, calibration: str, ratio: float, seed: int, digest: str) -> dict[str, Any] | None:
        """The row of a run, if it is there."""
        wanted = self._run(recipe, calibration, ratio, seed, digest)
        return next((row for row in self if wanted.items() <= row.items()), None)

    def add(
        self, recipe: str, calibration: str, ratio: float, seed: int, digest: str, found: Mapping[str, Any], **more: Any
    ) -> dict[str, Any]:
        """Write the row of a run."""
        about = {"model": self.model, "prunus": prunus.__version__, "torch": str(torch.__version__)}
        row = {**self._run(recipe, calibration, ratio, seed, digest), **found, **more, **about, "kinds": self.kinds}
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def table(self, runs: Sequence[tuple[str, str, float, int, str]], kinds: list[str]) -> str:
        """Multiples of the dense perplexity, one line per run; the perplexities themselves for the dense model."""
        lines: dict[tuple[str, ...], dict[str, float]] = {}
        for row in filter(None, (self.have(*run) for run in runs)):
            key = (row["recipe"], row["calibration"], f"{100 * row['ratio']:g} %", str(row["seed"]))
            lines[key] = {**row.get("relative", row["perplexity"]), **({MEAN: row[MEAN]} if MEAN in row else {})}
        return markdown_table(("recipe", "calibration", "removed", "seed"), lines, [*kinds, MEAN])

    @staticmethod
    def _run(recipe: str, calibration: str, ratio: float, seed: int, digest: str) -> dict[str, Any]:
        return {"recipe": recipe, "calibration": calibration, "ratio": ratio, "seed": seed, "settings": digest}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    for flag, meaning in (
        ("--calibration", "JSON lines; the last fifth is a kind of text of its own"),
        ("--kind", "a kind of text to measure on"),
    ):
        metavar = "NAME=FILE[:COLUMN]"
        parser.add_argument(flag, type=named_place, action="append", default=[], metavar=metavar, help=meaning)
    parser.add_argument("--calibrations", nargs="+", help="texts to calibrate on (default: those of --calibration)")
    parser.add_argument("--recipes", nargs="+", default=["default"], help="names or files, settings after commas")
    parser.add_argument("--recover", type=int, metavar="STEPS", help="train each model so long on its calibration text")
    parser.add_argument("--windows", type=int, default=12, help="windows of each kind of text")
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    options = parser.parse_args()
    if options.recover is not None:
        RecoveryOptions(max_steps=options.recover)  # or the error would come after hours
    options.ratios = options.ratios or [0.2, 0.4]
    options.calibration, options.kind = dict(options.calibration), dict(options.kind)
    return options


if __name__ == "__main__":
    main()
