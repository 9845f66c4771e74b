"""The original commands and functions, against slow loops that know nothing of the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import plain_scoring
from tiny_families import CASES as ALL_CASES
from tiny_families import VOCABULARY, case_id, make_model, random_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import prunus
from prunus.calibration import calibration_from_tokens
from prunus.errors import (
    BudgetError,
    CalibrationError,
    NonFiniteError,
    OptionError,
    PlanError,
    StatisticsError,
    UnsupportedModelError,
)
from prunus.selection.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # core and the commands are no part of the installed package

import demo_global_pruning  # noqa: E402
import llama3_global_pruning  # noqa: E402
from core.methods.global_pruning import (  # noqa: E402
    build_global_group_table,
    compute_attention_group_importance_taylor,
    compute_attention_group_importance_wanda,
    compute_mlp_group_importance_taylor,
    compute_mlp_group_importance_wanda,
    select_groups_to_prune,
)
from llama3_global_pruning import collect_layer_activations  # noqa: E402

#: the families that the original interface was made for: q, k, v, gate and up apart
CASES = [case for case in ALL_CASES if case[0] in ("llama", "mistral", "qwen2", "qwen3")]
ONE_EACH = [next(case for case in CASES if case[0] == model_type) for model_type in dict(CASES)]
COLUMNS = ["layer_idx", "group_type", "group_idx", "importance", "cost", "score"]
PROJECTIONS = {
    "attention": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    "mlp": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
}
ALL_PROJECTIONS = [*PROJECTIONS["attention"], *PROJECTIONS["mlp"]]


def heads(model):
    config = model.config
    return {
        "head_dim": config.head_dim,
        "gqa_ratio": config.num_attention_heads // config.num_key_value_heads,
    }


def sum_attention_groups(layer, value, *, head_dim, gqa_ratio):
    """One value per weight → one per group, head by head; `value(path, parameter)` gives a tensor."""
    sums = []
    for group in range(layer.self_attn.k_proj.out_features // head_dim):
        total = 0.0
        for head in range(group * gqa_ratio, (group + 1) * gqa_ratio):
            for index in range(head * head_dim, (head + 1) * head_dim):
                total += float(value("self_attn.q_proj", "weight")[index].double().sum())
                total += float(value("self_attn.o_proj", "weight")[:, index].double().sum())
                if layer.self_attn.q_proj.bias is not None:
                    total += float(value("self_attn.q_proj", "bias")[index])
        for path in ("self_attn.k_proj", "self_attn.v_proj"):
            for index in range(group * head_dim, (group + 1) * head_dim):
                total += float(value(path, "weight")[index].double().sum())
                if layer.get_submodule(path).bias is not None:
                    total += float(value(path, "bias")[index])
        sums.append(total)
    return torch.tensor(sums, dtype=torch.float64)


def sum_channels(layer, value):
    sums = []
    for channel in range(layer.mlp.up_proj.out_features):
        total = float(value("mlp.down_proj", "weight")[:, channel].double().sum())
        for path in ("mlp.gate_proj", "mlp.up_proj"):
            total += float(value(path, "weight")[channel].double().sum())
            if layer.get_submodule(path).bias is not None:
                total += float(value(path, "bias")[channel])
        sums.append(total)
    return torch.tensor(sums, dtype=torch.float64)


def sequence_gradients(model, tokens):
    """The gradient of the mean token loss of every sequence by itself, by parameter name."""
    gradients = []
    for sequence in tokens:
        model.zero_grad()
        model(sequence[None], labels=sequence[None]).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    return gradients


def mean_of(gradients, power=1):
    return {name: sum(g[name] ** power for g in gradients) / len(gradients) for name in gradients[0]}


def put_gradients(model, gradients):
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()


@pytest.fixture
def trained():
    """A Qwen2 (q/k/v biases) with the mean gradient on its weights, and both orders by name."""
    model = make_model("qwen2", "gqa-tied", num_hidden_layers=3)
    gradients = sequence_gradients(model, random_tokens(3))
    evidence = SimpleNamespace(model=model, gradients=mean_of(gradients), hessian_diag=mean_of(gradients, power=2))
    put_gradients(model, evidence.gradients)
    return evidence


# --- importance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_taylor_is_the_sum_over_the_weights_of_each_group(case):
    model = make_model(*case)
    tokens = random_tokens(2)
    model(tokens, labels=tokens).loss.backward()
    for layer in model.model.layers:

        def value(path, parameter, layer=layer):
            weight = layer.get_submodule(path).get_parameter(parameter)
            return (weight.detach() * weight.grad).abs()

        found = compute_attention_group_importance_taylor(layer, **heads(model))
        torch.testing.assert_close(found, sum_attention_groups(layer, value, **heads(model)), rtol=1e-5, atol=1e-8)
        assert found.shape == (model.config.num_key_value_heads,)
        found = compute_mlp_group_importance_taylor(layer)
        torch.testing.assert_close(found, sum_channels(layer, value), rtol=1e-5, atol=1e-8)
        assert not found.requires_grad


@pytest.mark.parametrize("case", ONE_EACH, ids=case_id)
def test_the_second_order_is_added_whichever_way_it_is_keyed(case):
    model = make_model(*case)
    gradients = sequence_gradients(model, random_tokens(3))
    hessian_diag = mean_of(gradients, power=2)
    put_gradients(model, mean_of(gradients))
    layer = model.model.layers[1]

    def value(path, parameter):
        weight = layer.get_submodule(path).get_parameter(parameter)
        curvature = hessian_diag[f"model.layers.1.{path}.{parameter}"]
        return (weight.detach() * weight.grad).abs() + 0.5 * (weight.detach() ** 2 * curvature).abs()

    by_projection = {}
    for path in ALL_PROJECTIONS:
        name = path.partition(".")[2]
        by_projection[name] = hessian_diag[f"model.layers.1.{path}.weight"]
        if f"model.layers.1.{path}.bias" in hessian_diag:
            by_projection[f"{name}.bias"] = hessian_diag[f"model.layers.1.{path}.bias"]

    expected = sum_attention_groups(layer, value, **heads(model))
    for diagonal, number in ((hessian_diag, 1), (by_projection, None), (by_projection, 1)):
        found = compute_attention_group_importance_taylor(
            layer, **heads(model), hessian_diag=diagonal, layer_idx=number
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
        found = compute_mlp_group_importance_taylor(layer, diagonal, layer_idx=number)
        torch.testing.assert_close(found, sum_channels(layer, value), rtol=1e-5, atol=1e-8)


def test_a_bias_without_a_curvature_of_its_own_counts_by_its_first_order(trained):
    layer = trained.model.model.layers[0]
    by_projection = {
        path.partition(".")[2]: trained.hessian_diag[f"model.layers.0.{path}.weight"]
        for path in PROJECTIONS["attention"]
    }
    zero_biases = dict(trained.hessian_diag)
    for name in zero_biases:
        if name.endswith(".bias"):
            zero_biases[name] = torch.zeros_like(zero_biases[name])
    torch.testing.assert_close(
        compute_attention_group_importance_taylor(layer, **heads(trained.model), hessian_diag=by_projection),
        compute_attention_group_importance_taylor(layer, **heads(trained.model), hessian_diag=zero_biases, layer_idx=0),
    )


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_wanda_is_the_sum_over_the_weights_of_each_group(case):
    model = make_model(*case)
    layer = model.model.layers[0]
    generator = torch.Generator().manual_seed(3)
    activations = {
        path.partition(".")[2]: torch.rand(layer.get_submodule(path).in_features, generator=generator)
        for path in ALL_PROJECTIONS
    }

    def value(path, parameter):
        weight = layer.get_submodule(path).get_parameter(parameter).detach()
        return (weight * activations[path.partition(".")[2]] if parameter == "weight" else weight).abs()

    found = compute_attention_group_importance_wanda(layer, activations, **heads(model))
    torch.testing.assert_close(found, sum_attention_groups(layer, value, **heads(model)), rtol=1e-5, atol=1e-8)
    found = compute_mlp_group_importance_wanda(layer, activations)
    torch.testing.assert_close(found, sum_channels(layer, value), rtol=1e-5, atol=1e-8)


def test_half_precision_is_multiplied_in_float32():
    model = make_model("llama", "gqa").to(torch.float16)
    layer = model.model.layers[0]
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 6e-8)  # most products would be zero in float16

    def value(path, parameter):
        weight = layer.get_submodule(path).get_parameter(parameter)
        return (weight.detach().double() * weight.grad.double()).abs()

    torch.testing.assert_close(
        compute_mlp_group_importance_taylor(layer), sum_channels(layer, value), rtol=1e-5, atol=0
    )


class Block(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        for name, (inputs, outputs) in sizes.items():
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))


def bare_layer(**blocks):
    """A decoder layer that no model has, and that notes nothing but its weights."""
    layer = nn.Module()
    for name, sizes in blocks.items():
        layer.add_module(name, Block(**sizes))
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    return layer


ATTENTION = {"q_proj": (10, 24), "k_proj": (10, 8), "v_proj": (10, 8), "o_proj": (24, 10)}
MLP = {"gate_proj": (10, 7), "up_proj": (10, 7), "down_proj": (7, 10)}


def test_a_layer_alone_is_enough():
    layer = bare_layer(self_attn=ATTENTION, mlp=MLP)

    def value(path, parameter):
        return layer.get_submodule(path).weight.detach().abs()

    attention = sum_attention_groups_of_bare(layer, value)
    torch.testing.assert_close(compute_attention_group_importance_taylor(layer, 4, 3), attention, rtol=1e-5, atol=1e-8)
    layer.mlp.up_proj.bias = layer.mlp.down_proj.bias = None
    torch.testing.assert_close(
        compute_mlp_group_importance_taylor(layer), sum_channels(layer, value), rtol=1e-5, atol=1e-8
    )
    only_mlp = bare_layer(mlp=MLP)
    assert compute_mlp_group_importance_taylor(only_mlp).shape == (7,)
    with pytest.raises(UnsupportedModelError, match=r"no attention block.*model\.model\.layers\[0\]"):
        compute_attention_group_importance_taylor(only_mlp, 4, 3)


def sum_attention_groups_of_bare(layer, value):
    return sum_attention_groups(layer, value, head_dim=4, gqa_ratio=3)


# --- head_dim and gqa_ratio ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_wrong_heads_name_the_right_ones(case):
    model = make_model(*case)
    right = heads(model)
    tokens = random_tokens(1)
    model(tokens, labels=tokens).loss.backward()
    layer = model.model.layers[0]
    wrong = (
        {},  # the defaults, those of Llama 3 8B
        {**right, "head_dim": right["head_dim"] * 2},
        {**right, "head_dim": 1},
        {**right, "gqa_ratio": right["gqa_ratio"] + 1},
    )
    for given_heads in wrong:
        for call in (
            lambda h: compute_attention_group_importance_taylor(layer, **h),
            lambda h: compute_attention_group_importance_wanda(layer, {}, **h),
            lambda h: build_global_group_table(model, **h),
        ):
            with pytest.raises(OptionError) as caught:
                call(given_heads)
            assert f"Pass head_dim={right['head_dim']}, gqa_ratio={right['gqa_ratio']}" in str(caught.value)
    torch.testing.assert_close(
        compute_attention_group_importance_taylor(layer, None, None),
        compute_attention_group_importance_taylor(layer, **right),
    )


def test_wrong_heads_of_a_layer_that_notes_nothing():
    layer = bare_layer(self_attn=ATTENTION)
    with pytest.raises(OptionError, match=r"head_dim is 3.*8 rows, which it must divide"):
        compute_attention_group_importance_taylor(layer, 3, 3)
    with pytest.raises(OptionError, match=r"Pass head_dim=4, gqa_ratio=3"):
        compute_attention_group_importance_taylor(layer, 4, 4)
    with pytest.raises(OptionError, match="pass head_dim"):
        compute_attention_group_importance_taylor(layer, None, 3)
    assert compute_attention_group_importance_taylor(layer, 2, 3).shape == (4,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k_proj": (10, 7)}, "24 query rows are not a multiple of its 7 key rows"),
        ({"v_proj": (10, 12)}, r"v_proj.weight has shape \(12, 10\), the layer's other projections imply \(8, 10\)"),
        ({"q_proj": (10, 16)}, r"q_proj.weight has shape \(16, 10\)"),
    ],
)
def test_a_layer_whose_projections_do_not_fit_together_is_refused(changed, message):
    with pytest.raises(UnsupportedModelError, match=message):
        compute_attention_group_importance_taylor(bare_layer(self_attn={**ATTENTION, **changed}), 4, 3)


# --- what is missing or misshapen ----------------------------------------------------------------------------------


def test_without_gradients_a_backward_pass_is_asked_for():
    model = make_model("llama", "gqa")
    layer = model.model.layers[0]
    with pytest.raises(StatisticsError, match=r"self_attn\.q_proj\.weight has no gradient.*backward\(\).*first"):
        compute_attention_group_importance_taylor(layer, **heads(model))
    with pytest.raises(StatisticsError, match=r"mlp\.gate_proj\.weight has no gradient"):
        compute_mlp_group_importance_taylor(layer)
    with pytest.raises(StatisticsError, match=r"layer 0: .*backward.*importance_info={'gradients'"):
        build_global_group_table(model, **heads(model))


def test_a_curvature_that_is_missing_or_misshapen_is_named(trained):
    layer = trained.model.model.layers[2]
    with pytest.raises(StatisticsError, match=r"nothing for 'gate_proj'.*pass layer_idx="):
        compute_mlp_group_importance_taylor(layer, trained.hessian_diag)
    with pytest.raises(StatisticsError, match=r"'model\.layers\.7\.mlp\.gate_proj\.weight' or 'gate_proj'"):
        compute_mlp_group_importance_taylor(layer, trained.hessian_diag, layer_idx=7)
    with pytest.raises(StatisticsError, match=r"hessian_diag\['up_proj'\] has shape \(3,\)"):
        compute_mlp_group_importance_taylor(
            layer, {"gate_proj": torch.zeros_like(layer.mlp.gate_proj.weight), "up_proj": torch.zeros(3)}
        )


def test_activations_that_are_missing_or_misshapen_are_named(trained):
    layer = trained.model.model.layers[0]
    with pytest.raises(StatisticsError, match="nothing for 'down_proj'; it has 'gate_proj', 'up_proj'"):
        compute_mlp_group_importance_wanda(layer, dict.fromkeys(("gate_proj", "up_proj"), torch.ones(48)))
    with pytest.raises(StatisticsError, match=r"activations\['q_proj'\] has shape \(5,\), and \(48,\) is needed"):
        compute_attention_group_importance_wanda(layer, {"q_proj": torch.ones(5)}, **heads(trained.model))


@pytest.mark.parametrize(
    ("method", "info", "error", "message"),
    [
        ("wanda", None, StatisticsError, r"wanda needs.*'activations'.*collect_layer_activations"),
        ("wanda", {"gradients": {}}, StatisticsError, r"wanda needs.*'activations'.*it holds 'gradients'"),
        ("wanda", {"activations": {0: {}}}, StatisticsError, r"\['activations'\]\[0\] holds nothing for 'q_proj'"),
        ("wanda", {"activations": {}}, StatisticsError, "holds nothing for layer 0"),
        ("taylor_2nd", None, StatisticsError, r"taylor_2nd needs.*'hessian_diag'"),
        ("taylor", {"gradients": {}}, StatisticsError, r"'model\.layers\.0\.self_attn\.q_proj\.weight'"),
        ("taylor_2nd", {"hessian_diag": {}}, StatisticsError, r"\['hessian_diag'\] holds nothing for 'model\.layers"),
        ("taylor", {"grads": {}}, OptionError, "importance_info has grads; its keys are activations, gradients"),
        ("tailor", None, OptionError, "Did you mean taylor"),
        ("magnitude", None, OptionError, r"not one of taylor, taylor_2nd, wanda.*prunus\.score"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_importance_info_that_does_not_fit_the_method(trained, method, info, error, message):
    with pytest.raises(error, match=message):
        build_global_group_table(trained.model, method, info, **heads(trained.model))


def test_a_gradient_that_is_not_finite_names_its_layer(trained):
    trained.gradients["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 2, mlp"):
        build_global_group_table(trained.model, "taylor", {"gradients": trained.gradients}, **heads(trained.model))


# --- the table -----------------------------------------------------------------------------------------------------


def check_sorted(table, model):
    assert list(table.columns) == COLUMNS
    assert table["score"].is_monotonic_increasing
    assert list(table.index) == list(range(len(table)))
    config = model.config
    biases = {path: model.model.layers[0].get_submodule(path).bias is not None for path in ALL_PROJECTIONS}
    gqa = config.num_attention_heads // config.num_key_value_heads
    attention = config.head_dim * (2 * gqa * config.hidden_size + 2 * config.hidden_size)
    attention += config.head_dim * (gqa * biases["self_attn.q_proj"] + 2 * biases["self_attn.k_proj"])
    mlp = 3 * config.hidden_size + biases["mlp.gate_proj"] + biases["mlp.up_proj"]
    assert (table["cost"] == table["group_type"].map({"attention": attention, "mlp": mlp})).all()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_table_holds_every_group_once_cheapest_first(case):
    model = make_model(*case)
    gradients = mean_of(sequence_gradients(model, random_tokens(2)))
    from_info = build_global_group_table(model, "taylor", {"gradients": gradients}, **heads(model))
    put_gradients(model, gradients)
    table = build_global_group_table(model, **heads(model))
    pd.testing.assert_frame_equal(table, from_info)
    check_sorted(table, model)
    pd.testing.assert_series_equal(table["score"], table["importance"] / table["cost"], check_names=False)
    for layer_idx, layer in enumerate(model.model.layers):
        for axis, expected in (
            ("attention", compute_attention_group_importance_taylor(layer, **heads(model))),
            ("mlp", compute_mlp_group_importance_taylor(layer)),
        ):
            rows = table[(table["layer_idx"] == layer_idx) & (table["group_type"] == axis)].sort_values("group_idx")
            assert rows["group_idx"].tolist() == list(range(len(expected)))
            assert rows["importance"].tolist() == expected.tolist()


@pytest.mark.parametrize("case", ONE_EACH, ids=case_id)
@pytest.mark.parametrize("method", ["taylor", "taylor_2nd", "wanda"])
def test_the_table_is_the_one_of_the_package(case, method):
    model = make_model(*case)
    tokens = random_tokens(3)
    gradients = sequence_gradients(model, tokens)
    info = {
        "gradients": mean_of(gradients),
        "hessian_diag": mean_of(gradients, power=2),
        "activations": collect_layer_activations(model, [tokens]),
    }
    found = build_global_group_table(model, method, info, **heads(model), normalization="layer_sum")
    options = plain_scoring(method=method, normalize="layer_sum")
    expected = prunus.score(model, calibration_from_tokens(tokens), options, batch_size=2).table
    order = ["layer_idx", "group_type", "group_idx"]
    pd.testing.assert_frame_equal(
        found.sort_values(order, ignore_index=True), expected.sort_values(order, ignore_index=True), rtol=1e-4
    )


def test_a_layer_range_gives_the_rows_of_its_layers(trained):
    whole = build_global_group_table(trained.model, **heads(trained.model))
    part = build_global_group_table(trained.model, layer_start=1, layer_end=2, **heads(trained.model))
    expected = whole[whole["layer_idx"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, expected)
    # Only the layers of the range need gradients.
    for parameter in (*trained.model.model.layers[0].parameters(), *trained.model.model.layers[2].parameters()):
        parameter.grad = None
    part = build_global_group_table(trained.model, layer_start=1, layer_end=2, **heads(trained.model))
    pd.testing.assert_frame_equal(part, expected)
    for start, end in ((0, 4), (2, 2), (-1, 2)):
        with pytest.raises(OptionError):
            build_global_group_table(trained.model, layer_start=start, layer_end=end, **heads(trained.model))


def test_a_pruned_model_has_a_table_too():
    dense = make_model("llama", "gqa", num_hidden_layers=3)
    kept = [
        {"attention": [0, 2], "mlp": range(7)},
        {"attention": [], "mlp": range(20)},
        {"attention": [1], "mlp": []},
    ]
    model = prunus.apply_plan(dense, Plan.from_kept(prunus.Geometry.of(dense), kept))
    tokens = random_tokens(2)
    model(tokens, labels=tokens).loss.backward()
    table = build_global_group_table(model, head_dim=8, gqa_ratio=2)
    counts = table.groupby(["layer_idx", "group_type"]).size().to_dict()
    assert counts == {(0, "attention"): 2, (0, "mlp"): 7, (1, "mlp"): 20, (2, "attention"): 1}
    activations = collect_layer_activations(model, [tokens])
    assert set(activations[1]) == {"gate_proj", "up_proj", "down_proj"}
    assert activations[2]["o_proj"].shape == (16,)


def test_raw_wanda_warns_and_a_normalised_one_does_not(trained):
    info = {"activations": collect_layer_activations(trained.model, [random_tokens(1)])}
    with pytest.warns(UserWarning, match='not on one scale.*normalization="layer_sum"') as caught:
        build_global_group_table(trained.model, "wanda", info, **heads(trained.model))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = build_global_group_table(
            trained.model, "wanda", info, normalization="layer_sum", **heads(trained.model)
        )
        build_global_group_table(trained.model, **heads(trained.model))
    means = table.groupby(["layer_idx", "group_type"])["score"].mean()
    assert means.tolist() == pytest.approx([1.0] * len(means))


# --- selection -----------------------------------------------------------------------------------------------------


def table_of(scores, costs):
    rows = [(i // 5, "mlp", i % 5, s * c, c, s) for i, (s, c) in enumerate(zip(scores, costs, strict=True))]
    return pd.DataFrame(rows, columns=COLUMNS)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=30),
    st.floats(0, 0.99),
    st.integers(0, 100),
    st.randoms(use_true_random=False),
)
def test_selection_reaches_the_target_and_passes_it_by_less_than_one_group(groups, share, other, random):
    scores, costs = zip(*groups, strict=True)
    table = table_of(scores, costs)
    total = sum(costs) + other
    ratio = share * sum(costs) / total
    chosen = select_groups_to_prune(table, ratio, total)
    # What is taken one by one, lowest score first.
    expected, removed = [], 0
    for row in sorted(table.itertuples(index=False), key=lambda row: (row.score, row.layer_idx, row.group_idx)):
        if removed >= ratio * total:
            break
        expected.append((row.layer_idx, row.group_idx))
        removed += row.cost
    assert list(zip(chosen["layer_idx"], chosen["group_idx"], strict=True)) == expected
    assert list(chosen.columns) == COLUMNS
    if len(chosen):
        assert chosen["cost"].sum() >= ratio * total > chosen["cost"].sum() - chosen["cost"].iloc[-1]
        left = table["score"][~table.set_index(["layer_idx", "group_idx"]).index.isin(expected)]
        assert left.empty or chosen["score"].max() <= left.min()
    # The order of the table's rows decides nothing.
    order = list(range(len(table)))
    random.shuffle(order)
    pd.testing.assert_frame_equal(select_groups_to_prune(table.iloc[order], ratio, total), chosen)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.05, 0.11])
def test_selection_agrees_with_the_package_on_a_model(trained, ratio):
    model = trained.model
    table = build_global_group_table(model, **heads(model))
    rows = select_groups_to_prune(table, ratio, model.num_parameters())
    plan = prunus.select(table, prunus.Geometry.of(model), ratio)
    assert all(kept.attention and kept.mlp for kept in plan.layers)
    cut = {(row.layer_idx, row.group_type, row.group_idx) for row in rows.itertuples()}
    assert cut == {
        (layer_idx, axis, group)
        for layer_idx, (before, kept) in enumerate(zip(plan.widths, plan.layers, strict=True))
        for axis in ("attention", "mlp")
        for group in set(range(before[axis])) - set(kept[axis])
    }
    assert prunus.apply_plan(model, plan).num_parameters() == model.num_parameters() - rows["cost"].sum()


def test_selection_refuses_what_it_cannot_do():
    table = table_of([1.0, 2.0], [10, 10])
    twenty = pd.concat([table] * 10, ignore_index=True).head(20).assign(cost=5, score=range(20))
    assert len(select_groups_to_prune(twenty, 0.55, 100)) == 11, "0.55 x 100 lies just above 55"
    with pytest.raises(BudgetError, match=r"largest reachable ratio is 0\.5555"):
        select_groups_to_prune(twenty.head(10), 0.6, 90)
    assert len(select_groups_to_prune(twenty.head(10), 0.5555, 90)) == 10
    with pytest.raises(BudgetError, match=r"removing 30 of 100.*have 20.*largest reachable ratio is 0\.2\. Lower"):
        select_groups_to_prune(table, 0.3, 100)
    for ratio in (-0.1, 1.0, 25):
        with pytest.raises(OptionError, match="ratio"):
            select_groups_to_prune(table, ratio, 100)
    with pytest.raises(OptionError, match="total_params is 0"):
        select_groups_to_prune(table, 0.1, 0)
    with pytest.raises(PlanError, match="no column cost"):
        select_groups_to_prune(table.drop(columns="cost"), 0.1, 100)
    with pytest.raises(PlanError, match="1 scores that are NaN"):
        select_groups_to_prune(table_of([1.0, float("nan")], [10, 10]), 0.1, 100)


# --- activations ---------------------------------------------------------------------------------------------------


def activations_by_hand(model, batches):
    """Mean |input| over real tokens, token by token."""
    sums, counts, handles = {}, {}, []
    current = {}

    def watch(key):
        def hook(module, args):
            for row, keep_row in zip(args[0].detach(), current["mask"], strict=True):
                for x, keep in zip(row, keep_row, strict=True):
                    if keep:
                        sums[key] = sums.get(key, 0) + x.double().abs()
                        counts[key] = counts.get(key, 0) + 1

        return hook

    for layer_idx, layer in enumerate(model.model.layers):
        for path in ALL_PROJECTIONS:
            key = (layer_idx, path.partition(".")[2])
            handles.append(layer.get_submodule(path).register_forward_pre_hook(watch(key)))
    for input_ids, mask in batches:
        current["mask"] = mask.tolist()
        with torch.no_grad():
            model(input_ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return {key: value / counts[key] for key, value in sums.items()}


@pytest.mark.parametrize("case", ONE_EACH, ids=case_id)
def test_activations_are_means_over_tokens_and_padding_never_counts(case):
    model = make_model(*case)
    batches = [
        (random_tokens(2, 9, seed=1), torch.tensor([[1] * 9, [1] * 4 + [0] * 5])),
        (random_tokens(3, 6, seed=2), torch.tensor([[1] * 6, [0] * 3 + [1] * 3, [1] * 2 + [0] * 4])),
        (random_tokens(1, 12, seed=3), torch.ones(1, 12, dtype=torch.int64)),
    ]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = collect_layer_activations(model, [{"input_ids": ids, "attention_mask": mask} for ids, mask in batches])
    expected = activations_by_hand(model, batches)
    assert {(i, name) for i, by_name in found.items() for name in by_name} == expected.keys()
    for (layer_idx, name), value in expected.items():
        torch.testing.assert_close(found[layer_idx][name], value, rtol=1e-4, atol=1e-6)
    for ids, mask in batches:
        ids[mask == 0] = VOCABULARY - 1  # other padding, same activations
    again = collect_layer_activations(model, batches)
    torch.testing.assert_close(again, found)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_activations_take_every_form_of_batches():
    model = make_model("llama", "gqa")
    tokens = random_tokens(4, 8)
    expected = collect_layer_activations(model, [{"input_ids": tokens}])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=3)
    forms = [
        tokens,
        [tokens],
        tokens.split(1),
        list(tokens),  # one sequence at a time
        {"input_ids": tokens, "labels": tokens},
        loader,
        (batch for batch in loader),
        calibration_from_tokens(tokens).batches(2),
        [(tokens, torch.ones_like(tokens, dtype=torch.bool))],
    ]
    for form in forms:
        torch.testing.assert_close(collect_layer_activations(model, form, device="cpu"), expected)
    largest = collect_layer_activations(model, tokens, statistic="max")
    assert (largest[0]["q_proj"] >= expected[0]["q_proj"]).all()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no calibration batches"),
        ([{"labels": torch.ones(1, 4)}], "a batch has labels; it needs input_ids"),
        (["text"], "a str instead of a tensor"),
        ([torch.ones(1, 4)], "must be integers"),
    ],
)
def test_batches_that_hold_no_tokens_are_refused(batches, message):
    with pytest.raises(CalibrationError, match=message):
        collect_layer_activations(make_model("llama", "gqa"), batches)


# --- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama on disk, with a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_model("llama", "gqa", vocab_size=257, num_hidden_layers=3, eos_token_id=256).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    return path


def run(script, *arguments, cwd):
    """Run a command from another directory; prunus may or may not be installed."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_prunes_a_folder_from_any_directory(folder, tmp_path):
    settings = ("--num_samples", 3, "--seq_len", 24, "--importance_method", "taylor_2nd", "--pruning_ratio", 0.2)
    done = run("llama3_global_pruning.py", "--base_model", folder, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "pruned" / "tiny-llama-taylor_2nd-0.2"
    assert f"saved to {out.relative_to(tmp_path)}" in done.stdout
    assert "% removed" in done.stdout
    assert "perplexity: " in done.stdout
    dense = AutoModelForCausalLM.from_pretrained(folder)
    smaller = AutoModelForCausalLM.from_pretrained(out)
    metrics = json.loads((out / "prunus" / "metrics.json").read_text())
    assert metrics["parameters_before"] == dense.num_parameters()
    assert metrics["parameters_after"] == smaller.num_parameters()
    assert metrics["scoring"]["method"] == "taylor_2nd"
    assert metrics["scoring"]["normalize"] == "none"
    assert metrics["calibration"]["samples"] == 3
    largest_group = 48 * 6 * 8
    target = 0.8 * dense.num_parameters()
    assert target - largest_group - 48 <= smaller.num_parameters() <= target
    plan = Plan.load(out / "prunus" / "plan.json")
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(smaller(tokens).logits, prunus.apply_plan(dense, plan)(tokens).logits)
    assert smaller.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=256).shape[1] > 8
    assert "python llama3_global_pruning.py --base_model" in (out / "README.md").read_text()


def test_help_lists_the_original_flags_and_defaults(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        llama3_global_pruning.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "--base_model PATH",
        "--importance_method {taylor,taylor_2nd,wanda} what a group is worth (default: taylor)",
        "in [0, 1) (default: 0.25)",
        "calibration sequences (default: 128)",
        "pruned/<model>-<method>-<ratio>",
    ):
        assert expected in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--base_model", "m", "--ratio", "0.2"],
        ["--base_model", "m", "--pruning", "0.2"],  # no guessing of abbreviations
        ["--base_model", "m", "--importance_method", "tailor"],
        ["--base_model", "m", "--num_samples", "many"],
    ],
)
def test_wrong_flags_exit_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        llama3_global_pruning.main(arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pruning_ratio", "1.5"], r"ratio is 1\.5"),
        (["--num_samples", "0"], "samples is 0|needs calibration sequences"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--layer_start", "2", "--layer_end", "9"], r"layer_start 2 and --layer_end 9 .* 3 layers"),
        (["--layer_start", "2", "--pruning_ratio", "0.6"], "largest reachable ratio is"),
        (["--device", "abacus"], "abacus"),
        (["--eval_text", "nowhere.txt"], r"nowhere\.txt"),
    ],
)
def test_what_cannot_work_is_one_clear_line(arguments, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--seq_len", "16", "--num_samples", "2"]
    assert llama3_global_pruning.main(["--base_model", str(folder), *small, *arguments]) == 1
    # What the engine was chosen by stands in a line of its own.
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("engine ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0])
    assert not (tmp_path / "pruned").exists()


def test_a_full_folder_is_kept_unless_overwriting(folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    command = ["--base_model", str(folder), "--output_dir", str(tmp_path)]
    assert llama3_global_pruning.main(command) == 1
    assert "not empty" in capsys.readouterr().err
    assert llama3_global_pruning.main([*command, "--overwrite"]) == 1
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_interruption_and_lack_of_memory_leave_no_traceback(monkeypatch, capsys):
    for error, status, message in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 1, "smaller --batch_size"),
    ):

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(llama3_global_pruning, "prune_job", fail)
        assert llama3_global_pruning.main(["--base_model", "m"]) == status
        assert message in capsys.readouterr().err


def test_the_default_output_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for model, name in ((".", "tiny-llama"), (f"{folder}/", "tiny-llama"), ("owner/Model-8B", "Model-8B")):
        out = llama3_global_pruning.default_output(model, "wanda", 0.25)
        assert out.as_posix() == f"pruned/{name}-wanda-0.25"


@pytest.mark.parametrize("method", ["taylor", "taylor_2nd", "wanda"])
def test_the_demonstration_shows_every_step_and_saves_nothing(method, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--num_samples", "2", "--seq_len", "24", "--rows", "3"]
    assert demo_global_pruning.main(["--base_model", str(folder), "--importance_method", method, *small]) == 0
    shown = capsys.readouterr().out
    for expected in ("1. Load", "layer_idx group_type", "cut first:", "kept longest:", "in total", "perplexity: "):
        assert expected in shown
    assert ("layer_sum" in shown) == (method == "wanda")
    per_layer = re.findall(r"^(\d)\s+(\d) of 3\s+(\d+) of 20\s+([\d,]+)$", shown, re.MULTILINE)
    assert [row[0] for row in per_layer] == ["0", "1", "2"]
    removed = sum(int(row[3].replace(",", "")) for row in per_layer)
    assert sum(int(row[1]) * 48 * 6 * 8 + int(row[2]) * 48 * 3 for row in per_layer) == removed
    assert f"with {removed:,} of " in shown
    assert list(tmp_path.iterdir()) == []


def test_the_demonstration_explains_its_errors(folder, capsys):
    assert demo_global_pruning.main(["--base_model", str(folder), "--pruning_ratio", "0.99"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: --pruning_ratio 0.99")
    assert len(error.splitlines()) == 1


def test_the_examples_of_the_readme_run(capsys):
    text = (ROOT / "core" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for block in blocks:
            exec(compile(block, "core/README.md", "exec"), names)
    assert names["smaller"].num_parameters() <= 0.75 * names["model"].num_parameters()
    assert "→" in capsys.readouterr().out
