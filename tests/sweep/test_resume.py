"""A run that was killed goes on from its last finished layer, with the same bits."""

from __future__ import annotations

import os
import random
import signal
import time
import weakref

import pytest
import torch
from forked import Forked, forked
from test_opened import cut, save
from tiny_families import make_model, padded_batches, random_tokens

from prunus.calibration import Batch
from prunus.checkpoint import open_model
from prunus.errors import StatisticsError
from prunus.files.records import Records
from prunus.model.geometry import Geometry
from prunus.model.layers import layers_of
from prunus.repair.block_repair import RepairOptions, repair_
from prunus.repair.least_squares import solve_ridge_
from prunus.statistics import ActivationStatistics, GateGradients, WeightGradients
from prunus.surgery import apply_plan
from prunus.sweep import sweep

LAYERS = 5
KINDS = {
    "backward": lambda: [WeightGradients(squares=True), GateGradients(), ActivationStatistics()],
    "sampled": lambda: [WeightGradients(), GateGradients(labels="sampled")],
    "forward": lambda: [ActivationStatistics()],
}


def as_batches(seed: int, size: int) -> list[Batch]:
    return [Batch(ids, None) for ids in random_tokens(5, 14, seed=seed).split(size)]


class Killed(BaseException):
    """Not an error that anything handles."""


@pytest.fixture(scope="module")
def model():
    return make_model("qwen2", num_hidden_layers=LAYERS)


def run(model, kind, work, **options):
    return sweep(model, padded_batches(), KINDS[kind](), engine="streamed", work=work, progress=False, **options)


def assert_same_bits(one, other):
    assert one.loss == other.loss
    for first, second in zip(one.layers, other.layers, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_between_any_two_layers(model, kind, tmp_path, monkeypatch):
    expected = run(model, kind, None)
    ran = []
    for statistic in (ActivationStatistics, GateGradients):
        monkeypatch.setattr(statistic, "finish_layer", _spied(statistic.finish_layer, ran, lambda: left))
    passes = 2 * LAYERS if kind == "backward" else LAYERS
    for left in range(1, passes + 1):
        ran.clear()
        with pytest.raises(Killed):
            run(model, kind, tmp_path / str(left))
        ran.clear()
        left, before = 10**9, left
        assert_same_bits(run(model, kind, tmp_path / str(before)), expected)
        finished = (before - 1) // (2 if kind == "backward" else 1)
        assert len(ran) == passes - finished * (2 if kind == "backward" else 1), "what is finished is not done again"
        assert not list((tmp_path / str(before)).glob("*/process-*")), "nothing that waited is left"


def _spied(whole, ran, left):
    def finish_layer(self, geometry, layer_idx, layer, sequences):
        ran.append(layer_idx)
        if len(ran) == left():
            raise Killed
        return whole(self, geometry, layer_idx, layer, sequences)

    return finish_layer


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: {"model": make_model("qwen2", num_hidden_layers=LAYERS, seed=1)}, "model"),
        (lambda model: {"data": as_batches(seed=9, size=3)}, "calibration tokens"),
        (lambda model: {"data": as_batches(seed=1, size=1)}, "sequences per batch"),
        (lambda model: {"statistics": [ActivationStatistics(), GateGradients()]}, "statistics"),
        (lambda model: {"statistics": [WeightGradients(loss_scale="sum")]}, "statistics"),
        (lambda model: {"seed": 7}, "seed"),
    ],
)
def test_a_folder_of_other_inputs_is_refused_and_says_what_differs(model, change, named, tmp_path):
    run(model, "sampled", tmp_path)
    other = {"model": model, "data": padded_batches(), "statistics": KINDS["sampled"](), "seed": 0} | change(model)
    with pytest.raises(StatisticsError, match=rf"other inputs: .*{named} \(.* there, .* now\)"):
        sweep(
            other["model"],
            other["data"],
            other["statistics"],
            engine="streamed",
            seed=other["seed"],
            work=tmp_path,
            progress=False,
        )


def test_one_changed_weight_is_another_model(model, tmp_path):
    run(model, "forward", tmp_path)
    changed = make_model("qwen2", num_hidden_layers=LAYERS)
    changed.model.layers[3].mlp.up_proj.weight.data[7, 11] += 1
    with pytest.raises(StatisticsError, match="model"):
        run(changed, "forward", tmp_path)


@pytest.mark.parametrize("opened", [False, True], ids=["in memory", "opened"])
def test_repair_goes_on_after_the_last_repaired_layer(model, opened, tmp_path, monkeypatch):
    folder = save(model, tmp_path / "model")
    plan = cut(Geometry.of(model))
    data = [Batch(ids, None) for ids in random_tokens(batch=8, seq_len=16).split(4)]

    def repaired(work=None, options=None):
        dense = open_model(folder)[0] if opened else model
        smaller = apply_plan(dense, plan)
        repairs = repair_(smaller, dense, plan, data, options, work=work, progress=False)
        return repairs, {name: t for name, t in _state(smaller).items() if name.endswith("_proj.weight")}

    repairs, weights = repaired()
    whole, solved = solve_ridge_, []

    waiting = set()

    def spied(*args):
        solved.append(1)
        waiting.update(path.parent.name for path in tmp_path.glob("work/waiting/*/*.safetensors"))
        if len(solved) == 4:
            raise Killed
        return whole(*args)

    monkeypatch.setattr("prunus.repair.block_repair.solve_ridge_", spied)
    with pytest.raises(Killed):
        repaired(tmp_path / "work")
    again, same = repaired(tmp_path / "work")
    assert again == repairs
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    assert waiting == ({"dense", "hidden", "inputs"} if opened else set()), "only an opened model's wait on disk"
    assert not (tmp_path / "work" / "waiting").exists()
    # Layer 0 has one block, layer 1 none, layer 2 two: three were solved, and a fourth begun.
    assert len(solved) == 4 + len(repairs) - 3
    with pytest.raises(StatisticsError, match="repair"):
        repaired(tmp_path / "work", RepairOptions(damping=0.5))


def test_records_on_disk_are_not_held_in_memory_too(tmp_path):
    """Weights of all repaired layers together would be as large as the model."""
    records, tensor = Records(tmp_path, {}), torch.arange(5.0)
    held = weakref.ref(tensor)
    records.put(3, {"weight": tensor}, {"loss": 0.1 + 0.2})
    del tensor
    assert held() is None
    for found in (records, Records(tmp_path, {})):
        assert found[3]["weight"].tolist() == [0, 1, 2, 3, 4]
        assert found.about(3) == {"loss": 0.1 + 0.2}
        assert (len(found), 3 in found, 2 in found) == (1, True, False)


def _state(model):
    layers = layers_of(model)
    state = {}
    for layer_idx in range(len(layers)):
        with layers.hold(layer_idx) as layer:
            state |= {f"{layer_idx}.{name}": tensor.clone() for name, tensor in layer.state_dict().items()}
    return state


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_kill_9_at_random_points(tmp_path):
    """Killed again and again, until a run gets through; the file that it writes is the same, byte for byte."""
    folder = save(make_model("llama", num_hidden_layers=8), tmp_path / "model")
    kinds = [WeightGradients(squares=True), GateGradients()]

    def score(work, out):
        model, _ = open_model(folder)
        found = sweep(model, padded_batches() * 6, kinds, engine="streamed", work=tmp_path / work, progress=False)
        found.save(tmp_path / out)

    begun = time.perf_counter()
    assert forked(lambda: score("undisturbed", "expected")).status == 0
    seconds = time.perf_counter() - begun
    generator, kills = random.Random(4), 0
    for _ in range(3):
        process = Forked(lambda: score("work", "found"))
        time.sleep(generator.uniform(0.1, 0.5) * seconds)
        process.kill()
        kills += process.wait().status == -signal.SIGKILL
    assert forked(lambda: score("work", "found")).status == 0
    assert kills, "it was never killed"
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
