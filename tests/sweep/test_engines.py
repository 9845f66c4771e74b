"""The two engines take the same statistics."""

from __future__ import annotations

import pytest
import torch
from tiny_families import CASES, case_id, make_model, padded_batches, plan_keeping

from prunus.errors import NonFiniteError, OptionError
from prunus.model.geometry import Geometry
from prunus.statistics import ActivationStatistics, GateGradients, WeightGradients
from prunus.surgery import apply_plan
from prunus.sweep import sweep


def taken(model, engine, *kinds, data=None):
    return sweep(model, data or padded_batches(), [kind() for kind in kinds], engine=engine, progress=False)


def assert_same(first, second):
    assert first.sequences == second.sequences
    if first.loss is not None or second.loss is not None:
        assert first.loss == pytest.approx(second.loss, rel=1e-6)
    for one, other in zip(first.layers, second.layers, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_streamed_equals_resident(case):
    model = make_model(*case, num_hidden_layers=3)
    kinds = (lambda: WeightGradients(squares=True), GateGradients, ActivationStatistics)
    assert_same(taken(model, "resident", *kinds), taken(model, "streamed", *kinds))


def test_streamed_equals_resident_without_a_backward_pass():
    model = make_model("llama", "gqa", num_hidden_layers=3)
    assert_same(taken(model, "resident", ActivationStatistics), taken(model, "streamed", ActivationStatistics))


def test_streamed_equals_resident_on_a_pruned_model_with_missing_blocks():
    model = make_model("llama", "gqa", num_hidden_layers=3)
    kept = [
        {"attention": [], "mlp": [1, 2]},
        {"attention": [0, 2], "mlp": []},
        {"attention": [1], "mlp": [0, 5, 7]},
    ]
    pruned = apply_plan(model, plan_keeping(Geometry.of(model), kept))
    kinds = (lambda: WeightGradients(squares=True), GateGradients)
    assert_same(taken(pruned, "resident", *kinds), taken(pruned, "streamed", *kinds))


def test_streamed_holds_the_gradients_of_one_layer_at_a_time():
    held = []

    class Watched(WeightGradients):
        def on_output_gradient(self, call):
            super().on_output_gradient(call)
            held.append(len(self._gradients))

    model = make_model("llama", "gqa", num_hidden_layers=4)
    taken(model, "streamed", Watched)
    assert max(held) == 1
    held.clear()
    taken(model, "resident", Watched)
    assert max(held) == 4


@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_a_loss_that_is_not_finite_names_the_layer_and_leaves_the_model_as_it_was(engine):
    model = make_model("qwen2", num_hidden_layers=3)
    model.train()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="layer 1 is the first"):
        taken(model, engine, GateGradients)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_an_unknown_engine_is_refused():
    with pytest.raises(OptionError, match="'steamed' is unknown"):
        taken(make_model("llama"), "steamed", GateGradients)
