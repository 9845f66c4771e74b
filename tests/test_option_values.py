"""Options that Python callers give are refused for what they mean, as those of the command line are."""

from __future__ import annotations

import json
import math

import pytest
from plain import plain_scoring
from tiny_families import make_model
from tiny_folder import fails, run

from prunus.errors import OptionError, PlanError
from prunus.model.geometry import Geometry
from prunus.pipeline.rounds import schedule
from prunus.repair.block_repair import RepairOptions
from prunus.scoring.score import Score, ScoringOptions, score
from prunus.scoring.weighing import weigh_attention
from prunus.selection.constraints import Constraints
from prunus.selection.select import check_ratio
from prunus.selection.targets import TargetOptions
from prunus.sweep.engine import ModelOptions

NO_NUMBERS = (math.nan, math.inf, -math.inf, "1", None, True)


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, -1, 2.5])
@pytest.mark.parametrize(
    "make",
    [
        lambda value: ModelOptions(batch_size=value),
        lambda value: Constraints(align=value),
        lambda value: TargetOptions("flops", context=value),
        lambda value: schedule(0.2, value),
    ],
    ids=["batch size", "align", "context", "rounds"],
)
def test_numbers_of_things(make, value):
    with pytest.raises(OptionError, match=r"; (give a whole number|the smallest is 1)"):
        make(value)


@pytest.mark.parametrize("value", [*NO_NUMBERS, -1, 2.5])
@pytest.mark.parametrize("name", ["layer_start", "min_keep_attention", "min_keep_mlp"])
def test_numbers_of_things_that_may_be_none(name, value):
    with pytest.raises(OptionError, match=f"`{name}` is {value!r}; (give a whole number|the smallest is 0)"):
        Constraints(**{name: value})


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, -1])
@pytest.mark.parametrize(
    "make",
    [
        lambda value: ScoringOptions(attention_weight=value),
        lambda value: RepairOptions(damping=value),
        lambda value: ScoringOptions(hybrid=(("taylor", value),)),
    ],
    ids=["attention weight", "damping", "hybrid"],
)
def test_factors(make, value):
    with pytest.raises(OptionError, match="it must be a positive and finite number"):
        make(value)


@pytest.mark.parametrize("value", [*NO_NUMBERS, -0.1, 1.1])
@pytest.mark.parametrize(
    "make",
    [
        lambda value: ScoringOptions(noise=value),
        lambda value: RepairOptions(noise=value),
        lambda value: RepairOptions(residual=value),
    ],
    ids=["noise", "noise", "residual"],
)
def test_shares(make, value):
    with pytest.raises(OptionError, match=r"must lie in \[0, 1\]"):
        make(value)


@pytest.mark.parametrize("value", [*NO_NUMBERS, 1, -0.1])
def test_ratios(value):
    with pytest.raises(OptionError, match=r"must lie in \[0, 1\)"):
        check_ratio(value)


@pytest.mark.parametrize("value", [2.5, "1", True])
def test_seeds(value):
    with pytest.raises(OptionError, match="`random_seed` is"):
        ScoringOptions(random_seed=value)


@pytest.mark.parametrize("factor", [-1.0, 0.0, math.nan, math.inf])
def test_factors_on_scores(factor):
    table = score(make_model("llama", "gqa"), options=plain_scoring(method="magnitude"), progress=False).table
    with pytest.raises(OptionError, match="`attention_weight` is"):
        weigh_attention(table, factor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring": {"attention_weight": -1}}, "scoring.attention_weight is -1; it must be greater than 0"),
        ({"scoring": {"attention_weight": math.nan}}, "it holds NaN"),
        ({"scoring": {"attention_weight": "2"}}, 'scoring.attention_weight is "2"; it must be a number'),
        ({"rounds": 1.5}, "rounds is 1.5; it must be a whole number"),
        ({"target": {"target": "flops", "context": 10.9}}, "context is 10.9; it must be a whole number"),
        ({"target": {"target": "flops", "context": math.inf}}, "it holds Infinity"),
    ],
)
@pytest.mark.parametrize("words", [[], ["--normalize", "layer_sum"]])
def test_scores_of_a_damaged_file(capsys, tmp_path, change, message, words):
    model = make_model("llama", "gqa")
    score(model, options=plain_scoring(method="magnitude"), progress=False).save(tmp_path)
    plan = ["plan", tmp_path, "--ratio", "0.2", "--out", tmp_path / "plan.json", *words]
    run(capsys, *plan)
    about = json.loads((tmp_path / "score.json").read_text())
    for name, value in change.items():
        about[name] = {**about[name], **value} if isinstance(about.get(name), dict) else value
    (tmp_path / "score.json").write_text(json.dumps(about))
    (tmp_path / "plan.json").unlink()
    assert message in fails(capsys, *plan)
    assert not (tmp_path / "plan.json").exists()
    with pytest.raises(PlanError, match=r"score\.json|malformed target"):
        assert Score.load(tmp_path).target.costs(Geometry.of(model))
