"""What a job says before it starts: nothing is written, stages are those of the run, and sums are counted by hand."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_folder import SIZES, fails, run, run_json

from prunus.errors import BudgetError
from prunus.model.geometry import Geometry
from prunus.pipeline import forecast as forecast_module
from prunus.pipeline.forecast import forecast
from prunus.pipeline.job import Job
from prunus.pipeline.options import CalibrationOptions, EvaluationOptions
from prunus.pipeline.prune import forecast_prune
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.request import check_request
from prunus.pipeline.stages import stages_of_job
from prunus.selection.constraints import Constraints


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def small_job(folder, text, **more) -> Job:
    return Job(str(folder), 0.2, calibration=CalibrationOptions(str(text), samples=6, seq_len=24), **more)


def test_the_stages_are_those_of_the_run(capsys, tmp_path, folder, text):
    words = ["prune", folder, "--out", tmp_path / "small", "--ratio", "0.2", "--calibration", text, *SIZES]
    before = torch.get_rng_state()
    ahead = run_json(capsys, *words, "--dry-run")
    assert torch.equal(torch.get_rng_state(), before)
    assert files(tmp_path) == []
    said = run(capsys, *words).err.splitlines()
    metrics = json.loads((tmp_path / "small" / "prunus" / "metrics.json").read_text())
    assert [stage["stage"] for stage in metrics["stages"]] == [*ahead["stages"]][:-1]  # saved while saving
    assert all(stage["seconds"] > 0 and stage["peak_bytes"] > 0 for stage in metrics["stages"])
    assert all(seconds > 0 for seconds in ahead["stages"].values())
    assert ahead["seconds"] == pytest.approx(sum(ahead["stages"].values()))
    (removal,) = ahead["removals"]
    assert removal["before"] == metrics["parameters_before"] == ahead["parameters"]
    assert removal["removed"] == pytest.approx(0.2 * metrics["parameters_before"])
    assert removal["most"] >= metrics["parameters_before"] - metrics["parameters_after"]
    # The same in four lines, then a line per stage.
    first = next(number for number, line in enumerate(said) if line.startswith("Llama"))
    assert said[first + 1].startswith(f"removes 20.0%: {removal['removed']:,.0f} of {removal['before']:,} parameters")
    assert said[first + 3].startswith("about ")
    lines = [re.fullmatch(rf"(\d) of {len(ahead['stages'])}: (.*), \d+ s left", line) for line in said[first + 4 :]]
    assert [(match[1], match[2]) for match in lines if match] == [
        (str(number), name) for number, name in enumerate(ahead["stages"], start=1)
    ]


def test_for_people(capsys, tmp_path, folder, text):
    words = ["--out", tmp_path / "out", "--calibration", text, *SIZES, "--dry-run"]
    shown = run(capsys, "prune", folder, "--ratio", "0.2", *words).out
    assert "Llama" in shown
    assert "about" in shown
    assert "cut and repair, round 2 of 2" in shown
    assert "scoring" in run(capsys, "score", folder, *words).out
    shown = run(capsys, "compare", folder, "--ratios", "0.1,0.2", "--seeds", "0,1", *words).out
    assert shown.count("removes") == 2
    assert "comparing, seed 1" in shown
    assert files(tmp_path) == []


def test_what_cannot_work_is_said_first(capsys, tmp_path, folder, text):
    words = ["prune", folder, "--out", tmp_path / "out", "--calibration", text, *SIZES, "--dry-run"]
    said = fails(capsys, *words, "--ratio", "0.99")
    assert "the largest reachable ratio is" in said
    for source, message in (("missing.jsonl", "does not exist"), ("c5", "there is no calibration source 'c5'")):
        for command in (["prune"], ["score"], ["compare", "--ratios", "0.2"]):
            given = [command[0], folder, *command[1:], "--out", tmp_path / "out", "--calibration", source, *SIZES]
            assert message in fails(capsys, *given, "--dry-run")
    chat = fails(capsys, *words, "--set", "calibration.chat_column=messages")
    assert "conversations come from .jsonl" in chat
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert "is not empty, nor an earlier output" in fails(capsys, *words)
    assert files(tmp_path) == ["out", "out/mine.txt"]


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe.fast(), Recipe.original(), Recipe.original("magnitude"), Recipe().by("adaptive")]
)
@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_names_are_those_of_the_stages(folder, text, tmp_path, recipe, engine):
    job = small_job(folder, text, recipe=recipe)
    job = replace(job, run=replace(job.run, engine=engine), calibration=replace(job.calibration, samples=16))
    request = check_request(job, tmp_path / "out", work=tmp_path / "work", saves=True, overwrite=False)
    assert [*forecast(request).stages] == stages_of_job(request)
    assert os.listdir(tmp_path) == []


class UnitProbe:
    """A machine on which everything takes a time that is easy to count."""

    head_forward, head_backward, selection = 100.0, 1000.0, 0.0

    def __init__(self, *_):
        pass

    def forward(self, seq_len):
        return 1.0

    def scoring(self, options, seq_len):
        return 10.0

    def writing(self, rows, context, draws):
        return 7.0 if draws else 0.0

    def sums(self, inputs, outputs, seq_len):
        return 0.01 * inputs

    def solution(self, inputs, outputs):
        return 5.0


def test_a_count_by_hand(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast_module, "Probe", UnitProbe)
    for name in ("READING", "WRITING_SPEED", "TOKENISING"):
        monkeypatch.setattr(forecast_module, name, float("inf"))
    job = small_job(folder, text, evaluation=EvaluationOptions(held_out=4))
    ahead = forecast_prune(job, tmp_path / "out")
    geometry = Geometry.of(
        check_request(job, tmp_path / "out", work=None, saves=True, overwrite=False).empty,
    )
    stages = ahead.stages
    assert stages["scoring, round 1 of 2"] == pytest.approx(6 * 24 * (10 + 1000))
    assert stages["scoring, round 2 of 2"] == pytest.approx(3 * 24 * (0.9 * 10 + 1000))
    assert "writing text" not in stages
    mixed = replace(job, calibration=replace(job.calibration, source=(*job.calibration.source, "self:3")))
    # Three quarters of 6 and 4 sequences of 24 tokens: one batch, of texts of 24 tokens behind prompts of about 32.
    assert forecast_prune(mixed, tmp_path / "out").stages["writing text"] == pytest.approx((24 + 32) * 7)
    heads = geometry.num_key_value_groups * geometry.head_dim
    for name, gone, sequences in (("cut and repair, round 1 of 2", 0.1, 1), ("cut and repair, round 2 of 2", 0.2, 6)):
        share = gone * geometry.total_parameters / ahead.removals[0].most
        widths = geometry.widths
        kept = {axis: sum(w[axis] for w in widths) * (1 - share) / len(widths) for axis in ("attention", "mlp")}
        walked = sequences * 24 * (1 + 1.5 * (1 - gone))
        solved = sequences * 24 * 0.01 * (kept["mlp"] + kept["attention"] * heads) + 2 * 5
        fitted = 4 * sequences * 24 / 2 * 100  # four times the head, on the sequences without noise
        assert stages[name] == pytest.approx(walked + len(widths) * solved + fitted, rel=0.05)
    assert stages["measuring"] == pytest.approx(4 * 24 * (1 + 0.8 + 2 * 100))


def test_what_can_go_under_constraints(folder, text, tmp_path):
    constraints = Constraints(axes=("mlp",), min_keep_mlp=4)
    job = replace(small_job(folder, text, recipe=Recipe(selection=constraints)), ratio=0.1)
    (removal,) = forecast_prune(job, tmp_path / "out").removals
    geometry = Geometry.of(
        check_request(job, tmp_path / "out", work=None, saves=True, overwrite=False).empty,
    )
    channels = sum(widths["mlp"] - 4 for widths in geometry.widths)
    assert removal.most == channels * geometry.group_parameters["mlp"]
    assert removal.groups == {"attention": 0, "mlp": round(removal.removed / geometry.group_parameters["mlp"])}
    with pytest.raises(BudgetError, match="the largest reachable ratio"):
        forecast_prune(Job(str(folder), 0.9, recipe=Recipe(selection=constraints)), tmp_path / "out")
