"""Hypothesis strategies: shapes of models, importances, plans, and damage to files."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from tiny_families import DENSE, undivided

from prunus.model.families import AXES, FAMILIES
from prunus.model.geometry import Geometry
from prunus.model.widths import LayerWidths
from prunus.selection.latency_profile import LatencyProfile, PhaseTimes, ProfiledShape
from prunus.selection.plan import KeptGroups, Plan
from prunus.selection.table import build_table

#: scores whose sums are exact in floating point, with many ties
exact_scores = st.integers(0, 12).map(lambda n: n / 4)
any_scores = st.one_of(st.just(0.0), st.floats(1e-9, 1e9))
seconds = st.floats(0, 1, allow_subnormal=False)


@st.composite
def layer_widths(draw: Any, max_layers: int = 5, max_attention: int = 4, max_mlp: int = 14) -> tuple[LayerWidths, ...]:
    """Widths of layers, ragged ones too; at least one block is there."""
    layer = st.builds(LayerWidths, st.integers(0, max_attention), st.integers(0, max_mlp))
    layers = draw(st.lists(layer, min_size=1, max_size=max_layers))
    if not any(widths[axis] for widths in layers for axis in AXES):
        layers[0] = LayerWidths(1, 1)
    return tuple(layers)


#: families in which every group can go by itself
DIVISIBLE = sorted(name for name, family in DENSE.items() if not any(block.indivisible for block in family.blocks))


@st.composite
def geometries(draw: Any, model_types: Sequence[str] = DIVISIBLE) -> Geometry:
    """Shapes of models; costs are free, as long as they add up."""
    widths = draw(layer_widths())
    there = {axis: any(layer[axis] for layer in widths) for axis in AXES}
    group = {axis: draw(st.integers(1, 40)) if there[axis] else 0 for axis in AXES}
    block = {axis: draw(st.integers(0, 30)) if there[axis] else 0 for axis in AXES}
    rest = draw(st.integers(1, 200))
    inside = sum(layer[axis] * group[axis] + bool(layer[axis]) * block[axis] for layer in widths for axis in AXES)
    return Geometry(
        family=FAMILIES[draw(st.sampled_from(model_types))],
        hidden_size=8,
        head_dim=2,
        num_key_value_groups=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 50)),
        widths=widths,
        windows=tuple(draw(st.sampled_from([None, 2, 5])) for _ in widths),
        total_parameters=rest + inside,
        group_parameters=group,
        block_parameters=block,
    )


@st.composite
def tables(draw: Any, geometry: Geometry, scores: st.SearchStrategy[float] = any_scores, **options: Any) -> Any:
    """A global table for a model of this shape; importance is score times cost."""
    importance = [
        {
            axis: torch.tensor(
                draw(st.lists(scores, min_size=widths[axis], max_size=widths[axis])), dtype=torch.float64
            )
            * geometry.group_parameters[axis]
            for axis in AXES
        }
        for widths in geometry.widths
    ]
    return build_table(geometry, importance, **options)


@st.composite
def plans(draw: Any, widths: tuple[LayerWidths, ...] | None = None, model_type: str | None = None) -> Plan:
    """A plan for layers of these widths, with which a model of the family can be cut; it keeps at least one group."""
    widths = widths or draw(layer_widths())
    family = FAMILIES[model_type or draw(st.sampled_from(sorted(DENSE)))]
    kept = [{axis: [group for group in range(layer[axis]) if draw(st.booleans())] for axis in AXES} for layer in widths]
    if not any(groups for layer in kept for groups in layer.values()):
        layer_idx, axis = next((i, axis) for i, layer in enumerate(widths) for axis in AXES if layer[axis])
        kept[layer_idx][axis] = [0]
    layers = (
        KeptGroups(*(tuple(undivided(family.block(axis), layer[axis], before[axis])) for axis in AXES))
        for before, layer in zip(widths, kept, strict=True)
    )
    return Plan(family.model_type, widths, tuple(layers))


#: what may stand where something else belongs
json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 40),
        st.integers(),
        st.sampled_from([10**12, 2**63, -(2**63), 10**400]),
        st.floats(),
        st.text(max_size=8),
        st.from_regex(r"[0-9,\-]{0,8}", fullmatch=True),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["groups", "kept", *AXES]), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed_json(draw: Any, values: Any) -> Any:
    """One node of a JSON value, wherever it is, becomes another value, disappears, is renamed or stands there twice."""
    values = copy.deepcopy(values)
    node, parent, key = values, None, None
    while isinstance(node, dict | list) and node and (parent is None or draw(st.booleans())):
        parent = node
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        node = parent[key]
    change = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
    if change == "replace":
        parent[key] = draw(json_values)
    elif change == "remove":
        del parent[key]
    elif isinstance(parent, list):
        parent.insert(key, parent[key])
    else:
        parent[draw(st.text(max_size=8))] = parent.pop(key)
    return values


@st.composite
def overwritten(draw: Any, content: bytes) -> bytes:
    """Bytes of a file cut off, overwritten, inserted or lost; or the same text in another encoding."""
    change = draw(st.sampled_from(["bytes", "bytes", "bytes", "cut", "empty", "utf-16", "utf-8-sig", "nested"]))
    if change == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if change == "empty":
        return b""
    if change.startswith("utf"):
        return content.decode("latin-1").encode(change)
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        new = draw(st.binary(max_size=3) | st.sampled_from([b"9" * 12, b"-", b"NaN", b"1e999", b'"', b","]))
        damaged[at : at + draw(st.integers(0, 3))] = b"[" * 10_000 if change == "nested" else new
    return bytes(damaged)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """A file that holds JSON, damaged in its values or in its bytes."""
    changed = changed_json(json.loads(content)).map(lambda values: json.dumps(values).encode())
    return st.one_of(changed, overwritten(content))


@st.composite
def profiles(draw: Any, geometry: Geometry) -> LatencyProfile:
    """Some measured table that fits a model; some times fall where the block is wider."""

    def points(axis: str) -> tuple[tuple[int, float], ...]:
        widest = max(max(layer[axis] for layer in geometry.widths), 1)
        widths = sorted({widest, *draw(st.sets(st.integers(1, widest), max_size=4))})
        return tuple((width, draw(seconds)) for width in widths)

    return LatencyProfile(
        model="some",
        shape=ProfiledShape.of(geometry),
        device="cpu",
        machine="x86_64 Linux",
        threads=1,
        dtype="float32",
        torch="2",
        transformers="5",
        prompt_tokens=8,
        new_tokens=4,
        batch_size=1,
        repeats=1,
        prefill=PhaseTimes(draw(seconds) + 0.01, points("attention"), points("mlp")),
        decode=PhaseTimes(draw(seconds) + 0.01, points("attention"), points("mlp")),
    )
