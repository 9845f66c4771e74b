"""The latency table: curves against slow oracles, files that are refused, and a real measurement."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries, profiles, seconds
from tiny_families import ONE_UNLIKE, case_id, logits, make_model, random_tokens

from prunus.errors import OptionError, PlanError
from prunus.evaluation.profiling import _marked, profile, widths_to_measure
from prunus.evaluation.speed_options import SpeedOptions
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.selection.latency_profile import PHASES, LatencyProfile, PhaseTimes, never_falling


@given(values=st.lists(seconds, min_size=1, max_size=9))
def test_never_falling_is_the_nearest_such_sequence(values):
    """The isotonic regression by its max-min formula, in every interval."""
    n = len(values)
    expected = [max(min(np.mean(values[a : b + 1]) for b in range(i, n)) for a in range(i + 1)) for i in range(n)]
    assert never_falling(values) == pytest.approx(expected, abs=1e-12)


@given(data=st.data())
def test_a_models_time_is_the_sum_of_its_blocks(data):
    geometry = data.draw(geometries())
    table = data.draw(profiles(geometry))
    phase = data.draw(st.sampled_from(["prefill", "decode"]))
    kept = tuple(
        type(widths)(*(data.draw(st.integers(0, widths[axis])) for axis in AXES)) for widths in geometry.widths
    )
    costs = table.costs(geometry, phase)
    total = table.times(phase).fixed
    for layer in kept:
        for axis in AXES:
            points = [(0, 0.0), *table.times(phase).points(axis)]
            heights = never_falling([height for _, height in points])
            for (left, _), low, (right, _), high in zip(points, heights, points[1:], heights[1:], strict=False):
                if left < layer[axis] <= right:
                    total += low + (high - low) * (layer[axis] - left) / (right - left)
    assert costs.left(kept) == pytest.approx(1e6 * total)
    for layer, prices, widths in zip(costs.blocks, costs.group, geometry.widths, strict=True):
        for axis in AXES:
            assert layer[axis][0] == 0
            assert (np.diff(layer[axis]) >= 0).all()
            assert prices[axis] * widths[axis] == pytest.approx(layer[axis][-1])


@given(data=st.data())
def test_a_file_gives_the_profile_back(data, tmp_path_factory):
    table = data.draw(profiles(data.draw(geometries())))
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    table.save(path)
    assert LatencyProfile.load(path) == table
    assert LatencyProfile.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two layers whose MLP is wide."""
    path = tmp_path_factory.mktemp("models") / "wide"
    make_model("llama", "gqa", hidden_size=96, intermediate_size=8192).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def table(folder):
    return profile(str(folder), SpeedOptions(prompt_tokens=32, new_tokens=8, repeats=3), progress=False)


def test_wide_blocks_are_measured_to_take_longer(table):
    for phase in ("prefill", "decode"):
        times = table.times(phase)
        assert [width for width, _ in times.attention] == [1, 2, 3]
        assert [width for width, _ in times.mlp] == widths_to_measure("mlp", 8192)
        mlp = dict(times.mlp)
        # 8192 channels of 96 are 2.4 million multiplications per token, one channel almost none.
        assert mlp[8192] > 2 * mlp[1] > 0
        assert times.fixed > 0
    assert table.prefill.seconds("mlp", 8192)[-1] > 2 * table.decode.seconds("mlp", 8192)[-1], "32 tokens against one"
    assert (table.model, table.dtype, table.threads) == ("wide", "float32", torch.get_num_threads())


#: channels that a single token takes longer for than calling the modules does
WIDE = 32768


@pytest.mark.parametrize("case", [case for case in ONE_UNLIKE if case[0] in ("llama", "olmo2", "gemma2")], ids=case_id)
def test_each_block_gets_its_own_time(case, tmp_path):
    """A wide MLP beside a narrow attention, with norms before, behind and around: the time is the MLP's, all of it."""
    make_model(*case, intermediate_size=WIDE, num_hidden_layers=1).save_pretrained(tmp_path / "wide")
    runs = SpeedOptions(prompt_tokens=32, new_tokens=3, repeats=2, warm_up=1)
    table = profile(str(tmp_path / "wide"), runs, progress=False)
    geometry = Geometry.of(make_model(*case, intermediate_size=WIDE, num_hidden_layers=1))
    for phase, times in (("prefill", 3), ("decode", 1.2)):
        costs = table.costs(geometry, phase)
        assert costs.fixed > 0
        attention, mlp = (float(costs.blocks[0][axis][-1]) for axis in AXES)
        # One token through 32768 channels of 48 is five million multiplications, attention's are thirty thousand.
        assert mlp > times * attention > 0, (phase, mlp, attention)


@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_the_marks_stand_where_the_blocks_begin(case):
    """The order of a pass, noted by hooks of the test's own on the blocks: one mark between attention and MLP."""
    model, passed = make_model(*case), []
    family = Geometry.of(model).family
    with _marked(model, lambda *_: passed.append("mark")):
        for layer in model.model.layers:
            for block in family.blocks:
                for projection in block.projections:
                    module = layer.get_submodule(projection.path)
                    module.register_forward_hook(lambda *_, axis=block.axis: passed.append(axis))
                # A norm belongs to the block that it serves.
                for norm in block.norms:
                    layer.get_submodule(norm).register_forward_hook(lambda *_, axis=block.axis: passed.append(axis))
        logits(model, random_tokens(1, 4))
    without_repeats = [a for a, b in zip(passed, [None, *passed], strict=False) if a != b or a == "mark"]
    layers = ["mark", "attention", "mark", "mlp"] * 2
    assert without_repeats == ["mark", *layers, "mark", "mark"]


def test_widths_that_are_measured():
    assert widths_to_measure("attention", 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert widths_to_measure("attention", 32) == [1, 4, 8, 12, 16, 20, 24, 28, 32]
    assert widths_to_measure("mlp", 1536) == [
        *(1, 192, 383, 384, 576, 767, 768, 960, 1151, 1152, 1344, 1535, 1536),
    ]
    assert widths_to_measure("mlp", 1) == [1]
    assert widths_to_measure("mlp", 0) == []


def test_profiles_of_other_models_are_refused(table):
    for change, message in (
        ({"hidden_size": 48}, "with hidden_size 96, the model has 48: run `prunus profile`"),
        ({"vocab_size": 50}, "with vocab_size 96, the model has 50"),
        (
            {"intermediate_size": 8193},
            "prefill times of wide with at most 8192 mlp groups, layer 0 of",
        ),
    ):
        other = Geometry.of(make_model("llama", "gqa", **{"hidden_size": 96, "intermediate_size": 8192, **change}))
        with pytest.raises(PlanError, match=message):
            table.costs(other, "decode")
    deeper = Geometry.of(make_model("llama", "gqa", hidden_size=96, intermediate_size=1000, num_hidden_layers=5))
    assert table.costs(deeper, "decode").total > 0


#: of a malformed profile
SHAPE = {"model_type": "llama", "head_dim": 8, "num_key_value_groups": 2, "vocab_size": 96}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("axis", AXES)
def test_every_phase_reaches_up_to_the_width_of_the_model(table, phase, axis):
    """A table that ends below would be read on at its last height: cutting down to there would save nothing."""
    geometry = Geometry.of(make_model("llama", "gqa", hidden_size=96, intermediate_size=8192))
    times = table.times(phase)
    for fewer in (times.points(axis)[:-1], ()):
        short = replace(table, **{phase: replace(times, **{axis: fewer})})
        widest = max((width for width, _ in fewer), default=0)
        for asked in PHASES:
            with pytest.raises(PlanError, match=f"has {phase} times of wide with at most {widest} {axis} groups"):
                short.costs(geometry, asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fixed": -1.0}, "a time is -1.0"),
        ({"fixed": float("nan")}, "a time is nan"),
        ({"mlp": ((10.9, 1.0),)}, "widths of mlp are"),
        ({"mlp": ((2, 1.0), (2, 1.0))}, r"widths of mlp are \[2, 2\]"),
        ({"attention": ((1, float("inf")),)}, "a time is inf"),
    ],
)
def test_times_that_a_caller_makes_up(changes, message):
    with pytest.raises(PlanError, match=message):
        PhaseTimes(**{"fixed": 1.0, "attention": ((1, 0.1),), "mlp": ((1, 1.0),), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "prunus-plan"}, "the field 'format' must be 'prunus-profile'"),
        ({"version": 2}, "profile version 2 is not 1"),
        ({"shape": {}}, r"shape.model_type is missing \(4 more faults\)"),
        ({"decode": {"fixed": 1.0, "attention": [[1, 0.1]], "mlp": []}}, "decode.mlp is an array of 0"),
        ({"decode": {"fixed": 1.0, "attention": [[2, 0.1], [1, 0.1]], "mlp": [[1, 1.0]]}}, r"\[2, 1\], which must"),
        (
            {"decode": {"fixed": 1.0, "attention": [[1, -0.1]], "mlp": [[1, 1.0]]}},
            "attention.0.1 is -0.1; it must be gr",
        ),
        (
            {"decode": {"fixed": float("nan"), "attention": [[1, 0.1]], "mlp": [[1, 1.0]]}},
            "decode.fixed is NaN; it must be a finite",
        ),
        ({"threads": -1}, "threads is -1; it must be greater than or equal to 1"),
        (
            {"decode": {"fixed": 1.0, "attention": [[10.9, 0.1]], "mlp": [[1, 1.0]]}},
            "attention.0.0 is 10.9; it must be a",
        ),
        (
            {"decode": {"fixed": 1.0, "attention": [["1", 0.1]], "mlp": [[1, 1.0]]}},
            'attention.0.0 is "1"; it must be a',
        ),
        ({"decode": {"fixed": 0, "attention": [[1, 0.0]], "mlp": [[1, 0]]}}, "its times are all 0"),
        ({"decode": [1]}, "decode is an array of 1; it must be an object"),
    ],
)
def test_malformed_profiles(table, changes, message):
    with pytest.raises(PlanError, match=message):
        LatencyProfile.from_dict({**table.to_dict(), **changes})


def test_files_that_are_no_profiles(tmp_path):
    with pytest.raises(PlanError, match=r"the latency profile .*none\.json cannot be read: No such file"):
        LatencyProfile.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("text")
    with pytest.raises(PlanError, match="is not JSON"):
        LatencyProfile.load(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(PlanError, match="does not hold a JSON object, but a JSON array"):
        LatencyProfile.load(tmp_path / "list.json")


def test_a_prompt_beyond_the_context_is_refused(folder):
    with pytest.raises(OptionError, match="make 72 tokens, more than the context of wide, 64"):
        profile(str(folder), SpeedOptions(prompt_tokens=64, new_tokens=8), progress=False)


def test_a_busy_machine_is_said_to_be_one(folder, caplog, monkeypatch):
    """The thread that waits: its clock stands still."""
    monkeypatch.setattr("time.thread_time", lambda: 0.0)
    profile(str(folder), SpeedOptions(prompt_tokens=8, new_tokens=2, repeats=1, warm_up=0), progress=False)
    assert any("got only 0 % of the processor" in message for message in caplog.messages)
