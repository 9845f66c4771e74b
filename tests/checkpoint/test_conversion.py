"""Files that hold a tensor for each expert, and what is said of those that lack some."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folder import byte_tokenizer
from tiny_mixtures import MIXED_CASES, make_mixture, shared_mixture

from prunus.checkpoint import load_model, open_model, save_checkpoint
from prunus.checkpoint.conversion import Conversion, as_stored
from prunus.checkpoint.weights import StoredWeights
from prunus.errors import CheckpointError, UnsupportedModelError
from prunus.model.geometry import Geometry
from prunus.model.layers import layers_of
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixture") / "whole"
    save_checkpoint(shared_mixture("qwen3_moe", "tied"), byte_tokenizer(), place, card="", extras={})
    return place


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def changed(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("case", MIXED_CASES, ids="-".join)
def test_what_is_stored_makes_the_model_again(case):
    model = shared_mixture(*case)
    stored = as_stored(model, dict(model.state_dict()))
    conversion = Conversion(model, stored)
    for name, tensor in model.state_dict().items():
        parts = conversion.stored[name]
        assert all(parts[part].shape == stored[part].shape for part in parts)
        assert torch.equal(conversion.make(name, {part: stored[part] for part in parts}), tensor)
    assert {part for parts in conversion.stored.values() for part in parts} == stored.keys()


@pytest.mark.parametrize("case", MIXED_CASES, ids="-".join)
def test_parts_lie_where_it_is_said(case):
    """All of every tensor, and in its own memory: what is written there is a part of it."""
    model = shared_mixture(*case)
    stored = as_stored(model, dict(model.state_dict()))
    conversion = Conversion(model, stored)
    for name, tensor in model.state_dict().items():
        places, parts = conversion.places(name), conversion.split(name, tensor)
        assert places.keys() == parts.keys() == conversion.stored[name].keys()
        assert all(torch.equal(parts[part], stored[part]) for part in parts)
        assert all(part.is_contiguous() for part in parts.values())
        assert {part.untyped_storage().data_ptr() for part in parts.values()} == {tensor.untyped_storage().data_ptr()}
        assert sum(part.numel() for part in parts.values()) == tensor.numel()


@pytest.mark.parametrize("case", MIXED_CASES, ids="-".join)
def test_experts_that_go_are_not_read(case, tmp_path, monkeypatch):
    """Cut once and twice on the way from the disk: the same layers as of a model that is cut in memory."""
    model = make_mixture(*case)
    save_checkpoint(model, byte_tokenizer(), tmp_path / "whole", card="", extras={})
    opened, _ = open_model(tmp_path / "whole")
    read, sizes = StoredWeights.read_into, []

    def noting(self, name, out, entry=None):
        sizes.append(out.numel() if "expert" in name or "linear" in name else 0)
        read(self, name, out, entry)

    monkeypatch.setattr(StoredWeights, "read_into", noting)
    for kept in ((1, 2, 4, 5), (0, 3)):
        geometry = Geometry.of(opened)
        layers = [
            {axis: kept if axis == "expert" and w[axis] else range(w[axis]) for axis in geometry.axes}
            for w in geometry.widths
        ]
        plan = Plan.from_kept(geometry, layers)
        opened, model = apply_plan(opened, plan), apply_plan(model, plan)
        sizes.clear()
        with layers_of(opened).hold(1) as held:
            expected = model.model.layers[1].state_dict()
            assert held.state_dict().keys() == expected.keys()
            assert all(torch.equal(held.state_dict()[name], tensor) for name, tensor in expected.items())
            experts = sum(tensor.numel() for name, tensor in expected.items() if "expert" in name)
            assert 0 < sum(sizes) <= experts


@pytest.mark.parametrize("read", [load_model, open_model])
def test_experts_that_are_not_there_are_named(folder, read):
    lost = "model.layers.1.mlp.experts.4.up_proj.weight"
    changed(folder, lambda tensors: tensors.pop(lost))
    with pytest.raises(CheckpointError, match=f"lacks 1 of the 12 tensors that .*gate_up_proj.*{lost}"):
        read(folder)


@pytest.mark.parametrize("read", [load_model, open_model])
def test_a_router_of_another_size_is_named(folder, read):
    router = "model.layers.0.mlp.gate.weight"

    def narrower(tensors):
        tensors[router] = tensors[router][:5].contiguous()

    changed(folder, narrower)
    with pytest.raises(CheckpointError, match=rf"{router}' has shape \(5, 48\), config.json makes it \(6, 48\)"):
        read(folder)


def test_a_config_with_another_number_of_experts_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 5, "num_local_experts": 5}))
    with pytest.raises(CheckpointError, match=r"which the model|has shape"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 7}))
    with pytest.raises(UnsupportedModelError, match="each token to 7 of 6 experts"):
        Geometry.of(load_model(folder)[0])


@pytest.mark.parametrize("model_type", ["glm4_moe", "ernie4_5_moe", "gpt_oss", "mixtral"])
def test_an_opened_model_has_the_dtypes_of_one_in_memory(model_type, tmp_path):
    """Some families keep routers in float32, whatever the model is held in."""
    model = make_mixture(model_type).to(torch.bfloat16)
    save_checkpoint(model, byte_tokenizer(), tmp_path / "half", card="", extras={})
    resident, opened = load_model(tmp_path / "half")[0], open_model(tmp_path / "half")[0]
    for layer_idx, layer in enumerate(resident.model.layers):
        with layers_of(opened).hold(layer_idx) as held:
            for name, tensor in layer.state_dict().items():
                assert held.state_dict()[name].dtype == tensor.dtype, name
                assert torch.equal(held.state_dict()[name], tensor), name


@pytest.mark.parametrize("read", [load_model, open_model])
def test_layers_that_predict_further_tokens_are_left_out(tmp_path, read):
    """GLM-4.5 has one behind its decoder, which transformers does not load either."""
    model = make_mixture("glm4_moe", num_hidden_layers=2)
    save_checkpoint(model, byte_tokenizer(), tmp_path / "glm", card="", extras={})
    config = json.loads((tmp_path / "glm" / "config.json").read_text())
    (tmp_path / "glm" / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    changed(tmp_path / "glm", lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.ones(48, 96)}))
    found = read(tmp_path / "glm")[0]
    assert len(found.model.layers) == 2
    geometry = Geometry.of(found)
    assert apply_plan(found, Plan.keep_all(geometry)).config.num_nextn_predict_layers == 0
