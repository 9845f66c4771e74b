r"""Models of the shapes of Qwen3-30B-A3B and gpt-oss-20b, with random weights and few layers, cut under a memory limit.

gpt-oss has its experts in MXFP4. A child process may not have more memory than the limit (RLIMIT_DATA, with which Linux
refuses more). Time grows with layers and tokens; the rest (start, embeddings) does not.

    python benchmarks/expert_shape.py --layers 6 --samples 8 --limit 8GB --work /tmp/shape
    python benchmarks/expert_shape.py --shape gpt-oss-20b --layers 2 --samples 8 --limit 8GB --work /tmp/shape
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from prunus.checkpoint import empty_model
from prunus.checkpoint.conversion import as_stored
from prunus.files.tensor_file import TensorLayout, write_tensors
from prunus.machine.byte_sizes import parse_bytes

#: name of a model → its model type and what its config says
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
        },
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 131072,
            "sliding_window": 128,
        },
    ),
}
#: random numbers are drawn once, and each tensor has them from another place on
DRAWN = 2**24


def make(folder: Path, shape: str, layers: int) -> None:
    """The model folder, one tensor in memory at a time."""
    model_type, fields = SHAPES[shape]
    config = AutoConfig.for_model(
        model_type, **fields, num_hidden_layers=layers, tie_word_embeddings=False, dtype=torch.bfloat16
    )
    model = empty_model(config, torch.bfloat16)
    config.architectures = [type(model).__name__]
    if model_type == "gpt_oss":
        config.quantization_config = {"quant_method": "mxfp4"}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0").save_pretrained(folder)
    stored = as_stored(model, dict(model.state_dict()))
    layouts = {name: TensorLayout(torch.bfloat16, tuple(tensor.shape)) for name, tensor in stored.items()}
    if model_type == "gpt_oss":
        for name in [name for name in layouts if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = layouts.pop(name).shape
            layouts[f"{name}_blocks"] = TensorLayout(torch.uint8, (experts, rows, columns // 32, 16))
            layouts[f"{name}_scales"] = TensorLayout(torch.uint8, (experts, rows, columns // 32))
    generator = torch.Generator().manual_seed(0)
    # As large as those of a trained model, so that tokens are spread over the experts and nothing overflows.
    drawn = (torch.randn(DRAWN, generator=generator) * 0.02).to(torch.bfloat16)
    bits = torch.randint(0, 256, (DRAWN,), generator=generator, dtype=torch.uint8)

    def values(name: str, layout: TensorLayout) -> Tensor:
        size = math.prod(layout.shape)
        start = int(torch.randint(0, DRAWN // 2, (), generator=generator))
        pool = bits if name.endswith("_blocks") else drawn
        some = pool[start:].repeat(-(-size // (DRAWN - start)))[:size].view(layout.shape)
        if layout.dtype == torch.uint8:
            # Of the 16 numbers the mean square is 10: about as large as the weights below.
            return some if name.endswith("_blocks") else torch.full(layout.shape, 120, dtype=torch.uint8)
        return some + 1 if "norm" in name else some

    tensors = ((name, values(name, layout)) for name, layout in layouts.items())
    write_tensors(folder / "model.safetensors", layouts, tensors, {"format": "pt"})


def main() -> None:
    """Make the model, prune it in a child, say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model; gigabytes")
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--method", default="reap")
    parser.add_argument("--limit", default="8GB")
    parser.add_argument("--set", nargs="*", default=["repair=null"])
    arguments = parser.parse_args()
    model, out = arguments.work / f"{arguments.shape}-{arguments.layers}", arguments.work / f"{arguments.shape}-out"
    if not model.is_dir():
        make(model, arguments.shape, arguments.layers)
    shutil.rmtree(out, ignore_errors=True)
    text = arguments.work / f"{arguments.shape}.txt"
    vocabulary = SHAPES[arguments.shape][1]["vocab_size"]
    chosen = torch.randint(2, vocabulary, (arguments.samples * arguments.seq_len + 1,), generator=torch.Generator())
    text.write_text(" ".join(f"w{i}" for i in chosen.tolist()))
    limit = parse_bytes(arguments.limit, "--limit")
    sizes = ["--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len), "--max-memory", arguments.limit]
    settings = ["run.engine=streamed", "evaluation.held_out=0", "output.report=false", *arguments.set]
    words = ["prune", str(model), "--out", str(out), "--experts", "0.5", "--method", arguments.method]
    words += ["--calibration", str(text), *sizes, *(word for setting in settings for word in ("--set", setting))]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "prunus", *words],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    facts = {
        "seconds": round(time.perf_counter() - start, 1),
        "model_gb": round((model / "model.safetensors").stat().st_size / 1e9, 2),
        "status": done.returncode,
        "options": {name: str(value) for name, value in vars(arguments).items()},
    }
    if done.returncode == 0:
        metrics = json.loads((out / "prunus" / "metrics.json").read_text())
        facts |= {name: metrics[name] for name in ("seconds_to_prune", "parameters_before", "parameters_after")}
        facts["peak_gb"] = {stage["stage"]: round(stage["peak_bytes"] / 1e9, 2) for stage in metrics["stages"]}
        # The process starts to count anew with every stage.
        facts["peak_gb"]["saving"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 2)
        facts["seconds_of"] = {stage["stage"]: stage["seconds"] for stage in metrics["stages"]}
        facts["estimate"] = next(line for line in done.stderr.splitlines() if line.startswith("engine"))
    else:
        facts["error"] = done.stderr[-2000:]
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
