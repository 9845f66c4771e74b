"""Does a model pruned with `--align gguf` survive Q4_K_M in llama.cpp? Run by `make deploy-check`.

Prunes SmolLM2-135M by 20 %, with and without `--align gguf`, writes GGUF files, has llama.cpp quantise them to Q4_K_M,
load them and generate. Beside them the dense model, to tell what the quantisation costs anyway: its rows of 576 are no
whole blocks of K-quants, and get others. The reference is each model itself, in transformers in float32.

    python benchmarks/gguf_quantised.py --out benchmarks/results/gguf-quantised.json
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from deploy_check import QUESTIONS, ask, compare, greedy, scores_of
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus

MODEL, TYPE = "smollm2-135m", "Q4_K_M"
#: as fast as possible: quality is not the point here
QUICK = [
    "--calibration",
    "default",
    "--samples",
    "8",
    "--seq-len",
    "128",
    "--rounds",
    "1",
    "--set",
    "repair=null",
    "--set",
    "evaluation.held_out=0",
    "--set",
    "output.report=false",
]
CASES = {
    "dense": None,
    "20 %": ["--ratio", "0.2", *QUICK],
    "20 %, `--align gguf`": ["--ratio", "0.2", "--align", "gguf", *QUICK],
}


def main() -> None:
    """Run the cases; the table goes to stdout, everything measured to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=64, help="generated per prompt; there are four")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "cases": {}}
    for name, options in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            result["cases"][name] = check(options, args, Path(folder))
        print(name, result["cases"][name], file=sys.stderr, flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result["cases"]))


def markdown(cases: dict[str, Any]) -> str:
    """The table of RESULTS.md."""
    rows = [
        "| model | file, f16 | Q4_K_M | MLP outputs in K-quants | equal greedy tokens | mean difference |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, facts in cases.items():
        sizes = (f"{facts[kind] / 2**20:.0f} MiB" for kind in ("bytes", "bytes_quantised"))
        rows.append(
            f"| {name} | {' | '.join(sizes)} | {facts['down_in_k_quants']} of {facts['down']} "
            f"| {facts['equal_tokens']} of {facts['tokens']} | {facts['mean_difference']:.3f} |"
        )
    return "\n".join(rows)


def check(options: list[str] | None, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prune (without options: keep all), export, quantise, load, generate."""
    source, file = MODEL, folder / "model.gguf"
    if options is None:
        model, tokenizer = prunus.load_model(MODEL)
    else:
        source = str(folder / "pruned")
        prunus_command("prune", MODEL, "--out", source, *options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    model = model.float().eval()
    prunus_command("export", source, "--to", "gguf", "--out", str(file))
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in QUESTIONS
    ]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    continuations = [greedy(model, prompt, args.tokens) for prompt in prompts]
    job = {"texts": texts, "prompts": prompts, "continuations": continuations, "tokens": args.tokens}
    job |= {"model": str(file), "quantize": TYPE}
    answer = ask("deploy_llama_cpp.py", job, file, args.llama_python)
    scored = [scores_of(model, *pair) for pair in zip(prompts, continuations, strict=True)]
    quantised = folder / f"model-{TYPE}.gguf"
    kinds = [t.tensor_type.name for t in GGUFReader(quantised).tensors if t.name.endswith("ffn_down.weight")]
    return {
        "bytes": file.stat().st_size,
        "bytes_quantised": quantised.stat().st_size,
        "down": len(kinds),
        "down_in_k_quants": sum("_K" in kind for kind in kinds),
        "down_types": collections.Counter(kinds),
        "text": tokenizer.decode(answer["tokens"][0]),
        **compare(continuations, scored, answer),
    }


def prunus_command(*words: str) -> None:
    """Run a command of prunus, as typed."""
    subprocess.run([sys.executable, "-m", "prunus", *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
