r"""What a sweep costs: time and memory of every method under both engines, against passes written by hand.

Every figure comes from a fresh process; repetitions are interleaved (all jobs once, then all again), and medians are
shown. Memory is the peak of the resident set (of the CUDA allocator on CUDA) during the pass, once as it is and once
without what the process has before it holds a model. Time is that of the pass: a resident model is in memory before it
begins, a streamed one is read from disk (or the system's cache) within it. `methods` also times the matrix products
alone that a pass cannot do without, in the model's own shapes, and says which share of each pass they are.

    python benchmarks/engine.py methods --samples 16 --seq-len 256 --dtypes float32,bfloat16 --repetitions 3
    python benchmarks/engine.py scaling --depths 4,8,16,32 --sequence-counts 4,8,16 --processes 1,2
    python benchmarks/engine.py limit --layers 24 --hidden-size 2048 --samples 8
    python benchmarks/engine.py limit --shape llama-3-8b --compute float32 --limit 8GB --engines streamed
    python benchmarks/engine.py kill --repetitions 20

`limit` makes a model of random weights on disk, then scores, prunes, repairs and saves it in a process that may not
have as much memory as its weights take: RLIMIT_DATA, with which Linux refuses memory beyond a limit. As a control it
lets the resident engine try the same. `--dtype` is that on disk, `--compute` the one of the passes.

`kill` prunes and repairs a small model of random weights in two rounds, once undisturbed, and then again and again with
a SIGKILL at a random moment, after which the same command goes on. It counts the kills and the results that are the
same as the undisturbed one's, byte for byte: table, plan and weights, with nothing left beside them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from rows import write_report
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

import prunus
from prunus.calibration import Batch
from prunus.checkpoint import empty_model, load_model, locate, open_model, resolve_dtype
from prunus.checkpoint.packaged_model import PACKAGED_MODEL
from prunus.files.tensor_file import TensorLayout, write_tensors
from prunus.importance import METHODS, MethodOptions, get_method
from prunus.importance.registry import statistics_for
from prunus.machine.byte_sizes import parse_bytes, show_bytes
from prunus.machine.metering import metered
from prunus.machine.placement import DTYPES, dtype_name
from prunus.machine.processes import is_first, joined
from prunus.model.layers import outside_layers
from prunus.model.saved_dtype import save_in_
from prunus.sweep import ENGINES, sweep
from prunus.sweep.estimate import Workload, estimate

#: passes as a user would write them, against which the others are measured
BASELINES = ("forward", "forward+backward")
#: products of a pass alone: by the weights; and gradients by the inputs; and by the weights (the head's is not needed)
PRODUCTS = {"products": 1, "products, input gradients": 2, "products, all gradients": 3}
#: sizes of published models, by their config.json (meta-llama/Meta-Llama-3-8B)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    }
}
#: sequences that `limit` measures perplexity on
HELD_OUT = 2
#: methods that take no pass have nothing to be measured
MEASURED = [name for name, method in METHODS.items() if method.needs]


def main() -> None:
    options = parse()
    if options.command == "one":
        one(options)
        return
    run = {"methods": measure_methods, "scaling": measure_scaling, "limit": measure_limit, "kill": kill}[
        options.command
    ]
    report = {
        "command": " ".join(sys.argv[1:]),
        "prunus": prunus.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads",
        "device": options.device,
        **run(options),
    }
    if options.out:
        write_report(Path(options.out), report)


# --- one job, in a process of its own ---


def one(options: argparse.Namespace) -> None:
    """Run one job and print what it took as JSON."""
    torch.set_num_threads(options.threads)
    before = psutil.Process().memory_info().rss if options.device == "cpu" else 0
    generator = torch.Generator().manual_seed(0)
    with joined():
        work = tempfile.TemporaryDirectory(dir=options.scratch)
        load = open_model if options.engine == "streamed" else load_model
        model, _ = load(options.model, dtype=options.dtype, device=options.device)
        ids = torch.randint(3, model.config.vocab_size, (options.samples, options.seq_len), generator=generator)
        batches = [Batch(part, None) for part in ids.split(options.batch_size)]
        with metered(options.device) as cost:
            if options.job == "forward":
                forward(model, batches)
            elif options.job == "forward+backward":
                forward_and_backward(model, batches)
            elif options.job in PRODUCTS:
                products(model, batches, PRODUCTS[options.job])
            else:
                wanted = statistics_for([get_method(options.job)], MethodOptions())
                folder = Path(work.name) / "work" if options.engine == "streamed" else None
                sweep(model, batches, wanted, engine=options.engine, work=folder, progress=False)
        if is_first():
            print(json.dumps({"seconds": cost.seconds, "peak_bytes": cost.peak_bytes, "before_bytes": before}))
        work.cleanup()


@torch.no_grad()
def forward(model: Any, batches: list[Batch]) -> None:
    for batch in batches:
        ids = batch.input_ids.to(model.device)
        model(ids, labels=ids, use_cache=False)


def forward_and_backward(model: Any, batches: list[Batch]) -> None:
    """Gradients of all weights, accumulated over batches."""
    model.requires_grad_(True)
    for batch in batches:
        ids = batch.input_ids.to(model.device)
        (model(ids, labels=ids, use_cache=False).loss / len(batches)).backward()


@torch.no_grad()
def products(model: Any, batches: list[Batch], kinds: int) -> None:
    """The matrix products of a pass: 1 = by the weights, 2 = also those of gradients by inputs, 3 = also by weights."""
    linear = [(name, module.weight) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for batch in batches:
        filled: dict[int, Tensor] = {}
        for name, weight in linear:
            inputs, gradient = (
                filled.setdefault(width, torch.ones(batch.input_ids.numel(), width, dtype=model.dtype))
                for width in (weight.shape[1], weight.shape[0])
            )
            torch.nn.functional.linear(inputs, weight)
            if kinds > 1:
                gradient @ weight
            if kinds > 2 and "layers" in name:
                gradient.T @ inputs


def products_of(job: str) -> str:
    """The products that a pass cannot do without."""
    needs = get_method(job).needs if job in METHODS else {"forward+backward": {"gradients"}}.get(job, set())
    return list(PRODUCTS)[2 if needs & {"gradients", "squares"} else 1 if "gates" in needs else 0]


# --- the measurements ---


def measure_methods(options: argparse.Namespace) -> dict[str, Any]:
    """Every method under both engines, and the baselines."""
    model = str(locate(options.model))
    jobs = [(name, "resident") for name in (*PRODUCTS, *BASELINES)]
    jobs += [(name, engine) for name in options.methods for engine in options.engines]
    cases = [(dtype, job, engine) for dtype in options.dtypes for job, engine in jobs]
    found = interleaved(
        [{**shared(options), "model": model, "job": job, "engine": e, "dtype": dtype} for dtype, job, e in cases],
        options,
    )
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        costs = {case[1:]: cost for case, cost in zip(cases, found, strict=True) if case[0] == dtype}
        base = costs["forward+backward", "resident"]
        for (job, engine), cost in costs.items():
            row = {
                "dtype": dtype,
                "job": job,
                "engine": engine,
                **cost,
                "time_ratio": cost["seconds"] / base["seconds"],
            }
            if job not in PRODUCTS:
                row["product_share"] = costs[products_of(job), "resident"]["seconds"] / cost["seconds"]
                row["peak_ratio"] = cost["peak_bytes"] / base["peak_bytes"]
                row["own_ratio"] = cost["own_bytes"] / base["own_bytes"]
            rows.append(row)
    show(f"{Path(options.model).name}, relative to forward+backward by hand", rows)
    return {"model": Path(options.model).name, "rows": rows}


def measure_scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Depth, number of sequences and number of processes, one at a time."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folders = {depth: make_model(Path(scratch) / f"depth-{depth}", depth, options) for depth in options.depths}
        first = folders[options.depths[0]]
        cases: list[dict[str, int]] = [{"layers": depth} for depth in options.depths]
        cases += [{"sequences": count} for count in options.sequence_counts]
        cases += [{"processes": count} for count in options.processes]
        jobs = [(case, engine) for case in cases for engine in options.engines]
        found = interleaved(
            [
                {
                    **shared(options),
                    "model": str(folders[case["layers"]] if "layers" in case else first),
                    "samples": case.get("sequences", options.samples),
                    "job": options.method,
                    "engine": engine,
                    "processes": case.get("processes", 1),
                }
                for case, engine in jobs
            ],
            options,
        )
        rows = [{**case, "engine": engine, **cost} for (case, engine), cost in zip(jobs, found, strict=True)]
    show(f"{options.method}, {options.hidden_size} wide", rows)
    return {"method": options.method, "rows": rows}


def measure_limit(options: argparse.Namespace) -> dict[str, Any]:
    """A model larger than the memory it is pruned in."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = make_model(Path(scratch) / "model", options.layers, options)
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        compute = DTYPES[options.compute] if options.compute else dtype_of(options)
        meta = empty_model(LlamaConfig.from_pretrained(folder), compute)
        work = Workload(
            get_method(options.method).needs,
            options.samples,
            options.seq_len,
            options.batch_size,
            repairs=True,
            cuts=True,
            evaluation_tokens=HELD_OUT * options.seq_len,
        )
        text = Path(scratch) / "text.txt"
        text.write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        save_in_(meta, dtype_of(options))
        needed = estimate(meta, compute, work, torch.device("cpu"), dtype_of(options))
        limit = parse_bytes(options.limit) if options.limit else needed.streamed
        if limit >= weights:
            print(f"the limit of {show_bytes(limit)} is not below the weights ({show_bytes(weights)}): deeper, please")
        rows = []
        for engine in options.engines:
            out = Path(scratch) / f"{engine}-result"
            start = time.perf_counter()
            words = (limit, folder, out, text, options.ratio, engine, dtype_name(compute), options.method)
            sizes = (options.samples, options.seq_len, HELD_OUT, options.batch_size, options.threads)
            done = subprocess.run(
                [sys.executable, "-c", LIMITED, *map(str, (*words, *sizes))],
                capture_output=True,
                text=True,
                # Arrow reserves 1 GiB of addresses for its own allocator, and glibc some for every thread; all counts.
                env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"},
                check=False,
            )
            said = done.stderr.strip().splitlines()[-1][:200] if done.returncode else ""
            facts = json.loads(done.stdout) if done.returncode == 0 else {}
            complete = (out / "config.json").is_file()
            seconds = round(time.perf_counter() - start, 1)
            rows.append({"engine": engine, "saved": complete, "seconds": seconds, **facts, "said": said})
            shutil.rmtree(out, ignore_errors=True)
        report = {
            "parameters": sum(parameter.numel() for parameter in meta.parameters()),
            "weights_bytes": weights,
            "limit_bytes": limit,
            "estimate_streamed_bytes": needed.streamed,
            "estimate_resident_bytes": needed.resident,
        }
    show(f"{report['parameters']:,} parameters: {show_bytes(weights)} of weights under {show_bytes(limit)}", rows)
    return {**report, "rows": rows}


#: RLIMIT_DATA counts private writable memory, touched or not, that of interpreter and libraries too; their code, and
#: the system's cache of files that are read, are not in it. It is set once everything is imported: libraries that
#: cannot start a thread fail in places that no message explains.
LIMITED = """
import json, resource, sys
limit, folder, out, text, ratio, engine, dtype, method, samples, seq_len, held_out, batch_size, threads = sys.argv[1:]
import psutil
import torch
import prunus
torch.set_num_threads(int(threads))
resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
recipe = prunus.Recipe(1, prunus.ScoringOptions(method=method, attention_weight=1.0, noise=0.0))
job = prunus.Job(
    folder, float(ratio), recipe,
    prunus.CalibrationOptions((text,), samples=int(samples), seq_len=int(seq_len)),
    prunus.EvaluationOptions(held_out=int(held_out)),
    prunus.ModelOptions(device="cpu", dtype=dtype, engine=engine, batch_size=int(batch_size)),
)
metrics = prunus.prune_job(job, out, progress=False)
keys = ("parameters_before", "parameters_after", "perplexity_before", "perplexity_after", "seconds_to_prune")
peak = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
stages = {"seconds of " + stage["stage"]: stage["seconds"] for stage in metrics["stages"]}
print(json.dumps({**{key: metrics[key] for key in keys}, **stages, **peak}))
"""


#: what a run that was killed must leave as an undisturbed one does
COMPARED = ("model.safetensors", "prunus/groups.csv", "prunus/plan.json")


def kill(options: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL at random moments, and what the same command makes of it when it is given again."""
    # Processes that are forked from one that has imported everything: a run begins at once, as in a process of its own.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["__main__"])
    generator = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = make_model(Path(scratch) / "model", options.layers, options)

        def run(out: Path, seconds: float | None) -> tuple[int, float]:
            """Start the command and kill it after some seconds: its exit status, minus a signal's number; its time."""
            here, there = processes.Pipe()
            process = processes.Process(target=pruned, args=(folder, out, options, there))
            process.start()
            here.recv()
            begun = time.perf_counter()
            process.join(seconds)
            process.kill()
            process.join()
            assert process.exitcode is not None
            return process.exitcode, time.perf_counter() - begun

        def result(out: Path) -> list[bytes]:
            return [(out / name).read_bytes() for name in COMPARED]

        status, duration = run(Path(scratch) / "undisturbed" / "out", None)
        if status:
            raise SystemExit("the undisturbed run failed")
        expected = result(Path(scratch) / "undisturbed" / "out")
        while sum(row["killed"] for row in rows) < options.repetitions:
            number = len(rows)
            place, after = Path(scratch) / f"killed-{number}", generator.uniform(0, duration)
            status, lasted = run(place / "out", after)
            if status == 0:
                duration = min(duration, lasted)  # it came before the kill: the machine is less busy than it was
            killed, found = status == -signal.SIGKILL, len(list(place.glob("**/layer-*.safetensors")))
            if run(place / "out", None)[0] if killed else status:
                raise SystemExit(f"run {number} failed by itself")
            rows.append(
                {
                    "after_seconds": after,
                    "killed": killed,
                    "layers_found": found,
                    "same": result(place / "out") == expected,
                    "alone": [path.name for path in place.iterdir()] == ["out"],
                }
            )
            print(rows[-1], file=sys.stderr)
            shutil.rmtree(place)
    hit = [row for row in rows if row["killed"]]
    same = sum(row["same"] and row["alone"] for row in hit)
    show(f"undisturbed {duration:.1f} s; {same} of {len(hit)} killed runs have the same result", rows)
    return {"undisturbed_seconds": duration, "killed": len(hit), "same": same, "rows": rows}


def pruned(folder: Path, out: Path, options: argparse.Namespace, parent: Any) -> None:
    """One run of `kill`."""
    torch.set_num_threads(options.threads)
    parent.send("ready")
    job = prunus.Job(
        str(folder),
        0.3,
        prunus.Recipe().by(options.method),
        prunus.CalibrationOptions(samples=options.samples, seq_len=options.seq_len),
        prunus.EvaluationOptions(held_out=0),
        prunus.ModelOptions(device="cpu", engine="streamed", batch_size=options.batch_size),
    )
    prunus.prune_job(
        job,
        out,
        # A kill may come when the result is there and the work folder not yet gone.
        overwrite=True,
        progress=False,
    )


def interleaved(jobs: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, float]]:
    """Each job in fresh processes, all of them once, then all again; medians."""
    runs: list[list[dict[str, float]]] = [[] for _ in jobs]
    for repetition in range(options.repetitions):
        for job, seen in zip(jobs, runs, strict=True):
            seen.append(in_a_process(dict(job)))
            print(f"{repetition + 1}/{options.repetitions} {job['job']} {job['engine']} {seen[-1]}", file=sys.stderr)
    return [
        {
            "seconds": statistics.median(run["seconds"] for run in seen),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in seen),
            "own_bytes": statistics.median(run["peak_bytes"] - run["before_bytes"] for run in seen),
            "repetitions": len(seen),
        }
        for seen in runs
    ]


def in_a_process(job: dict[str, Any]) -> dict[str, float]:
    processes = job.pop("processes", 1)
    job["threads"] = max(1, job["threads"] // processes)  # they share the cores
    words = [__file__, "one", *(f"--{name.replace('_', '-')}={value}" for name, value in job.items())]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def make_model(folder: Path, layers: int, options: argparse.Namespace) -> Path:
    """A Llama of random weights on disk, in the sizes that the options say."""
    sizes = SHAPES.get(getattr(options, "shape", None) or "") or {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size or 4 * options.hidden_size,
        "num_hidden_layers": 24,
        "num_attention_heads": options.hidden_size // 64,
        "num_key_value_heads": max(1, options.hidden_size // 256),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    config = LlamaConfig(**{**sizes, "num_hidden_layers": layers or sizes["num_hidden_layers"]})
    return save_random_llama(folder, config, dtype_of(options))


def save_random_llama(folder: Path, config: LlamaConfig, dtype: torch.dtype, device: str = "cpu") -> Path:
    """A Llama of random weights on disk, written tensor by tensor, with a tokenizer that has a token for every byte."""
    config.dtype = dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    model = empty_model(config, dtype)
    inside = {name: p for name, p in model.named_parameters() if name.startswith("model.layers.")}
    named = {**outside_layers(model), **inside}
    generator = torch.Generator(device).manual_seed(0)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in named.items():
            scale = 0.02 if parameter.ndim > 1 else 0.0
            value = torch.empty(parameter.shape, device=device).normal_(
                mean=1.0 if scale == 0 else 0.0, std=scale, generator=generator
            )
            yield name, value.to(parameter.dtype).cpu()

    layouts = {name: TensorLayout.of(parameter) for name, parameter in named.items()}
    write_tensors(folder / "model.safetensors", layouts, weights(), {"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    dtype = resolve_dtype(options.dtype)
    return torch.float32 if dtype == "auto" else dtype


def shared(options: argparse.Namespace) -> dict[str, Any]:
    names = ("samples", "seq_len", "batch_size", "threads", "dtype", "device", "scratch")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name.replace("_bytes", " MB"), justify="right")
    for row in rows:
        table.add_row(*(cell(name, row.get(name)) for name in columns))
    Console(width=160).print(table)


def cell(name: str, value: Any) -> str:
    if name.endswith("_bytes") and value is not None:
        return f"{value / 1e6:,.0f}"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    numbers = lambda text: [int(part) for part in text.split(",") if part]  # noqa: E731
    names = lambda text: [part for part in text.split(",") if part]  # noqa: E731
    for command in ("methods", "scaling", "limit", "kill", "one"):
        sub = commands.add_parser(command)
        sub.add_argument("--samples", type=int, default=16)
        sub.add_argument("--seq-len", type=int, default=256)
        sub.add_argument("--batch-size", type=int, default=1)
        sub.add_argument("--repetitions", type=int, default=20 if command == "kill" else 3)
        sub.add_argument("--threads", type=int, default=os.cpu_count())
        sub.add_argument("--device", default="cpu")
        sub.add_argument("--dtype", default="bfloat16" if command == "limit" else "float32")
        sub.add_argument("--scratch", help="folder for models and block inputs; the system's temporary one otherwise")
        sub.add_argument("--out", help="JSON file")
        if command in ("methods", "one"):
            sub.add_argument("--model", default=PACKAGED_MODEL)
        if command in ("methods", "scaling"):
            sub.add_argument("--engines", type=names, default=list(ENGINES))
        if command == "methods":
            sub.add_argument("--methods", type=names, default=MEASURED)
            sub.add_argument("--dtypes", type=names, default=["float32"])
        if command in ("scaling", "limit", "kill"):
            sub.add_argument("--method", default="taylor")
            sub.add_argument("--hidden-size", type=int, default={"limit": 2048, "kill": 128}.get(command, 512))
            sub.add_argument("--intermediate-size", type=int)
            sub.add_argument("--vocab-size", type=int, default=512 if command == "kill" else 32000)
        if command == "kill":
            sub.add_argument("--layers", type=int, default=12)
            sub.add_argument("--seed", type=int, default=0)
        if command == "scaling":
            sub.add_argument("--depths", type=numbers, default=[4, 8, 16, 32])
            sub.add_argument("--sequence-counts", type=numbers, default=[8, 16, 32])
            sub.add_argument("--processes", type=numbers, default=[1, 2])
        if command == "limit":
            sub.add_argument("--layers", type=int, help="24, or as many as the shape has")
            sub.add_argument("--shape", choices=SHAPES, help="sizes of a published model, in place of the others")
            sub.add_argument("--compute", choices=DTYPES, help="dtype of the passes; otherwise that on disk")
            sub.add_argument("--engines", type=names, default=list(reversed(ENGINES)))
            sub.add_argument("--ratio", type=float, default=0.2)
            sub.add_argument("--limit", help="e.g. 2GB; the estimate of the streamed engine otherwise")
        if command == "one":
            sub.add_argument("--job", required=True)
            sub.add_argument("--engine", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
