"""Processes that torchrun starts share out the sequences and agree with one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from forked import Ended, together
from safetensors.torch import load_file
from tiny_folder import SIZES

import prunus
from prunus.cli import main

PATHS = f"{Path(prunus.__file__).parents[1]}:{Path(__file__).parents[1]}"


def torchrun(words: list[str]) -> Ended:
    """The real launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "prunus"]
    environment = {**os.environ, "PYTHONPATH": PATHS}
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=environment, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def by_fork(words: list[str]) -> Ended:
    return together(2, lambda: main(words))


@pytest.mark.parametrize(
    ("start", "engine", "method"),
    [
        pytest.param(torchrun, "resident", "hybrid", marks=pytest.mark.slow),
        (by_fork, "streamed", "taylor_2nd"),
        (by_fork, "streamed", "gate_fisher"),
    ],
)
def test_two_processes_agree_with_one(folder, text, tmp_path, start, engine, method):
    # Five sequences: the shares are unequal.
    options = [
        "--calibration",
        text,
        "--samples",
        5,
        "--seq-len",
        24,
        "--set",
        f"run.engine={engine}",
        "--method",
        method,
    ]
    one, two = (
        [str(word) for word in ["score", folder, "--out", tmp_path / name, *options, "--json"]]
        for name in ("one", "two")
    )
    assert main(one) == 0
    ended = start(two)
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["groups"] > 0, "one process prints, once"
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two"}
    one, two = (load_file(tmp_path / name / "statistics.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    tables = [pd.read_csv(tmp_path / name / "groups.csv") for name in ("one", "two")]
    keys = ["layer_idx", "group_type", "group_idx"]
    first, second = (table.set_index(keys)["importance"].sort_index() for table in tables)
    pd.testing.assert_series_equal(first, second, rtol=1e-5)
    losses = [json.loads((tmp_path / name / "score.json").read_text())["calibration_loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_more_processes_than_batches_and_other_commands_are_refused(folder, text, tmp_path, monkeypatch, capsys):
    options = ["--calibration", text, "--samples", 2, "--seq-len", 24, "--set", "run.batch_size=2"]
    ended = by_fork([str(word) for word in ["score", folder, "--out", tmp_path / "two", *options]])
    assert ended.status == 1
    assert "2 processes cannot share 1 calibration batches" in ended.err
    assert not (tmp_path / "two").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["prune", str(folder), "--out", str(tmp_path / "out"), *SIZES]) == 1
    assert "only `prunus score` shares its work out" in capsys.readouterr().err
