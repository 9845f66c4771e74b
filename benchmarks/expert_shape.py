r"""Models of the shapes of Qwen3-30B-A3B and gpt-oss-20b, with random weights and few layers, cut under a memory limit.

gpt-oss has its experts in MXFP4. A child process may not have more memory than the limit (RLIMIT_DATA, with which Linux
refuses more). It prunes the model once for every number of sequences; time is CPU time of the child, by the stages that
it names, since other programs may keep the cores busy. What changes with the number of sequences is the part that grows
with tokens, what does not is reading, decoding, cutting and saving. From both, and the number of layers, follows what
the whole model would take: an extrapolation, that nobody measured.

    taskset -c 1 env OMP_NUM_THREADS=1 python benchmarks/expert_shape.py --samples 2 8 --limit 8GB --work /tmp/shape \
        --out benchmarks/results/expert-shape-qwen3-30b-a3b.json
    taskset -c 1 env OMP_NUM_THREADS=1 python benchmarks/expert_shape.py --shape gpt-oss-20b --layers 2 --samples 2 8 \
        --limit 8GB --work /tmp/shape --out benchmarks/results/expert-shape-gpt-oss-20b.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from prunus.checkpoint import empty_model
from prunus.checkpoint.conversion import as_stored
from prunus.files.tensor_file import TensorLayout, write_tensors
from prunus.machine.byte_sizes import parse_bytes


@dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        model_type: of transformers.
        layers: that the real one has.
        fields: of its config.
    """

    model_type: str
    layers: int
    fields: dict[str, Any]

    @property
    def experts(self) -> int:
        """Experts of each layer."""
        number: int = self.fields.get("num_experts") or self.fields["num_local_experts"]
        return number


SHAPES = {
    "qwen3-30b-a3b": Shape(
        "qwen3_moe",
        48,
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
    "gpt-oss-20b": Shape(
        "gpt_oss",
        24,
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
WEIGHTS = "model.safetensors"


def make(folder: Path, shape: Shape, layers: int) -> None:
    """The model folder, one tensor in memory at a time."""
    model_type = shape.model_type
    config = AutoConfig.for_model(
        model_type, **shape.fields, num_hidden_layers=layers, tie_word_embeddings=False, dtype=torch.bfloat16
    )
    model = empty_model(config, torch.bfloat16)
    config.architectures = [type(model).__name__]
    if model_type == "gpt_oss":
        config.quantization_config = {"quant_method": "mxfp4"}
    folder.mkdir(parents=True, exist_ok=True)
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
        # What a token is must be more of its residual stream than what all have in common, or all go to few experts.
        return some + 1 if "norm" in name else 50 * some if "embed" in name else some

    tensors = ((name, values(name, layout)) for name, layout in layouts.items())
    write_tensors(folder / WEIGHTS, layouts, tensors, {"format": "pt"})


@dataclass(frozen=True)
class Run:
    """One child that pruned the model.

    Attributes:
        tokens: of the calibration text.
        seconds: wall clock.
        cpu_seconds: stage → CPU seconds, user and system; "start" is what came before the first stage.
        resident_gb: stage → what the child had in memory when it began.
        facts: peaks of memory, parameters and the estimate, for people.
    """

    tokens: int
    seconds: float
    cpu_seconds: dict[str, float]
    resident_gb: dict[str, float]
    facts: dict[str, Any]


def prune(model: Path, sequences: int, arguments: argparse.Namespace) -> Run:
    """Prune the model in a child under the limit.

    Raises:
        SystemExit: the child failed.
    """
    out, text = (arguments.work / f"{arguments.shape}{end}" for end in ("-out", ".txt"))
    vocabulary = SHAPES[arguments.shape].fields["vocab_size"]
    tokens = sequences * arguments.seq_len
    chosen = torch.randint(2, vocabulary, (tokens + 1,), generator=torch.Generator().manual_seed(0))
    text.write_text(" ".join(f"w{i}" for i in chosen.tolist()))
    limit = parse_bytes(arguments.limit, "--limit")
    sizes = ["--samples", str(sequences), "--seq-len", str(arguments.seq_len), "--max-memory", arguments.limit]
    settings = ["run.engine=streamed", "evaluation.held_out=0", "output.report=false", *arguments.set]
    words = ["prune", str(model), "--out", str(out), "--overwrite", "--experts", "0.5", "--method", arguments.method]
    words += ["--calibration", str(text), *sizes, *(word for setting in settings for word in ("--set", setting))]
    start, stage, said = time.perf_counter(), "start", []
    cpu_seconds, resident_gb = dict[str, float](), dict[str, float]()
    child = subprocess.Popen(
        [sys.executable, "-m", "prunus", *words],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    for line in child.stderr:
        said.append(line)
        if named := re.match(r"\d+ of \d+: ([^,]+)", line):
            process = psutil.Process(child.pid)
            times = process.cpu_times()
            cpu_seconds[stage], stage = times.user + times.system, named[1].strip()
            resident_gb[stage] = round(process.memory_info().rss / 1e9, 2)
    # The files of a child that is waited for are gone, and with them what it took.
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit("".join(said)[-2000:])
    cpu_seconds[stage] = used.ru_utime + used.ru_stime
    metrics = json.loads((out / "prunus" / "metrics.json").read_text())
    peaks = {stage["stage"]: round(stage["peak_bytes"] / 1e9, 2) for stage in metrics["stages"]}
    facts = {name: metrics[name] for name in ("parameters_before", "parameters_after")} | {
        # The process starts to count anew with every stage.
        "peak_gb": {**peaks, "saving": round(used.ru_maxrss * 1024 / 1e9, 2)},
        "estimate": next(line.strip() for line in said if line.startswith("engine")),
    }
    shutil.rmtree(out)
    ends = [0.0, *cpu_seconds.values()]
    each = {name: end - begin for name, begin, end in zip(cpu_seconds, ends[:-1], ends[1:], strict=True)}
    return Run(tokens, time.perf_counter() - start, each, resident_gb, facts)


def extrapolated(few: Run, many: Run, shape: Shape, layers: int, saved: float) -> dict[str, Any]:
    """CPU seconds of the whole model on 128 × 512 tokens, from two runs of some of its layers.

    Only scoring grows with the tokens; of other stages the mean of both runs counts. Start and loading stay what they
    are, scoring and cut grow with the layers, and saving with the bytes of the result.

    Args:
        few: the run with fewer tokens.
        many: the run with more.
        shape: of the model.
        layers: that both had.
        saved: how many times as many bytes as theirs the whole result has.
    """
    tokens = 128 * 512
    parts: dict[str, Any] = {}
    total = 0.0
    for stage, seconds in many.cpu_seconds.items():
        difference = seconds - few.cpu_seconds[stage] if stage == "scoring" else 0.0
        per_token = difference / (many.tokens - few.tokens)
        fixed = (seconds + few.cpu_seconds[stage]) / 2 - per_token * (many.tokens + few.tokens) / 2
        times = {"start": 1.0, "loading": 1.0, "saving": saved}.get(stage, shape.layers / layers)
        whole = times * (fixed + per_token * tokens)
        total += whole
        parts[stage] = {
            "fixed": round(fixed, 2),
            "per_1000_tokens": round(1000 * per_token, 3),
            "whole_model": round(whole, 1),
        }
        if stage == "scoring":
            of_a_layer = {"fixed": round(fixed / layers, 2), "per_1000_tokens": round(1000 * per_token / layers, 3)}
            parts[stage]["each_layer"] = of_a_layer
    return {"layers": shape.layers, "tokens": tokens, "stages": parts, "cpu_hours": round(total / 3600, 2)}


def main() -> None:
    """Make the model, prune it in children, say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model; gigabytes")
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, nargs=2, default=[2, 8], help="sequences of the two runs, fewer first")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--method", default="reap")
    parser.add_argument("--limit", default="8GB")
    parser.add_argument("--set", nargs="*", default=["repair=null"])
    arguments = parser.parse_args()
    shape, model = SHAPES[arguments.shape], arguments.work / f"{arguments.shape}-{arguments.layers}"
    if not (model / WEIGHTS).is_file():
        make(model, shape, arguments.layers)
    runs = [prune(model, sequences, arguments) for sequences in arguments.samples]
    size = (model / WEIGHTS).stat().st_size
    outside = 2 * 2 * shape.fields["vocab_size"] * shape.fields["hidden_size"]
    saved = (outside + (size - outside) / 2 * shape.layers / arguments.layers) / (outside + (size - outside) / 2)
    facts = {
        "command": "taskset -c 1 env OMP_NUM_THREADS=1 python benchmarks/expert_shape.py …",
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} core",
        "options": {name: str(value) for name, value in vars(arguments).items() if name not in ("work", "out")},
        "model_gb": round(size / 1e9, 2),
        "runs": [
            {
                "tokens": run.tokens,
                "tokens_per_expert": run.tokens * shape.fields["num_experts_per_tok"] // shape.experts,
                "seconds": round(run.seconds, 1),
                "cpu_seconds": {stage: round(seconds, 1) for stage, seconds in run.cpu_seconds.items()},
                "resident_gb": run.resident_gb,
                **run.facts,
            }
            for run in runs
        ],
        "extrapolated": extrapolated(runs[0], runs[1], shape, arguments.layers, saved),
    }
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
