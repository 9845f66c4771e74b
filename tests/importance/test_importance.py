"""The registry of methods and how they are applied; the formulas themselves are in the conformance suite."""

from __future__ import annotations

import pytest
import torch
from tiny_families import make_model, random_tokens

from prunus.calibration import Batch
from prunus.errors import NonFiniteError, OptionError, StatisticsError
from prunus.importance import METHODS, LayerEvidence, MethodOptions, get_method, score_groups
from prunus.importance.registry import method, statistics_for
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.selection.table import build_table
from prunus.statistics import ActivationStatistics, GateGradients, RoutingStatistics, Statistics, WeightGradients
from prunus.sweep import sweep

DENSE_METHODS = [name for name, found in METHODS.items() if set(AXES) <= set(found.axes)]


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "gqa")


@pytest.fixture(scope="module")
def statistics(model) -> Statistics:
    """What every method needs."""
    batches = [Batch(random_tokens(3, 8), None)]
    return sweep(model, batches, statistics_for(METHODS.values(), MethodOptions()), progress=False)


# --- the registry ---


def test_the_first_methods_are_there():
    assert {"taylor", "taylor_2nd", "wanda", "magnitude", "random"} <= METHODS.keys()
    assert next(iter(METHODS.values())).name in METHODS


@pytest.mark.parametrize("name", METHODS)
def test_methods_describe_themselves(name):
    found = get_method(name)
    assert found.name == name
    assert len(found.summary) > 20
    assert found.summary.endswith(".")
    assert found.needs <= {"gradients", "squares", "activations", "gates", "routing"}
    assert found.importance.__module__ == f"prunus.importance.{name}"


@pytest.mark.parametrize(
    ("wrong", "meant"), [("tayler", "taylor"), ("taylor2", "taylor_2nd"), ("wand", "wanda"), ("Random", "random")]
)
def test_unknown_methods_get_suggestions(wrong, meant):
    with pytest.raises(
        OptionError, match=rf"`method` '{wrong}' is unknown. Did you mean .*{meant}.*Choose one of .*wanda"
    ):
        get_method(wrong)


def test_unknown_methods_without_a_close_name():
    with pytest.raises(OptionError, match=r"`method` 'xyz' is unknown. Choose one of") as raised:
        get_method("xyz")
    assert "Did you mean" not in str(raised.value)


def test_a_method_of_ones_own(model, statistics, monkeypatch):
    """One function with a decorator is all it takes."""
    monkeypatch.setattr("prunus.importance.registry.METHODS", dict(METHODS))

    @method("by_number", needs=["gates"], comparable=False)
    def by_number(layer: LayerEvidence, options: MethodOptions):
        """Groups by their number: the last is the most important.

        More.
        """
        return {axis: torch.arange(layer.geometry.widths[layer.layer_idx][axis]) for axis in AXES}

    found = get_method("by_number")
    assert found.summary == "Groups by their number: the last is the most important."
    assert (found.needs, found.comparable) == (frozenset({"gates"}), False)
    importance = score_groups(model, found, statistics)
    assert importance[1]["mlp"].tolist() == list(range(20))
    assert importance[1]["mlp"].dtype == torch.float64
    assert "by_number" not in METHODS


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hessian": "median"}, "`hessian` 'median' is unknown; choose one of mean_loss"),
        ({"activation": "mode"}, "`activation` 'mode' is unknown; choose one of mean_abs"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(OptionError, match=message):
        MethodOptions(**options)


def kinds(*names: str, **options) -> list[type]:
    return [type(s) for s in statistics_for([METHODS[name] for name in names], MethodOptions(**options))]


def test_each_statistic_is_taken_once():
    assert kinds("magnitude", "random") == []
    assert kinds("taylor") == kinds("taylor", "taylor_2nd") == [WeightGradients]
    assert kinds("wanda", "magnitude") == [ActivationStatistics]
    assert kinds("gate_fisher") == [GateGradients]
    assert kinds(*METHODS) == [WeightGradients, ActivationStatistics, GateGradients, RoutingStatistics]
    (plain,) = statistics_for([METHODS["taylor"]], MethodOptions(hessian="empirical_fisher"))
    assert (plain.squares, plain.loss_scale) == (False, "sum")
    (both,) = statistics_for([METHODS["taylor"], METHODS["taylor_2nd"]], MethodOptions())
    assert (both.squares, both.loss_scale) == (True, "mean")


def test_only_what_needs_a_backward_pass_gets_one(model):
    batches = [Batch(random_tokens(2, 6), None)]
    assert sweep(model, batches, statistics_for([METHODS["wanda"]], MethodOptions()), progress=False).loss is None
    assert sweep(model, batches, statistics_for([METHODS["taylor"]], MethodOptions()), progress=False).loss > 0


# --- statistics that do not fit ---


@pytest.mark.parametrize("name", [name for name in DENSE_METHODS if METHODS[name].needs])
def test_missing_statistics(model, name):
    empty = Statistics(({}, {}), sequences=1)
    for statistics in (None, empty):
        with pytest.raises(StatisticsError, match=rf"layer 0: method '{name}' needs the statistic.*sweep that takes"):
            score_groups(model, METHODS[name], statistics)


def test_second_order_without_squares(model):
    first = sweep(model, [Batch(random_tokens(), None)], [WeightGradients()], progress=False)
    with pytest.raises(StatisticsError, match=r"'taylor_2nd' needs the statistic 'second_order\.attention'.*squares"):
        score_groups(model, METHODS["taylor_2nd"], first)


def test_statistics_of_another_depth(model, statistics):
    with pytest.raises(StatisticsError, match="of 1 layers, the model has 2"):
        score_groups(model, METHODS["taylor"], Statistics(statistics.layers[:1], 3))


@pytest.mark.parametrize("name", [name for name in DENSE_METHODS if METHODS[name].needs])
def test_statistics_of_another_width(statistics, name):
    other = make_model("llama", "gqa", intermediate_size=21)
    with pytest.raises(StatisticsError, match=r"layer 0.*of another model"):
        score_groups(other, METHODS[name], statistics)


@pytest.mark.parametrize("name", DENSE_METHODS)
def test_statistics_from_a_file(model, statistics, tmp_path, name):
    statistics.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    for a, b in zip(
        score_groups(model, METHODS[name], statistics), score_groups(model, METHODS[name], again), strict=True
    ):
        assert all(torch.equal(a[axis], b[axis]) for axis in AXES)


def test_weights_that_are_not_finite(statistics):
    """Without a loss to look at, the table names the layer."""
    model = make_model("llama", "gqa")
    model.model.layers[1].mlp.up_proj.weight.data[3, 0] = float("nan")
    for name in ("magnitude", "wanda"):
        importance = score_groups(model, METHODS[name], statistics)
        with pytest.raises(NonFiniteError, match="layer 1, mlp: 1 of 20"):
            build_table(Geometry.of(model), importance)


# --- the control ---


def test_random_seeds(model):
    def draw(seed: int, other=model):
        return score_groups(other, METHODS["random"], None, MethodOptions(random_seed=seed))

    assert all(torch.equal(a["mlp"], b["mlp"]) for a, b in zip(draw(3), draw(3), strict=True))
    values = torch.stack([layer["mlp"] for seed in range(4) for layer in draw(seed)])
    assert len(values.unique()) == values.numel(), "no two seeds or layers draw the same"
    deeper = draw(3, make_model("llama", "gqa", num_hidden_layers=4))
    assert torch.equal(deeper[1]["attention"], draw(3)[1]["attention"]), "a layer's numbers are its own"
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    draw(5)
    assert torch.equal(torch.random.get_rng_state(), state), "the program's own randomness is left alone"


@pytest.mark.parametrize("seed", [-1, 2**31, 2**63 - 1])
def test_any_seed_will_do(model, seed):
    assert score_groups(model, METHODS["random"], None, MethodOptions(random_seed=seed))[0]["mlp"].shape == (20,)
