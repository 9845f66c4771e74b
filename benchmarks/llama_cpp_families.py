"""Does llama.cpp say what transformers says, for a model of every family that `export --to gguf` writes?

Models of six layers of random weights from config, cut to ragged layers (one of them removed, but for SmolLM3, whose
layers have kinds by their numbers), exported, and continued greedily in both. Two environments may be used: this
script's for transformers, and one with llama-cpp-python. `--quantize Q4_K_M` has llama.cpp quantise the f32 file first.

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
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from deploy_check import compare, greedy, scores_of
from transformers import AutoConfig, AutoModelForCausalLM

import prunus
from prunus.checkpoint import load_model, save_checkpoint
from prunus.export import export_gguf
from prunus.model.families import FAMILIES
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan

LAYERS, GROUPS, CHANNELS = 6, 3, 512
#: head_dim times heads is the hidden size where a config has no head_dim; random weights are large enough for the
#: logits to differ, or else every greedy token would be a tie
BASE = {
    "hidden_size": 384,
    "intermediate_size": CHANNELS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2 * GROUPS,
    "num_key_value_heads": GROUPS,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
DERIVED = {"head_dim": None}
GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": 48}
FIELDS: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_word_embeddings": False},
    "granite": {
        **DERIVED,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0156,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "smollm3": {**DERIVED, "no_rope_layer_interval": 4},
    "olmo2": DERIVED,
    "phi3": {**DERIVED, "original_max_position_embeddings": 1024},
    "gemma2": {**GEMMA, "sliding_window_pattern": 2},
    "gemma3_text": {
        **GEMMA,
        "sliding_window_pattern": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
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
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--tokens", type=int, default=200, help="generated per prompt; there are three")
    parser.add_argument("--quantize", help="a type of llama.cpp, such as Q4_K_M; compares nothing, only runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {"families": {}}
    result |= {
        "models": f"{LAYERS} layers of random weights, hidden size {BASE['hidden_size']}, seed 0",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    with tempfile.TemporaryDirectory() as folder:
        for family in args.families:
            result["families"].setdefault(family, {}).update(_check(family, args, Path(folder)))
            print(family, result["families"][family], file=sys.stderr)
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


def _check(family: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    _, tokenizer = load_model("smollm2-135m")
    torch.manual_seed(0)
    fields: dict[str, Any] = {**BASE, "vocab_size": len(tokenizer), **FIELDS.get(family, {})}
    fields = {name: value for name, value in fields.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32).eval()
    model = prunus.apply_plan(model, _plan(Geometry.of(model), keeps_layers=family == "smollm3"))
    source, file = folder / family, folder / f"{family}.gguf"
    save_checkpoint(model, tokenizer, source, card="", extras={})
    multiple = 256 if args.quantize else 1
    written = export_gguf(str(source), file, type="f32", mlp_multiple=multiple, progress=False)
    facts: dict[str, Any] = {
        "architecture": written["architecture"],
        "zeros": written["of_them_zeros"] / written["parameters"],
    }
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    continuations = [greedy(model, prompt, args.tokens) for prompt in prompts]
    job = {"texts": list(PROMPTS), "prompts": prompts, "continuations": continuations, "tokens": args.tokens}
    job |= {"model": str(file), "quantize": args.quantize}
    job_file, answer_file = folder / "job.json", folder / "answer.json"
    job_file.write_text(json.dumps(job))
    script = Path(__file__).with_name("deploy_llama_cpp.py")
    subprocess.run([args.llama_python, str(script), str(job_file), str(answer_file)], check=True)
    answer = {**json.loads(answer_file.read_text()), "seconds": None}
    if args.quantize:
        assert all(math.isfinite(value) for row in answer["log_probabilities"] for value in row)
        return {args.quantize: {"generated": sum(map(len, answer["tokens"]))}}
    scored = [scores_of(model, *pair) for pair in zip(prompts, continuations, strict=True)]
    return {**facts, **compare(continuations, scored, answer), "same_tokenization": answer["prompts"] == prompts}


def _plan(geometry: Geometry, keeps_layers: bool) -> Plan:
    """Layer 0 without attention, 1 without channels, 3 gone altogether, the others of different widths."""
    kept: list[dict[Any, Any]] = [
        {"attention": [], "mlp": range(3, 400)},
        {"attention": [0, 2], "mlp": []},
        {"attention": [1], "mlp": range(100)},
        {"attention": [0] if keeps_layers else [], "mlp": range(5) if keeps_layers else []},
        {"attention": [1, 2], "mlp": range(0, CHANNELS, 2)},
        {"attention": [0, 1], "mlp": range(450)},
    ]
    if geometry.family.block("attention").indivisible:
        kept = [{**layer, "attention": range(GROUPS) if layer["attention"] else []} for layer in kept]
    return Plan.from_kept(geometry, kept)


if __name__ == "__main__":
    main()
