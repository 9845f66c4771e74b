"""The commands as a user types them, on a tiny model folder."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from forked import Forked
from plain import PLAIN, UNMEASURED
from safetensors.torch import load_file, save_file
from tiny_folder import SIZES, TEXT, fails, run, run_json, save_tiny_folder
from transformers import AutoModelForCausalLM

import prunus
from prunus.cli import main
from prunus.model.families import AXES


def test_prune_writes_a_whole_folder(capsys, tmp_path, folder, text):
    out = tmp_path / "small"
    options = ["--ratio", "0.2", "--calibration", text, *SIZES, "--set", "evaluation.held_out=2"]
    metrics = run_json(capsys, "prune", folder, "--out", out, *options)
    assert metrics == json.loads((out / "prunus" / "metrics.json").read_text())
    files = {"recipe.yaml", "plan.json", "groups.csv", "score.json", "metrics.json", "samples.json"}
    assert {p.name for p in (out / "prunus").iterdir()} == files
    assert (out / "report.html").is_file()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.num_parameters() == metrics["parameters_after"]
    one_group = 48 * 8 * 6
    assert 0 <= metrics["parameters_before"] * 0.8 - metrics["parameters_after"] <= one_group
    assert metrics["perplexity_before"] > 1
    card = (out / "README.md").read_text()
    assert str(folder.parent) not in (out / "config.json").read_text()
    assert f"{metrics['perplexity_after']:.2f}" in card
    assert metrics["calibration"]["sha256"] in card


def test_the_stages_one_by_one_give_what_prune_gives(capsys, tmp_path, folder, text):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--calibration", text, *SIZES, "--recipe", "original", "--method", "taylor_2nd"]
    once = [*UNMEASURED, "--set", "selection.min_keep_mlp=3"]
    run(capsys, "prune", folder, "--out", whole, "--ratio", "0.3", *options, *once)
    run(capsys, "score", folder, "--out", tmp_path / "scores", *options)
    run(
        capsys,
        "plan",
        tmp_path / "scores" / "groups.csv",
        "--ratio",
        "0.3",
        "--set",
        "selection.min_keep_mlp=3",
        "--out",
        tmp_path / "plan.json",
    )
    run(capsys, "apply", folder, tmp_path / "plan.json", "--out", parts)
    assert (tmp_path / "plan.json").read_text() == (whole / "prunus" / "plan.json").read_text()
    first, second = (load_file(path / "model.safetensors") for path in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_prune_as_a_python_call_gives_the_same_model(capsys, tmp_path, folder, text):
    model, tokenizer = prunus.load_model(folder)
    calibration = prunus.load_calibration(str(text), tokenizer, samples=6, seq_len=24)
    options = ["--ratio", "0.25", "--calibration", text, *SIZES, *UNMEASURED]
    for name, flags, arguments in (("plain", PLAIN, {"recipe": prunus.Recipe.original()}), ("default", [], {})):
        run(capsys, "prune", folder, "--out", tmp_path / name, *options, *flags)
        result = prunus.prune(model, 0.25, calibration, **arguments, progress=False)
        saved, state = load_file(tmp_path / name / "model.safetensors"), result.model.state_dict()
        assert all(torch.equal(saved[key], state[key]) for key in saved)


def test_repair_changes_weights_but_not_the_plan(capsys, tmp_path, folder, text):
    options = [
        "--ratio",
        "0.3",
        "--calibration",
        text,
        "--samples",
        "24",
        "--seq-len",
        "24",
        *UNMEASURED,
    ]
    run(capsys, "prune", folder, "--out", tmp_path / "plain", *options, *PLAIN)
    run(capsys, "prune", folder, "--out", tmp_path / "repaired", *options, *PLAIN, "--set", "repair.damping=0.1")
    plans = [(tmp_path / name / "prunus" / "plan.json").read_text() for name in ("plain", "repaired")]
    assert plans[0] == plans[1]
    plain, repaired = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "repaired"))
    changed = {name for name in plain if not torch.equal(plain[name], repaired[name])}
    assert changed
    assert all(name.endswith(("o_proj.weight", "down_proj.weight", "model.norm.weight")) for name in changed)


def test_eval_reports_what_programs_read(capsys, folder, text):
    facts = run_json(capsys, "eval", folder, "--text", text, "--seq-len", "32", "--windows", "3")
    assert facts["tokens"] == len(TEXT)
    assert facts["windows"] == 3
    assert facts["perplexity"] > 1
    assert facts["parameters"] == AutoModelForCausalLM.from_pretrained(folder).num_parameters()


def test_inspect_counts_and_shows_what_was_removed(capsys, tmp_path, folder, text):
    facts = run_json(capsys, "inspect", folder, "--ratio", "0.2")
    assert facts["family"] == "llama"
    assert facts["groups"] == {"attention": 9, "mlp": 60}
    assert facts["parameters_per_group"] == {"attention": 48 * 8 * 6, "mlp": 48 * 3}
    assert facts["ratio"]["parameters_to_remove"] == round(0.2 * facts["parameters"])
    out = tmp_path / "small"
    run(capsys, "prune", folder, "--out", out, "--ratio", "0.2", *PLAIN, "--method", "random", *UNMEASURED)
    pruned = run_json(capsys, "inspect", out)
    for before, now, removed in zip(facts["layers"], pruned["layers"], pruned["removed"], strict=True):
        assert before["intermediate_size"] - now["intermediate_size"] == removed["mlp"]
        assert before["num_key_value_heads"] - now["num_key_value_heads"] == removed["attention"]
    assert "of 20" in run(capsys, "inspect", out).out


def test_compare_writes_a_table_and_plans(capsys, tmp_path, folder, text):
    out = tmp_path / "comparison"
    words = ["compare", folder, "--recipes", "original", "--methods", "taylor,wanda,random", "--ratios", "0.1,0.3"]
    measured = ["--eval-text", text, "--set", "evaluation.seq_len=32", "--set", "evaluation.windows=2"]
    run(capsys, *words, "--seeds", "0,3", "--out", out, "--calibration", text, *SIZES, *measured)
    rows = pd.read_csv(out / "comparison.csv")
    each = ["dense", "taylor", "taylor", "wanda", "wanda", "random", "random"]
    assert list(rows["recipe"]) == each * 2
    assert list(rows["seed"]) == [0] * 7 + [3] * 7
    assert (rows["relative"] == rows["perplexity"] / rows["perplexity"][0]).all()
    assert (out / "report.html").is_file()
    assert "overwrite" in fails(capsys, *words, "--out", out, "--calibration", text, *SIZES)
    model, tokenizer = prunus.load_model(folder)
    for seed in (0, 3):
        plan = prunus.Plan.load(out / "plans" / f"taylor-0.3-seed{seed}.json")
        drawn = prunus.load_calibration(str(text), tokenizer, samples=6, seq_len=24, seed=seed)
        assert plan == prunus.prune(model, 0.3, drawn, prunus.Recipe.original(), progress=False).plan
        pruned = prunus.apply_plan(model, plan)
        again = prunus.perplexity(pruned, tokenizer, TEXT, seq_len=32, max_windows=2, progress=False).perplexity
        row = rows.query("recipe == 'taylor' and ratio == 0.3 and seed == @seed")
        assert row["perplexity"].item() == pytest.approx(again, rel=1e-6)


def test_compare_takes_recipes_by_name_and_file(capsys, tmp_path, folder, text):
    (tmp_path / "mine.yaml").write_text("rounds: 1\nrepair: null\n")
    words = ["compare", folder, "--recipes", f"default,{tmp_path / 'mine.yaml'}", "--ratios", "0.2"]
    rows = run_json(capsys, *words, "--out", tmp_path / "out", "--calibration", text, *SIZES)
    assert [row["recipe"] for row in rows] == ["dense", "default", "mine"]


def test_compare_measures_recipes_of_one_name_alike(capsys, tmp_path, folder, text):
    """Two results keep their recipes under one name; what is no recipe in them must be the same."""
    for name, more in (("one", "rounds: 1"), ("two", "rounds: 1\nscoring: {method: taylor}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(f"{more}\nrepair: null\ncalibration: {{samples: 6}}\n")
    files = [str(tmp_path / name / "recipe.yaml") for name in ("one", "two")]
    words = [
        "compare",
        folder,
        "--ratios",
        "0.2",
        "--calibration",
        text,
        "--seq-len",
        "24",
        "--recipes",
        ",".join(files),
    ]
    rows = run_json(capsys, *words, "--out", tmp_path / "both", "--set", "evaluation.seq_len=24")
    assert [row["recipe"] for row in rows] == ["dense", *files]
    assert len(list((tmp_path / "both" / "plans").glob("*.json"))) == 2
    Path(files[1]).write_text("calibration: {samples: 7}\n")
    message = fails(capsys, *words, "--out", tmp_path / "uneven")
    assert f"calibration.samples is 6 in {files[0]} and 7 in {files[1]}" in message
    assert "give it with --samples VALUE" in message
    assert not (tmp_path / "uneven").exists()
    for name in ("a-b", "a b"):
        (tmp_path / f"{name}.yaml").write_text("rounds: 1")
    words[-1] = f"{tmp_path / 'a-b.yaml'},{tmp_path / 'a b.yaml'}"
    assert "the plans of a-b and a b would have one name" in fails(capsys, *words, "--out", tmp_path / "uneven")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratio", "1.2"], "ratio is 1.2"),
        (["--ratio", "0.95"], "largest reachable ratio is"),
        (
            ["--ratio", "0.2", "--set", "selection.min_keep_mlp=20", "--set", "selection.min_keep_attention=3"],
            "largest reachable ratio is 0",
        ),
        (["--ratio", "0.2", "--method", "tailor"], "Did you mean taylor"),
        (["--ratio", "0.2", "--set", "selection.axes=[attention, heads]"], "each one of attention, mlp"),
        (["--ratio", "0.2", "--set", "selection.layer_start=7"], "layer_start 7"),
        (["--ratio", "0.2", "--samples", "100000"], "tokens"),
        (["--ratio", "0.2", "--samples", "0"], "samples is 0"),
        (["--ratio", "0.2", "--calibration", "missing.txt"], "missing.txt"),
        (["--ratio", "0.2", "--eval-text", "missing.txt"], "missing.txt"),
        (["--ratio", "0.2", "--device", "tpu"], "tpu"),
        (["--ratio", "0.2", "--dtype", "int3"], "int3"),
    ],
)
def test_wrong_values_are_named_and_nothing_is_written(capsys, tmp_path, folder, text, words, message):
    out = tmp_path / "out"
    default = [] if "--calibration" in words else ["--calibration", text]
    assert message in fails(capsys, "prune", folder, "--out", out, *default, *words)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there_is_not_overwritten(capsys, tmp_path, folder):
    out = tmp_path / "out"
    words = ["prune", folder, "--out", out, "--ratio", "0.1", *PLAIN, "--method", "random", *UNMEASURED]
    run(capsys, *words)
    assert "overwrite" in fails(capsys, *words)
    run(capsys, *words, "--overwrite")


def test_weights_with_nan_are_refused_by_layer(capsys, tmp_path, folder):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    message = fails(capsys, "prune", broken, "--out", tmp_path / "out", "--ratio", "0.1", "--method", "random")
    assert "layers.1.mlp.up_proj" in message


def test_a_text_that_is_just_long_enough_is_not_measured_on(capsys, caplog, tmp_path, folder):
    out, text = tmp_path / "out", tmp_path / "short.txt"
    text.write_text(TEXT[:430])
    words = ["--calibration", text, "--seq-len", "50", "--samples", "8"]
    assert run_json(capsys, "prune", folder, "--out", out, "--ratio", "0.1", *words)["perplexity_after"] is None
    assert "perplexity is not measured" in caplog.text
    assert "## Evaluation" not in (out / "README.md").read_text()


@pytest.mark.parametrize("missing", ["score.json", "groups.csv"])
def test_plan_says_which_file_is_missing(capsys, tmp_path, folder, missing):
    scores = tmp_path / "scores"
    run(capsys, "score", folder, "--out", scores, "--method", "magnitude")
    (scores / missing).unlink()
    assert missing in fails(capsys, "plan", scores, "--ratio", "0.1", "--out", tmp_path / "plan.json")


def test_a_plan_for_another_model_is_refused(capsys, tmp_path, folder):
    run(capsys, "score", folder, "--out", tmp_path / "scores", "--method", "magnitude")
    run(capsys, "plan", tmp_path / "scores", "--ratio", "0.1", "--out", tmp_path / "plan.json")
    other = save_tiny_folder(tmp_path / "other", "llama", "gqa", num_hidden_layers=2)
    message = fails(capsys, "apply", other, tmp_path / "plan.json", "--out", tmp_path / "out")
    assert "3 decoder layers" in message


def test_unknown_flags_are_wrong_usage(capsys, folder):
    assert main(["prune", str(folder), "--out", "x", "--rato", "0.2"]) == 2
    assert "rato" in capsys.readouterr().err


def test_wanda_warns_that_raw_scores_do_not_compare(capsys, caplog, tmp_path, folder, text):
    words = ["score", folder, "--method", "wanda", "--calibration", text, *SIZES]
    run(capsys, *words, "--out", tmp_path / "raw")
    assert "not on one scale" in caplog.text
    caplog.clear()
    run(capsys, *words, "--out", tmp_path / "shares", "--set", "scoring.normalize=layer_sum")
    assert "not on one scale" not in caplog.text


def test_ctrl_c_in_the_middle_leaves_nothing_behind(tmp_path, folder, text, monkeypatch):
    out = tmp_path / "out"
    words = [
        "prune",
        str(folder),
        "--out",
        str(out),
        "--ratio",
        "0.2",
        "--calibration",
        str(text),
        "--samples",
        "8",
        "--seq-len",
        "32",
    ]

    # The child says when it has begun its passes, and then waits there: it is interrupted in the middle of the work.
    def told(*args):
        print("sweeping", flush=True)
        time.sleep(120)

    monkeypatch.setattr("prunus.sweep.resident._run_batch", told)
    child = Forked(lambda: main(words))
    child.wait_until(lambda: child.said() == "sweeping\n")
    child.kill(signal.SIGINT)
    ended = child.wait()
    assert ended.status == 130
    assert "interrupted" in ended.err
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["score", "compare"])
def test_overwrite_replaces_what_the_same_command_wrote(capsys, tmp_path, folder, text, kind):
    out = tmp_path / "out"
    words = {
        "score": ["score", folder, "--method", "wanda", "--calibration", text, *SIZES],
        "compare": [
            "compare",
            folder,
            "--recipes",
            "original",
            "--methods",
            "random",
            "--ratios",
            "0.1",
            "--calibration",
            text,
            *SIZES,
        ],
    }[kind]
    run(capsys, *words, "--out", out)
    before = sorted(path.name for path in out.iterdir())
    assert "overwrite" in fails(capsys, *words, "--out", out)
    run(capsys, *words, "--out", out, "--overwrite")
    assert sorted(path.name for path in out.iterdir()) == before


def test_the_example_of_the_python_api_runs(capsys, tmp_path, folder, monkeypatch):
    example = str(Path(__file__).parents[2] / "examples" / "python_api.py")
    words = ["--model", str(folder), "--samples", "4", "--seq-len", "32", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [example, *words])
    runpy.run_path(example, run_name="__main__")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert f"pruned: {pruned.num_parameters():,} parameters" in capsys.readouterr().out


def test_methods_made_of_methods(capsys, tmp_path, folder, text):
    options = ["--calibration", text, "--samples", "8", "--seq-len", "24"]
    mixed = ["--method", "hybrid", "--set", "scoring.hybrid={taylor: 0.4, wanda: 0.3, gate_fisher: 0.3}"]
    facts = run_json(capsys, "score", folder, "--out", tmp_path / "mixed", *options, *mixed)
    assert facts["scoring"]["method"] == "hybrid"
    assert facts["scoring"]["hybrid"] == [["taylor", 0.4], ["wanda", 0.3], ["gate_fisher", 0.3]]
    chosen = ["--method", "adaptive", "--set", "scoring.adaptive.candidates=[taylor, magnitude]"]
    captured = run(capsys, "score", folder, "--out", tmp_path / "chosen", *options, *chosen, "--json")
    facts = json.loads(captured.out)
    assert [set(record["loss_rise"]) for record in facts["adaptive"]] == [{"taylor", "magnitude"}] * 2
    for record in facts["adaptive"]:
        assert f"{record['axis']}: chose {record['method']}; removing a quarter by" in captured.err


def test_another_normalisation_keeps_the_attention_weight(capsys, tmp_path, folder, text):
    scores = tmp_path / "scores"
    weight = ["--method", "wanda", "--set", "scoring.attention_weight=1.3"]
    run(capsys, "score", folder, "--out", scores, "--calibration", text, *SIZES, *weight)
    options = ["--ratio", "0.3", "--out", tmp_path / "plan.json"]
    run(capsys, "plan", scores, *options, "--normalize", "layer_sum")
    table, about = pd.read_csv(scores / "groups.csv"), json.loads((scores / "score.json").read_text())
    by_layer = table.groupby(["layer_idx", "group_type"])["importance"]
    attention = table["group_type"].map({"attention": 1.3, "mlp": 1.0})
    table["score"] = table["importance"] / by_layer.transform("mean") * attention
    removed, target, gone = 0, 0.3 * about["geometry"]["total_parameters"], set()
    for row in table.sort_values("score").itertuples():
        if removed < target:
            removed += row.cost
            gone.add((row.layer_idx, row.group_type, row.group_idx))
    plan = prunus.Plan.load(tmp_path / "plan.json")
    kept = {(i, axis, group) for i, layer in enumerate(plan.layers) for axis in AXES for group in layer[axis]}
    every = set(table[["layer_idx", "group_type", "group_idx"]].itertuples(index=False, name=None))
    assert kept == every - gone
    about["scoring"]["attention_weight"] = "much"
    (scores / "score.json").write_text(json.dumps(about))
    message = fails(capsys, "plan", scores, *options, "--overwrite", "--normalize", "layer_mean")
    assert 'scoring.attention_weight is "much"; it must be a number' in message
