"""--engine, --max-memory and --work as a user types them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from plain import PLAIN, UNMEASURED
from safetensors.torch import load_file
from tiny_folder import SIZES, fails, run, save_tiny_folder

import prunus
from prunus.cli import main
from prunus.machine.byte_sizes import parse_bytes

SMALLEST = r"smallest --max-memory that would do is ([\d.]+[MG]B)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("models") / "tiny", "qwen3", num_hidden_layers=3)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """1.2 MB of weights in every layer, so that megabytes tell the engines apart."""
    path = tmp_path_factory.mktemp("models") / "deep"
    return save_tiny_folder(path, "qwen3", num_hidden_layers=6, intermediate_size=2000)


@pytest.mark.parametrize("rounds", [1, 2])
def test_prune_with_weights_on_disk_saves_what_it_saves_with_them_in_memory(capsys, tmp_path, folder, text, rounds):
    out = tmp_path / "small"
    run(
        capsys,
        *(
            "prune",
            folder,
            "--out",
            out,
            "--ratio",
            0.3,
            "--set",
            "run.engine=streamed",
            "--method",
            "taylor",
            "--rounds",
            rounds,
        ),
        *("--calibration", text, *SIZES, "--set", "evaluation.held_out=2", "--set", "output.report=false"),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["small"], "the work folder is gone"
    model, tokenizer = prunus.load_model(folder)
    drawn = prunus.load_calibration(str(text), tokenizer, samples=8, seq_len=24).split(2)[0]
    result = prunus.prune(
        model,
        0.3,
        drawn,
        # A model on disk writes no text.
        prunus.Recipe(rounds, prunus.ScoringOptions(method="taylor"), repair=prunus.RepairOptions()),
        engine="streamed",
        progress=False,
    )
    saved, state = load_file(out / "model.safetensors"), result.model.state_dict()
    assert saved.keys() <= state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    metrics = json.loads((out / "prunus" / "metrics.json").read_text())
    assert metrics["engine"] == "streamed"
    assert metrics["plan"] == result.plan.fingerprint


@pytest.mark.parametrize("command", ["compare", "eval", "apply"])
def test_other_commands_under_a_limit(capsys, tmp_path, deep, text, command, monkeypatch):
    """The limit is so small that weights have to stay on disk."""
    monkeypatch.setattr("prunus.sweep.estimate.resident_set", lambda: 0)
    for constant in ("FIRST_USE", "FIRST_SOLUTION", "GROUP_BYTES"):
        monkeypatch.setattr(f"prunus.sweep.estimate.{constant}", 0)
    sizes = ["--calibration", text, *SIZES, "--set", "evaluation.held_out=2"]
    words = {
        "compare": ["compare", deep, "--recipes", "original", "--methods", "taylor,wanda", "--ratios", "0.2", *sizes],
        "eval": ["eval", deep, "--text", text, "--seq-len", 32, "--windows", 3, "--json"],
        "apply": ["apply", deep, tmp_path / "small" / "prunus" / "plan.json"],
    }[command]
    if command == "apply":
        run(capsys, "prune", deep, "--out", tmp_path / "small", "--ratio", 0.2, *PLAIN, *sizes, *UNMEASURED)
    found = {}
    # "tight" is what the streamed engine says it needs.
    refused = fails(capsys, *words, *(["--out", tmp_path / "no"] if command != "eval" else []), "--max-memory", "1KB")
    tight = re.search(SMALLEST, refused)[1]
    for name, limit in (("tight", tight), ("ample", "9GB")):
        out = ["--out", tmp_path / f"{command}-{name}"] if command != "eval" else []
        captured = run(capsys, *words, *out, "--max-memory", limit)
        assert f"engine {'streamed' if name == 'tight' else 'resident'}: about" in captured.err
        found[name] = captured.out
    if command == "eval":
        perplexities = [json.loads(printed)["perplexity"] for printed in found.values()]
        assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-6)
    if command == "apply":
        one, other = (load_file(tmp_path / f"apply-{name}" / "model.safetensors") for name in found)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_limit_that_cannot_be_kept_is_refused_before_any_work(capsys, tmp_path, folder, text):
    words = ["score", folder, "--out", tmp_path / "scores", "--calibration", text, *SIZES]
    message = fails(capsys, *words, "--max-memory", "100MB")
    smallest = re.search(SMALLEST, message)[1]
    assert parse_bytes(smallest) > 100e6
    assert not (tmp_path / "scores").exists()
    # The process itself has grown a little in between.
    run(capsys, *words, "--max-memory", f"{int(parse_bytes(smallest) / 1e6) + 100}MB")
    assert "resident engine needs" in fails(
        capsys, *words, "--overwrite", "--set", "run.engine=resident", "--max-memory", "100MB"
    )
    assert "write a size such as 8GB" in fails(capsys, *words, "--overwrite", "--max-memory", "lots")


def test_work_folder_of_other_options_is_refused(capsys, tmp_path, folder, text, monkeypatch):
    words = [
        "score",
        folder,
        "--out",
        tmp_path / "scores",
        "--calibration",
        text,
        *SIZES,
        "--set",
        "run.engine=streamed",
    ]

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("prunus.scoring.score.score_groups", interrupted)
        assert main([str(word) for word in words]) == 130
    capsys.readouterr()
    assert (tmp_path / "scores.work").is_dir()
    assert "other inputs: calibration tokens" in fails(capsys, *words, "--seed", "5")
    run(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
