"""The examples train a folder of unequal widths as they say: by Trainer, by PEFT, and in shards."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from forked import together
from tiny_families import logits
from transformers import AutoModelForCausalLM

import prunus
from prunus.checkpoint import is_ragged
from prunus.sweep.sequence_loss import perplexity_of_windows

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = ["--samples", "64", "--seq-len", "32", "--batch-size", "4", "--learning-rate", "5e-3"]


def loss_of(model, tokenizer) -> float:
    """On sequences that no example draws: those behind the first 64."""
    drawn = prunus.load_calibration("default", tokenizer, samples=80, seq_len=32)
    return perplexity_of_windows(model.eval(), drawn.input_ids[64:], progress=False).nll


def run(monkeypatch, name: str, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_trainer(pruned, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(monkeypatch, "train_with_trainer.py", pruned, "--out", out, *SIZES, "--steps", "24", "--device", "cpu")
    before, tokenizer = prunus.load_model(pruned)
    after, _ = prunus.load_model(out)
    assert is_ragged(after.config)
    assert after.num_parameters() == before.num_parameters()
    assert loss_of(after, tokenizer) < loss_of(before, tokenizer) - 0.1
    assert (out / "prunus" / "plan.json").read_bytes() == (pruned / "prunus" / "plan.json").read_bytes()


def test_peft(pruned, tmp_path, monkeypatch, capsys):
    from peft import PeftModel

    out = tmp_path / "out"
    run(monkeypatch, "train_with_peft.py", pruned, "--out", out, *SIZES, "--steps", "24", "--device", "cpu")
    said = capsys.readouterr().out
    assert float(said.split("at most ")[1]) < 1e-4
    before, tokenizer = prunus.load_model(pruned)
    base = loss_of(before, tokenizer)
    after = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned), out)
    linear = [name for name, module in before.model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sum("lora_" in name for name, _ in after.named_parameters()) == 2 * len(linear), "the head has none"
    assert loss_of(after.merge_and_unload(), tokenizer) < base - 0.1


@pytest.mark.parametrize("steps", [3])
def test_two_processes_that_share_every_weight_train_as_one(pruned, tmp_path, monkeypatch, steps):
    """The mean gradient of two halves of a batch is that of the batch: an ordinary loop is the oracle."""
    out = tmp_path / "out"
    words = ["train_with_fsdp.py", pruned, "--out", out, *SIZES, "--steps", steps]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    ended = together(2, lambda: runpy.run_path(str(EXAMPLES / words[0]), run_name="__main__") and None)
    assert ended.status == 0, ended.err
    found, tokenizer = prunus.load_model(out)
    assert is_ragged(found.config)

    model = AutoModelForCausalLM.from_pretrained(pruned, dtype="float32").train()
    drawn = prunus.load_calibration("default", tokenizer, samples=64, seq_len=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = drawn.input_ids[torch.randint(64, (4,), generator=generator)]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ids = drawn.input_ids[:2]
    untrained, _ = prunus.load_model(pruned)
    moved = (logits(model.eval(), ids) - logits(untrained, ids)).abs().max()
    assert (logits(found, ids) - logits(model.eval(), ids)).abs().max() < 0.02 * moved
