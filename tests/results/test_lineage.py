"""Pruning what was pruned: each step keeps its own plan, and the composed one leads from the original to the result."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from huggingface_hub import metadata_load
from plain import plain_recipe, plain_scoring
from tiny_families import ONE_UNLIKE, case_id, logits, make_model, plan_keeping, random_tokens, zeroed
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import prunus
from prunus.cli import main
from prunus.errors import CheckpointError
from prunus.model.geometry import Geometry
from prunus.pipeline.job import Job, OutputOptions
from prunus.pipeline.prune import prune_job
from prunus.results.lineage import COMPOSED_PLAN, lineage_of
from prunus.selection.plan import Plan

QUICK = {
    "recipe": plain_recipe(plain_scoring(method="magnitude", normalize="layer_sum")),
    "evaluation": prunus.EvaluationOptions(held_out=0),
    "output": OutputOptions(report=False),
}


@pytest.fixture
def saved(tmp_path):
    """Writes a model as a folder in the test's own folder, and says where."""
    words = Tokenizer(WordLevel({"<unk>": 0, **{f"w{i}": i for i in range(3, 96)}}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)

    def save(model, name="dense"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def prune(source, out, ratio):
    return prune_job(Job(str(source), ratio, **QUICK), out, progress=False)


def by_hand(source, out, kept):
    """Cut a folder to these groups of each layer, and save the result."""
    geometry = Geometry.of(prunus.load_model(source)[0])
    return prunus.apply_checkpoint(str(source), plan_keeping(geometry, kept), out)


def plan_in(folder, name=COMPOSED_PLAN):
    return Plan.load(folder / "prunus" / name)


@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_two_steps_of_every_family(case, saved, tmp_path):
    model, tokens = make_model(*case, num_hidden_layers=4), random_tokens()
    dense, once, twice = saved(model), tmp_path / "once", tmp_path / "twice"
    # The first step leaves a layer without attention, one without an MLP, and one goes altogether.
    heads, channels = Geometry.of(model).widths[0]["attention"], Geometry.of(model).widths[0]["mlp"]
    whole = {"attention": range(heads), "mlp": range(channels)}
    by_hand(dense, once, [{**whole, "attention": []}, {**whole, "mlp": []}, {"attention": [], "mlp": []}, whole])
    metrics = prune(once, twice, 0.1)
    composed = plan_in(twice)
    # Both plans, each applied to what it is for, give the model that was saved.
    loaded = AutoModelForCausalLM.from_pretrained(twice)
    expected = logits(loaded, tokens)
    assert torch.equal(logits(prunus.apply_plan(model, composed), tokens), expected)
    first = AutoModelForCausalLM.from_pretrained(once)
    assert torch.equal(logits(prunus.apply_plan(first, plan_in(twice, "plan.json")), tokens), expected)
    torch.testing.assert_close(expected, logits(zeroed(model, composed.layers), tokens), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(first, tokens), atol=1e-3), "the second step must matter"
    assert json.loads(json.dumps(metrics)) == json.loads((twice / "prunus" / "metrics.json").read_text())
    assert metrics["base_model"] == "once"
    assert metrics["original"] == {
        "model": "dense",
        "parameters": model.num_parameters(),
        "plan": composed.fingerprint,
    }


@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_the_default_recipe_on_a_pruned_model(engine, saved, tmp_path):
    """Several rounds with repair, each against the model that was given, ragged as it is."""
    model = make_model("llama", num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in random_tokens(1, 600)[0].tolist()))
    dense, once, twice = saved(model), tmp_path / "once", tmp_path / "twice"
    whole = {"attention": range(3), "mlp": range(20)}
    by_hand(dense, once, [{**whole, "attention": []}, {**whole, "mlp": []}, whole, whole])
    words = [
        "--calibration",
        str(text),
        "--samples",
        "6",
        "--seq-len",
        "12",
        "--set",
        "evaluation.held_out=2",
        "--set",
        f"run.engine={engine}",
        "--set",
        "output.report=false",
    ]
    assert main(["prune", str(once), "--out", str(twice), "--ratio", "0.15", *words, "--device", "cpu"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(twice)
    composed = plan_in(twice)
    assert composed.widths == Geometry.of(model).widths
    assert [w for w in composed.kept_widths if w.num_key_value_heads or w.intermediate_size] == list(
        Geometry.of(loaded).widths
    )
    assert loaded.num_parameters() <= 0.85 * prunus.load_model(once)[0].num_parameters()


def test_three_steps_and_what_the_card_says(saved, tmp_path, capsys):
    model, tokens = make_model("llama", num_hidden_layers=4), random_tokens()
    folders = [saved(model), *(tmp_path / name for name in ("once", "twice", "thrice"))]
    for source, out in pairwise(folders):
        prune(source, out, 0.1)
    assert not (folders[1] / "prunus" / COMPOSED_PLAN).exists(), "one step is its own plan"
    last = folders[-1]
    expected = logits(AutoModelForCausalLM.from_pretrained(last), tokens)
    assert torch.equal(logits(prunus.apply_plan(model, plan_in(last)), tokens), expected)
    card = (last / "README.md").read_text()
    before, after = model.num_parameters(), prunus.load_model(last)[0].num_parameters()
    assert f"\ndense without {1 - after / before:.1%} of its parameters" in card
    assert f"the base of this one was twice, with {prunus.load_model(folders[2])[0].num_parameters():,}" in card
    assert f"| parameters | {before:,} | {after:,} |" in card
    assert "| original model | dense |" in card
    assert "plan_from_original.json" in card
    # Widths are those of the original's layers.
    capsys.readouterr()
    assert main(["inspect", str(last), "--json"]) == 0
    removed = json.loads(capsys.readouterr().out)["removed"]
    assert [row["of"] for row in removed] == [{"attention": 3, "mlp": 20}] * 4
    kept = plan_in(last).kept_widths
    assert [row["mlp"] for row in removed] == [20 - widths.intermediate_size for widths in kept]
    rows = [line for line in card.splitlines() if line.startswith(tuple(f"| {i} |" for i in range(4)))]
    assert len(rows) == 4


def test_a_model_of_the_hub_stays_the_base_model(saved, tmp_path):
    """The second step is made from a local folder; the page on the Hub still belongs to the model that was not cut."""
    dense, once, twice = saved(make_model("llama")), tmp_path / "once", tmp_path / "twice"
    prune(dense, once, 0.1)
    metrics = json.loads((once / "prunus" / "metrics.json").read_text())
    (once / "prunus" / "metrics.json").write_text(json.dumps({**metrics, "base_model": "someone/llama"}))
    prune(once, twice, 0.1)
    assert metadata_load(twice / "README.md")["base_model"] == "someone/llama"
    assert "[someone/llama](https://huggingface.co/someone/llama) without" in (twice / "README.md").read_text()


def test_the_class_may_change_on_the_way(saved, tmp_path):
    """A Llama whose heads no longer divide its hidden size goes on as a Mistral; the plan is still for the Llama."""
    model = make_model("llama", num_attention_heads=8, num_key_value_heads=4)  # 48 = 6 · 8, and 5 does not divide it
    dense, once, twice = saved(model), tmp_path / "once", tmp_path / "twice"
    by_hand(dense, once, [{"attention": [0, 1, 3], "mlp": range(20)}] * 2)
    by_hand(once, twice, [{"attention": [0, 2], "mlp": range(9)}, {"attention": [1], "mlp": range(20)}])
    composed = plan_in(twice)
    assert composed.model_type == "llama"
    assert [layer.attention for layer in composed.layers] == [(0, 3), (1,)]
    expected = logits(AutoModelForCausalLM.from_pretrained(twice), random_tokens())
    torch.testing.assert_close(logits(prunus.apply_plan(model, composed), random_tokens()), expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [("metrics.json", "{}"), ("metrics.json", "not JSON"), ("metrics.json", "[1]"), ("plan.json", "{}")],
)
def test_records_that_cannot_be_read_are_refused_before_long_work(name, text, saved, tmp_path, monkeypatch):
    """What the new cut is relative to would not be known, and the result's card would name the wrong model."""
    dense, once, twice = saved(make_model("llama")), tmp_path / "once", tmp_path / "twice"
    prune(dense, once, 0.1)
    plan = prunus.Plan.load(once / "prunus" / "plan.json")
    (once / "prunus" / name).write_text(text)
    monkeypatch.setattr("prunus.pipeline.inputs.load_or_open", None)
    monkeypatch.setattr("prunus.pipeline.apply.load_or_open", None)
    with pytest.raises(CheckpointError, match=r"its records cannot be read .* remove that folder"):
        prune(once, twice, 0.1)
    with pytest.raises(CheckpointError, match="its records cannot be read"):
        prunus.apply_checkpoint(str(once), plan, twice)
    assert not twice.exists()


def test_a_plan_that_leads_elsewhere_is_not_composed(saved, tmp_path, caplog):
    """Somebody replaced the weights of a pruned folder by those of another model."""
    dense, once, twice = saved(make_model("llama")), tmp_path / "once", tmp_path / "twice"
    prune(dense, once, 0.1)
    saved(make_model("llama", intermediate_size=17), "once")
    assert "original" not in prune(once, twice, 0.1)
    assert "does not lead to the model that lies there" in caplog.text
    assert not (twice / "prunus" / COMPOSED_PLAN).exists()


def test_a_model_that_was_never_cut_has_no_lineage(saved):
    assert lineage_of(saved(make_model("llama"))) is None
