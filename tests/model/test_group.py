"""A printed group names exactly what a cut without it removes."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from tiny_families import UNLIKE, case_id, make_model
from tiny_folder import SIZES, run

from prunus.errors import OptionError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.model.group import Group
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", UNLIKE, ids=case_id)
def test_its_parts_are_what_surgery_removes(case, axis):
    model = make_model(*case)
    geometry = Geometry.of(model)
    if geometry.family.block(axis).indivisible:
        pytest.skip("its groups go together")
    biases = frozenset(p.path for p in geometry.family.projections if hasattr_bias(model, geometry, p.path))
    last = geometry.widths[1][axis] - 1
    for index in sorted({0, last // 2, last}):
        group = Group(geometry, 1, axis, index, biases)
        kept = [{each: range(widths[each]) for each in AXES} for widths in geometry.widths]
        kept[1][axis] = [other for other in range(geometry.widths[1][axis]) if other != index]
        if not kept[1][axis]:
            continue
        cut = dict(apply_plan(model, Plan.from_kept(geometry, kept)).named_parameters())
        parts = list(group.parts())
        assert sum(part.parameters for part in parts) == group.cost
        for name, before in model.named_parameters():
            left = before.detach()
            for part in sorted((part for part in parts if part.tensor == name), key=lambda part: -part.start):
                assert part.parameters == left.narrow(part.dim, part.start, part.stop - part.start).numel()
                stay = [i for i in range(left.shape[part.dim]) if not part.start <= i < part.stop]
                left = left.index_select(part.dim, torch.tensor(stay))
            assert torch.equal(left, cut[name]), name


def hasattr_bias(model, geometry, path):
    return model.get_submodule(f"{geometry.family.layers}.0.{path}").bias is not None


def test_how_it_is_printed(llama):
    printed = str(Group.parse("2:mlp:17", Geometry.of(llama)))
    assert printed.splitlines() == [
        "layer 2, mlp group 17: 144 parameters",
        "  model.layers.2.mlp.gate_proj.weight: row 17, 48 parameters",
        "  model.layers.2.mlp.up_proj.weight: row 17, 48 parameters",
        "  model.layers.2.mlp.down_proj.weight: column 17, 48 parameters",
    ]
    assert "model.layers.0.self_attn.q_proj.weight: rows 16–31, 768 parameters" in str(
        Group.parse("0:attention:1", Geometry.of(llama))
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("17", "is not LAYER:AXIS:GROUP"),
        ("0:heads:1", "is not LAYER:AXIS:GROUP"),
        ("-1:mlp:1", "is not LAYER:AXIS:GROUP"),
        ("4:mlp:1", "layers 0 to 3"),
        ("0:attention:3", "groups 0 to 2"),
    ],
)
def test_what_is_no_group(llama, text, message):
    with pytest.raises(OptionError, match=message):
        Group.parse(text, Geometry.of(llama))


def test_as_typed_with_a_table(capsys, tmp_path, folder, text):
    run(capsys, "score", folder, "--out", tmp_path / "scores", "--calibration", text, *SIZES)
    words = ["inspect", folder, "--group", "1:attention:2", "--table", tmp_path / "scores"]
    printed = run(capsys, *words).out
    assert "model.layers.1.self_attn.o_proj.weight" in printed
    facts = json.loads(run(capsys, *words, "--json").out)
    table = pd.read_csv(tmp_path / "scores" / "groups.csv")
    row = table.query("layer_idx == 1 and group_type == 'attention' and group_idx == 2")
    assert facts["importance"] == row["importance"].item()
    assert facts["score"] == row["score"].item()
    assert facts["rank"] == row.index.item() + 1
    assert facts["of"] == len(table)
    assert facts["cost"] == sum(part["parameters"] for part in facts["parts"])
