"""Pruned models are trained as any other: gradient checkpointing, Trainer, LoRA with PEFT."""

from __future__ import annotations

import copy
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from shaped_models import HARDEST, Shaped, left_padded
from tiny_families import ONE_EACH, logits, random_tokens
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from prunus.checkpoint import is_ragged

peft = pytest.importorskip("peft")

LLAMA, PHI3 = ONE_EACH[0], next(case for case in ONE_EACH if case[0] == "phi3")
hardest = pytest.mark.parametrize("shaped", HARDEST, ids=str)


def names_of_projections(model) -> list[str]:
    return sorted(
        {n.rsplit(".", 1)[1] for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    )


def train(model, steps=4) -> list[float]:
    """Plain steps on two sequences; the loss before each."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses, tokens = [], random_tokens()
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.eval()
    return losses


@hardest
def test_gradient_checkpointing_gives_the_same_gradients(shaped):
    input_ids, mask = left_padded()
    labels = input_ids.masked_fill(mask == 0, -100)
    plain, frugal = copy.deepcopy(shaped.pruned).train(), copy.deepcopy(shaped.pruned).train()
    frugal.gradient_checkpointing_enable()
    assert frugal.is_gradient_checkpointing
    for model in (plain, frugal):
        model(input_ids, attention_mask=mask, labels=labels).loss.backward()
    for (name, a), b in zip(frugal.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, msg=name)


class Sequences(Dataset):
    """Eight random sequences, as a data set of transformers' Trainer."""

    def __len__(self):
        return 8

    def __getitem__(self, number):
        tokens = random_tokens(1, 10, seed=number)[0]
        return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("shaped", [HARDEST[0], HARDEST[-1], Shaped(LLAMA, "uniform")], ids=str)
def test_trainer(shaped, folder_of, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder_of(shaped))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        gradient_checkpointing=True,
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sequences())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "trained"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(loaded, random_tokens()), logits(model.eval(), random_tokens()))
    assert not torch.allclose(logits(loaded, random_tokens()), logits(shaped.pruned, random_tokens()), atol=1e-3)
    # The code travels with each copy, also with the checkpoints on the way, from which training goes on.
    for place in ("trained", "out/checkpoint-2"):
        config = json.loads((tmp_path / place / "config.json").read_text())
        assert ("auto_map" in config) == is_ragged(model.config)
        assert (tmp_path / place / "modeling_prunus.py").is_file() == is_ragged(model.config)
    again = Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder_of(shaped)), args=arguments, train_dataset=Sequences()
    )
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    torch.testing.assert_close(logits(again.model.eval(), random_tokens()), logits(loaded, random_tokens()))


@hardest
def test_lora_trained_merged_saved_and_loaded(shaped, folder_of, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder_of(shaped))
    before = logits(base, random_tokens())
    targets = names_of_projections(base)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, random_tokens()), before), "an untrained adapter changes nothing"
    losses = train(model)
    assert losses[-1] < losses[0]
    trained = logits(model, random_tokens())
    assert not torch.allclose(trained, before, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(folder_of(shaped))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter"), random_tokens()), trained)
    merged = model.merge_and_unload()
    assert type(merged) is type(shaped.pruned)
    torch.testing.assert_close(logits(merged, random_tokens()), trained, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded, random_tokens()), logits(merged, random_tokens()))


@pytest.mark.parametrize("case", [LLAMA, PHI3], ids=["llama", "fused"])
def test_lora_on_all_linear_layers(case):
    """Where an attention or an MLP is missing, there is nothing to adapt, and that is no error."""
    model = copy.deepcopy(Shaped(case, "everything").pruned)
    projections = [n for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with_adapters = {n.split(".lora_A")[0] for n, _ in adapted.named_parameters() if ".lora_A" in n}
    assert with_adapters == {f"base_model.model.model.{name}" for name in projections}


def test_the_example_of_pruning_and_lora_runs(folder_of, tokenizer, tmp_path, monkeypatch, capsys):
    """From a pruned folder, so that it also cuts what was cut before."""
    text = tmp_path / "text.txt"
    text.write_text(tokenizer.decode(random_tokens(1, 800)[0]))
    example = str(Path(__file__).parents[2] / "examples" / "prune_then_lora.py")
    words = ["--model", folder_of(Shaped(LLAMA, "ragged")), "--text", text, "--out", tmp_path / "out", "--ratio", "0.1"]
    words += ["--samples", "6", "--seq-len", "12", "--steps", "12", "--learning-rate", "0.02", "--rank", "4"]
    monkeypatch.setattr(sys, "argv", [example, *map(str, words)])
    runpy.run_path(example, run_name="__main__")
    printed = capsys.readouterr().out
    said = dict(re.findall(r"(?m)^(pruned|trained|loaded): (.*)$", printed))
    assert said["trained"] == said["loaded"]
    assert said["trained"] != said["pruned"]
    losses = [float(loss) for loss in re.findall(r"step .*: loss ([\d.]+)", printed)]
    assert losses[-1] < losses[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = Shaped(LLAMA, "ragged").pruned.num_parameters()
    assert loaded.num_parameters() <= 0.9 * before
    assert said["loaded"].startswith(f"{loaded.num_parameters():,} parameters")
    assert (tmp_path / "out" / "modeling_prunus.py").is_file()
