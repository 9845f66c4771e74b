r"""What prunus does on one GPU, in at most eight minutes: tests, scoring, a model of 8 billion parameters, a whole run.

    python benchmarks/gpu_check.py --out benchmarks/results/gpu-check.json

Parts, in this order: `methods`, every method on both engines against passes written by hand; `large`, the shape of
Llama 3 8B with random weights, resident and streamed, against a backward pass with gradient checkpointing; `recipe`,
the default recipe from folder to folder; `recovery`, tokens per second of training; `tests`, those marked `cuda`. Each
part is written to the JSON file as soon as it is done, and printed as a table for RESULTS.md.

`--device cpu --small` runs the same code on tiny models in under a minute, so that it cannot rot unseen.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine import BASELINES, MEASURED, SHAPES, forward, forward_and_backward, save_random_llama
from rows import write_report
from transformers import LlamaConfig

import prunus
from prunus.calibration import Batch
from prunus.checkpoint import load_model, locate, open_model
from prunus.checkpoint.packaged_model import PACKAGED_MODEL
from prunus.cli import main as prunus_command
from prunus.importance import MethodOptions, get_method
from prunus.importance.registry import statistics_for
from prunus.machine.metering import metered
from prunus.sweep import ENGINES, Engine, sweep

TINY = {
    **SHAPES["llama-3-8b"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        model: scored, pruned and trained.
        large: sizes of the model of random weights.
        samples: sequences of `methods`.
        seq_len: their tokens.
        calibration: sequences of the whole run.
        minutes: of training.
    """

    model: str
    large: dict[str, Any]
    samples: int
    seq_len: int
    calibration: int
    minutes: float


def main() -> int:
    options = parse()
    report: dict[str, Any] = {
        "prunus": prunus.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU",
        "small": options.small,
    }
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        sizes = Sizes(PACKAGED_MODEL, SHAPES["llama-3-8b"], 8, 512, 128, 1.0)
        if options.small:
            tiny = save_random_llama(Path(scratch) / "tiny", LlamaConfig(**TINY), torch.float32)
            sizes = Sizes(str(tiny), TINY, 2, 32, 4, 0.01)
        for name in options.parts:
            report[name] = PARTS[name](sizes, options.device, Path(scratch))
            report["seconds"] = round(time.perf_counter() - begun, 1)
            write_report(options.out, report)
            print(f"\n**{name}**, {report['device']}\n\n{table(report[name])}\n", flush=True)
    print(f"{report['seconds']} s in all")
    return int(any(row.get("failed") for row in report.get("tests", [])))


def methods(sizes: Sizes, device: str, scratch: Path) -> list[dict[str, Any]]:
    """Every method on both engines, and the passes by hand."""
    folder, rows = locate(sizes.model), []
    for name in BASELINES:
        rows.append({"pass": name, "engine": "by hand", **measured(folder, "resident", by_hand(name), sizes, device)})
    for name in MEASURED:
        rows += [
            {"pass": name, "engine": engine, **measured(folder, engine, swept(name, engine, scratch), sizes, device)}
            for engine in ENGINES
        ]
    return with_ratios(rows, "forward+backward")


def large(sizes: Sizes, device: str, scratch: Path) -> list[dict[str, Any]]:
    """A model of the large shape on both engines, against a backward pass with gradient checkpointing."""
    folder = save_random_llama(scratch / "large", LlamaConfig(**sizes.large), torch.bfloat16, device)
    rows = [
        {
            "pass": "backward, checkpointed",
            "engine": "by hand",
            **measured(folder, "resident", by_hand("checkpointed"), sizes, device),
        }
    ]
    for name in ("taylor", "gate_fisher"):
        rows += [
            {"pass": name, "engine": engine, **measured(folder, engine, swept(name, engine, scratch), sizes, device)}
            for engine in ENGINES
        ]
    return with_ratios(rows, "backward, checkpointed")


def recipe(sizes: Sizes, device: str, scratch: Path) -> list[dict[str, Any]]:
    """The default recipe from folder to folder."""
    with metered(device) as cost:
        words = ["prune", sizes.model, "--out", str(scratch / "pruned"), "--ratio", "0.2", "--device", device]
        words += ["--samples", str(sizes.calibration), "--seq-len", str(sizes.seq_len)]
        command(*words, "--set", "evaluation.held_out=4")
    metrics = json.loads((scratch / "pruned" / "prunus" / "metrics.json").read_text(encoding="utf-8"))
    keys = ("parameters_before", "parameters_after", "perplexity_before", "perplexity_after", "seconds_to_prune")
    return [{**{key: metrics[key] for key in keys}, "seconds": cost.seconds, "peak_bytes": cost.peak_bytes}]


def recovery(sizes: Sizes, device: str, scratch: Path) -> list[dict[str, Any]]:
    """Training with all weights and with adapters: tokens per second, and the loss before and after."""
    if not (scratch / "pruned" / "config.json").is_file():
        recipe(sizes, device, scratch)
    rows = []
    for train in ("full", "lora"):
        out = scratch / f"recovered-{train}"
        words = ["recover", str(scratch / "pruned"), "--out", str(out), "--teacher", str(locate(sizes.model))]
        words += ["--text", "default", "--seq-len", str(sizes.seq_len), "--device", device]
        command(*words, "--train", train, "--max-minutes", str(sizes.minutes), "--set", "text.held_out=4")
        facts = json.loads((out / "prunus" / "recovery.json").read_text(encoding="utf-8"))
        loss, taken = facts["held_out_loss"], {key: facts[key] for key in ("tokens", "seconds")}
        rows.append({"train": train, **taken, "tokens_per_second": taken["tokens"] / taken["seconds"], **loss})
    return rows


def tests(sizes: Sizes, device: str, scratch: Path) -> list[dict[str, Any]]:
    """The tests that need a GPU; none of them on a CPU."""
    if device != "cuda":
        return [{"tests": "marked cuda", "skipped": f"the device is {device}"}]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    said = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    return [{"tests": "marked cuda", "said": said, "failed": done.returncode != 0}]


PARTS: dict[str, Callable[[Sizes, str, Path], list[dict[str, Any]]]] = {
    "methods": methods,
    "large": large,
    "recipe": recipe,
    "recovery": recovery,
    "tests": tests,
}


def measured(folder: Path, engine: str, run: Callable[[Any, list[Batch]], None], sizes: Sizes, device: str) -> Any:
    """Seconds and peak memory of a pass over a model that is loaded for it and let go; the second time counts."""
    load = open_model if engine == "streamed" else load_model
    model, _ = load(folder, dtype="bfloat16", device=device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (sizes.samples, sizes.seq_len), generator=generator)
    batches = [Batch(part, None) for part in ids.split(1)]
    run(model, batches[:1])
    with metered(device) as cost:
        run(model, batches)
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes}


def by_hand(name: str) -> Callable[[Any, list[Batch]], None]:
    """A pass as a user would write it."""
    if name != "checkpointed":
        return {"forward": forward, "forward+backward": forward_and_backward}[name]

    def checkpointed(model: Any, batches: list[Batch]) -> None:
        model.train()  # which checkpointing asks for; these models have no dropout
        model.gradient_checkpointing_enable({"use_reentrant": False})
        forward_and_backward(model, batches)
        model.zero_grad(set_to_none=True)

    return checkpointed


def swept(method: str, engine: Engine, scratch: Path) -> Callable[[Any, list[Batch]], None]:
    """The pass of a method under an engine."""

    def run(model: Any, batches: list[Batch]) -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as work:
            folder = Path(work) / "work" if engine == "streamed" else None
            wanted = statistics_for([get_method(method)], MethodOptions())
            sweep(model, batches, wanted, engine=engine, work=folder, progress=False)

    return run


def command(*words: str) -> None:
    """A command of prunus, which has to succeed."""
    if prunus_command(list(words)):
        raise SystemExit(f"prunus {' '.join(words)} failed")


def with_ratios(rows: list[dict[str, Any]], base: str) -> list[dict[str, Any]]:
    """Time and memory as multiples of one row's."""
    first = next(row for row in rows if row["pass"] == base)
    for row in rows:
        row["time_ratio"] = row["seconds"] / first["seconds"]
        row["peak_ratio"] = row["peak_bytes"] / first["peak_bytes"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[name.replace("_bytes", ", MB").replace("_", " ") for name in columns], ["---"] * len(columns)]
    lines += [[cell(name, row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.0f}"
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny models, less than a minute")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help="by comma")
    parser.add_argument("--scratch", help="folder for models (17 GB); the system's temporary one otherwise")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check.json"))
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} unknown; there are {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU; --device cpu --small shows what would be measured")
    return options


if __name__ == "__main__":
    sys.exit(main())
