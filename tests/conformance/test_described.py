"""Every linear module of a decoder layer is described by its family, or the model is refused by the module's name."""

from __future__ import annotations

import pytest
import torch
from tiny_families import (
    CASES,
    DENSE,
    ONE_UNLIKE,
    VARIANTS,
    case_id,
    groups_of,
    make_model,
    tiny_config,
    weights_of_group,
)
from torch import nn

from prunus.errors import UnsupportedModelError
from prunus.model.families import AXES, FAMILIES
from prunus.model.geometry import Geometry
from prunus.model.loss import chunked_cross_entropy, head_function, next_token_labels


class Quantised(nn.Linear):
    """Stands for the linear modules of quantisation libraries, which derive from torch's."""


class LowRank(nn.Module):
    """Stands for an adapter around a linear module."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)


@pytest.fixture
def family(tiny):
    return tiny.family


def replace(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, module)


def test_every_linear_is_described(tiny):
    described = {projection.path for projection in tiny.family.projections}
    for layer in tiny.model.get_submodule(tiny.family.layers):
        found = {path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        assert found == described
        for block in tiny.family.blocks:
            for path in (*block.norms, *block.untouched):
                assert "norm" in path
                assert layer.get_submodule(path).weight.ndim == 1
    for path in (tiny.family.embedding, tiny.family.head, tiny.family.final_norm):
        assert tiny.model.get_submodule(path).weight.numel()


def test_every_weight_of_a_projection_has_one_owner(tiny):
    """The slices of all groups partition each weight, rows and columns alike; so do the geometry's indices."""
    for layer_idx, layer in enumerate(tiny.model.get_submodule(tiny.family.layers)):
        for axis in AXES:
            owners = {}
            for group in range(groups_of(layer, axis, tiny.model.config)):
                for name, index in weights_of_group(layer, axis, group, tiny.model.config):
                    counts = owners.setdefault(name, torch.zeros_like(layer.get_parameter(name)))
                    counts[index] += 1
                    # A value of 1 at this group's weights and 0 elsewhere sums to this group alone.
                    mark = torch.zeros_like(layer.get_parameter(name))
                    mark[index] = 1
                    sums = tiny.geometry.sum_to_groups(layer_idx, axis, {name: mark})
                    expected = torch.zeros_like(sums)
                    expected[group] = mark.sum()
                    assert torch.equal(sums, expected), (name, group)
            assert all(bool((counts == 1).all()) for counts in owners.values())
            biases = {f"{p.path}.bias" for p in tiny.family.block(axis).projections if p.outputs != ("residual",)}
            weights = {f"{p.path}.weight" for p in tiny.family.block(axis).projections}
            assert owners.keys() == weights | {name for name in biases if name in dict(layer.named_parameters())}


def adds(block):
    """Path of the module whose output the decoder layer adds to the residual stream."""
    return block.post_norm or (block.module if block.experts else block.output.path)


def test_a_layer_answers_its_input_and_what_its_blocks_add(tiny):
    """What repair and layer priors build upon, and the loss of the whole model on the head's own factors."""
    seen = {}
    layer = tiny.model.get_submodule(tiny.family.layers)[1]

    def note(path):
        return lambda module, args, kwargs, output: seen.update({path: (args[0] if args else None, output)})

    paths = ["", *(adds(block) for block in tiny.family.blocks)]
    handles = [layer.get_submodule(path).register_forward_hook(note(path), with_kwargs=True) for path in paths]
    with torch.no_grad():
        loss = tiny.model(tiny.input_ids, labels=tiny.input_ids).loss
        hidden = tiny.model.model(tiny.input_ids).last_hidden_state
        losses = chunked_cross_entropy(hidden, head_function(tiny.model), next_token_labels(tiny.input_ids), chunk=5)
    for handle in handles:
        handle.remove()
    entered, left = seen[""]
    added = sum(seen[adds(block)][1] for block in tiny.family.blocks)
    torch.testing.assert_close(entered + tiny.family.residual_scale(tiny.model.config) * added, left)
    torch.testing.assert_close(losses.sum() / tiny.input_ids[:, 1:].numel(), loss)


@pytest.mark.parametrize("place", ["", "self_attn.", "mlp."], ids=["layer", "attention", "mlp"])
@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_an_additional_linear_is_refused(case, place):
    model = make_model(*case)
    layer = model.get_submodule(FAMILIES[case[0]].layers)[1]
    replace(layer, place + "extra_proj", nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match=rf"layer 1 holds '{place}extra_proj' \(Linear\).*{case[0]}"):
        Geometry.of(model)


@pytest.mark.parametrize("wrapper", [Quantised, LowRank])
@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_a_changed_projection_is_refused(case, wrapper):
    for projection in FAMILIES[case[0]].projections:
        model = make_model(*case)
        layer = model.get_submodule(FAMILIES[case[0]].layers)[1]
        linear = layer.get_submodule(projection.path)
        if wrapper is Quantised:
            replace(layer, projection.path, Quantised(linear.in_features, linear.out_features))
        else:
            replace(layer, projection.path, LowRank(linear))
        with pytest.raises(UnsupportedModelError, match=rf"layer 1.*{projection.path}"):
            Geometry.of(model)


def test_every_family_has_tiny_models():
    assert VARIANTS.keys() == DENSE.keys()
    # How heads are laid out is a matter of the projections: families that have the same ones are tested together.
    for projections in {family.projections for family in DENSE.values()}:
        alike = [model_type for model_type, family in DENSE.items() if family.projections == projections]
        configs = [tiny_config(*case) for case in CASES if case[0] in alike]
        heads = {(c.num_attention_heads, c.num_key_value_heads) for c in configs}
        assert any(q > kv > 1 for q, kv in heads), f"{alike} lack a variant with grouped queries"
        assert any(q == kv for q, kv in heads), f"{alike} lack a variant with one query head per key/value head"
        assert any(q > kv == 1 for q, kv in heads), f"{alike} lack a variant with one key/value head"
        assert {c.tie_word_embeddings for c in configs} == {True, False}, f"{alike} lack tied or untied"


def test_a_family_without_a_tiny_model_fails_with_what_to_add():
    with pytest.raises(pytest.fail.Exception, match=r"'unheard_of' has no tiny model.*add an entry to VARIANTS"):
        tiny_config("unheard_of", "missing")
