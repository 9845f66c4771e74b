"""compare does no work twice, and each of its rows is what prune gives alone."""

from __future__ import annotations

import pytest
from tiny_families import make_model
from tiny_folder import TEXT, save_tiny_folder

import prunus
from prunus.model.geometry import Geometry
from prunus.pipeline import compare as comparison
from prunus.pipeline.compare import compare, cuts_at_once
from prunus.pipeline.inputs import Inputs
from prunus.repair.compensation import CompensationOptions
from prunus.scoring.score import ScoringOptions
from prunus.selection.plan import Plan
from prunus.sweep.estimate import bytes_of_a_cut

METHODS, RATIOS = ["taylor", "magnitude"], [0.1, 0.3, 0.30001]


@pytest.fixture
def paths(tmp_path):
    folder, text = tmp_path / "tiny", tmp_path / "text.txt"
    save_tiny_folder(folder, "llama", "gqa", num_hidden_layers=3)
    text.write_text(TEXT, encoding="utf-8")
    return folder, text


def run(paths, out, **options):
    folder, text = paths
    return compare(
        str(folder),
        METHODS,
        RATIOS,
        out,
        calibration=prunus.CalibrationOptions(str(text), samples=6, seq_len=24),
        scoring=ScoringOptions(normalize="layer_sum"),
        evaluation=prunus.EvaluationOptions(held_out=2),
        progress=False,
        **options,
    )


@pytest.mark.parametrize("engine_free", [10**12, 0], ids=["all at once", "one at a time"])
def test_rows_are_those_of_prune_and_equal_plans_are_made_once(paths, tmp_path, monkeypatch, engine_free):
    whole, measure, together, measured = comparison.compensate_together_, Inputs.measure, [], []

    def spied(cuts, *args, **options):
        together.append(len(cuts))
        return whole(cuts, *args, **options)

    def counted(self, model, **options):
        measured.append(model)
        return measure(self, model, **options)

    monkeypatch.setattr(comparison, "compensate_together_", spied)
    monkeypatch.setattr(comparison, "free_memory", lambda device, limit: engine_free)
    monkeypatch.setattr(Inputs, "measure", counted)
    repair = CompensationOptions()
    frame = run(paths, tmp_path / "out", compensation=repair)
    found = [tuple(row) for row in frame[["method", "ratio", "compensated"]].itertuples(index=False)]
    assert found == [("dense", 0.0, False)] + [(m, r, c) for m in METHODS for r in RATIOS for c in (False, True)]
    # 0.3 and 0.30001 are less than a group apart.
    assert len(measured) == 1 + 2 * 2 * 2
    assert together == ([4] if engine_free else [1, 1, 1, 1])

    folder, text = paths
    model, tokenizer = prunus.load_model(folder)
    drawn = prunus.load_calibration(str(text), tokenizer, samples=8, seq_len=24)
    calibration, held_out = drawn.split(2)
    for row in frame.iloc[1:].itertuples():
        scoring = ScoringOptions(method=row.method, normalize="layer_sum")
        compensation = repair if row.compensated else None
        alone = prunus.prune(model, row.ratio, calibration, scoring=scoring, compensation=compensation, progress=False)
        expected = prunus.perplexity_of_windows(alone.model, held_out.input_ids, progress=False)
        assert row.perplexity == expected.perplexity
        suffix = "-compensated" if row.compensated else ""
        assert Plan.load(tmp_path / "out" / "plans" / f"{row.method}-{row.ratio:g}{suffix}.json") == alone.plan


def test_rounds_and_reselection_go_through_prune(paths, tmp_path):
    frames = [
        run(paths, tmp_path / "rounds", rounds=2),
        compare(
            str(paths[0]),
            ["gate_fisher"],
            [0.2],
            tmp_path / "reselected",
            calibration=prunus.CalibrationOptions(str(paths[1]), samples=6, seq_len=24),
            compensation=CompensationOptions(reselect=True),
            evaluation=prunus.EvaluationOptions(held_out=2),
            progress=False,
        ),
    ]
    assert [len(frame) for frame in frames] == [1 + 6, 1 + 2]
    assert all(frame["perplexity"].notna().all() for frame in frames)


def test_how_many_at_once():
    model = make_model("llama", "gqa", num_hidden_layers=3)
    geometry = Geometry.of(model)
    plans = [Plan.keep_all(geometry)] * 5
    one = bytes_of_a_cut(model, geometry.total_parameters, 1000)
    free = {None: 1, 0: 1, 2 * one: 1, 4 * one: 2, 7 * one: 3, 10**15: 5}
    assert {bound: cuts_at_once(model, plans, 1000, bound) for bound in free} == free
