"""Importances against slow, obvious computations of the formulas, and what every method has to respect."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache

import pytest
import torch
from cut_cases import METHODS, Tiny
from tiny_families import (
    CASES,
    ONE_UNLIKE,
    UNLIKE,
    VOCABULARY,
    case_id,
    groups_of,
    make_model,
    plan_keeping,
    random_tokens,
    shared_model,
    weights_of_group,
)
from torch import Tensor

from prunus.calibration import Batch
from prunus.importance import MethodOptions, score_groups
from prunus.importance.registry import statistics_for
from prunus.model.families import AXES, FAMILIES
from prunus.model.geometry import Geometry
from prunus.statistics import Statistics
from prunus.statistics.activations import ACTIVATION_STATISTICS
from prunus.surgery import apply_plan
from prunus.sweep import ENGINES, Engine, sweep

CLOSE = {"rtol": 2e-4, "atol": 1e-9}
#: methods that look at nothing of the model but its shape
BLIND = {"random"}
LENGTHS = (12, 5, 9, 2)
DEFAULT_OPTIONS = MethodOptions()


@cache
def sequences(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, ...]:
    """Token sequences of unequal length."""
    return tuple(random_tokens(1, length, seed=20 + i)[0] for i, length in enumerate(lengths))


def padded(rows: Sequence[Tensor], side: str, batch_size: int) -> list[Batch]:
    """The sequences in batches, filled up with random tokens that must not count."""
    width = max(map(len, rows))
    ids = random_tokens(len(rows), width, seed=30)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return [Batch(i, m) for i, m in zip(ids.split(batch_size), mask.split(batch_size), strict=True)]


def measure(model, method: str, batches: list[Batch], options: MethodOptions = DEFAULT_OPTIONS, engine="resident"):
    """What the package says, from a sweep for this method alone."""
    wanted = statistics_for([METHODS[method]], options)
    statistics = sweep(model, batches, wanted, engine=engine, progress=False) if wanted else None
    return score_groups(model, METHODS[method], statistics, options)


@cache
def statistics_of_all(model, side: str, batch_size: int, options: MethodOptions, engine: Engine) -> Statistics:
    """What all methods need of `sequences()`, from one sweep that their tests share."""
    wanted = statistics_for(list(METHODS.values()), options)
    return sweep(model, padded(sequences(), side, batch_size), wanted, engine=engine, progress=False)


def measure_with_all(
    model,
    method: str,
    side: str,
    batch_size: int,
    options: MethodOptions = DEFAULT_OPTIONS,
    engine: Engine = "resident",
):
    """What the package says, from a sweep for all methods; `test_unpadded` has those for one."""
    statistics = statistics_of_all(model, side, batch_size, options, engine)
    return score_groups(model, METHODS[method], statistics, options)


# --- the oracles: one sequence at a time, no padding, whole weights, loops ---


def sequence_gradients(model, row: Tensor, scale: str) -> dict[str, Tensor]:
    """Gradient of the loss of one sequence by every parameter, by autograd."""
    parameters = dict(model.named_parameters())
    log_probabilities = torch.log_softmax(model(row[None]).logits[0].float(), dim=-1)
    losses = [-log_probabilities[t, row[t + 1]] for t in range(len(row) - 1)]
    loss = sum(losses) / len(losses) if scale == "mean" else sum(losses)
    gradients = torch.autograd.grad(loss, [*parameters.values()])
    return {name: gradient.double() for name, gradient in zip(parameters, gradients, strict=True)}


@lru_cache(maxsize=8)
def all_gradients(model, rows: tuple[Tensor, ...], hessian: str) -> list[dict[str, Tensor]]:
    return [sequence_gradients(model, row, "mean" if hessian == "mean_loss" else "sum") for row in rows]


def taylor(model, rows, options) -> dict[str, Tensor]:
    gradients = all_gradients(model, rows, options.hessian)
    return {
        name: (parameter.double() * sum(g[name] for g in gradients) / len(rows)).abs()
        for name, parameter in model.named_parameters()
    }


def taylor_2nd(model, rows, options) -> dict[str, Tensor]:
    gradients = all_gradients(model, rows, options.hessian)
    result = {}
    for name, parameter in model.named_parameters():
        theta = parameter.double()
        mean = sum(g[name] for g in gradients) / len(rows)
        mean_square = sum(g[name] ** 2 for g in gradients) / len(rows)
        result[name] = (theta * mean).abs() + 0.5 * (theta**2 * mean_square).abs()
    return result


@lru_cache(maxsize=8)
def recorded_inputs(model, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What entered each linear module, over all tokens of all sequences: (tokens, in_features)."""
    inputs: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for row in rows:
            model(row[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values).double() for name, values in inputs.items()}


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_abs": lambda x: x.abs().mean(dim=0),
    "l1": lambda x: x.abs().sum(dim=0),
    "l2": lambda x: (x**2).sum(dim=0).sqrt(),
    "mean": lambda x: x.mean(dim=0),
    "max": lambda x: x.abs().max(dim=0).values,
    "std": lambda x: x.std(dim=0, unbiased=False),
}


def wanda(model, rows, options) -> dict[str, Tensor]:
    inputs = recorded_inputs(model, rows)
    result = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind == "bias":
            result[name] = parameter.double().abs()
        elif module in inputs:
            activation = ACTIVATIONS[options.activation](inputs[module])
            result[name] = (parameter.double() * activation[None, :]).abs()
    return result


def magnitude(model, rows, options) -> dict[str, Tensor]:
    return {name: parameter.double().abs() for name, parameter in model.named_parameters()}


def closed_gates(layer, block, groups, x: Tensor, gradient: Tensor) -> Tensor:
    """For each group: what the output of the norm behind a block loses without it, times the gradient there.

    The block's own modules run again, without the group. Where all groups go at once, the block goes.
    """
    projection, norm = layer.get_submodule(block.output.path), layer.get_submodule(block.post_norm)
    with torch.no_grad():
        whole, effects = norm(projection(x)), []
        if groups == 1 or block.indivisible:
            return (whole * gradient).double().sum().expand(groups) / groups**0.5
        for group in range(groups):
            without = x.unflatten(-1, (groups, -1)).clone()
            without[..., group, :] = 0
            effects.append(((whole - norm(projection(without.flatten(-2)))) * gradient).double().sum())
    return torch.stack(effects)


def gate_fisher(model, rows, options) -> list[dict[str, Tensor]]:
    """A gate of value 1 in front of every group's slice of the last projection's input; always with summed losses.

    Where a norm follows the block: the group's share of what the norm adds to the residual stream instead.
    """
    family = FAMILIES[model.config.model_type.removeprefix("prunus_")]
    layers = model.get_submodule(family.layers)
    groups = [{axis: groups_of(layer, axis, model.config) for axis in AXES} for layer in layers]
    totals = [{axis: torch.zeros(number, dtype=torch.float64) for axis, number in layer.items()} for layer in groups]
    for row in rows:
        gates, behind, entered, handles = {}, {}, {}, []
        for layer_idx, layer in enumerate(layers):
            for axis, number in groups[layer_idx].items():
                if not number:
                    continue
                key, block = (layer_idx, axis), family.block(axis)
                projection = layer.get_submodule(block.output.path)
                if block.post_norm:

                    def keep(_, args, output, key=key, entered=entered):
                        entered[key] = args[0].detach()

                    def keep_behind(_, args, output, key=key, behind=behind):
                        behind[key] = output

                    handles.append(projection.register_forward_hook(keep))
                    handles.append(layer.get_submodule(block.post_norm).register_forward_hook(keep_behind))
                else:
                    gate = gates[key] = torch.ones(number, requires_grad=True)
                    handles.append(
                        projection.register_forward_pre_hook(
                            lambda _, args, gate=gate: (args[0].unflatten(-1, (len(gate), -1)) * gate[:, None]).flatten(
                                -2
                            )
                        )
                    )
        log_probabilities = torch.log_softmax(model(row[None]).logits[0].float(), dim=-1)
        loss = -sum(log_probabilities[t, row[t + 1]] for t in range(len(row) - 1))
        for handle in handles:
            handle.remove()
        found = torch.autograd.grad(loss, [*gates.values(), *behind.values()])
        for (layer_idx, axis), gradient in zip([*gates, *behind], found, strict=True):
            effect = gradient.double()
            if (layer_idx, axis) in behind:
                number, x = groups[layer_idx][axis], entered[layer_idx, axis]
                effect = closed_gates(layers[layer_idx], family.block(axis), number, x, gradient)
            totals[layer_idx][axis] += effect**2 / len(rows)
    return totals


#: method → importance of every single weight, by parameter name
ORACLES: dict[str, Callable[..., Mapping[str, Tensor]]] = {
    "taylor": taylor,
    "taylor_2nd": taylor_2nd,
    "wanda": wanda,
    "magnitude": magnitude,
}
#: method → importance of every group, for methods that are not a sum over weights
GROUP_ORACLES: dict[str, Callable[..., list[dict[str, Tensor]]]] = {"gate_fisher": gate_fisher}


def expected(
    model, method: str, rows: tuple[Tensor, ...], options: MethodOptions = DEFAULT_OPTIONS
) -> list[dict[str, Tensor]]:
    """The oracle's weights summed over each group, one group at a time."""
    if method in GROUP_ORACLES:
        return GROUP_ORACLES[method](model, rows, options)
    if method not in ORACLES:
        pytest.fail(
            f"method {method!r} has no oracle: write its formula, for a weight, into ORACLES (or, for a group, into "
            "GROUP_ORACLES) in tests/conformance/test_oracles.py; or add it to BLIND, if it looks at nothing"
        )
    prefix = FAMILIES[model.config.model_type.removeprefix("prunus_")].layers
    values = ORACLES[method](model, rows, options)
    result = []
    for layer_idx, layer in enumerate(model.get_submodule(prefix)):
        by_axis = {}
        for axis in AXES:
            sums = []
            for group in range(groups_of(layer, axis, model.config)):
                places = weights_of_group(layer, axis, group, model.config)
                sums.append(
                    sum(values[f"{prefix}.{layer_idx}.{name}"].detach()[index].sum().item() for name, index in places)
                )
            by_axis[axis] = torch.tensor(sums, dtype=torch.float64)
        result.append(by_axis)
    return result


@lru_cache(maxsize=512)
def oracle(
    case: tuple[str, str], method: str, lengths: tuple[int, ...] = LENGTHS, options: MethodOptions = DEFAULT_OPTIONS
) -> list[dict[str, Tensor]]:
    """What is expected of a shared model on `sequences(lengths)`: one computation for all batches and engines."""
    return expected(shared_model(*case), method, sequences(lengths), options)


def assert_equal_importance(actual, wanted, **close) -> None:
    for layer_idx, (ours, theirs) in enumerate(zip(actual, wanted, strict=True)):
        for axis in AXES:
            torch.testing.assert_close(
                ours[axis],
                theirs[axis],
                **(close or CLOSE),
                msg=lambda m, where=f"layer {layer_idx} {axis}": f"{where}: {m}",
            )


# --- the formulas ---


@pytest.fixture(params=UNLIKE, ids=case_id)
def tiny(request) -> Tiny:
    """What a method computes depends on the description of a family."""
    return Tiny(*request.param)


@pytest.fixture(params=[name for name in METHODS if name not in BLIND])
def seeing(request) -> str:
    """A method that looks at weights or data."""
    return request.param


def test_unpadded(tiny, seeing):
    lengths = (9,) * 4
    batches = [Batch(ids, None) for ids in torch.stack(sequences(lengths)).split(3)]
    assert_equal_importance(measure(tiny.model, seeing, batches), oracle(tiny.case, seeing, lengths))


@pytest.mark.parametrize(("side", "batch_size"), [("left", 1), ("right", 3), ("left", 4)])
def test_padded(tiny, seeing, side, batch_size):
    """Padding never counts, and every sequence weighs the same whatever its length and its batch."""
    actual = measure_with_all(tiny.model, seeing, side, batch_size)
    assert_equal_importance(actual, oracle(tiny.case, seeing))


@pytest.mark.parametrize("side", ["left", "right"])
def test_layer_by_layer(tiny, seeing, side):
    """The streamed engine, too."""
    actual = measure_with_all(tiny.model, seeing, side, 3, engine="streamed")
    assert_equal_importance(actual, oracle(tiny.case, seeing))


@pytest.mark.parametrize("method", ["taylor", "taylor_2nd"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("case", UNLIKE, ids=case_id)
def test_summed_losses(case, method, batch_size):
    """`hessian` empirical_fisher: the loss of a sequence is the sum over its tokens."""
    options = MethodOptions(hessian="empirical_fisher")
    actual = measure_with_all(shared_model(*case), method, "right", batch_size, options)
    assert_equal_importance(actual, oracle(case, method, options=options))
    mean = oracle(case, method)
    assert not torch.allclose(actual[0]["mlp"], mean[0]["mlp"], rtol=0.1), "the scale must matter"


@pytest.mark.parametrize("activation", ACTIVATION_STATISTICS)
@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_activation_statistics(case, activation):
    model, rows, options = shared_model(*case), sequences(), MethodOptions(activation=activation)
    actual = measure(model, "wanda", padded(rows, "left", 3), options)
    assert_equal_importance(actual, expected(model, "wanda", rows, options))


@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_methods_are_told_apart(case):
    """The oracles would not notice if all methods computed the same: here is that they do not."""
    model, rows = shared_model(*case), sequences()
    last_batch = expected(model, "taylor", rows[-1:])
    together = expected(model, "taylor", (torch.cat(rows),))
    found = {method: expected(model, method, rows) for method in [*ORACLES, *GROUP_ORACLES]}
    for other in (last_batch, together, *(found[method] for method in found if method != "taylor")):
        assert not torch.allclose(found["taylor"][0]["mlp"], other[0]["mlp"], rtol=1e-2)
    wrong = expected(model, "taylor_2nd", (torch.cat(rows),) * 2)
    assert not torch.allclose(found["taylor_2nd"][0]["attention"], wrong[0]["attention"], rtol=1e-2)


# --- what holds for every method ---


def test_shape_and_range(tiny, method):
    importance = tiny.importance(method)
    assert len(importance) == tiny.model.config.num_hidden_layers
    for widths, by_axis in zip(tiny.geometry.widths, importance, strict=True):
        for axis in AXES:
            values = by_axis[axis]
            assert values.shape == (widths[axis],)
            assert values.dtype == torch.float64
            assert values.device.type == "cpu"
            assert torch.isfinite(values).all()
            assert (values >= 0).all()
            assert not values.requires_grad
    assert any(len(by_axis["mlp"].unique()) > 10 for by_axis in importance), "groups are told apart"


@cache
def permuted(model, axis: str, layer_idx: int, order: tuple[int, ...]):
    """The same function with the groups of one layer in another order."""
    other = copy.deepcopy(model)
    prefix = FAMILIES[model.config.model_type].layers
    source, target = (m.get_submodule(f"{prefix}.{layer_idx}") for m in (model, other))
    with torch.no_grad():
        for new, old in enumerate(order):
            there = weights_of_group(target, axis, new, model.config)
            here = weights_of_group(source, axis, old, model.config)
            for (name, to), (_, index) in zip(there, here, strict=True):
                target.get_parameter(name)[to] = source.get_parameter(name)[index]
                norm = name.replace("_proj.weight", "_norm.weight")
                if FAMILIES[model.config.model_type].block(axis).indivisible and norm in source.state_dict():
                    # No group's own, as none can go without the others, but it has an entry for each of its rows.
                    target.get_parameter(norm)[to[0]] = source.get_parameter(norm)[index[0]]
    return other


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_permuting_groups_permutes_importance(case, seeing, axis):
    tiny = Tiny(*case)
    groups = tiny.geometry.widths[1][axis]
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(3)).tolist()
    if order == sorted(order):
        order.reverse()
    other = permuted(tiny.model, axis, 1, tuple(order))
    torch.testing.assert_close(other(tiny.input_ids).logits, tiny.model(tiny.input_ids).logits, rtol=1e-4, atol=1e-4)
    before, after = (measure_with_all(model, seeing, "right", 2) for model in (tiny.model, other))
    wanted = [dict(by_axis) for by_axis in before]
    wanted[1][axis] = before[1][axis][order]
    assert_equal_importance(after, wanted)


@cache
def ragged_of(tiny: Tiny):
    """A plan that takes blocks away, and the model after it."""
    groups = tiny.geometry.widths[0]
    kept = [{"attention": [], "mlp": [0, 3, 4]}, {"attention": range(groups["attention"])[:1], "mlp": []}]
    plan = plan_keeping(tiny.geometry, kept)
    return plan, apply_plan(tiny.model, plan)


def test_of_a_pruned_model(tiny, seeing):
    """Importances of ragged models, with absent blocks: a second cut needs them."""
    plan, ragged = ragged_of(tiny)
    rows = sequences()
    wanted = expected(ragged, seeing, rows)
    for engine in ENGINES:
        actual = measure(ragged, seeing, padded(rows, "left", 2), engine=engine)
        assert [{axis: len(by_axis[axis]) for axis in AXES} for by_axis in actual] == [
            {"attention": 0, "mlp": 3},
            {"attention": len(plan.layers[1].attention), "mlp": 0},
        ]
        assert_equal_importance(actual, wanted)


@cache
def in_bfloat16(model_type: str, variant: str):
    return make_model(model_type, variant).to(torch.bfloat16)


@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_in_bfloat16(case, seeing):
    """Half the precision gives about the same importances, accumulated in more."""
    wanted = measure_with_all(shared_model(*case), seeing, "right", 2)
    actual = measure_with_all(in_bfloat16(*case), seeing, "right", 2)
    assert_equal_importance(actual, wanted, rtol=0.2, atol=0.05 * float(wanted[0]["mlp"].max()))


@cache
def with_a_dead_group(tiny: Tiny):
    model = copy.deepcopy(tiny.model)
    layer = model.get_submodule(tiny.family.layers)[1]
    with torch.no_grad():
        for name, index in weights_of_group(layer, "mlp", 4, model.config):
            layer.get_parameter(name)[index] = 0
    return model


def test_a_dead_group_is_worth_nothing(tiny, seeing):
    """A channel whose weights are all zero cannot matter to any method that looks."""
    importance = measure_with_all(with_a_dead_group(tiny), seeing, "right", 4)[1]["mlp"]
    assert float(importance[4]) == 0
    assert int((importance == 0).sum()) == 1


@pytest.mark.parametrize("method", sorted(BLIND))
def test_blind_methods_look_at_nothing(method):
    """The control depends on the shape, the layer and its seed; groups cost-weighted, so that both axes go alike."""
    model, other = make_model("llama", "gqa"), make_model("llama", "gqa", seed=1)
    geometry = Geometry.of(model)
    values = score_groups(model, METHODS[method], None)
    assert_equal_importance(score_groups(other, METHODS[method], None), values, rtol=0, atol=0)
    reseeded = score_groups(model, METHODS[method], None, MethodOptions(random_seed=1))
    for axis in AXES:
        scores = values[0][axis] / geometry.group_parameters[axis]
        assert bool(((scores >= 0) & (scores < 1)).all())
        assert not torch.equal(values[0][axis], values[1][axis])
        assert not torch.equal(values[0][axis], reseeded[0][axis])
    wide = score_groups(make_model("llama", intermediate_size=20_000), METHODS[method], None)[0]["mlp"]
    shares = wide / geometry.group_parameters["mlp"]
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(shares.std()) == pytest.approx(12**-0.5, abs=0.02)


def test_every_method_has_an_oracle():
    assert METHODS.keys() == ORACLES.keys() | GROUP_ORACLES.keys() | BLIND
    with pytest.raises(pytest.fail.Exception, match=r"'unheard_of' has no oracle.*ORACLES"):
        expected(shared_model(*CASES[0]), "unheard_of", [])


def test_padding_would_show():
    """The filling of padded batches is ordinary tokens: counting them changes importances."""
    rows = sequences()
    model = shared_model(*CASES[0])
    for method in ("taylor", "taylor_2nd", "wanda", "gate_fisher"):
        honest = measure(model, method, padded(rows, "left", 4))
        counted = measure(model, method, [Batch(b.input_ids, None) for b in padded(rows, "left", 4)])
        assert not torch.allclose(honest[0]["mlp"], counted[0]["mlp"], rtol=0.02), method
    assert int(padded(rows, "left", 4)[0].input_ids.max()) < VOCABULARY
