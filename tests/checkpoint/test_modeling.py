"""A ragged model computes what the dense model computes with the cut groups' outputs zeroed."""

from __future__ import annotations

import pytest
import torch
from tiny_families import DENSE
from tiny_models import ALL, INTERMEDIATE, LAYERS, RAGGED, Kept, cut, dense_model, zeroed
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from prunus.checkpoint import is_ragged, modeling_prunus, pruned_config
from prunus.model.geometry import Geometry

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ABSENT = {
    "attention of the first layer": (Kept((), ALL), *[Kept((0, 1), ALL)] * 3),
    "attention of a middle layer": (Kept((0, 1), ALL), Kept((), (1, 2)), *[Kept((0, 1), ALL)] * 2),
    "attention of the last layer": (*[Kept((1,), ALL)] * 3, Kept((), ALL)),
    "every attention": (Kept((), ALL[:7]),) * LAYERS,
    "an MLP": (Kept((0, 1), ALL), Kept((1,), ()), *[Kept((0, 1), ALL[5:])] * 2),
    "every MLP": (Kept((0, 1), ()), *[Kept((1,), ())] * 3),
    "a layer": (Kept((0,), ALL), Kept((), ()), Kept((), ALL), Kept((0, 1), (3,))),
}


def logits(model, input_ids, **kwargs):
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 2), (4, 1)], ids=["gqa", "mha", "gqa-wide", "mqa"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_equal_the_zeroed_dense_model(family, heads, tied, input_ids):
    # With an odd number of heads LlamaConfig refuses this hidden size, as it does in real life.
    heads = (4, 4) if family == "llama" and heads[0] in (3, 6) else heads
    model = dense_model(family, heads, tie_word_embeddings=tied)
    last = heads[1] - 1
    kept = (Kept((), (0, 5, 6)), Kept((last,), ()), Kept((0,), ALL[3:20]), Kept(tuple(range(heads[1])), ALL))
    ragged = cut(model, kept)
    assert is_ragged(ragged.config)
    expected = logits(zeroed(model, kept), input_ids)
    torch.testing.assert_close(logits(ragged, input_ids), expected, **CLOSE)
    assert not torch.allclose(logits(model, input_ids), expected, **CLOSE), "the cut must matter for this to be a test"
    assert (ragged.lm_head.weight is ragged.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("kept", ABSENT.values(), ids=ABSENT)
def test_absent_blocks(family, kept, input_ids):
    model = dense_model(family)
    ragged = cut(model, kept)
    torch.testing.assert_close(logits(ragged, input_ids), logits(zeroed(model, kept), input_ids), **CLOSE)
    for layer, keep in zip(ragged.model.layers, [k for k in kept if k.heads or k.channels], strict=True):
        assert any(p.numel() for p in layer.self_attn.parameters()) == bool(keep.heads)
        assert any(p.numel() for p in layer.mlp.parameters()) == bool(keep.channels)


def test_geometry_reads_ragged_models(family):
    ragged = cut(dense_model(family), RAGGED)
    geometry = Geometry.of(ragged)
    assert geometry.widths == tuple(keep.widths for keep in RAGGED)
    assert geometry.total_parameters == sum(p.numel() for p in ragged.parameters())


def test_a_ragged_model_can_be_cut_again(family, input_ids):
    model = dense_model(family)
    once = (Kept((0, 1), ALL[:20]), Kept((1,), ALL[:20]), Kept((), ALL), Kept((0, 1), ()))
    ragged = cut(model, once)
    narrower = pruned_config(ragged.config, [keep.widths for keep in once[:2]], [0, 1])
    assert [w["intermediate_size"] for w in narrower.layer_widths] == [20, 20]
    uniform = pruned_config(ragged.config, [Kept((1,), ALL[:20]).widths] * 2, [0, 1])
    assert (uniform.model_type, uniform.num_attention_heads, uniform.intermediate_size) == (family, 2, 20)


def test_the_families_agree_on_norms():
    """The norms that leave with a block are named in two places, since checkpoints carry one of them with them."""
    for model_type, family in DENSE.items():
        config_class = type(AutoConfig.for_model(f"prunus_{model_type}"))
        for auto_class in (AutoModel, AutoModelForCausalLM):
            model_class = auto_class._model_mapping[config_class]
            assert model_class.attention_norms == family.block("attention").norms
            assert model_class.mlp_norms == family.block("mlp").norms


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(family, implementation, input_ids):
    model = dense_model(family)
    ragged = cut(model, RAGGED)
    ragged.set_attn_implementation(implementation)
    assert {layer.self_attn.config._attn_implementation for layer in ragged.model.layers[1:]} == {implementation}
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    actual, expected = (logits(m, input_ids, attention_mask=mask) for m in (ragged, zeroed(model, RAGGED)))
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **CLOSE)


def test_hidden_states(family, input_ids):
    model = dense_model(family)
    oracle = zeroed(model, RAGGED)
    ragged = cut(model, RAGGED)
    for m in (ragged, oracle):
        m.set_attn_implementation("eager")
    actual, expected = (m(input_ids, output_hidden_states=True, output_attentions=True) for m in (ragged, oracle))
    torch.testing.assert_close(actual.hidden_states, expected.hidden_states, **CLOSE)
    assert len(actual.attentions) == LAYERS


def test_new_models_are_initialised_like_stock_ones(family):
    config = cut(dense_model(family), RAGGED).config
    config.initializer_range = 0.1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ in modeling_prunus.__all__
    assert config.num_hidden_layers == LAYERS
    for layer in (model.model.layers[2], model.model.layers[3]):
        assert float(layer.self_attn.q_proj.weight.detach().std()) == pytest.approx(0.1, rel=0.15)
        assert float(layer.mlp.down_proj.weight.detach().std()) == pytest.approx(0.1, rel=0.15)
        assert torch.equal(layer.input_layernorm.weight, torch.ones_like(layer.input_layernorm.weight))
    decoder = AutoModel.from_config(config)
    assert len(decoder.layers) == LAYERS
    assert isinstance(decoder.layers[0].input_layernorm, nn.Identity)
    assert decoder.layers[3].mlp.up_proj.out_features == INTERMEDIATE


@pytest.mark.parametrize("as_tuple", [False, True], ids=["output", "tuple"])
@pytest.mark.parametrize("kept", [RAGGED, *ABSENT.values()], ids=["ragged", *ABSENT])
def test_attention_weights_stand_at_their_layers(family, kept, as_tuple, input_ids):
    dense = dense_model(family)
    ragged = cut(dense, kept)
    oracle = zeroed(dense, kept)
    for model in (oracle, ragged):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = oracle(input_ids, output_attentions=True).attentions
        output = ragged(input_ids, output_attentions=True, return_dict=not as_tuple)
    actual = output[-1] if as_tuple else output.attentions
    left = [(keep, weights) for keep, weights in zip(kept, expected, strict=True) if keep.heads or keep.channels]
    assert len(actual) == len(left)
    for weights, (keep, whole) in zip(actual, left, strict=True):
        if not keep.heads:
            assert weights is None
            continue
        query_heads = [2 * head + i for head in keep.heads for i in range(2)]
        torch.testing.assert_close(weights, whole[:, query_heads], **CLOSE)
