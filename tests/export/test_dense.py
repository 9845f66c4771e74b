"""Dense folders: a stock class with the logits of the ragged model, for every family."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_families import CASES, case_id, logits, make_model, plan_keeping, random_tokens
from transformers import AutoModelForCausalLM

import prunus
from prunus.errors import OptionError
from prunus.export import export_dense, fill_model
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan

#: no attention, no channels, narrow, wide
RAGGED = [
    {"attention": [], "mlp": range(3, 18)},
    {"attention": [0], "mlp": []},
    {"attention": [0], "mlp": [1, 5]},
    {"attention": [], "mlp": []},
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_filled_model_is_stock_and_has_the_logits_of_the_ragged_one(case):
    family, variant = case
    whole = make_model(family, variant, num_hidden_layers=5, max_window_layers=1) if family == "qwen2" else None
    whole = whole or make_model(family, variant, num_hidden_layers=5)
    geometry = Geometry.of(whole)
    heads = geometry.widths[0].num_key_value_heads
    kept = [*RAGGED, {"attention": range(max(1, heads - 1)), "mlp": range(17)}]
    plan = plan_keeping(geometry, kept)
    ragged = prunus.apply_plan(whole, plan)
    filled = fill_model(ragged)
    assert not hasattr(filled.config, "layer_widths")
    assert type(filled).__module__.startswith("transformers.models.")
    assert filled.config.num_key_value_heads == max(widths.num_key_value_heads for widths in plan.kept_widths)
    assert filled.config.intermediate_size == 17
    tokens = random_tokens()
    torch.testing.assert_close(logits(filled, tokens), logits(ragged, tokens), rtol=1e-4, atol=1e-4)
    assert logits(ragged, tokens).std() > 0.1


def test_the_ragged_model_stays_as_it_is():
    whole = make_model("llama", num_hidden_layers=2)
    ragged = prunus.apply_plan(
        whole, Plan.from_kept(Geometry.of(whole), [{"attention": [0], "mlp": [1]}, {"attention": [0, 1], "mlp": [2]}])
    )
    before = {name: tensor.clone() for name, tensor in ragged.state_dict().items()}
    fill_model(ragged).model.embed_tokens.weight.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ragged.state_dict().items())


def test_the_folder_loads_as_a_stock_class_and_says_what_it_is(saved, tmp_path):
    whole = make_model("llama", num_hidden_layers=2, vocab_size=276)
    ragged = prunus.apply_plan(
        whole,
        Plan.from_kept(
            Geometry.of(whole), [{"attention": [0, 2], "mlp": range(9)}, {"attention": [1], "mlp": range(4)}]
        ),
    )
    facts = export_dense(str(saved(ragged)), tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["model_type"] == "mistral" if 48 % 4 else "llama"
    assert "auto_map" not in config
    assert not list((tmp_path / "dense").glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert facts["parameters_after"] == loaded.num_parameters() > ragged.num_parameters() == facts["parameters_before"]
    tokens = random_tokens()
    torch.testing.assert_close(logits(loaded, tokens), logits(ragged, tokens), rtol=1e-4, atol=1e-4)
    card = (tmp_path / "dense" / "README.md").read_text()
    assert f"{facts['parameters_after']:,}" in card
    assert "trust_remote_code" not in card


def test_equal_layers_need_no_filling(saved, tmp_path):
    with pytest.raises(OptionError, match="equal widths already"):
        export_dense(str(saved(make_model("llama", vocab_size=276))), tmp_path / "dense")
