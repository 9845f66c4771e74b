"""A size to fit of a GGUF file, `90MB:Q8_0`: what is written never takes more, whatever llama.cpp fills up."""

from __future__ import annotations

import pytest
import torch
from tiny_families import make_model

from prunus.errors import OptionError, UnsupportedModelError
from prunus.export import export_gguf
from prunus.model.geometry import Geometry
from prunus.pipeline.job import Job
from prunus.pipeline.recipe import Recipe
from prunus.selection.constraints import Constraints
from prunus.selection.fit import FitOptions
from prunus.selection.select import select
from prunus.selection.storage import storage_costs
from prunus.selection.table import build_table
from prunus.surgery import apply_plan

gguf = pytest.importorskip("gguf")
SIZES = {"num_hidden_layers": 6, "intermediate_size": 512, "vocab_size": 320}


def fitted(model, size: str, selection: Constraints | None = None) -> Job:
    return Job("", fit=FitOptions(size), recipe=Recipe(selection=selection or Constraints())).fitted(model)


@pytest.mark.parametrize(
    ("family", "per_layer"),
    [("llama", True), ("qwen2", True), ("qwen3", True), ("granite", False), ("gemma3_text", False), ("phi3", False)],
)
@pytest.mark.parametrize("share", [0.9, 0.6])
def test_a_file_takes_no_more_than_asked(saved, tmp_path, family, per_layer, share):
    """Of importances that would leave layers of very different widths, and of the first one nothing."""
    # Of Qwen 3 only tied models have files with layers of their own widths.
    more = {"gemma3_text": {"query_pre_attn_scalar": 12}, "qwen3": {"tie_word_embeddings": True}}
    model = make_model(family, **SIZES, **more.get(family, {}))
    geometry = Geometry.of(model)
    total = int(storage_costs(geometry, "Q8_0").total)
    job = fitted(model, f"{int(share * total)}B:Q8_0")
    generator = torch.Generator().manual_seed(0)
    importance = [
        {axis: torch.rand(widths[axis], dtype=torch.float64, generator=generator) * 4.0**i for axis in geometry.axes}
        for i, widths in enumerate(geometry.widths)
    ]
    costs = job.recipe.target.costs(geometry)
    plan = select(build_table(geometry, importance), geometry, job.ratio, job.recipe.selection, costs)
    assert (len(set(plan.kept_widths)) > 1) == per_layer
    export_gguf(str(saved(apply_plan(model, plan))), tmp_path / "model.gguf", type="q8_0", progress=False)
    tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    written = sum(int(tensor.n_bytes) for tensor in tensors if not tensor.name.startswith("rope_"))
    # One step less of the cut would be too large: a group of the first kind in one layer, or in all.
    step = max(curve["mlp"][64] - curve["mlp"][32] for curve in costs.blocks) * (1 if per_layer else len(costs.blocks))
    assert 0 <= int(share * total) - written < step + max(curve["attention"][-1] for curve in costs.blocks)


def test_what_files_cannot_hold_is_said():
    model = make_model("granite", **SIZES)
    with pytest.raises(
        OptionError, match=r"`shape=ragged`: in GGUF files of Granite 3 \(dense\) all layers are equally"
    ):
        fitted(model, "1MB:Q8_0", Constraints(shape="ragged"))
    model = make_model("phi3", **SIZES)
    with pytest.raises(OptionError, match=r"`axes=attention`: GGUF files of Phi-3.* hold all attention heads"):
        fitted(model, "1MB:Q8_0", Constraints(axes=("attention",)))
    with pytest.raises(OptionError, match="in GGUF files every layer has both blocks"):
        fitted(make_model("llama", **SIZES), "1MB:Q8_0", Constraints(shape="depth", axes=("mlp",)))
    # A checkpoint holds any shape, and a file any depth.
    size = Geometry.of(model).total_parameters
    assert fitted(model, f"{3 * size}B", Constraints(shape="ragged")).recipe.selection.shape == "ragged"
    assert fitted(model, f"{size // 2}B:Q8_0", Constraints(shape="depth")).recipe.selection.shape == "depth"


def test_a_family_that_is_not_written(monkeypatch):
    monkeypatch.setattr("prunus.export.llama_cpp.CANDIDATES", {})
    with pytest.raises(UnsupportedModelError, match="cannot be written as GGUF"):
        fitted(make_model("llama", **SIZES), "1MB:Q8_0")
