r"""A model of the shape of Qwen3-30B-A3B, of random weights and few layers, scored and cut under a memory limit.

A child process may not have more memory than the limit (RLIMIT_DATA, with which Linux refuses more). Time grows with
layers and tokens; the rest (start, embeddings) does not.

    python benchmarks/expert_shape.py --layers 6 --samples 8 --limit 8GB --work /tmp/shape
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from prunus.checkpoint import empty_model
from prunus.checkpoint.conversion import as_stored
from prunus.files.tensor_file import TensorLayout, write_tensors
from prunus.machine.byte_sizes import parse_bytes


def make(folder: Path, layers: int) -> None:
    """The model folder, one tensor in memory at a time."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        architectures=["Qwen3MoeForCausalLM"],
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(151936)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0").save_pretrained(folder)
    model = empty_model(config, torch.bfloat16)
    stored = as_stored(model, dict(model.state_dict()))
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stored.items():
            # As large as those of a trained model, so that tokens are spread over the experts and nothing overflows.
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * 0.02
            yield name, (values + 1 if "norm" in name else values).to(torch.bfloat16)

    layouts = {name: TensorLayout(torch.bfloat16, tuple(tensor.shape)) for name, tensor in stored.items()}
    write_tensors(folder / "model.safetensors", layouts, tensors(), {"format": "pt"})


def main() -> None:
    """Make the model, prune it in a child, say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model; gigabytes")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--method", default="reap")
    parser.add_argument("--limit", default="8GB")
    parser.add_argument("--set", nargs="*", default=["repair=null"])
    arguments = parser.parse_args()
    model, out = arguments.work / f"layers-{arguments.layers}", arguments.work / "out"
    if not model.is_dir():
        make(model, arguments.layers)
    shutil.rmtree(out, ignore_errors=True)
    text = arguments.work / "text.txt"
    chosen = torch.randint(2, 151936, (arguments.samples * arguments.seq_len + 1,), generator=torch.Generator())
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
        facts["seconds_of"] = {stage["stage"]: stage["seconds"] for stage in metrics["stages"]}
        facts["estimate"] = next(line for line in done.stderr.splitlines() if line.startswith("engine"))
    else:
        facts["error"] = done.stderr[-2000:]
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
