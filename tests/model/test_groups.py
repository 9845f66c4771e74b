"""The geometry of groups: what a model is made of, what it costs, and which models are refused."""

from __future__ import annotations

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries, plans
from tiny_families import CASES, case_id, count_parameters, head_dim_of, make_model, shared_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaModel

from prunus.errors import PlanError, UnsupportedModelError
from prunus.model.families import AXES, FAMILIES, UNFIT, family_of
from prunus.model.geometry import Geometry
from prunus.model.modules import submodule
from prunus.model.widths import LayerWidths, layer_widths_of
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan


@pytest.fixture(params=CASES, ids=case_id)
def model(request):
    """Of every family and variant; shared."""
    return shared_model(*request.param)


# --- reading it off a model ---


def test_shape(model):
    geometry, config = Geometry.of(model), model.config
    assert geometry.family is FAMILIES[config.model_type] is family_of(config)
    assert geometry.hidden_size == config.hidden_size
    assert geometry.head_dim == head_dim_of(config)
    assert geometry.widths == (LayerWidths(config.num_key_value_heads, config.intermediate_size),) * 2
    assert geometry.size(0, "residual") == config.hidden_size
    assert geometry.size(1, "query") == config.num_attention_heads * head_dim_of(config)
    assert geometry.size(0, "key_value") == config.num_key_value_heads * head_dim_of(config)
    assert geometry.size(0, "channel") == config.intermediate_size


def test_costs_are_what_smaller_models_lack(model):
    """One group less, and one block less, counted in models that transformers builds."""
    geometry, config = Geometry.of(model), model.config
    assert geometry.total_parameters == count_parameters(model)

    def size(**fields) -> int:
        # Rotary positions have no weights, but refuse other numbers of heads.
        same = {**config.to_dict(), "head_dim": head_dim_of(config), "rope_parameters": None}
        smaller = type(config).from_dict({**same, **fields})
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(smaller).num_parameters()

    layers, query_heads = config.num_hidden_layers, config.num_attention_heads // config.num_key_value_heads
    assert size() == geometry.total_parameters
    narrower = size(intermediate_size=config.intermediate_size - 1)
    assert geometry.total_parameters - narrower == layers * geometry.group_parameters["mlp"]
    wider = {
        "num_key_value_heads": 2 * config.num_key_value_heads,
        "num_attention_heads": 2 * config.num_key_value_heads * query_heads,
    }
    more = size(**wider) - geometry.total_parameters
    if geometry.family.block("attention").indivisible:
        # Norms that run over all heads grow with their number, and are the whole block's.
        more -= sum(p.numel() for name, p in model.named_parameters() if ".q_norm." in name or ".k_norm." in name)
    assert more == layers * config.num_key_value_heads * geometry.group_parameters["attention"]
    one_layer_less = geometry.total_parameters - size(num_hidden_layers=layers - 1, layer_types=None)
    whole_layer = sum(geometry.widths[0][a] * geometry.group_parameters[a] + geometry.block_parameters[a] for a in AXES)
    assert one_layer_less == whole_layer


def test_block_parameters(model):
    """Norms, the output bias and the per-head norms leave with the block."""
    geometry, layer = Geometry.of(model), model.model.layers[0]

    def numel(*modules) -> int:
        return sum(getattr(p, "numel", int)() for p in modules)

    names = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")
    head_norms = [getattr(layer.self_attn, name).weight for name in names if hasattr(layer.self_attn, name)]
    norms = {"attention": ["input_layernorm"], "mlp": ["post_attention_layernorm"]}
    if model.config.model_type in ("gemma2", "gemma3_text"):
        norms["attention"].append("post_attention_layernorm")
        norms["mlp"] = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if model.config.model_type == "glm4":
        norms["attention"].append("post_self_attn_layernorm")
        norms["mlp"].append("post_mlp_layernorm")
    if model.config.model_type in ("olmo2", "olmo3", "exaone4"):
        norms = {"attention": ["post_attention_layernorm"], "mlp": ["post_feedforward_layernorm"]}
    weights = {axis: [layer.get_submodule(name).weight for name in names] for axis, names in norms.items()}
    bias = [b for b in (layer.self_attn.o_proj.bias,) if b is not None]
    assert geometry.block_parameters["attention"] == numel(*weights["attention"], *head_norms, *bias)
    bias = [b for b in (layer.mlp.down_proj.bias,) if b is not None]
    assert geometry.block_parameters["mlp"] == numel(*weights["mlp"], *bias)


def test_on_the_meta_device(model):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert Geometry.of(empty) == Geometry.of(model)


def test_head_dim_of_old_configs():
    """Configs from before `head_dim` was a field."""
    model = make_model("llama", "mha-tied", head_dim=12)
    config = copy.deepcopy(model.config)
    config.head_dim = None
    assert config.hidden_size // config.num_attention_heads == 12
    model.config = config
    assert Geometry.of(model).head_dim == 12


def test_of_a_ragged_model(llama, geometry):
    kept = [
        {"attention": [0], "mlp": range(7)},
        {"attention": [], "mlp": [3]},
        {"attention": [], "mlp": []},
        {"attention": [0, 1, 2], "mlp": []},
    ]
    ragged = apply_plan(llama, Plan.from_kept(geometry, kept))
    after = Geometry.of(ragged)
    assert after.widths == layer_widths_of(ragged.config) == (LayerWidths(1, 7), LayerWidths(0, 1), LayerWidths(3, 0))
    assert after.group_parameters == geometry.group_parameters
    assert after.block_parameters == geometry.block_parameters
    assert after.total_parameters == count_parameters(ragged)


def test_of_a_model_without_any_attention(llama, geometry):
    ragged = apply_plan(llama, Plan.from_kept(geometry, [{"attention": [], "mlp": [0]}] * 4))
    assert Geometry.of(ragged).group_parameters == {"attention": 0, "mlp": geometry.group_parameters["mlp"]}


# --- indices and sums ---


@given(geometry=geometries(), data=st.data())
def test_indices_partition_every_space(geometry, data):
    layer_idx = data.draw(st.integers(0, len(geometry.widths) - 1))
    for space, axis in (("query", "attention"), ("key_value", "attention"), ("channel", "mlp")):
        groups = geometry.widths[layer_idx][axis]
        owned = [geometry.indices([group], space) for group in range(groups)]
        assert all(indices.dtype == torch.int64 for indices in owned)
        assert [i for indices in owned for i in indices.tolist()] == list(range(geometry.size(layer_idx, space)))
        some = data.draw(st.lists(st.integers(0, groups - 1), max_size=3)) if groups else []
        assert geometry.indices(some, space).tolist() == [i for group in some for i in owned[group].tolist()]


def sums_by_hand(layer, axis: str, config, values) -> list[float]:
    """One weight at a time: which group is it of?"""
    groups = config.num_key_value_heads if axis == "attention" else config.intermediate_size
    query_heads = config.num_attention_heads // config.num_key_value_heads
    totals = [0.0] * groups
    for name, tensor in values.items():
        module, kind = name.split(".")[-2:]
        for index, value in zip(torch.cartesian_prod(*map(torch.arange, tensor.shape)), tensor.flatten(), strict=True):
            index = index.tolist() if tensor.ndim > 1 else [int(index)]
            if module in ("o_proj", "down_proj"):
                if kind == "bias":
                    continue  # of no group
                place = index[1]
            else:
                place = index[0]
            if module in ("q_proj", "o_proj"):
                group = place // config.head_dim // query_heads
            elif module in ("k_proj", "v_proj"):
                group = place // config.head_dim
            else:
                group = place
            totals[group] += float(value)
    return totals


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("variant", ["gqa-biases", "mqa-biases", "mha-tied"])
def test_sum_to_groups(variant, axis):
    model = make_model("llama", variant, hidden_size=24, head_dim=4)
    geometry, layer = Geometry.of(model), model.model.layers[1]
    prefix = "self_attn" if axis == "attention" else "mlp"
    values = {name: p.detach() for name, p in layer.named_parameters() if name.startswith(prefix)}
    actual = geometry.sum_to_groups(1, axis, values)
    assert actual.dtype == torch.float64
    expected = sums_by_hand(layer, axis, model.config, values)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    for projection in geometry.family.block(axis).projections:
        for parameter in ("weight", "bias"):
            if (name := f"{projection.path}.{parameter}") in values:
                alone = geometry.sum_projection_to_groups(1, axis, projection, values[name], squared=True)
                by_hand = sums_by_hand(layer, axis, model.config, {name: values[name] ** 2})
                torch.testing.assert_close(alone, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert geometry.sum_to_groups(1, axis, {}).tolist() == [0.0] * geometry.widths[1][axis]


@given(geometry=geometries(), data=st.data())
def test_parameters_left_adds_up(geometry, data):
    plan = data.draw(plans(geometry.widths, geometry.family.model_type))
    left = geometry.parameters_left(geometry.widths)
    assert left == geometry.total_parameters
    for layer_idx, kept in enumerate(plan.layers):
        for axis in AXES:
            before = geometry.widths[layer_idx][axis]
            left -= (before - len(kept[axis])) * geometry.group_parameters[axis]
            left -= geometry.block_parameters[axis] * (before > 0 and not kept[axis])
    assert geometry.parameters_left(plan.kept_widths) == left


# --- as JSON ---


@given(geometry=geometries())
def test_round_trip(geometry):
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"model_type": None},
        {"layers": [[3]]},
        {"layers": 4},
        {"layers": [["a", "b"]]},
        {"head_dim": None},
        {"total_parameters": float("inf")},
        {"group_parameters": {"attention": 3}},
        {"block_parameters": None},
    ],
    ids=repr,
)
def test_malformed_geometry(geometry, changes):
    with pytest.raises(PlanError, match="malformed model geometry"):
        Geometry.from_dict({**geometry.to_dict(), **changes})
    values = geometry.to_dict()
    del values[next(iter(changes))]
    with pytest.raises(PlanError, match="malformed model geometry"):
        Geometry.from_dict(values)


# --- refusals ---


def test_another_family():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)
    with pytest.raises(
        UnsupportedModelError, match=r"model type 'gpt2' is not supported.*Supported: .*llama, ministral3, mistral"
    ):
        Geometry.of(AutoModelForCausalLM.from_config(config))


def refusal(config) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        family_of(config)
    return str(caught.value)


def test_dense_types_that_do_not_fit_are_told_why():
    for model_type, reason in UNFIT.items():
        assert f"{model_type!r} is not supported: {reason}" in refusal(AutoConfig.for_model(model_type))


def test_no_family_is_guessed_from_a_name():
    message = refusal(SimpleNamespace(model_type="qwen25"))
    assert "'qwen25' is not supported: it is one that this version of transformers does not know" in message
    assert "model type '' is not supported" in refusal(object())
    assert "closest" not in refusal(AutoConfig.for_model("mamba"))


@pytest.mark.parametrize(
    "model_type",
    ["deepseek_v3", "dbrx", "llama4", "phimoe", "minimax"],
)
def test_other_mixtures_of_experts_are_told_which_can_be_cut(model_type):
    """Of whatever name: their configs count experts, at the top or in a part."""
    config = AutoConfig.for_model(model_type)
    pattern = rf"'{model_type}' is not supported: it is .*a mixture of experts\. Of mixtures.*mixtral.*Supported"
    assert re.search(pattern, refusal(config))
    read_from_json = SimpleNamespace(**{**config.to_dict(), "model_type": "unheard_of"})
    assert re.search(pattern.replace(model_type, "unheard_of"), refusal(read_from_json))


STATE = "a state-space or recurrent model, or a hybrid"
DENSE_GRANITE_4 = {"layer_types": ["attention"] * 4, "num_local_experts": 0, "num_experts_per_tok": 0}
DENSE = "a dense model of a type made for mixtures of experts"


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"model_type": "mamba"}, STATE),
        ({"model_type": "falcon_mamba"}, STATE),
        ({"model_type": "rwkv"}, STATE),
        ({"model_type": "recurrent_gemma", "block_types": ["recurrent", "attention"]}, STATE),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, STATE),
        ({"model_type": "bamba"}, STATE),
        ({"model_type": "t5"}, "an encoder-decoder model"),
        ({"model_type": "unheard_of", "is_encoder_decoder": True}, "an encoder-decoder model"),
        ({"model_type": "bert"}, "an encoder"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "'gemma3_text'. Give its folder"),
        ({"model_type": "gemma3"}, "text part (text_config) is of type 'gemma3_text'"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "'llama'. That part can be cut"),
        ({"model_type": "qwen2_5_vl"}, "text part (text_config) is of type 'qwen2_5_vl_text'"),
        ({"model_type": "granitemoehybrid", **DENSE_GRANITE_4}, DENSE),
        ({"model_type": "granitemoehybrid", **DENSE_GRANITE_4, "layer_types": ["mamba", "attention"]}, STATE),
        ({"model_type": "granitemoehybrid", **DENSE_GRANITE_4, "num_local_experts": 8}, "a mixture of experts"),
    ],
)
def test_what_is_known_of_a_type_is_said(fields, known):
    message = refusal(SimpleNamespace(**fields))
    assert known in message
    assert "mixture of experts" in known or ". Of mixtures" not in message


class LoraLike(nn.Module):
    """An adapter beside a block."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.Linear(48, 2, bias=False)


def test_an_adapter_is_named(llama):
    llama.model.layers[2].mlp.adapter = LoraLike()
    with pytest.raises(UnsupportedModelError, match=r"layer 2 holds 'mlp.adapter.lora_A'.*[Mm]erge adapters"):
        Geometry.of(llama)


def test_parameters_outside_any_module_are_named(llama):
    llama.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedModelError, match="layer 1 holds 'self_attn'"):
        Geometry.of(llama)


class Int4Linear(nn.Linear):
    pass


class Packed(nn.Module):
    """A quantised linear module that is none of torch's: its weight is no parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


@pytest.mark.parametrize("quantised", [Int4Linear(48, 20, bias=False), Packed()], ids=lambda m: type(m).__name__)
def test_quantised_projections_are_named(llama, quantised):
    llama.model.layers[3].mlp.up_proj = quantised
    message = rf"layer 3: mlp.up_proj is a {type(quantised).__name__}, not a plain torch.nn.Linear.*bf16"
    with pytest.raises(UnsupportedModelError, match=message):
        Geometry.of(llama)


def test_parametrised_weights_are_refused(llama):
    nn.utils.parametrizations.weight_norm(llama.model.layers[0].self_attn.q_proj)
    with pytest.raises(UnsupportedModelError, match=r"layer 0.*self_attn\.q_proj"):
        Geometry.of(llama)


@pytest.mark.parametrize("path", ["mlp.gate_proj", "self_attn.o_proj", "input_layernorm", "post_attention_layernorm"])
def test_missing_modules_are_named(llama, path):
    parent, _, name = path.rpartition(".")
    delattr(submodule(llama.model.layers[1], parent), name)
    with pytest.raises(UnsupportedModelError, match=f"layer 1 has no '{path}', which the family 'llama' describes"):
        Geometry.of(llama)


def test_a_decoder_without_its_head_is_refused(llama):
    """`AutoModel` instead of `AutoModelForCausalLM`."""
    with pytest.raises(UnsupportedModelError, match=r"a LlamaModel, a decoder without an output head.*causal language"):
        Geometry.of(LlamaModel(llama.config))


def test_shapes_that_the_config_does_not_imply(llama):
    llama.model.layers[2].self_attn.k_proj = nn.Linear(48, 16, bias=False)
    with pytest.raises(
        UnsupportedModelError, match=r"layer 2: self_attn.k_proj.weight has shape \(16, 48\).*\(24, 48\)"
    ):
        Geometry.of(llama)


def test_as_many_layers_as_the_config_says(llama):
    del llama.model.layers[3]
    with pytest.raises(UnsupportedModelError, match="describes 4 decoder layers, the model has 3"):
        Geometry.of(llama)


def test_the_model_stays_as_it_is(llama):
    before = copy.deepcopy(llama.state_dict())
    Geometry.of(llama)
    assert llama.state_dict().keys() == before.keys()
    assert isinstance(llama.config, LlamaConfig)
