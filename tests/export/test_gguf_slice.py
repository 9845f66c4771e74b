"""Experts and layers cut out of a GGUF file: read back by gguf's own reader and compared byte for byte."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_families import make_model
from tiny_folder import fails, run_json

import prunus
from prunus.errors import CheckpointError, OptionError, PlanError, PrunusError, UnsupportedModelError
from prunus.export import apply_plan_to_gguf, export_gguf, open_gguf, slice_gguf
from prunus.model.geometry import Geometry
from prunus.model.widths import LayerWidths
from prunus.selection.plan import KeptGroups, Plan

KINDS = ("F16", "F32", "Q8_0", "Q4_K", "Q6_K", "IQ2_XXS", "MXFP4")
EXPERTS, LAYERS, HIDDEN = 6, 3, 256
KEPT = {0: (0, 2, 5), 1: (1, 2, 3), 2: (3, 4, 5)}


def write_mixture(
    path: Path,
    kind: str = "Q8_0",
    architecture: str = "qwen3moe",
    dense: int = 0,
    layers: int = LAYERS,
    router_rows: int = EXPERTS,
    leave_out: str = "",
    extra: dict[str, tuple[int, ...]] | None = None,
    **numbers: Any,
) -> Path:
    """A mixture of experts with random bytes in every tensor, of a storage type; shapes are as numpy has them."""
    writer, rng = gguf.GGUFWriter(path, architecture), np.random.default_rng(0)
    fields = {
        "block_count": layers,
        "expert_count": EXPERTS,
        "expert_used_count": 2,
        "attention.head_count_kv": [2] * layers,
        **numbers,
    }
    for name, value in fields.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"{architecture}.{name}", value)
    writer.add_size_label("30B-A3B")
    writer.add_token_list([b"a", b"\xff\xfe", "ü".encode()])  # tokens need not be text
    writer.add_float32("general.something", 0.1)

    def add(name: str, shape: tuple[int, ...], of: str) -> None:
        if name == leave_out:
            return
        type_ = gguf.GGMLQuantizationType[of]
        shape_in_bytes = gguf.quant_shape_to_byte_shape(shape, type_)
        writer.add_tensor(name, rng.integers(0, 256, shape_in_bytes, dtype=np.uint8), raw_dtype=type_)

    add("token_embd.weight", (3, HIDDEN), kind)
    add("output_norm.weight", (64,), "Q8_0")
    for layer in range(layers):
        add(f"blk.{layer}.attn_q.weight", (5, HIDDEN), kind)
        if layer < dense:
            add(f"blk.{layer}.ffn_up.weight", (7, HIDDEN), kind)
            continue
        add(f"blk.{layer}.ffn_gate_inp.weight", (router_rows, HIDDEN), "F32")
        add(f"blk.{layer}.exp_probs_b.bias", (EXPERTS,), "F16")
        add(f"blk.{layer}.ffn_gate_exps.weight", (EXPERTS, 3, HIDDEN), kind)
        add(f"blk.{layer}.ffn_up_exps.weight", (EXPERTS, 3, HIDDEN), kind)
        add(f"blk.{layer}.ffn_down_exps.weight", (EXPERTS, 1, HIDDEN), kind)
        add(f"blk.{layer}.ffn_down_exps.bias", (EXPERTS, 5), "F32")
        # As long as there are experts, and not one per expert.
        add(f"blk.{layer}.ffn_down_shexp.weight", (EXPERTS, HIDDEN), kind)
    for name, shape in (extra or {}).items():
        add(name, shape, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields, as bytes and types, and tensors: type and numpy's array of bytes with the shape of the blocks."""
    reader = gguf.GGUFReader(path)
    fields = {
        key: (field.types, [field.parts[i].tobytes() for i in field.data])
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    return fields, {tensor.name: (tensor.tensor_type.name, np.array(tensor.data)) for tensor in reader.tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_kept_experts_are_copied_byte_for_byte(kind, tmp_path):
    path = write_mixture(tmp_path / "a.gguf", kind)
    facts = slice_gguf(open_gguf(path), tmp_path / "b.gguf", KEPT, progress=False)
    fields, tensors = read(path)
    new_fields, new_tensors = read(tmp_path / "b.gguf")
    assert list(new_tensors) == list(tensors)
    for name, (type_, values) in tensors.items():
        layer = int(name.split(".")[1]) if name.startswith("blk.") else None
        per_expert = any(part in name for part in ("_exps.", "gate_inp", "exp_probs"))
        expected = values[list(KEPT[layer])] if per_expert else values
        assert new_tensors[name][0] == type_
        assert new_tensors[name][1].tobytes() == expected.tobytes()
        assert new_tensors[name][1].shape == expected.shape
    assert new_fields.pop("qwen3moe.expert_count")[1] == [struct.pack("<I", 3)]
    fields.pop("qwen3moe.expert_count")
    fields.pop("general.size_label")  # 30B is no longer true
    assert new_fields == fields
    assert (facts["experts_before"], facts["experts_after"]) == (6, 3)
    assert facts["bytes_after"] == (tmp_path / "b.gguf").stat().st_size < facts["bytes_before"] == path.stat().st_size
    removed = 3 * LAYERS * (HIDDEN + 1 + 7 * HIDDEN + 5)
    assert facts["parameters_before"] - facts["parameters_after"] == removed


def test_keeping_everything_copies_the_file(tmp_path):
    path = write_mixture(tmp_path / "a.gguf")
    slice_gguf(open_gguf(path), tmp_path / "b.gguf", dict.fromkeys(range(LAYERS), range(EXPERTS)))
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()


def test_layers_are_removed_and_numbered_anew(tmp_path):
    path = write_mixture(
        tmp_path / "a.gguf",
        dense=2,
        layers=5,
        leading_dense_block_count=2,
        **{"attention.head_count_kv": [2, 3, 4, 5, 6], "rope.dimension_sections": [1, 2, 3, 4, 5]},
    )
    kept = {2: (0, 1, 4), 4: (1, 2, 3)}
    facts = slice_gguf(open_gguf(path), tmp_path / "b.gguf", kept, layers=(1, 2, 4))
    _, tensors = read(path)
    fields, new_tensors = read(tmp_path / "b.gguf")
    assert fields["qwen3moe.block_count"][1] == [struct.pack("<I", 3)]
    assert fields["qwen3moe.leading_dense_block_count"][1] == [struct.pack("<I", 1)]
    assert b"".join(fields["qwen3moe.attention.head_count_kv"][1]) == struct.pack("<3i", 3, 4, 6)
    assert len(fields["qwen3moe.rope.dimension_sections"][1]) == 5
    assert (facts["layers_before"], facts["layers_after"]) == (5, 3)
    for new, old in ((0, 1), (1, 2), (2, 4)):
        assert np.array_equal(new_tensors[f"blk.{new}.attn_q.weight"][1], tensors[f"blk.{old}.attn_q.weight"][1])
    assert np.array_equal(
        new_tensors["blk.2.ffn_down_exps.weight"][1], tensors["blk.4.ffn_down_exps.weight"][1][[1, 2, 3]]
    )
    assert "blk.3.attn_q.weight" not in new_tensors


def test_layers_that_predict_further_tokens_leave_with_the_first_expert(tmp_path, caplog):
    path = write_mixture(tmp_path / "a.gguf", architecture="glm4moe", layers=4, nextn_predict_layers=1)
    slice_gguf(open_gguf(path), tmp_path / "b.gguf", KEPT)
    fields, tensors = read(tmp_path / "b.gguf")
    assert fields["glm4moe.block_count"][1] == [struct.pack("<I", 3)]
    assert fields["glm4moe.nextn_predict_layers"][1] == [struct.pack("<I", 0)]
    assert not [name for name in tensors if name.startswith("blk.3.")]
    assert "only predict further tokens" in caplog.text
    slice_gguf(open_gguf(path), tmp_path / "c.gguf", dict.fromkeys(range(3), range(EXPERTS)))
    assert (tmp_path / "c.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("kept", "groups"),
    [((0, 1, 4, 5), 2), (range(6), 3), ((0, 2, 4), None), ((0, 1, 2), None), ((0, 1), None)],
)
def test_groups_of_experts_stay_whole(kept, groups, tmp_path):
    path = write_mixture(tmp_path / "a.gguf", expert_group_count=3, expert_group_used_count=1)
    kept = dict.fromkeys(range(LAYERS), kept)
    if groups is None:
        with pytest.raises(PlanError, match="chooses 1 of 3 groups of 2 experts"):
            slice_gguf(open_gguf(path), tmp_path / "b.gguf", kept)
        assert list(tmp_path.iterdir()) == [path]
        return
    slice_gguf(open_gguf(path), tmp_path / "b.gguf", kept)
    assert read(tmp_path / "b.gguf")[0]["qwen3moe.expert_group_count"][1] == [struct.pack("<I", groups)]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({**KEPT, 1: (1, 2)}, r"layer 0 keeps 3 experts and layer 1 2"),
        (dict.fromkeys(range(3), (4,)), r"1 experts per layer would stay, and a token is routed to 2"),
        ({**KEPT, 2: (1, 3, 6)}, r"layer 2: experts to keep .* 0\.\.5"),
        ({**KEPT, 2: (3, 1, 2)}, r"layer 2: experts to keep have to ascend"),
        ({**KEPT, 2: (-1, 1, 2)}, r"layer 2: experts to keep"),
        ({0: (0, 1), 1: (0, 1)}, r"layer 2 of the file has 6 experts"),
        ({**KEPT, 3: (0, 1, 2)}, r"layer 3: experts are to stay"),
    ],
)
def test_experts_that_cannot_be_kept(kept, message, tmp_path):
    path = write_mixture(tmp_path / "a.gguf")
    with pytest.raises(PlanError, match=message):
        slice_gguf(open_gguf(path), tmp_path / "b.gguf", kept)
    assert list(tmp_path.iterdir()) == [path]


def test_more_experts_stay_than_a_token_goes_to(tmp_path):
    path = write_mixture(tmp_path / "a.gguf", expert_used_count=3)
    with pytest.raises(PlanError, match=r"2 experts per layer would stay, and a token is routed to 3"):
        slice_gguf(open_gguf(path), tmp_path / "b.gguf", dict.fromkeys(range(LAYERS), (1, 4)))
    slice_gguf(open_gguf(path), tmp_path / "b.gguf", KEPT)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"router_rows": 5}, CheckpointError, r"ffn_gate_inp.weight has 5 experts, and qwen3moe.expert_count is 6"),
        (
            {"leave_out": "blk.1.ffn_down_exps.weight"},
            CheckpointError,
            r"layer 1 has experts but no blk.1.ffn_down_exp",
        ),
        ({"leave_out": "blk.1.ffn_gate_inp.weight"}, CheckpointError, r"layer 1 has experts but no blk.1.ffn_gate_inp"),
        ({"extra": {"blk.1.ffn_gate.3.weight": (4, 4)}}, UnsupportedModelError, r"stores experts as 'blk.1.ffn_gate.3"),
        ({"extra": {"blk.1.ffn_up_chexps.weight": (6, 4)}}, UnsupportedModelError, r"ffn_up_chexps.* does not cut"),
        ({"extra": {"blk.7.attn_q.weight": (6, 4)}}, CheckpointError, r"has 3 layers and a tensor 'blk.7.attn_q"),
        ({"expert_count": 3}, CheckpointError, r"has 6 experts, and qwen3moe.expert_count is 3"),
        ({"block_count": [3]}, CheckpointError, r"block_count is not a whole number"),
    ],
)
def test_files_that_contradict_themselves(settings, error, message, tmp_path):
    path = write_mixture(tmp_path / "a.gguf", **settings)
    with pytest.raises(error, match=message):
        slice_gguf(open_gguf(path), tmp_path / "b.gguf", KEPT)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("architecture", ["gemma3", "smollm3", "gpt-oss"])
def test_layers_that_have_kinds_by_number_are_not_removed(architecture, tmp_path):
    path = write_mixture(tmp_path / "a.gguf", architecture=architecture)
    with pytest.raises(UnsupportedModelError, match="kinds of layers by their numbers"):
        slice_gguf(open_gguf(path), tmp_path / "b.gguf", {0: (0, 1), 2: (0, 1)}, layers=(0, 2))


def test_a_part_of_a_model_is_refused(tmp_path):
    path = tmp_path / "m-00001-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"one of 3 parts .*llama-gguf-split"):
        open_gguf(path)


def test_the_input_is_never_replaced(tmp_path):
    path = write_mixture(tmp_path / "a.gguf")
    before = path.read_bytes()
    (tmp_path / "link.gguf").hardlink_to(path)
    for out in (path, tmp_path / "link.gguf"):
        with pytest.raises(OptionError, match="file that is read"):
            slice_gguf(open_gguf(path), out, KEPT, overwrite=True)
    assert path.read_bytes() == before
    (tmp_path / "other.gguf").write_text("mine")
    with pytest.raises(OptionError, match="`overwrite`"):
        slice_gguf(open_gguf(path), tmp_path / "other.gguf", KEPT, overwrite=True)


def test_damaged_files_are_named_and_leave_nothing(tmp_path):
    """Any byte of the header may be anything: an error with a name, or a file that gguf reads."""
    whole = write_mixture(tmp_path / "a.gguf").read_bytes()
    start = gguf.GGUFReader(tmp_path / "a.gguf").data_offset
    path, out, chance = tmp_path / "b.gguf", tmp_path / "c.gguf", random.Random(0)
    refused = 0
    for case in range(120):
        damaged = bytearray(whole)
        if case % 3 == 0:
            del damaged[chance.randrange(len(damaged)) :]
        else:
            at = chance.randrange(start - 8)
            damaged[at : at + 1 + 7 * (case % 2)] = chance.choice(
                [b"\xff", b"\x00", bytes([chance.randrange(256)])]
            ) * (1 + 7 * (case % 2))
        path.write_bytes(damaged)
        try:
            slice_gguf(open_gguf(path), out, KEPT, progress=False)
        except PrunusError:
            assert not out.exists()
            refused += 1
        else:
            gguf.GGUFReader(out)
            out.unlink()
    assert refused > 60


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "does not begin with the letters GGUF"),
        (b"GGUF\x03\x00\x00\x00", "ends before"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**40, 1), "1,099,511,627,776 tensors"),
        # One field `a`, an array of 2^60 bytes.
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"a", 9, 0, 2**60) + bytes(64), "ends before"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 0), "does not name its architecture"),
    ],
)
def test_headers_that_promise_too_much(start, message, tmp_path):
    (tmp_path / "a.gguf").write_bytes(start)
    with pytest.raises(PrunusError, match=message):
        open_gguf(tmp_path / "a.gguf")


# --- plans ---


@pytest.fixture
def dense(saved, tmp_path):
    model = make_model("llama", "gqa", num_hidden_layers=4, vocab_size=280)
    export_gguf(str(saved(model)), tmp_path / "a.gguf", type="f16")
    return model, tmp_path / "a.gguf"


def keep(layers, geometry):
    """Whole layers stay or go."""
    return [
        {axis: range(widths[axis]) if layer in layers else [] for axis in ("attention", "mlp")}
        for layer, widths in enumerate(geometry.widths)
    ]


def test_a_plan_that_removes_layers_gives_the_file_that_export_writes(capsys, dense, saved, tmp_path):
    model, path = dense
    geometry = Geometry.of(model)
    plan = Plan.from_kept(geometry, keep((0, 2, 3), geometry))
    plan.save(tmp_path / "plan.json")
    facts = run_json(capsys, "apply", path, tmp_path / "plan.json", "--out", tmp_path / "b.gguf")
    assert (facts["layers_before"], facts["layers_after"]) == (4, 3)
    export_gguf(str(saved(prunus.apply_plan(model, plan), name="small")), tmp_path / "c.gguf", type="f16")
    expected, found = read(tmp_path / "c.gguf"), read(tmp_path / "b.gguf")
    for fields in (expected[0], found[0]):
        fields.pop("general.name")
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(found[1][name][1].tobytes() == values.tobytes() for name, (_, values) in expected[1].items())


def test_a_plan_of_experts_cuts_those_that_it_names(capsys, tmp_path):
    path = write_mixture(tmp_path / "a.gguf", dense=1)
    kept = [(), KEPT[1], KEPT[2]]
    widths = [LayerWidths(2, 0 if experts else 7, EXPERTS if experts else 0) for experts in kept]
    each = [KeptGroups((0, 1), () if experts else tuple(range(7)), experts) for experts in kept]
    Plan("qwen3_moe", tuple(widths), tuple(each)).save(tmp_path / "plan.json")
    facts = run_json(capsys, "apply", path, tmp_path / "plan.json", "--out", tmp_path / "b.gguf")
    assert (facts["experts_before"], facts["experts_after"]) == (EXPERTS, 3)
    slice_gguf(open_gguf(path), tmp_path / "c.gguf", {1: KEPT[1], 2: KEPT[2]})
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_a_plan_that_removes_channels_is_refused_by_name(capsys, dense, tmp_path):
    model, path = dense
    geometry = Geometry.of(model)
    kept = keep(range(4), geometry)
    kept[2]["mlp"] = range(7)
    Plan.from_kept(geometry, kept).save(tmp_path / "plan.json")
    error = fails(capsys, "apply", path, tmp_path / "plan.json", "--out", tmp_path / "b.gguf")
    assert "layer 2: the plan keeps 7 of 20 mlp groups, which cannot be cut out of a GGUF file" in error
    assert "prunus export --to gguf" in error
    assert not (tmp_path / "b.gguf").exists()


def test_a_plan_for_another_model_is_refused(dense, tmp_path):
    _, path = dense
    for model, message in (
        (make_model("llama", "gqa", num_hidden_layers=3), "plan is for 3 decoder layers"),
        (make_model("qwen3", num_hidden_layers=4), r"family 'qwen3', the file is of architecture 'llama'"),
        (make_model("llama", "gqa", num_hidden_layers=4, intermediate_size=24), "for 24 mlp groups, the file has 20"),
    ):
        with pytest.raises(PlanError, match=message):
            apply_plan_to_gguf(path, Plan.keep_all(Geometry.of(model)), tmp_path / "b.gguf")


def test_a_missing_file_is_named(capsys, dense, tmp_path):
    model, _ = dense
    Plan.keep_all(Geometry.of(model)).save(tmp_path / "plan.json")
    error = fails(capsys, "apply", tmp_path / "no.gguf", tmp_path / "plan.json", "--out", tmp_path / "b.gguf")
    assert "no.gguf is no file" in error
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == "prunus-plan"
