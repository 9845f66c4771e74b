r"""What removing experts costs: a small mixture of experts is trained, then cut by several methods, plain and repaired.

Perplexity is measured on the last part of the text, which neither training nor calibration sees.

    python benchmarks/experts.py --text c4-sample.jsonl --out benchmarks/results/experts
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import prunus
from prunus.pipeline.recipe import Recipe
from prunus.repair.block_repair import RepairOptions
from prunus.scoring.score import ScoringOptions
from prunus.selection.targets import TargetOptions
from prunus.sweep.sequence_loss import perplexity_of_windows

METHODS = ("random", "frequency", "reap", "gate_fisher", "taylor")
#: name → the repair of a row
REPAIRS: dict[str, RepairOptions | None] = {
    "plain": None,
    "without experts": RepairOptions(experts="none"),
    "repaired": RepairOptions(),
    "repaired, no noise": RepairOptions(noise=0.0),
}
LENGTH = 128


def read(path: Path) -> str:
    """The text of a .txt or .jsonl file."""
    text = path.read_text(encoding="utf-8")
    return "\n\n".join(json.loads(line)["text"] for line in text.splitlines()) if path.suffix == ".jsonl" else text


def tokenizer_of(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def train(windows: torch.Tensor, arguments: argparse.Namespace) -> Any:
    """A mixture that was trained on windows of tokens, (number, LENGTH)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=arguments.vocabulary,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.chosen,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    order, start = torch.Generator().manual_seed(0), time.perf_counter()
    for step in range(arguments.steps):
        done = max(step / arguments.steps, (time.perf_counter() - start) / (60 * arguments.minutes))
        if done >= 1:
            break
        warm, left = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * warm * (0.05 + 0.95 * left)
        batch = windows[torch.randint(len(windows), (arguments.batch,), generator=order)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.config.output_router_logits = False
    return model.eval()


def rows_of(model: Any, windows: torch.Tensor, held_out: torch.Tensor, arguments: argparse.Namespace) -> list[Any]:
    """Perplexity of every cut."""
    dense = perplexity_of_windows(model, held_out, progress=False).perplexity
    rows: list[dict[str, Any]] = [{"method": "dense", "perplexity": dense}]
    print(f"dense: {dense:.2f}", flush=True)
    for seed in arguments.seeds:
        drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[: arguments.samples]
        calibration = prunus.calibration_from_tokens(windows[drawn])
        for method in arguments.methods:
            for share in arguments.shares:
                for name in arguments.repairs:
                    scoring = ScoringOptions(method=method, attention_weight=1.0, noise=0.0, random_seed=seed)
                    recipe = Recipe(1, scoring, target=TargetOptions("experts"), repair=REPAIRS[name])
                    start = time.perf_counter()
                    found = prunus.prune(model, share, calibration, recipe, batch_size=16, progress=False)
                    seconds = time.perf_counter() - start
                    perplexity = perplexity_of_windows(found.model, held_out, progress=False).perplexity
                    facts = {"method": method, "share": share, "repair": name, "seed": seed}
                    rows.append({**facts, "perplexity": perplexity, "seconds": round(seconds, 1)})
                    print(f"{share:.0%} {method}, {name}, seed {seed}: {perplexity:.2f}", flush=True)
    return rows


def main() -> None:
    """Train, cut, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help=".txt or .jsonl with a column text")
    parser.add_argument("--out", type=Path, required=True, help="folder for experts.json and the trained model")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--chosen", type=int, default=2, help="experts per token")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--minutes", type=float, default=60, help="training stops after so many")
    parser.add_argument("--batch", type=int, default=16, help="training windows per step")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--repairs", nargs="+", default=["plain", "repaired"], choices=list(REPAIRS))
    arguments = parser.parse_args()
    text, folder = read(arguments.text), arguments.out / "model"
    cut = int(len(text) * 0.95)
    if not (folder / "config.json").exists():
        tokenizer = tokenizer_of(text[:cut], arguments.vocabulary)
        windows = windows_of(tokenizer, text[:cut])
        model = train(windows, arguments)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    model, tokenizer = prunus.load_model(folder)
    windows, held_out = windows_of(tokenizer, text[:cut]), windows_of(tokenizer, text[cut:])
    facts = {
        "command": "python benchmarks/experts.py --text TEXT --out OUT",
        "machine": platform.processor() or platform.machine(),
        "options": {name: getattr(value, "name", str(value)) for name, value in vars(arguments).items()},
        "tokens": {"training": windows.numel(), "held out": held_out.numel()},
        "rows": rows_of(model, windows, held_out, arguments),
    }
    (arguments.out / "experts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def windows_of(tokenizer: Any, text: str) -> torch.Tensor:
    """A text as windows of tokens, (number, LENGTH)."""
    ids = tokenizer(text)["input_ids"]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


if __name__ == "__main__":
    main()
