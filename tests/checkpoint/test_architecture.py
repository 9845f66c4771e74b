"""Which class and config a set of widths gets, and empty models."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import ALL, HEAD_DIM, LAYERS, RAGGED, Kept, cut, dense_config, dense_model, zeroed
from transformers import AutoConfig, AutoModelForCausalLM

from prunus.checkpoint import empty_model, is_ragged, pruned_config
from prunus.checkpoint.configuration_prunus import rope_fields_of_transformers_4
from prunus.errors import PlanError, UnsupportedModelError
from prunus.model.widths import LayerWidths, layer_widths_of

EVERY = range(LAYERS)


@pytest.mark.parametrize("tied", [False, True])
def test_equal_widths_give_the_stock_class(family, tied, input_ids):
    model = dense_model(family, (4, 2), tie_word_embeddings=tied)
    kept = tuple(Kept((i % 2,), ALL[i : i + 9]) for i in EVERY)
    narrow = cut(model, kept)
    assert narrow.config.model_type == family
    assert type(narrow) is type(model)
    assert (narrow.config.num_attention_heads, narrow.config.num_key_value_heads) == (2, 1)
    assert narrow.config.head_dim == HEAD_DIM
    with torch.no_grad():
        torch.testing.assert_close(
            narrow(input_ids).logits, zeroed(model, kept)(input_ids).logits, rtol=1e-4, atol=1e-4
        )


def test_keeping_everything_keeps_the_config(family):
    config = dense_config(family)
    again = pruned_config(config, [LayerWidths(2, 24)] * LAYERS, EVERY)
    assert type(again) is type(config)
    assert {k: v for k, v in again.to_dict().items() if k != "dtype"} == {
        k: v for k, v in config.to_dict().items() if k != "dtype"
    }


def test_fewer_layers_of_full_width_are_stock(family):
    config = dense_config(family)
    shallow = pruned_config(config, [LayerWidths(2, 24)] * 2, [0, 3])
    assert (shallow.model_type, shallow.num_hidden_layers, is_ragged(shallow)) == (family, 2, False)


def test_layer_types_follow_the_layers_that_are_left():
    config = dense_config("qwen3", use_sliding_window=True, sliding_window=6, max_window_layers=2)
    shallow = pruned_config(config, [LayerWidths(2, 24)] * 3, [1, 2, 3])
    assert shallow.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert (shallow.max_window_layers, shallow.sliding_window, shallow.use_sliding_window) == (1, 6, True)
    # What a reader that knows only max_window_layers concludes.
    derived = type(shallow)(**{**shallow.to_dict(), "layer_types": None})
    assert derived.layer_types == shallow.layer_types


def test_an_odd_number_of_heads_turns_llama_into_mistral(input_ids):
    model = dense_model("llama", (4, 4))
    kept = (Kept((0, 2, 3), ALL[:20]),) * LAYERS  # 3 heads do not divide a hidden size of 32
    narrow = cut(model, kept)
    assert (narrow.config.model_type, narrow.config.sliding_window) == ("mistral", None)
    assert not hasattr(narrow.config, "attention_bias")
    with torch.no_grad():
        torch.testing.assert_close(
            narrow(input_ids).logits, zeroed(model, kept)(input_ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_stays_llama(bias, input_ids):
    model = dense_model("llama", (4, 4), **{bias: True})
    kept = (Kept((0, 2, 3), ALL[:20]),) * LAYERS
    narrow = cut(model, kept)
    assert narrow.config.model_type == "prunus_llama"
    with torch.no_grad():
        torch.testing.assert_close(
            narrow(input_ids).logits, zeroed(model, kept)(input_ids).logits, rtol=1e-4, atol=1e-4
        )


def test_ragged_config_keeps_the_dense_fields(family):
    config = dense_config(family, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    ragged = pruned_config(config, [LayerWidths(1, 24), LayerWidths(2, 7)], [0, 2])
    assert ragged.model_type == f"prunus_{family}"
    assert (ragged.num_attention_heads, ragged.num_key_value_heads, ragged.intermediate_size) == (4, 2, 24)
    assert (ragged.num_hidden_layers, ragged.head_dim) == (2, HEAD_DIM)
    assert ragged.rope_parameters == config.rope_parameters
    assert layer_widths_of(ragged) == (LayerWidths(1, 24), LayerWidths(2, 7))
    assert config.num_hidden_layers == LAYERS, "the config of the model that is cut must stay as it was"


def test_ragged_config_round_trips(family, tmp_path):
    config = cut(dense_model(family), RAGGED).config
    fields = config.to_dict()
    assert json.loads(json.dumps(fields))["layer_widths"] == fields["layer_widths"]
    assert type(config).from_dict(fields).to_dict() == fields
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.layer_widths == config.layer_widths
    assert loaded.head_dim == HEAD_DIM


def test_head_dim_is_explicit_where_the_family_derives_it():
    config = AutoConfig.for_model("qwen2", hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    for widths in ([LayerWidths(1, 8)] * 2, [LayerWidths(1, 8), LayerWidths(2, 8)]):
        assert pruned_config(config, widths, [0, 1]).to_dict()["head_dim"] == 8


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"num_hidden_layers": 3}, "describes 4 layers"),
        (
            {"layer_widths": [{"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 3}] * 4},
            "2 query",
        ),
        (
            {"layer_widths": [{"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": -3}] * 4},
            "negat",
        ),
    ],
)
def test_inconsistent_widths_are_refused(family, fields, complaint):
    config = cut(dense_model(family), RAGGED).config
    with pytest.raises(ValueError, match=complaint):
        type(config)(**{**config.to_dict(), **fields})


def test_a_config_that_was_edited_into_nonsense_is_not_saved(family, tmp_path):
    config = cut(dense_model(family), RAGGED).config
    config.layer_widths.pop()
    with pytest.raises(StrictDataclassError, match="describes 3 layers"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("widths", "indices", "complaint"),
    [
        ([], [], "no decoder layer"),
        ([LayerWidths(1, 1)], [0, 1], "1 layer widths were given for 2"),
        ([LayerWidths(1, 1), LayerWidths(0, 0)], [0, 3], "layer 3 keeps neither"),
        ([LayerWidths(1, 1)] * 2, [1, 0], "not increasing"),
        ([LayerWidths(1, 1)] * 2, [0, 4], "not increasing"),
    ],
)
def test_impossible_layers_are_refused(widths, indices, complaint):
    with pytest.raises(PlanError, match=complaint):
        pruned_config(dense_config("llama"), widths, indices)


def test_per_layer_config_is_refused():
    config = dense_config("llama", per_layer_config={"1": {"intermediate_size": 8}})
    with pytest.raises(UnsupportedModelError, match="per_layer_config"):
        pruned_config(config, [LayerWidths(2, 24)] * LAYERS, EVERY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [LayerWidths(1, 9), LayerWidths(0, 9)], ids=["stock", "ragged"])
def test_empty_model(family, dtype, widths):
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = dense_config(family, rope_parameters={**rope, "original_max_position_embeddings": 64})
    config = pruned_config(config, [widths] * LAYERS, EVERY)
    empty = empty_model(config, dtype)
    real = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert type(empty) is type(real)
    assert all(parameter.is_meta and parameter.dtype == dtype for parameter in empty.parameters())
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    buffers = dict(real.named_buffers())
    assert buffers
    for name, buffer in empty.named_buffers():
        assert not buffer.is_meta
        assert torch.equal(buffer, buffers[name]), name
        assert buffer.dtype == buffers[name].dtype
    assert not empty.training


def test_empty_model_refuses_buffers_that_nobody_sets(monkeypatch):
    config = dense_config("llama")
    monkeypatch.setattr(AutoModelForCausalLM._model_mapping[type(config)], "_init_weights", lambda self, module: None)
    with pytest.raises(UnsupportedModelError, match="inv_freq"):
        empty_model(config, torch.float32)


def test_attention_implementation_is_kept(family):
    model = dense_model(family)
    model.set_attn_implementation("eager")
    assert cut(model, RAGGED).config._attn_implementation == "eager"
    assert cut(model, (Kept((0,), ALL),) * LAYERS).config._attn_implementation == "eager"


def test_longrope_factors_fix_the_stock_class_to_one_number_of_heads():
    """Phi3Config counts them against hidden size over heads: with fewer heads only the class of ragged models fits."""
    factors = [1.0, 1.5, 2.0, 4.0]
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    config = dense_config("phi3", rope_parameters=longrope)
    fewer_heads = pruned_config(config, [Kept((1,), ALL).widths] * LAYERS, EVERY)
    assert is_ragged(fewer_heads)
    assert fewer_heads.rope_parameters["long_factor"] == factors
    fewer_channels = pruned_config(config, [Kept((0, 1), ALL[:5]).widths] * LAYERS, EVERY)
    assert fewer_channels.model_type == "phi3"


GLOBAL, LOCAL = {"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}


@pytest.mark.parametrize(
    ("model_type", "rope_parameters", "fields"),
    [
        ("qwen3", GLOBAL, {"rope_theta": 1e6, "rope_scaling": None}),
        ("llama", LINEAR, {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        (
            "prunus_phi3",
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0],
                "long_factor": [2.0],
                "original_max_position_embeddings": 64,
            },
            {
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
            },
        ),
        (
            "gemma3_text",
            {"full_attention": LINEAR, "sliding_attention": LOCAL},
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        ("llama", {}, {}),
    ],
)
def test_rotary_fields_of_transformers_4(model_type, rope_parameters, fields):
    before = copy.deepcopy(rope_parameters)
    assert rope_fields_of_transformers_4(model_type, rope_parameters) == fields
    assert rope_parameters == before
