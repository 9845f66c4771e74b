"""Computing in one dtype and saving in another, on machines where half precision is fast, and where it is slow."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_folder import SIZES, run, run_json, save_tiny_folder

import prunus
from prunus.checkpoint import save_checkpoint
from prunus.files.tensor_file import TensorFile
from prunus.machine import compute_dtype
from prunus.recovery import step
from prunus.sweep.engine import ModelOptions, memory_needed
from prunus.sweep.estimate import Workload

FEW = [*SIZES, "--set", "evaluation.held_out=2", "--set", "output.report=false", "--ratio", 0.3]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A model in bfloat16."""
    path = save_tiny_folder(tmp_path_factory.mktemp("models") / "whole", "qwen3", num_hidden_layers=3)
    model, tokenizer = prunus.load_model(path)
    return save_checkpoint(model.to(torch.bfloat16), tokenizer, path.with_name("half"), card="", extras={})


@pytest.fixture
def slow(monkeypatch):
    """`slow(True)`: half precision is slow from now on; `slow(False)`: it is not."""

    def pretend(answer):
        monkeypatch.setattr(compute_dtype, "_measured", lambda *_: 17.0 if answer else 0.5)

    return pretend


def dtypes(folder):
    """Of the weights in a folder, by their headers, and of its config."""
    stored = {entry["dtype"] for entry in TensorFile(folder / "model.safetensors").entries.values()}
    return stored, json.loads((folder / "config.json").read_text())["dtype"]


def prune(capsys, out, *words):
    """What the command says; weights, metrics and recipe of the result."""
    said = run(capsys, "prune", *words, "--out", out)
    recipe = yaml.safe_load((out / "prunus" / "recipe.yaml").read_text())
    metrics = json.loads((out / "prunus" / "metrics.json").read_text())
    return said.err, (out / "model.safetensors").read_bytes(), metrics, recipe


@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_where_half_precision_is_slow(capsys, tmp_path, half, text, slow, engine):
    slow(True)
    words = half, "--calibration", text, *FEW, "--set", f"run.engine={engine}"
    _, weights, metrics, recipe = prune(capsys, tmp_path / "out", *words)
    assert dtypes(tmp_path / "out") == ({"BF16"}, "bfloat16")
    assert (metrics["compute_dtype"], metrics["saved_dtype"]) == ("float32", "bfloat16")
    assert (recipe["run"]["dtype"], recipe["output"]["save_dtype"]) == ("float32", "bfloat16")
    assert "float32 model" in metrics["perplexity_protocol"]
    # What was measured is what was saved.
    saved, tokenizer = prunus.load_model(tmp_path / "out", dtype="float32")
    drawn = prunus.load_calibration(str(text), tokenizer, samples=8, seq_len=24).split(2)[1]
    measured = prunus.perplexity_of_windows(saved, drawn.input_ids, progress=False)
    assert measured.perplexity == metrics["perplexity_after"]
    # It can be done again where the same question has another answer.
    slow(False)
    again = prune(capsys, tmp_path / "again", "--recipe", tmp_path / "out" / "prunus" / "recipe.yaml")
    assert again[1] == weights


def test_both_engines_save_the_same_where_half_precision_is_slow(capsys, tmp_path, half, text, slow):
    slow(True)
    for engine in ("resident", "streamed"):
        plain = ["--set", f"run.engine={engine}"]
        prune(capsys, tmp_path / engine, half, "--calibration", text, *FEW, *plain)
    resident, streamed = (load_file(tmp_path / engine / "model.safetensors") for engine in ("resident", "streamed"))
    assert resident.keys() == streamed.keys()
    for name, weight in resident.items():
        assert weight.dtype == torch.bfloat16
        # Sums in another order round to the next number now and then.
        torch.testing.assert_close(streamed[name].float(), weight.float(), rtol=2**-7, atol=1e-3)


def test_where_half_precision_is_fast_nothing_is_converted(capsys, tmp_path, half, text, slow):
    slow(False)
    said, by_itself, metrics, recipe = prune(capsys, tmp_path / "auto", half, "--calibration", text, *FEW)
    assert "in bfloat16;" in said
    asked = ["--dtype", "bfloat16", "--save-dtype", "bfloat16", "--batch-size", recipe["run"]["batch_size"]]
    assert prune(capsys, tmp_path / "asked", half, "--calibration", text, *FEW, *asked)[1] == by_itself
    assert (metrics["compute_dtype"], metrics["saved_dtype"]) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("compute", "save", "expected"),
    [
        ("float32", "auto", "bfloat16"),
        ("float32", "float32", "float32"),
        ("float32", "float16", "float16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_both_can_be_asked_for(capsys, tmp_path, half, text, compute, save, expected):
    asked = ["--dtype", compute, "--save-dtype", save, "--rounds", 1]
    _, _, metrics, _ = prune(capsys, tmp_path / "out", half, "--calibration", text, *FEW, *asked)
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    assert dtypes(tmp_path / "out") == ({names[expected]}, expected)
    assert (metrics["compute_dtype"], metrics["saved_dtype"]) == (compute, expected)
    saved, tokenizer = prunus.load_model(tmp_path / "out", dtype=compute)
    drawn = prunus.load_calibration(str(text), tokenizer, samples=8, seq_len=24).split(2)[1]
    measured = prunus.perplexity_of_windows(saved, drawn.input_ids, progress=False)
    assert measured.perplexity == metrics["perplexity_after"]


def test_weights_held_in_half_precision_are_saved_in_it(capsys, tmp_path, folder):
    """Of a float32 checkpoint: there is no more in them."""
    plan = tmp_path / "plan.json"
    prunus.Plan.keep_all(prunus.Geometry.of(prunus.load_model(folder)[0])).save(plan)
    for words, expected in (
        ([], "F32"),
        (["--dtype", "bfloat16"], "BF16"),
        (["--save-dtype", "float16"], "F16"),
        (["--dtype", "bfloat16", "--save-dtype", "float32"], "F32"),
    ):
        out = tmp_path / "-".join(["out", *words])
        metrics = run_json(capsys, "apply", folder, plan, "--out", out, *words)
        assert dtypes(out)[0] == {expected}
        assert metrics["saved_dtype"] == dtypes(out)[1]


def test_models_that_are_loaded_in_python(tmp_path, half, slow):
    slow(True)
    for load in (prunus.load_model, prunus.open_model):
        model, tokenizer = load(half)
        assert model.dtype == torch.float32
        out = save_checkpoint(model, tokenizer, tmp_path / load.__name__, card="", extras={})
        saved, stored = (load_file(folder / "model.safetensors") for folder in (out, half))
        assert saved.keys() == stored.keys()
        assert all(saved[name].dtype == torch.bfloat16 and torch.equal(saved[name], stored[name]) for name in stored)
        assert (out / "config.json").read_bytes() == (half / "config.json").read_bytes()
        assert load(half, dtype=None)[0].dtype == torch.bfloat16
        assert load(half, dtype="bfloat16")[0].dtype == torch.bfloat16
    slow(False)
    assert prunus.load_model(half)[0].dtype == torch.bfloat16
    model = prunus.load_model(half)[0].to(torch.float32)
    save_checkpoint(model, tokenizer, tmp_path / "float32", card="", extras={})
    assert dtypes(tmp_path / "float32")[0] == {"F32"}, "a user's own conversion counts"


def test_the_estimate_is_of_the_dtype_that_computes(half, slow):
    work = Workload(frozenset({"gradients"}), 4, 32)

    def needed(**options):
        return memory_needed(str(half), ModelOptions(**options), work).resident

    slow(True)
    assert needed() == pytest.approx(needed(dtype="float32"), rel=0.01)
    slow(False)
    assert needed() < needed(dtype="float32")


def test_other_commands_compute_in_it_too(capsys, tmp_path, half, text, slow):
    slow(True)
    assert run_json(capsys, "eval", half, "--text", text, "--seq-len", 24, "--max-windows", 2)["dtype"] == "float32"
    sizes = ["--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1, "--warm-up", 0]
    assert run_json(capsys, "bench", half, *sizes, "--no-memory")["results"][0]["dtype"] == "float32"
    assert run_json(capsys, "profile", half, "--out", tmp_path / "times.json", *sizes)["dtype"] == "float32"
    assert run_json(capsys, "score", half, "--out", tmp_path / "s", "--calibration", text, *SIZES)["compute_dtype"] == (
        "float32"
    )


@pytest.mark.parametrize(("answer", "expected"), [(True, False), (False, True)])
def test_recovery_trains_in_what_is_fast(half, folder, slow, answer, expected):
    slow(answer)
    cpu = torch.device("cpu")
    assert step._fast_in_bfloat16(cpu, prunus.checkpoint.read_config(half)) == expected
    assert not step._fast_in_bfloat16(cpu, prunus.checkpoint.read_config(folder)), "a float32 model stays it"
