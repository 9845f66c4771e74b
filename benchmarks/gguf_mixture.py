"""Does a mixture's GGUF file that `prunus apply` cut say what the cut model's own file says, in llama.cpp?

A small Qwen3 mixture of random weights is exported to GGUF, and `prunus apply PLAN` takes experts and a layer out of
that file. The same plan applied in transformers, and the result exported, is the other file. llama.cpp continues the
same prompts with both, and transformers with the cut model.

    python benchmarks/gguf_mixture.py --out benchmarks/results/gguf-mixture.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from deploy_check import ask, compare, greedy, scores_of
from transformers import AutoConfig, AutoModelForCausalLM

import prunus
from prunus.checkpoint import load_model, save_checkpoint
from prunus.export import export_gguf
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan

EXPERTS, LAYERS, SEED = 8, 4, 0
#: experts that stay; layer 2 goes altogether
KEPT: dict[int, tuple[int, ...]] = {0: (0, 2, 3, 5, 7), 1: (1, 2, 4, 6, 7), 3: (0, 1, 3, 4, 6)}
FIELDS: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "moe_intermediate_size": 128,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
PROMPTS = ("Once upon a time there were three foxes who", "def add(a, b):\n    return", "The 4 seasons:")


def main() -> None:
    """Cut, run and compare; everything measured goes to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=200, help="generated per prompt; there are three")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = check(args, Path(folder))
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def check(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The facts of both files."""
    _, tokenizer = load_model("smollm2-135m")
    torch.manual_seed(SEED)
    config = AutoConfig.for_model("qwen3_moe", vocab_size=len(tokenizer), **FIELDS)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    export(dense, tokenizer, folder / "dense")
    groups = range(FIELDS["num_key_value_heads"])
    plan = Plan.from_kept(
        Geometry.of(dense),
        [{"attention": groups if i in KEPT else [], "mlp": [], "expert": KEPT.get(i, ())} for i in range(LAYERS)],
    )
    (folder / "plan.json").write_text(json.dumps(plan.to_dict()))
    command = ["apply", str(folder / "dense.gguf"), str(folder / "plan.json"), "--out", str(folder / "sliced.gguf")]
    subprocess.run([sys.executable, "-m", "prunus", *command], check=True, stdout=subprocess.DEVNULL)
    cut = prunus.apply_plan(dense, plan)
    export(cut, tokenizer, folder / "written")
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    continuations = [greedy(cut, prompt, args.tokens) for prompt in prompts]
    scored = [scores_of(cut, *pair) for pair in zip(prompts, continuations, strict=True)]
    job = {"texts": list(PROMPTS), "prompts": prompts, "continuations": continuations, "tokens": args.tokens}
    files = {name: folder / f"{name}.gguf" for name in ("sliced", "written")}
    answers = {
        name: ask("deploy_llama_cpp.py", {**job, "model": str(file)}, file, args.llama_python)
        for name, file in files.items()
    }
    distinct = len({token for continuation in continuations for token in continuation})
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "experts": f"{EXPERTS} → {len(KEPT[0])}",
        "layers": f"{LAYERS} → {len(KEPT)}",
        "distinct_tokens": distinct,
        "files_equal": (folder / "sliced.gguf").read_bytes() == (folder / "written.gguf").read_bytes(),
        "same_tokens": answers["sliced"]["tokens"] == answers["written"]["tokens"],
        **{name: compare(continuations, scored, answer) for name, answer in answers.items()},
    }


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """A model as a folder, and as a GGUF file in float32 beside it."""
    save_checkpoint(model, tokenizer, folder, card="", extras={})
    export_gguf(str(folder), folder.with_suffix(".gguf"), type="f32", progress=False)


if __name__ == "__main__":
    main()
