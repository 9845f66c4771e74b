"""compare does no work twice, and each of its rows is what prune gives alone."""

from __future__ import annotations

import json

import pytest
from plain import plain_recipe, plain_scoring
from tiny_families import make_model
from tiny_folder import TEXT, save_tiny_folder

import prunus
from prunus.errors import OptionError
from prunus.model.geometry import Geometry
from prunus.pipeline import compare as comparison
from prunus.pipeline.compare import compare, cuts_at_once
from prunus.pipeline.inputs import Inputs
from prunus.pipeline.job import Job, OutputOptions
from prunus.pipeline.prune import prune_job
from prunus.repair.block_repair import RepairOptions
from prunus.selection.plan import Plan
from prunus.sweep.estimate import bytes_of_a_cut

RATIOS = [0.1, 0.3, 0.30001]
REPAIR = RepairOptions()
ONCE = {
    f"{method}{', repaired' if repair else ''}": plain_recipe(
        plain_scoring(method=method, normalize="layer_sum"), repair=repair
    )
    for method in ("taylor", "magnitude")
    for repair in (None, REPAIR)
}


@pytest.fixture
def paths(tmp_path):
    folder, text = tmp_path / "tiny", tmp_path / "text.txt"
    save_tiny_folder(folder, "llama", "gqa", num_hidden_layers=3)
    text.write_text(TEXT, encoding="utf-8")
    return folder, text


def run(paths, out, recipes, ratios=RATIOS, *, save_dtype="auto", **options):
    folder, text = paths
    job = Job(
        str(folder),
        calibration=prunus.CalibrationOptions(str(text), samples=6, seq_len=24),
        evaluation=prunus.EvaluationOptions(held_out=2),
        output=OutputOptions(save_dtype=save_dtype),
    )
    return compare(job, recipes, ratios, out, progress=False, **options)


def check_against_prune(paths, frame, recipes, out):
    folder, text = paths
    model, tokenizer = prunus.load_model(folder)
    for seed in frame["seed"].unique():
        drawn = prunus.load_calibration(str(text), tokenizer, samples=8, seq_len=24, seed=int(seed))
        calibration, held_out = drawn.split(2)
        rows = frame[frame["seed"] == seed]
        dense = prunus.perplexity_of_windows(model, held_out.input_ids, progress=False).perplexity
        assert rows["perplexity"].iloc[0] == dense
        for row in rows.iloc[1:].itertuples():
            alone = prunus.prune(model, row.ratio, calibration, recipes[row.recipe], progress=False)
            expected = prunus.perplexity_of_windows(alone.model, held_out.input_ids, progress=False)
            assert row.perplexity == expected.perplexity
            assert row.relative == expected.perplexity / dense
            name = row.recipe.replace(", ", "--")
            assert Plan.load(out / "plans" / f"{name}-{row.ratio:g}-seed{seed}.json") == alone.plan


@pytest.mark.parametrize("engine_free", [10**12, 0], ids=["all at once", "one at a time"])
def test_rows_are_those_of_prune_and_equal_plans_are_made_once(paths, tmp_path, monkeypatch, engine_free):
    whole, measure, together, measured = comparison.repair_together_, Inputs.measure, [], []

    def spied(cuts, *args, **options):
        together.append(len(cuts))
        return whole(cuts, *args, **options)

    def counted(self, model, **options):
        measured.append(model)
        return measure(self, model, **options)

    monkeypatch.setattr(comparison, "repair_together_", spied)
    monkeypatch.setattr(comparison, "free_memory", lambda device, limit: engine_free)
    monkeypatch.setattr(Inputs, "measure", counted)
    frame = run(paths, tmp_path / "out", ONCE)
    found = [tuple(row) for row in frame[["recipe", "ratio"]].itertuples(index=False)]
    assert found == [("dense", 0.0)] + [(name, ratio) for name in ONCE for ratio in RATIOS]
    # 0.3 and 0.30001 are less than a group apart.
    assert len(measured) == 1 + 2 * 2 * 2
    assert together == ([4] if engine_free else [1, 1, 1, 1])
    check_against_prune(paths, frame, ONCE, tmp_path / "out")


def test_recipes_of_several_rounds_repairs_and_seeds(paths, tmp_path):
    recipes = {
        "default": prunus.Recipe(),
        "rounds": plain_recipe(rounds=2),
        "repaired": plain_recipe(repair=REPAIR),
        "uniform": prunus.Recipe(selection=prunus.Constraints(shape="uniform")),
    }
    frame = run(paths, tmp_path / "out", recipes, [0.3], seeds=[0, 5])
    assert len(frame) == 2 * (1 + 4)
    plans = {name.replace(" ", "-"): recipe for name, recipe in recipes.items()}
    frame["recipe"] = frame["recipe"].str.replace(" ", "-")
    check_against_prune(paths, frame, plans, tmp_path / "out")


def test_how_many_at_once():
    model = make_model("llama", "gqa", num_hidden_layers=3)
    geometry = Geometry.of(model)
    plans = [Plan.keep_all(geometry)] * 5
    one = bytes_of_a_cut(model, geometry.total_parameters, 1000)
    free = {None: 1, 0: 1, 2 * one: 1, 4 * one: 2, 7 * one: 3, 10**15: 5}
    assert {bound: cuts_at_once(model, plans, 1000, bound) for bound in free} == free


def stopped_after(monkeypatch, measurements):
    """Have a comparison end like a killed one before the next measurement; the numbers of those that were made."""
    whole, made = Inputs.measure, []

    def stopping(self, model, **options):
        if len(made) == measurements:
            raise KeyboardInterrupt
        made.append(model.num_parameters())
        return whole(self, model, **options)

    monkeypatch.setattr(Inputs, "measure", stopping)
    return made


def test_a_stopped_comparison_goes_on_after_its_rows(paths, tmp_path, monkeypatch, caplog):
    recipes = {**ONCE, "rounds": plain_recipe(rounds=2)}
    whole = run(paths, tmp_path / "whole", recipes, [0.2, 0.3], seeds=[0, 5])
    out, left = tmp_path / "out", tmp_path / "out.work"
    assert len(whole) == 2 * (1 + 5 * 2)
    for done in (1, 3, 7):
        with monkeypatch.context() as patch:
            stopped_after(patch, done)
            with pytest.raises(KeyboardInterrupt):
                run(paths, out, recipes, [0.2, 0.3], seeds=[0, 5])
        assert not out.exists()
    assert "goes on after these rows" in caplog.text
    assert len(list((left / "rows").iterdir())) == 1 + 3 + 7
    with monkeypatch.context() as patch:
        made = stopped_after(patch, 100)
        frame = run(paths, out, recipes, [0.2, 0.3], seeds=[0, 5])
    assert len(made) == 22 - 11
    costs = ["seconds", "peak_bytes"]
    assert frame.drop(columns=costs).equals(whole.drop(columns=costs))
    assert {path.name for path in out.rglob("*")} == {path.name for path in (tmp_path / "whole").rglob("*")}
    for path in (tmp_path / "whole" / "plans").iterdir():
        assert (out / "plans" / path.name).read_bytes() == path.read_bytes()
    assert not left.exists()


@pytest.mark.parametrize("what", ["weights", "calibration", "recipe", "held out", "saved dtype"])
def test_rows_made_from_other_inputs_are_measured_again(paths, tmp_path, monkeypatch, what):
    folder, text = paths
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(paths, tmp_path / "out", {"one": plain_recipe()}, [0.2, 0.3])
    recipe, save_dtype, again = plain_recipe(), "auto", 3
    if what == "weights":
        save_tiny_folder(folder, "llama", "gqa", num_hidden_layers=3, seed=7)
    elif what == "recipe":  # the dense model's row does not depend on it
        recipe, again = plain_recipe(plain_scoring(normalize="layer_sum")), 2
    elif what == "saved dtype":
        save_dtype = "bfloat16"
    else:
        text.write_text(TEXT[::-1] if what == "calibration" else TEXT + TEXT.upper(), encoding="utf-8")
    with monkeypatch.context() as patch:
        made = stopped_after(patch, 100)
        frame = run(paths, tmp_path / "out", {"one": recipe}, [0.2, 0.3, 0.3], save_dtype=save_dtype)
    assert len(made) == again
    assert len(frame) == 3
    if save_dtype == "auto":
        check_against_prune(paths, frame, {"one": recipe}, tmp_path / "out")
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("damage", [{"row": {}}, {"plan": {"format": "none"}}, {"protocol": 3}])
def test_a_kept_row_that_is_none_is_named(paths, tmp_path, monkeypatch, damage):
    with monkeypatch.context() as patch:
        stopped_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(paths, tmp_path / "out", {"one": plain_recipe()}, [0.2, 0.3])
    for path in (tmp_path / "out.work" / "rows").iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(OptionError, match=r"remove .*/out.work/rows/\w+.json, and it is measured again"):
        run(paths, tmp_path / "out", {"one": plain_recipe()}, [0.2, 0.3])


def test_the_seed_of_what_needs_no_text(paths, tmp_path):
    """Each seed has a random order of its own, the same whatever it is compared with, and as prune makes it."""
    control = plain_recipe(plain_scoring(method="random"))
    recipes = {"alone": {"random": control}, "beside": {"random": control, "taylor": plain_recipe()}}
    plans = {}
    for name, given in recipes.items():
        run(paths, tmp_path / name, given, [0.3], seeds=[0, 5])
        plans |= {(name, s): Plan.load(tmp_path / name / "plans" / f"random-0.3-seed{s}.json") for s in (0, 5)}
    assert plans["alone", 0] == plans["beside", 0] != plans["alone", 5] == plans["beside", 5]
    folder, text = paths
    made = Job(str(folder), 0.3, control, prunus.CalibrationOptions(str(text), samples=6, seq_len=24, seed=5))
    prune_job(made, tmp_path / "pruned", progress=False)
    assert Plan.load(tmp_path / "pruned" / "prunus" / "plan.json") == plans["alone", 5]


def test_names_and_ratios_that_are_easily_lost(paths, tmp_path):
    recipes = {"None": plain_recipe(plain_scoring(method="random")), "1": plain_recipe()}
    frame = run(paths, tmp_path / "out", recipes, [0.3, 0.30000001])
    assert frame["recipe"].tolist() == ["dense", "None", "None", "1", "1"]
    assert frame["perplexity"].dtype == float
    assert len(list((tmp_path / "out" / "plans").iterdir())) == 4
