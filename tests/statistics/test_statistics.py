"""What is accumulated on the way: moments, gradients, gates; and statistics on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_families import make_model, random_tokens
from torch.nn import functional

from prunus.calibration import Batch
from prunus.errors import OptionError, StatisticsError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.statistics import ActivationStatistics, GateGradients, Statistics, WeightGradients
from prunus.statistics.activations import ACTIVATION_STATISTICS, read_activations
from prunus.sweep import sweep

CLOSE = {"rtol": 1e-4, "atol": 1e-8}


@pytest.fixture(scope="module")
def model():
    """Two layers with biases everywhere; shared."""
    return make_model("llama", "gqa-biases")


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Five sequences of 3 to 10 tokens in batches of 2, 1 and 2, filled up with tokens that do not count."""
    result = []
    for number, lengths in enumerate([(10, 3), (6,), (4, 9)]):
        ids = random_tokens(len(lengths), max(lengths), seed=50 + number)
        mask = torch.stack([(torch.arange(max(lengths)) < length).long() for length in lengths])
        result.append(Batch(ids, mask if len(lengths) > 1 else None))
    return result


def sequences(batches: list[Batch]) -> list[torch.Tensor]:
    return [
        ids if batch.attention_mask is None else ids[batch.attention_mask[i].bool()]
        for batch in batches
        for i, ids in enumerate(batch.input_ids)
    ]


def take(model, batches, *statistics) -> Statistics:
    return sweep(model, batches, statistics, progress=False)


# --- activations ---


def test_moments(model, batches):
    """Sums over tokens, one token at a time in numpy."""
    seen: dict[tuple[int, str], list[np.ndarray]] = {}
    handles = [
        layer.get_submodule(f"{block}.{name}").register_forward_pre_hook(
            lambda _, args, key=(i, name): seen.setdefault(key, []).extend(args[0][0].double().numpy())
        )
        for i, layer in enumerate(model.model.layers)
        for block, names in (("self_attn", ("q_proj", "v_proj", "o_proj")), ("mlp", ("up_proj", "down_proj")))
        for name in names
    ]
    with torch.no_grad():
        for row in sequences(batches):
            model(row[None])
    for handle in handles:
        handle.remove()
    layers = take(model, batches, ActivationStatistics()).layers
    assert len(seen) == 10
    for (layer_idx, projection), tokens in seen.items():
        assert len(tokens) == 10 + 3 + 6 + 4 + 9
        total, total_abs, square, largest = (np.zeros(len(tokens[0])) for _ in range(4))
        for token in tokens:
            total += token
            total_abs += abs(token)
            square += token**2
            largest = np.maximum(largest, abs(token))
        expected = {"sum": total, "abs_sum": total_abs, "square": square, "max": largest, "tokens": [len(tokens)]}
        for name, value in expected.items():
            actual = layers[layer_idx][f"activations.{projection}.{name}"]
            assert actual.dtype == torch.float64
            np.testing.assert_allclose(actual.numpy(), value, rtol=1e-4, atol=1e-4, err_msg=f"{projection} {name}")
        numbers = {name: layers[layer_idx][f"activations.{projection}.{name}"] for name in expected}
        array = np.array(tokens)
        of_tokens = {
            "mean_abs": abs(array).mean(0),
            "l1": abs(array).sum(0),
            "l2": np.linalg.norm(array, axis=0),
            "mean": array.mean(0),
            "max": abs(array).max(0),
            "std": array.std(0),
        }
        assert set(of_tokens) == set(ACTIVATION_STATISTICS)
        named = {f"activations.p.{name}": value for name, value in numbers.items()}
        for statistic, value in of_tokens.items():
            np.testing.assert_allclose(read_activations(named, "p", statistic).numpy(), value, rtol=1e-3, atol=1e-4)


def test_projections_with_one_input_report_it_alike(model, batches):
    layer = take(model, batches, ActivationStatistics()).layers[1]
    for name in ("sum", "abs_sum", "square", "max", "tokens"):
        q, k, v = (layer[f"activations.{p}.{name}"] for p in ("q_proj", "k_proj", "v_proj"))
        assert torch.equal(q, k)
        assert torch.equal(q, v)
        assert torch.equal(layer[f"activations.gate_proj.{name}"], layer[f"activations.up_proj.{name}"])
    assert not torch.equal(layer["activations.q_proj.sum"], layer["activations.gate_proj.sum"])
    assert read_activations(layer, "o_proj").shape == (48,)
    assert read_activations(layer, "down_proj").shape == (20,)


def test_a_constant_input_has_no_deviation():
    """Rounding must not make a variance negative, whose root is no number."""
    x = 0.1
    moments = {"sum": 3 * x, "abs_sum": 3 * x, "square": 3 * x * x * (1 - 1e-15), "max": x, "tokens": 3}
    named = {f"activations.p.{name}": torch.tensor([value], dtype=torch.float64) for name, value in moments.items()}
    assert float(read_activations(named, "p", "std")) == pytest.approx(0, abs=1e-6)


# --- gradients ---


def gradients_by_hand(model, batches, scale: str) -> list[dict[str, torch.Tensor]]:
    """Of every sequence by itself, by autograd."""
    result = []
    for row in sequences(batches):
        loss = functional.cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction=scale)
        parameters = dict(model.named_parameters())
        result.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
    return result


def of_layer(model, layer_idx: int, values) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer_idx}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


@pytest.mark.parametrize("scale", ["mean", "sum"])
@pytest.mark.parametrize("squares", [False, True])
def test_weight_gradients(model, batches, scale, squares):
    gradients = gradients_by_hand(model, batches, scale)
    geometry = Geometry.of(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    first = {n: (w * sum(g[n] for g in gradients) / len(gradients)).abs() for n, w in weights.items()}
    second = {n: w**2 * sum(g[n] ** 2 for g in gradients) / len(gradients) for n, w in weights.items()}
    statistics = take(model, batches, WeightGradients(squares=squares, loss_scale=scale))
    assert statistics.sequences == 5
    for layer_idx, layer in enumerate(statistics.layers):
        assert set(layer) == set(WeightGradients(squares=squares, loss_scale=scale).keys)
        for axis in AXES:
            expected = geometry.sum_to_groups(layer_idx, axis, of_layer(model, layer_idx, first))
            torch.testing.assert_close(layer[f"first_order.{axis}"], expected, **CLOSE)
            if squares:
                expected = geometry.sum_to_groups(layer_idx, axis, of_layer(model, layer_idx, second))
                torch.testing.assert_close(layer[f"second_order.{axis}"], expected, **CLOSE)


def test_the_mean_gradient_is_not_the_mean_of_magnitudes(model, batches):
    """Two sequences whose gradients cancel leave nothing of the first order, and all of the second."""
    both = take(model, batches, WeightGradients(squares=True)).layers[0]
    singles = [
        take(model, [Batch(row[None], None)], WeightGradients(squares=True)).layers[0] for row in sequences(batches)
    ]
    for axis in AXES:
        mean = sum(layer[f"first_order.{axis}"] for layer in singles) / 5
        assert (both[f"first_order.{axis}"] < mean).all()
        mean = sum(layer[f"second_order.{axis}"] for layer in singles) / 5
        torch.testing.assert_close(both[f"second_order.{axis}"], mean, **CLOSE)


def test_small_squares_in_half_precision(batches):
    """Squares below the smallest float16 (6e-8) count: they are taken in float32."""
    model = make_model("llama", "gqa")
    model.lm_head.weight.data *= 1e-4
    exact = take(model, batches, WeightGradients(squares=True)).layers[0]["second_order.mlp"]
    half = take(model.to(torch.bfloat16), batches, WeightGradients(squares=True)).layers[0]["second_order.mlp"]
    assert float(exact.max()) < 1e-7
    torch.testing.assert_close(half, exact, rtol=0.3, atol=0)


def test_unknown_loss_scale():
    with pytest.raises(OptionError, match="'median' is unknown; choose mean or sum"):
        WeightGradients(loss_scale="median")  # type: ignore[arg-type]


def test_a_finished_layer_is_forgotten(model, batches):
    """What was accumulated is handed over once: a second sweep starts from nothing."""
    statistics = [WeightGradients(squares=True), GateGradients(), ActivationStatistics()]
    first = take(model, batches, *statistics)
    second = take(model, batches, *statistics)
    for a, b in zip(first.layers, second.layers, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items())


# --- gates ---


def test_gate_gradients(model, batches):
    """Σ_t h·∂L/∂h equals Σⱼ W·∂L/∂W of the output projection, for every sequence: a gate multiplies both."""
    gradients = gradients_by_hand(model, batches, "sum")
    layers = take(model, batches, GateGradients()).layers
    for layer_idx, layer in enumerate(layers):
        for axis, path in (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
            name = f"model.layers.{layer_idx}.{path}.weight"
            weight = model.get_parameter(name).detach()
            groups = Geometry.of(model).widths[layer_idx][axis]
            gates = [(weight * g[name]).double().sum(dim=0).reshape(groups, -1).sum(dim=1) for g in gradients]
            expected = sum(gate**2 for gate in gates) / len(gates)
            torch.testing.assert_close(layer[f"gate_square.{axis}"], expected, rtol=1e-3, atol=1e-8)


def test_statistics_share_a_pass(model, batches):
    """Taken together, each is what it is alone."""
    kinds = [lambda: WeightGradients(squares=True), ActivationStatistics, GateGradients]
    together = take(model, batches, *(kind() for kind in kinds))
    alone = [take(model, batches, kind()) for kind in kinds]
    for layer_idx, layer in enumerate(together.layers):
        separate = {name: value for one in alone for name, value in one.layers[layer_idx].items()}
        assert layer.keys() == separate.keys()
        assert all(torch.equal(value, separate[name]) for name, value in layer.items())
    assert alone[1].loss is None
    assert together.loss == alone[0].loss == alone[2].loss


# --- on disk ---


def test_round_trip(model, batches, tmp_path):
    taken = sweep(
        model,
        batches,
        [WeightGradients(), ActivationStatistics(), GateGradients()],
        provenance={"source": "a", "seed": 3},
        progress=False,
    )
    taken.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    assert (again.sequences, again.loss, again.provenance) == (5, taken.loss, {"source": "a", "seed": 3})
    assert len(again.layers) == 2
    for a, b in zip(taken.layers, again.layers, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items())
        assert all(value.dtype == b[name].dtype for name, value in a.items())
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]


ABOUT = {"layers": 1, "sequences": 2, "loss": 1.5, "provenance": {}}
NOT_STATISTICS = {
    "no metadata": (None, "layers.0.a"),
    "another model's file": ({"format": "pt"}, "layers.0.a"),
    "not JSON": ({"prunus_statistics": "{"}, "layers.0.a"),
    "not an object": ({"prunus_statistics": "[]"}, "layers.0.a"),
    "no number of layers": ({"prunus_statistics": json.dumps({**ABOUT, "layers": None})}, "layers.0.a"),
    "nothing about the sequences": ({"prunus_statistics": json.dumps({"layers": 1})}, "layers.0.a"),
    "a layer too many": ({"prunus_statistics": json.dumps(ABOUT)}, "layers.1.a"),
    "a layer below zero": ({"prunus_statistics": json.dumps(ABOUT)}, "layers.-1.a"),
    "another name": ({"prunus_statistics": json.dumps(ABOUT)}, "lm_head.weight"),
}


@pytest.mark.parametrize(("metadata", "name"), NOT_STATISTICS.values(), ids=NOT_STATISTICS)
def test_files_that_are_no_statistics(tmp_path, metadata, name):
    path = tmp_path / "statistics.safetensors"
    save_file({name: torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(StatisticsError, match="is not a prunus statistics file"):
        Statistics.load(path)


@pytest.mark.parametrize("content", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!"], ids=repr)
def test_files_that_are_not_safetensors(tmp_path, content):
    path = tmp_path / "statistics.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StatisticsError, match=r"statistics\.safetensors is not a prunus statistics file"):
        Statistics.load(path)


def test_a_truncated_file(model, batches, tmp_path):
    path = tmp_path / "statistics.safetensors"
    take(model, batches, ActivationStatistics()).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StatisticsError):
        Statistics.load(path)


# --- labels drawn from the model ---


def test_sampled_labels_give_the_fisher_matrix_of_the_models_own_distribution():
    """E_y (Σ_t g_t(y_t))² = Σ_t E_y g_t(y_t)² (drawn apart, and each of mean zero), summed out over the vocabulary."""
    model, ids = make_model("llama", "gqa"), random_tokens(1, 6)
    layer = model.model.layers[1].mlp.down_proj
    gate = torch.ones(layer.in_features, requires_grad=True)
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0] * gate,))
    log_probabilities = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
    expected = torch.zeros(layer.in_features, dtype=torch.float64)
    for position in log_probabilities:
        for value in position:
            (gradient,) = torch.autograd.grad(value, gate, retain_graph=True)
            expected += float(value.exp()) * gradient.double().square()
    handle.remove()
    copies = [Batch(ids.expand(250, -1), None) for _ in range(8)]
    seen = sweep(model, copies, [GateGradients(labels="sampled")], seed=1, progress=False)
    # 2000 draws: a relative error of a few per cent in each channel.
    ratio = seen.layers[1]["gate_square.mlp"] / expected
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.05)
    assert float((ratio - 1).abs().max()) < 0.3
    assert seen.loss is None


@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_sampled_labels_follow_the_seed(engine):
    model, batches = make_model("llama", "gqa"), [Batch(random_tokens(3, 8, seed), None) for seed in (1, 2)]

    def take(seed):
        wanted = [GateGradients(labels="sampled"), WeightGradients()]
        return sweep(model, batches, wanted, engine=engine, seed=seed, progress=False)

    first, again, other = take(4), take(4), take(5)
    assert torch.equal(first.layers[0]["gate_square.mlp"], again.layers[0]["gate_square.mlp"])
    assert not torch.equal(first.layers[0]["gate_square.mlp"], other.layers[0]["gate_square.mlp"])
    # What listens to the text hears nothing of it, and the loss is that of the text.
    assert torch.equal(first.layers[0]["first_order.mlp"], other.layers[0]["first_order.mlp"])
    assert first.loss == sweep(model, batches, [WeightGradients()], engine=engine, progress=False).loss
