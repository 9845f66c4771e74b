"""Does llama.cpp say what transformers says, for a model of every family that `export --to gguf` writes?

Small models (family_models.py), cut to ragged layers (one of them removed, but for SmolLM3, whose layers have kinds by
their numbers), and mixtures with experts removed, are exported and continued greedily in both. Two environments may be
used: this script's for transformers, and one with llama-cpp-python. `--quantize Q4_K_M` has llama.cpp quantise the f32
file first.

    python benchmarks/llama_cpp_families.py --llama-python build/deploy-venv/bin/python \
        --out benchmarks/results/llama-cpp-families.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from deploy_check import ask, compare, greedy, scores_of
from family_models import GROUPS, HIDDEN, LAYERS, SEED, dense_model, experts_plan, ragged_plan, uniform_plan

import prunus
from prunus.checkpoint import load_model, save_checkpoint
from prunus.export import export_gguf
from prunus.export.llama_cpp import CANDIDATES
from prunus.model.families import FAMILIES
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan

#: what is run → family, how it is cut, and fields of its config beside those of family_models.py
MODELS: dict[str, tuple[str, Callable[[Geometry], Plan], dict[str, Any]]] = {
    **{family: (family, experts_plan if FAMILIES[family].mixture else ragged_plan, {}) for family in CANDIDATES},
    # As published; llama.cpp loads no other.
    "olmoe": ("olmoe", experts_plan, {"num_key_value_heads": 2 * GROUPS}),
    # As EXAONE 4 1.2B, and as 32B, which has windows: llama.cpp tells them apart by the number of layers.
    "exaone4": ("exaone4", ragged_plan, {"sliding_window": None, "layer_types": ["full_attention"] * LAYERS}),
    "exaone4, windows": (
        "exaone4",
        uniform_plan,
        {"num_hidden_layers": 64, "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 16},
    ),
    # Its layers have kinds by their numbers.
    "smollm3": ("smollm3", partial(ragged_plan, keeps_layers=True), {}),
    "qwen3, head of its own": ("qwen3", ragged_plan, {"tie_word_embeddings": False}),
    # Families whose ragged models go out as an architecture of another name.
    **{f"{family}, uniform": (family, uniform_plan, {}) for family in ("llama", "qwen3", "seed_oss", "ernie4_5")},
    # Mixtures that have lost attention groups as well; those of OLMoE go together.
    **{
        f"{family}, uniform": (family, uniform_plan, {})
        for family in CANDIDATES
        if FAMILIES[family].mixture and family != "olmoe"
    },
}
PROMPTS = (
    "Once upon a time there were three foxes who",
    "def add(a, b):\n    return",
    "The 4 seasons of the year 1999:",
)


def main() -> None:
    """Run the families; the table goes to stdout, everything measured to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--families", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", type=int, default=200, help="generated per prompt; there are three")
    parser.add_argument("--quantize", help="a type of llama.cpp, such as Q4_K_M; compares nothing, only runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {"families": {}}
    result |= {
        "models": f"{LAYERS} layers of random weights, hidden size {HIDDEN}, seed {SEED}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    _, tokenizer = load_model("smollm2-135m")
    for name in args.families:
        family, plan, fields = MODELS[name]
        model = dense_model(family, len(tokenizer), **fields)
        model = prunus.apply_plan(model, plan(Geometry.of(model)))
        with tempfile.TemporaryDirectory() as folder:
            result["families"].setdefault(name, {}).update(_check(model, tokenizer, args, Path(folder)))
        print(name, result["families"][name], file=sys.stderr, flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result["families"]))


def markdown(found: dict[str, Any]) -> str:
    """The table of RESULTS.md."""
    rows = [
        "| family | GGUF | zeros | equal greedy tokens | largest difference | mean |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for family, facts in found.items():
        if "tokens" in facts:
            rows.append(
                f"| `{family}` | `{facts['architecture']}` | {facts['zeros']:.0%} | {facts['equal_tokens']} of "
                f"{facts['tokens']} | {facts['largest_difference']:.6f} | {facts['mean_difference']:.6f} |"
            )
    return "\n".join(rows)


def _check(model: Any, tokenizer: Any, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source, file = folder / "model", folder / "model.gguf"
    save_checkpoint(model, tokenizer, source, card="", extras={})
    multiple = 256 if args.quantize and not Geometry.of(model).family.mixture else 1
    written = export_gguf(str(source), file, type="f32", mlp_multiple=multiple, progress=False)
    facts: dict[str, Any] = {
        "architecture": written["architecture"],
        "zeros": written["of_them_zeros"] / written["parameters"],
    }
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    continuations = [greedy(model, prompt, args.tokens) for prompt in prompts]
    job = {"texts": list(PROMPTS), "prompts": prompts, "continuations": continuations, "tokens": args.tokens}
    job |= {"model": str(file), "quantize": args.quantize}
    answer = ask("deploy_llama_cpp.py", job, file, args.llama_python)
    if args.quantize:
        assert all(math.isfinite(value) for row in answer["log_probabilities"] for value in row)
        return {args.quantize: {"generated": sum(map(len, answer["tokens"]))}}
    scored = [scores_of(model, *pair) for pair in zip(prompts, continuations, strict=True)]
    facts["distinct_tokens"] = len({token for continuation in continuations for token in continuation})
    return {**facts, **compare(continuations, scored, answer), "same_tokenization": answer["prompts"] == prompts}


if __name__ == "__main__":
    main()
