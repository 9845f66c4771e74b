"""Results whose files were damaged: `report` and `eval --update-card` name file, field and value, and write nothing."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_folder import fails, run

from prunus.errors import CheckpointError
from prunus.results.result_folder import add_evaluation, read_result


def changed(folder, place, name, change):
    """A copy of a result in which one JSON file holds something else."""
    copy = place / "copy"
    shutil.copytree(folder, copy)
    path = copy / name
    values = json.loads(path.read_text()) if path.is_file() else {}
    change(values)
    path.write_text(json.dumps(values))
    (copy / "report.html").unlink(missing_ok=True)
    return copy


METRICS = {
    "parameters_after is missing": lambda m: m.pop("parameters_after"),
    'parameters_before is "7"; it must be a whole number': lambda m: m.update(parameters_before="7"),
    "parameters_before is 0; it must be greater": lambda m: m.update(parameters_before=0),
    "parameters_after is 1000000000000000000": lambda m: m.update(parameters_after=10**60),
    "base_model is null; it must be text": lambda m: m.update(base_model=None),
    'perplexity_after is "3"; it must be a number': lambda m: m.update(perplexity_after="3"),
    "perplexity_after needs perplexity_text": lambda m: m.update(perplexity_text=None),
    "perplexity_before is -1; it must be greater than 0": lambda m: m.update(perplexity_before=-1),
    "calibration is an array of 1; it must be an object": lambda m: m.update(calibration=[1]),
    "scoring.method is missing": lambda m: m["scoring"].pop("method"),
    'stages.0.seconds is "1"; it must be a number': lambda m: m["stages"][0].update(seconds="1"),
    "it holds NaN": lambda m: m.update(ratio=float("nan")),
    "half of a surrogate pair": lambda m: m.update(command="\ud800"),
}


@pytest.mark.parametrize(("message", "change"), METRICS.items(), ids=METRICS)
def test_metrics(capsys, pruned, tmp_path, message, change):
    copy = changed(pruned, tmp_path, "prunus/metrics.json", change)
    said = fails(capsys, "report", copy)
    assert message in said
    assert str(copy / "prunus" / "metrics.json") in said
    assert message in fails(capsys, "eval", copy, "--update-card")
    assert not (copy / "report.html").exists()


ENTRY = {"text": "a", "protocol": "b", "perplexity": 2.5}
SPEED = {"options": {"prompt_tokens": 1, "new_tokens": 1, "batch_size": 1}, "device": "cpu", "threads": 1, "torch": "2"}
EVALUATION = {
    "perplexities.0.text is missing": {"perplexities": [{"protocol": "b", "perplexity": 2.5}]},
    "perplexities.1.perplexity is null; it must be a number": {"perplexities": [ENTRY, {**ENTRY, "perplexity": None}]},
    "perplexities is an object of 1; it must be an array": {"perplexities": {"a": 1}},
    "zero_shot.0.accuracy is 2; it must be less than or equal to 1": {
        "zero_shot": [{"task": "piqa", "items": 1, "accuracy": 2, "accuracy_norm": 0.5}]
    },
    'samples.0 is "x"; it must be an object': {"samples": ["x"]},
    "dense.model is missing": {"dense": {"perplexities": []}},
    "speed.results is an array of 0; List should have at least 1 item": {"speed": {**SPEED, "results": []}},
    "speed.results is missing": {"speed": SPEED},
    "commands.0 is 7; it must be text": {"commands": [7]},
}


@pytest.mark.parametrize(("message", "values"), EVALUATION.items(), ids=EVALUATION)
def test_evaluations(capsys, pruned, tmp_path, message, values):
    copy = changed(pruned, tmp_path, "prunus/evaluation.json", lambda old: old.update(values))
    said = fails(capsys, "report", copy)
    assert message in said
    assert str(copy / "prunus" / "evaluation.json") in said
    with pytest.raises(CheckpointError, match=r"evaluation\.json"):
        add_evaluation(copy, {"perplexities": [ENTRY]}, "prunus eval")
    assert not (copy / "report.html").exists()


def test_a_task_that_only_another_version_knows(capsys, pruned, tmp_path):
    task = {"task": "boolq", "items": 1, "accuracy": 0.5, "accuracy_norm": 0.5}
    copy = changed(pruned, tmp_path, "prunus/evaluation.json", lambda old: old.update(zero_shot=[task]))
    add_evaluation(copy, {"perplexities": [ENTRY]}, "prunus eval")
    assert "boolq" in (copy / "README.md").read_text()


def test_a_table_of_another_plan(capsys, pruned, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    path = copy / "prunus" / "groups.csv"
    (copy / "report.html").unlink()
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, "3,mlp,0,1.0,144,1.0"]) + "\n")
    assert "lists other groups than" in fails(capsys, "report", copy)


def test_a_card_that_is_no_text(capsys, pruned, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    (copy / "README.md").write_bytes(b"\xff\xfe card")
    with pytest.raises(CheckpointError, match=r"README\.md cannot be read, so it stays as it is"):
        add_evaluation(copy, {"perplexities": [ENTRY]}, "prunus eval")
    assert read_result(copy).evaluation == {}, "neither half is written"


def set_row(**fields):
    return lambda facts: facts["rows"][1].update(fields)


COMPARISON = {
    "rows is missing": lambda facts: facts.pop("rows"),
    "rows.1 is 3; it must be an object": lambda facts: facts["rows"].__setitem__(1, 3),
    'rows.1.ratio is "0.1"; it must be a number': set_row(ratio="0.1"),
    "rows.1.ratio is 10; it must be less than or equal to 1": set_row(ratio=10),
    "rows.1.recipe is 3; it must be text": set_row(recipe=3),
    "it has no row of the dense model with seed 7": set_row(seed=7),
    "rows.1.recipe is missing": lambda facts: facts["rows"][1].pop("recipe"),
    "rows.1.seed is 1.5; it must be a whole number": set_row(seed=1.5),
    "recipes.magnitude.scoring is missing": lambda facts: facts["recipes"]["magnitude"].pop("scoring"),
    "rows.1.parameters is -1; it must be greater": set_row(parameters=-1),
    "rows.1.seconds is -1; it must be greater": set_row(seconds=-1),
    "it has no row of the dense model": lambda facts: facts["rows"].pop(0),
    "evaluation.protocol is missing": lambda facts: facts["evaluation"].pop("protocol"),
    "model is 3; it must be text": lambda facts: facts.update(model=3),
}


@pytest.mark.parametrize(("message", "change"), COMPARISON.items(), ids=COMPARISON)
def test_comparisons(capsys, comparison, tmp_path, message, change):
    copy = changed(comparison, tmp_path, "comparison.json", change)
    said = fails(capsys, "report", copy)
    assert message in said
    assert str(copy / "comparison.json") in said
    assert not (copy / "report.html").exists()


def test_a_comparison_without_seeds(capsys, comparison, tmp_path):
    copy = changed(comparison, tmp_path, "comparison.json", lambda facts: [row.pop("seed") for row in facts["rows"]])
    run(capsys, "report", copy, "--overwrite")
    assert (copy / "report.html").stat().st_size > 0
