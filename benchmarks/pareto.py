r"""Prune, quantise, or take a smaller model? Size and speed in llama.cpp against perplexity, a table and a picture.

The dense model in llama.cpp's types, and pruned ones in three of them. Pruned folders are made by `prunus prune` with
the options after `--`, and reused if they are there; `--folder NAME=DIR` adds others, such as recovered ones. Every
file is exported in F16, quantised by llama.cpp and measured there: perplexity from its logits, then prefill and decode
of all files in turn (deploy_speed.py), as ratios to the dense model in F16 in the same round.

    python benchmarks/pareto.py --text wikitext2-test.raw.txt --work build/pareto --out benchmarks/results/pareto.json \
        --picture docs/pareto.svg --folder "20 % removed, recovered=smollm2-20r" \
        -- --calibration c4-sample.jsonl:2 --calibration self --samples 32 --seq-len 512

A name is a model and, after a comma, what else was done to it, which gets a mark of its own in the picture. Rows are
written when they are measured, and those that are there are not measured again. `llama-cpp-python` may be in another
environment, `--llama-python`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

from deploy_check import ask
from deploy_speed import measure
from gguf_quantised import prunus_command
from rows import made_once, markdown_table, named_place, options_and_words, write_report

import prunus
from prunus.checkpoint.packaged_model import PACKAGED_MODEL
from prunus.evaluation.perplexity import cut_text, read_text

DENSE, FULL = "dense", "F16"
#: llama.cpp's types, largest first; a pruned model in two of them tells how both add up
DENSE_TYPES = (FULL, "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K")
PRUNED_TYPES = (FULL, "Q8_0", "Q4_K_M")
#: blocks of Q8_0, and of the types that llama.cpp takes where a row is no multiple of a K-quant's 256: rows that are no
#: multiple of these either stay in F16
BLOCK = 32
#: of the types, in their order; colour-blind readers can tell them apart
COLOURS = ["#1a1f24", "#0072b2", "#56b4e9", "#d55e00", "#cc79a7", "#009e73"]
#: axis → its title, and whether less of it is better
AXES = {
    "size": ("file, MB", True),
    "prefill": ("prefill, × dense F16", False),
    "decode": ("decode, × dense F16", False),
}


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = prunus.load_model(options.model)
    windows = cut_text(
        tokenizer, read_text(options.text), seq_len=options.eval_seq_len, max_windows=options.windows
    ).ids
    settings = {
        "model": options.model,
        "text": Path(options.text).name,
        "windows": len(windows),
        "seq_len": options.eval_seq_len,
        "pruned with": " ".join(Path(word).name for word in options.words),
        "speed": f"{options.prompt_tokens} + {options.new_tokens} tokens, {options.threads} threads"
        + ", --no-repack" * options.no_repack,
    }
    report = json.loads(options.out.read_text()) if options.out.exists() else {**settings, "rows": []}
    if (found := {key: report[key] for key in settings}) != settings:
        raise SystemExit(f"{options.out} was measured with {found}, not with {settings}: name another file")
    if "perplexity in transformers" not in report:
        report["perplexity in transformers"] = prunus.perplexity_of_windows(model.float(), windows).perplexity
        write_report(options.out, report)
    del model
    rows = {(row["model"], row["type"]): row for row in report["rows"]}
    untimed = {}
    dense = [(DENSE, kind) for kind in DENSE_TYPES if kind in {FULL, *options.types}]
    pruned = [(name, kind) for name in names(options) for kind in PRUNED_TYPES if kind in options.types]
    for name, kind in dense + pruned:
        if "decode" in rows.get((name, kind), {}):
            continue
        file = untimed[name, kind] = gguf_file(name, kind, options)
        if (name, kind) not in rows:
            losses = losses_of(file, kind, windows.tolist(), options)
            row = {"model": name, "type": kind, "bytes": file.stat().st_size, "losses": losses}
            rows[name, kind] = {**row, "perplexity": math.exp(statistics.fmean(losses))}
            report["rows"] = list(rows.values())
            write_report(options.out, report)
    if not options.repeats:
        return
    if untimed:
        files = {" ".join(key): file for key, file in untimed.items()}
        timed = {DENSE: gguf_file(DENSE, FULL, options), **files}
        speeds = measure("llama.cpp q8_0", timed, options, options.llama_python)
        for key in untimed:
            rows[key] |= speeds[" ".join(key)]
    report["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    write_report(options.out, report)
    timed_rows = [row for row in report["rows"] if "decode" in row]  # others wait for a call that times them
    if options.picture:
        options.picture.write_text(picture(timed_rows) + "\n", encoding="utf-8")
    print(table(timed_rows), end="")


def names(options: argparse.Namespace) -> dict[str, tuple[Path, list[str]]]:
    """The pruned models: folder, and options of `prunus prune` that make it."""
    made: dict[str, tuple[str, list[str]]] = {}
    for ratio in options.ratios:
        made[f"{100 * ratio:g} % removed"] = (f"removed-{100 * ratio:g}", ["--ratio", str(ratio)])
    for ratio in options.aligned:
        words = ["--ratio", str(ratio), "--align", "gguf"]
        made[f"{100 * ratio:g} % removed, aligned"] = (f"removed-{100 * ratio:g}-aligned", words)
    found = {name: (options.work / folder, words) for name, (folder, words) in made.items()}
    return found | {name: (Path(folder), []) for name, folder in options.folder}


def gguf_file(name: str, kind: str, options: argparse.Namespace) -> Path:
    """Where llama.cpp's file of a type is, or will be; a model and its F16 file that are not there are made."""
    full = options.work / f"{name.replace(' %', '').replace(', ', '-').replace(' ', '-')}.gguf"
    source = options.model
    words: list[str] = []
    if name != DENSE:
        folder, words = names(options)[name]
        source = str(folder)
        if words:
            words = ["prune", options.model, *words, "--set", "evaluation.held_out=0", *options.words]
            made_once(folder, words, lambda: prunus_command(*words, "--out", source))
    export = ["export", source, "--to", "gguf", "--mlp-multiple", str(BLOCK)]
    made_once(full, [*export, *words], lambda: prunus_command(*export, "--out", str(full)))
    return full if kind == FULL else full.with_name(f"{full.stem}-{kind}.gguf")


def losses_of(file: Path, kind: str, windows: list[list[int]], options: argparse.Namespace) -> list[float]:
    """Mean loss of each window in llama.cpp, of its tokens but the first, which quantises the F16 file first."""
    job = {
        "model": str(file),
        "texts": [""] * len(windows),
        "prompts": [window[:1] for window in windows],
        "continuations": [window[1:] for window in windows],
        "tokens": 0,
        "threads": options.threads,
        "no_repack": options.no_repack,
    }
    if kind != FULL:
        job |= {"model": str(file).removesuffix(f"-{kind}.gguf") + ".gguf", "quantize": kind}
    answer = ask("deploy_llama_cpp.py", job, file, options.llama_python)
    return [-statistics.fmean(window) for window in answer["log_probabilities"]]


def dense_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The one that others are compared with."""
    return next(row for row in rows if (row["model"], row["type"]) == (DENSE, FULL))


def figures(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """What a row is compared by."""
    return {
        "size": row["bytes"] / 1e6,
        "perplexity": row["perplexity"],
        "times": row["perplexity"] / dense["perplexity"],
        "prefill": row["prefill"]["ratio"],
        "decode": row["decode"]["ratio"],
    }


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their figures, and the axes on which no row is better both there and in perplexity."""
    dense = dense_row(rows)
    with_figures = [{**row, **figures(row, dense)} for row in rows]
    for row in with_figures:
        row["unbeaten"] = [
            axis
            for axis, (_, less) in AXES.items()
            if not any(
                other["perplexity"] < row["perplexity"]
                and (other[axis] <= row[axis] if less else other[axis] >= row[axis])
                for other in with_figures
            )
        ]
    return with_figures


def table(rows: list[dict[str, Any]]) -> str:
    """One line per file."""
    dense = dense_row(rows)
    lines: dict[tuple[str, ...], dict[str, float]] = {}
    for row in compared(rows):
        differences = [loss - other for loss, other in zip(row["losses"], dense["losses"], strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        lines[row["model"], row["type"], ", ".join(row["unbeaten"])] = {
            AXES["size"][0]: row["size"],
            "perplexity": row["perplexity"],
            "× dense F16": row["times"],
            "± %": 100 * error,
            **{title: row[axis] for axis, (title, _) in AXES.items() if axis != "size"},
        }
    columns = next(iter(lines.values()))
    return markdown_table(("model", "type", "unbeaten in"), lines, columns)


def picture(rows: list[dict[str, Any]]) -> str:
    """Perplexity against each axis, as SVG: a colour per type, a mark per treatment, a line through rising ratios."""
    import vl_convert
    from keep_picture import CONFIG

    values = []
    for row in compared(rows):
        head, _, more = row["model"].partition(", ")
        is_dense = head == DENSE
        share = 0.0 if is_dense else float(head.partition(" ")[0])
        values.append(
            {key: row[key] for key in (*AXES, "perplexity", "type")}
            | {"treatment": more or (DENSE if is_dense else "pruned"), "share": share}
            | {"label": "" if is_dense else head.removesuffix(" removed")}
        )
    types = [kind for kind in DENSE_TYPES if any(value["type"] == kind for value in values)]
    treatments = list(dict.fromkeys(value["treatment"] for value in values))
    y = {
        "field": "perplexity",
        "type": "quantitative",
        "scale": {"type": "log", "nice": False, "padding": 12},
        "axis": {"values": [20, 25, 30, 40, 50, 60, 80, 100, 150]},
    }

    def panel(axis: str) -> dict[str, Any]:
        x = {"field": axis, "type": "quantitative", "title": AXES[axis][0], "scale": {"zero": False, "padding": 12}}
        scale = {"domain": types, "range": [COLOURS[DENSE_TYPES.index(kind)] for kind in types]}
        colour = {"field": "type", "type": "nominal", "title": None, "scale": scale}
        place = {"x": x, "y": y, "color": colour}
        lines = {"filter": f"datum.treatment == '{DENSE}' || datum.treatment == 'pruned'"}
        return {
            "width": 240,
            "height": 330,
            "layer": [
                {
                    "transform": [lines],
                    "mark": {"type": "line", "strokeWidth": 1.5},
                    "encoding": {**place, "order": {"field": "share", "type": "quantitative"}},
                },
                {
                    "mark": {"type": "point", "size": 55, "filled": True, "opacity": 1},
                    "encoding": {
                        **place,
                        "shape": {"field": "treatment", "type": "nominal", "sort": treatments, "title": None},
                    },
                },
                {
                    "mark": {"type": "text", "align": "left", "dx": 6, "dy": -5, "fontSize": 9},
                    "encoding": {**place, "text": {"field": "label"}},
                },
            ],
        }

    drawn = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "config": CONFIG,
        "data": {"values": values},
        "hconcat": [panel(axis) for axis in AXES],
    }
    return vl_convert.vegalite_to_svg(drawn)


def shares(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED_MODEL)
    parser.add_argument("--text", required=True, help="to measure perplexity on")
    parser.add_argument("--windows", type=int, default=20, help="the first so many of the text")
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    parser.add_argument("--ratios", type=shares, default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--aligned", type=shares, default=[], help="ratios that are pruned with `--align gguf` as well")
    parser.add_argument("--types", nargs="+", default=DENSE_TYPES, choices=DENSE_TYPES, help="only these, for now")
    parser.add_argument("--folder", type=named_place, action="append", default=[], metavar="NAME=DIR", help="a model")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--repeats", type=int, default=7, help="rounds of timing; 0 leaves it to a later call, when idle"
    )
    parser.add_argument("--no-repack", action="store_true", help="as llama.cpp's; its AMX kernels crash in 0.3.36")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--work", type=Path, default=Path("build/pareto"), help="folder for models and files")
    parser.add_argument("--picture", type=Path, help="the SVG to write")
    parser.add_argument("--out", type=Path, required=True)
    return options_and_words(parser)


if __name__ == "__main__":
    main()
