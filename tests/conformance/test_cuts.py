"""A cut model computes what the whole one computes without the cut groups, and is as large as was promised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_families import count_parameters, groups_of, logits, plan_keeping, random_tokens, zeroed
from torch import nn

from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.model.widths import layer_widths_of
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan

CLOSE = {"rtol": 1e-4, "atol": 1e-4}

#: what stays of layer 0 and layer 1, given the number of groups: whole blocks and layers gone, first and last group
#: kept, groups from the middle
KEPT: dict[str, Callable[[int, int], list[dict[str, list[int]]]]] = {
    "one group each": lambda a, m: [{"attention": [a - 1], "mlp": [m - 1]}, {"attention": [0], "mlp": [0]}],
    "other widths in each layer": lambda a, m: [
        {"attention": [*range(a)][1:] or [0], "mlp": [*range(0, m, 2)]},
        {"attention": [*range(a)], "mlp": [*range(m)][3:-2]},
    ],
    "no attention in layer 0": lambda a, m: [
        {"attention": [], "mlp": [*range(m)]},
        {"attention": [*range(a)], "mlp": [*range(m)]},
    ],
    "no MLP in layer 1": lambda a, m: [
        {"attention": [*range(a)], "mlp": [*range(m)]},
        {"attention": [*range(a)], "mlp": []},
    ],
    "no attention anywhere": lambda a, m: [{"attention": [], "mlp": [1, 5]}, {"attention": [], "mlp": [*range(m)]}],
    "no MLP anywhere": lambda a, m: [{"attention": [0], "mlp": []}, {"attention": [*range(a)], "mlp": []}],
    "no layer 0": lambda a, m: [{"attention": [], "mlp": []}, {"attention": [*range(a)][-1:], "mlp": [2, 3, 7]}],
    "no layer 1": lambda a, m: [{"attention": [*range(a)][:1], "mlp": [*range(m)]}, {"attention": [], "mlp": []}],
    "only one MLP": lambda a, m: [{"attention": [], "mlp": []}, {"attention": [], "mlp": [*range(1, m)]}],
}


def check_size(pruned, plan: Plan, geometry: Geometry) -> None:
    """Parameters as the geometry predicts, and modules of the widths that plan and config say."""
    assert count_parameters(pruned) == geometry.parameters_left(plan.kept_widths)
    after = Geometry.of(pruned)  # compares every projection's shape with the config
    expected = tuple(plan.kept_widths[layer_idx] for layer_idx in plan.surviving_layers)
    assert after.widths == expected == layer_widths_of(pruned.config)
    assert after.total_parameters == geometry.parameters_left(plan.kept_widths)
    assert pruned.config.num_hidden_layers == len(expected) == len(pruned.get_submodule(after.family.layers))
    for layer, widths in zip(pruned.get_submodule(after.family.layers), expected, strict=True):
        for axis in AXES:
            assert groups_of(layer, axis, pruned.config) == widths[axis]
            block = after.family.block(axis)
            left = [layer.get_submodule(path) for path in (block.module, *block.norms)]
            assert all(any(p.numel() for p in module.parameters()) == bool(widths[axis]) for module in left)


def test_keeping_everything_changes_no_bit(tiny):
    plan = Plan.keep_all(tiny.geometry)
    same = apply_plan(tiny.model, plan)
    assert type(same) is type(tiny.model)
    for ids in (tiny.input_ids, random_tokens(1, 30, seed=4)):
        assert torch.equal(logits(same, ids), logits(tiny.model, ids))
    assert same.state_dict().keys() == tiny.model.state_dict().keys()
    for name, tensor in tiny.model.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor), name
    ours = {p.data_ptr() for p in same.parameters()}
    assert not ours & {p.data_ptr() for p in tiny.model.parameters()}, "the new model has weights of its own"
    check_size(same, plan, tiny.geometry)


def test_the_cut_groups_are_gone_and_nothing_else(tiny, axes):
    plan = tiny.plan(axes)
    cut_axes = {
        axis
        for before, kept in zip(plan.widths, plan.layers, strict=True)
        for axis in AXES
        if len(kept[axis]) < before[axis]
    }
    assert cut_axes, "the plan must cut something for this to be a test"
    assert axes == "both" or cut_axes == {axes}
    expected = logits(zeroed(tiny.model, plan.layers), tiny.input_ids)
    torch.testing.assert_close(logits(tiny.pruned(axes), tiny.input_ids), expected, **CLOSE)
    assert not torch.allclose(logits(tiny.model, tiny.input_ids), expected, atol=1e-2), "the cut must matter"


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_whole_blocks_and_layers(tiny, kept):
    groups = tiny.geometry.widths[0]
    plan = plan_keeping(tiny.geometry, kept(groups["attention"], groups["mlp"]))
    pruned = apply_plan(tiny.model, plan)
    expected = logits(zeroed(tiny.model, plan.layers), tiny.input_ids)
    torch.testing.assert_close(logits(pruned, tiny.input_ids), expected, **CLOSE)
    assert not torch.allclose(logits(tiny.model, tiny.input_ids), expected, atol=1e-2), "the cut must matter"
    check_size(pruned, plan, tiny.geometry)


def test_the_size_is_as_predicted(tiny, axes):
    plan, geometry = tiny.plan(axes), tiny.geometry
    check_size(tiny.pruned(axes), plan, geometry)
    assert count_parameters(tiny.model) == geometry.total_parameters


def test_padding_changes_nothing(tiny):
    """A padded batch gives the logits of its sequences alone, in the cut model as in the whole one."""
    pruned = tiny.pruned("both")
    ids = tiny.input_ids
    padded = torch.cat([torch.zeros_like(ids[:, :4]), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 4).long().expand_as(padded)
    counted = {"attention_mask": mask, "position_ids": (torch.arange(padded.shape[1]) - 4).clamp(min=0)[None]}
    torch.testing.assert_close(logits(pruned, padded, **counted)[:, 4:], logits(pruned, ids), **CLOSE)


def test_pruned_weights_are_weights(tiny, axes):
    """Contiguous, trainable, on no one else's memory; tied where they were tied."""
    pruned = tiny.pruned(axes)
    theirs = {p.data_ptr() for p in tiny.model.parameters()}
    for name, parameter in pruned.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert parameter.is_contiguous(), name
        assert parameter.requires_grad, name
        assert not parameter.is_meta, name
        assert parameter.data_ptr() not in theirs, name
    tied = tiny.model.config.tie_word_embeddings
    assert (pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight) == tied
    assert pruned.config.tie_word_embeddings == tied
