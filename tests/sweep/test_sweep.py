"""A sweep leaves the model as it found it, whatever happens, and says what went wrong where."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tiny_families import make_model, random_tokens
from torch import nn
from torch.nn import functional

from prunus.calibration import Batch
from prunus.errors import CalibrationError, NonFiniteError, OptionError, UnsupportedModelError
from prunus.model.families import AXES
from prunus.statistics import ActivationStatistics, GateGradients, WeightGradients
from prunus.sweep import ENGINES, sweep


class Failing(WeightGradients):
    """Raises in the middle of a layer: in the forward or in the backward pass."""

    def __init__(self, where: str, error: type[BaseException] = RuntimeError):
        super().__init__()
        self.where, self.error = where, error

    def listens(self, moment, geometry, part):
        return moment == "input" or super().listens(moment, geometry, part)

    def on_input(self, call):
        if (self.where, call.layer_idx, call.projection.name) == ("forward", 1, "up_proj"):
            raise self.error("stop")

    def on_output_gradient(self, call):
        if (self.where, call.layer_idx, call.projection.name) == ("backward", 0, "v_proj"):
            raise self.error("stop")
        super().on_output_gradient(call)

    def finish_layer(self, *args):
        if self.where == "finish":
            raise self.error("stop")
        return super().finish_layer(*args)


@pytest.fixture
def model():
    """Some parts in training mode, some weights frozen, with dropout: nothing of it may change or matter."""
    model = make_model("llama", "gqa", attention_dropout=0.5)
    model.model.layers[1].train()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    return model


@pytest.fixture
def batches() -> list[Batch]:
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return [Batch(random_tokens(2, 7), mask), Batch(random_tokens(1, 9), None)]


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    return request.param


def picture(model) -> dict:
    """All that must stay."""
    return {
        "weights": copy.deepcopy(model.state_dict()),
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        },
        "own attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "config": model.config.to_dict(),
    }


def assert_unchanged(model, before: dict) -> None:
    after = picture(model)
    assert all(torch.equal(tensor, before["weights"][name]) for name, tensor in after["weights"].items())
    for name, gradient in after["gradients"].items():
        expected = before["gradients"][name]
        assert (gradient is None) == (expected is None), f"{name} got or lost a gradient"
        assert expected is None or torch.equal(gradient, expected)
    for part in ("requires_grad", "modes", "hooks", "own attributes", "config"):
        assert after[part] == before[part], part


# --- as it was found ---


@pytest.mark.parametrize("statistic", [WeightGradients, ActivationStatistics, GateGradients])
def test_the_model_is_left_as_it_was(model, batches, engine, statistic):
    before = picture(model)
    sweep(model, batches, [statistic()], engine=engine, progress=False)
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward", "finish"])
def test_also_after_an_exception(model, batches, engine, where, error):
    before = picture(model)
    with pytest.raises(error, match="stop"):
        sweep(model, batches, [Failing(where, error)], engine=engine, progress=False)
    assert_unchanged(model, before)
    model.eval()
    with torch.no_grad():
        model(random_tokens())  # nobody listens any more


def test_also_when_a_layer_fails(model, batches, engine):
    def fail(*args):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    before = picture(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        sweep(model, batches, [WeightGradients()], engine=engine, progress=False)
    assert_unchanged(model, before)
    handle.remove()


def test_forwards_that_others_wrapped_stay_wrapped(model, batches, engine):
    """As accelerate does it, to move a layer's inputs to its device."""
    calls = []
    layer = model.model.layers[0]
    original = layer.forward

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = wrapped
    sweep(model, batches, [WeightGradients()], engine=engine, progress=False)
    assert layer.forward is wrapped
    assert len(calls) >= len(batches)


def test_dropout_and_mode_do_not_matter(model, batches, engine):
    twice = [sweep(model, batches, [WeightGradients(squares=True)], engine=engine, progress=False) for _ in range(2)]
    calm = sweep(make_model("llama", "gqa"), batches, [WeightGradients(squares=True)], engine=engine, progress=False)
    for layers in zip(*(statistics.layers for statistics in (*twice, calm)), strict=True):
        for name, value in layers[0].items():
            assert all(torch.equal(value, other[name]) for other in layers[1:])


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_where_gradients_are_switched_off(model, batches, engine, context):
    """Callers may have them off: evaluation scripts do."""
    with context():
        statistics = sweep(model, batches, [WeightGradients()], engine=engine, progress=False)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
    assert float(statistics.layers[0]["first_order.mlp"].sum()) > 0


def test_frozen_models_have_gradients_too(model, batches, engine):
    expected = sweep(model, batches, [WeightGradients()], engine=engine, progress=False).layers
    model.requires_grad_(False)
    found = sweep(model, batches, [WeightGradients()], engine=engine, progress=False).layers
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(a[f"first_order.{axis}"], b[f"first_order.{axis}"]) for axis in AXES)


def test_gradient_checkpointing_does_no_harm(model, batches, engine):
    expected = sweep(model, batches, [WeightGradients()], engine=engine, progress=False).layers
    model.gradient_checkpointing_enable()
    model.train()
    found = sweep(model, batches, [WeightGradients()], engine=engine, progress=False).layers
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(a[f"first_order.{axis}"], b[f"first_order.{axis}"]) for axis in AXES)


# --- what it reports ---


def test_loss_and_counts(model, batches, engine):
    """The loss is per token over all sequences, not the mean of batch means."""
    model.eval()
    statistics = sweep(model, batches, [GateGradients()], engine=engine, provenance={"seed": 1}, progress=False)
    rows = [batches[0].input_ids[0], batches[0].input_ids[1, :4], batches[1].input_ids[0]]
    with torch.no_grad():
        losses = [functional.cross_entropy(model(r[None, :-1]).logits[0], r[1:], reduction="sum") for r in rows]
    assert statistics.loss == pytest.approx(float(sum(losses)) / (6 + 3 + 8), rel=1e-5)
    assert statistics.sequences == 3
    assert dict(statistics.provenance) == {"seed": 1}
    assert len(statistics.layers) == 2


def test_long_sequences_go_through_the_head_in_chunks(engine):
    """More positions than one chunk of the loss holds, in a batch; the gradient must not know."""
    model = make_model("llama", "gqa", max_position_embeddings=1024)
    ids = random_tokens(2, 600, seed=8)
    statistics = sweep(model, [Batch(ids, None)], [WeightGradients()], engine=engine, progress=False)
    model.zero_grad()
    loss = functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert statistics.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    mlp = model.model.layers[0].mlp
    rows = sum((p.weight * p.weight.grad).abs().sum(dim=1) for p in (mlp.gate_proj, mlp.up_proj))
    expected = (rows + (mlp.down_proj.weight * mlp.down_proj.weight.grad).abs().sum(dim=0)).detach().double()
    torch.testing.assert_close(statistics.layers[0]["first_order.mlp"], expected, rtol=1e-3, atol=1e-8)


# --- what goes wrong ---


def test_a_layer_that_answers_nan_is_named(model, batches, engine):
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    before = picture(model)
    with pytest.raises(NonFiniteError, match=r"calibration sequence 0 is nan: layer 1 is the first.*bf16"):
        sweep(model, batches, [WeightGradients()], engine=engine, progress=False)
    after = picture(model)
    for part in ("requires_grad", "modes", "hooks", "own attributes"):
        assert after[part] == before[part], part


def test_infinite_activations_are_found_where_they_begin(model, batches, engine):
    model.model.layers[0].mlp.up_proj.weight.data *= 1e30
    model.model.layers[0].mlp.gate_proj.weight.data *= 1e30
    with pytest.raises(NonFiniteError, match="layer 0 is the first whose output is not finite"):
        sweep(model, batches, [WeightGradients()], engine=engine, progress=False)


def test_the_head_is_named(model, batches, engine):
    model.lm_head.weight.data[5] = float("inf")
    with pytest.raises(NonFiniteError, match=r"logits are not finite"):
        sweep(model, batches, [WeightGradients()], engine=engine, progress=False)


def test_the_sequence_is_named(model, engine):
    """Only the third sequence contains the token whose embedding is broken."""
    ids = random_tokens(4, 6, seed=3).clamp(min=4)
    ids[2, 1] = 3
    model.model.embed_tokens.weight.data[3] = float("nan")
    batches = [Batch(part, None) for part in ids.split(2)]
    with pytest.raises(NonFiniteError, match="calibration sequence 2 is nan"):
        sweep(model, batches, [WeightGradients()], engine=engine, progress=False)


def test_no_batches(model, engine):
    with pytest.raises(CalibrationError, match="no calibration batches"):
        sweep(model, [], [WeightGradients()], engine=engine)


@pytest.mark.parametrize(
    "mask", [[[1, 1, 1], [1, 0, 0]], [[1, 1, 1], [0, 0, 0]], [[1, 1, 1], [1, 0, 1]]], ids=["one", "none", "apart"]
)
def test_a_sequence_with_nothing_to_predict(model, engine, mask):
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    batches = [Batch(random_tokens(3, 5), None), Batch(random_tokens(2, 3), torch.tensor(mask))]
    with pytest.raises(CalibrationError, match="calibration sequence 4 has no token to predict"):
        sweep(model, batches, [ActivationStatistics()], engine=engine, progress=False)
    assert not calls, "before any work"
    handle.remove()


def test_sequences_of_one_token(model, engine):
    with pytest.raises(CalibrationError, match="calibration sequence 0 has no token to predict"):
        sweep(model, [Batch(random_tokens(2, 1), None)], [WeightGradients()], engine=engine, progress=False)


def test_unknown_engine(model, batches):
    with pytest.raises(OptionError, match="`engine` 'warp' is unknown; choose one of resident, streamed"):
        sweep(model, batches, [WeightGradients()], engine="warp")  # type: ignore[arg-type]


def test_models_that_are_not_described(model, batches, engine):
    model.model.layers[0].mlp.adapter = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"'mlp\.adapter'"):
        sweep(model, batches, [WeightGradients()], engine=engine, progress=False)


def test_no_bar_without_a_terminal(model, batches, engine, capfd):
    sweep(model, batches, [WeightGradients()], engine=engine)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
