"""A pruned model that was saved and loaded, with and without this package, is the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from cut_cases import Tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import CASES, DENSE, case_id, count_parameters, logits, plan_keeping, shared_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prunus.checkpoint import is_ragged, load_model, save_checkpoint
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan

#: loads the folders named on the command line where no import of prunus can succeed, and writes their answers down
WITHOUT_PRUNUS = """
import sys
sys.modules["prunus"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

place, *names = sys.argv[1:]
input_ids = load_file(f"{place}/input.safetensors")["input_ids"]
answers = {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{place}/{name}", trust_remote_code=name.startswith("ragged"))
    answers[f"{name}.tied"] = torch.tensor(
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    with torch.no_grad():
        answers[f"{name}.logits"] = model(input_ids).logits
    answers[f"{name}.tokens"] = model.generate(input_ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
save_file(answers, f"{place}/answers.safetensors")
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, "word": 3}, unk_token="word"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def uniform_plan(model) -> Plan:
    """Other groups in each layer, but as many: what is left fits the stock class."""
    geometry = Geometry.of(model)
    groups = geometry.widths[0]
    attention, mlp = max(1, groups["attention"] - 1), groups["mlp"] - 5
    return plan_keeping(
        geometry,
        [
            {"attention": range(groups["attention"])[:attention], "mlp": range(mlp)},
            {"attention": range(groups["attention"])[-attention:], "mlp": range(2, 2 + mlp)},
        ],
    )


def test_with_the_package(tiny, axes, tokenizer, tmp_path):
    pruned = tiny.pruned(axes)
    save_checkpoint(pruned, tokenizer, tmp_path / "out", card="", extras={})
    expected = logits(pruned, tiny.input_ids)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(pruned)
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded, tiny.input_ids), expected)
    assert torch.equal(logits(load_model(tmp_path / "out")[0], tiny.input_ids), expected)
    assert count_parameters(loaded) == count_parameters(pruned)
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())
    tied = tiny.model.config.tie_word_embeddings
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert Geometry.of(loaded) == Geometry.of(pruned)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    assert sum(tensor.numel() for tensor in stored.values()) == count_parameters(pruned), "tied weights are stored once"
    assert not list((tmp_path / "out").rglob("*.bin"))
    is_code_there = (tmp_path / "out" / "modeling_prunus.py").is_file()
    assert is_code_there == is_ragged(pruned.config)


@pytest.mark.slow
def test_without_the_package(tokenizer, tmp_path):
    """One other process for all families: ragged models with the code they bring, equal widths as the stock class."""
    pruned = {}
    for case in CASES:
        model = shared_model(*case)
        pruned[f"stock-{case_id(case)}"] = apply_plan(model, uniform_plan(model))
        pruned[f"ragged-{case_id(case)}"] = Tiny(*case).pruned("both")
    for name, model in pruned.items():
        assert is_ragged(model.config) == name.startswith("ragged")
        save_checkpoint(model, tokenizer, tmp_path / name, card="", extras={})
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert ("auto_map" in config) == name.startswith("ragged")
    input_ids = Tiny(*CASES[0]).input_ids
    save_file({"input_ids": input_ids}, tmp_path / "input.safetensors")
    child = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_PRUNUS, str(tmp_path), *pruned],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    answers = load_file(tmp_path / "answers.safetensors")
    for name, model in pruned.items():
        torch.testing.assert_close(answers[f"{name}.logits"], logits(model, input_ids), rtol=1e-6, atol=1e-6)
        assert bool(answers[f"{name}.tied"]) == model.config.tie_word_embeddings, name
        expected = model.generate(input_ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(answers[f"{name}.tokens"], expected), name
    assert {name.split("-")[1] for name in pruned} == set(DENSE)
