"""A size to fit: never exceeded, and missed by less than one unit of cutting."""

from __future__ import annotations

import json
import math
import re

import pytest
from plain import PLAIN, UNMEASURED
from safetensors.torch import load_file
from tiny_blocks import make_stored
from tiny_folder import byte_tokenizer, fails, run, run_json
from tiny_multimodal import multimodal

from prunus.errors import BudgetError, OptionError
from prunus.machine.byte_sizes import parse_bytes
from prunus.model.geometry import Geometry
from prunus.pipeline.job_file import read_job
from prunus.selection.constraints import Constraints
from prunus.selection.costs import parameter_costs
from prunus.selection.fit import FitOptions
from prunus.selection.select import select
from prunus.selection.table import build_table
from prunus.selection.targets import TargetOptions

QUICK = [*PLAIN, "--method", "magnitude", *UNMEASURED]


def importance(geometry: Geometry):
    import torch

    generator = torch.Generator().manual_seed(0)
    return [
        {axis: torch.rand(widths[axis], dtype=torch.float64, generator=generator) for axis in ("attention", "mlp")}
        for widths in geometry.widths
    ]


@pytest.mark.parametrize("shape", ["ragged", "uniform", "depth"])
@pytest.mark.parametrize("share", [0.97, 0.8, 0.66])
def test_weights_never_exceed_the_size(geometry, shape, share):
    total = 2 * geometry.total_parameters
    constraints = Constraints(shape=shape)
    fitted = FitOptions(f"{int(share * total)}B").solved(geometry, "bfloat16", constraints)
    costs = fitted.target.costs(geometry)
    table = build_table(geometry, importance(geometry))
    plan = select(table, geometry, fitted.ratio, fitted.constraints, costs)
    left = 2 * geometry.parameters_left(plan.kept_widths)
    assert left == costs.left(plan.kept_widths) <= int(share * total)
    if shape == "ragged":  # one group less would not do
        assert int(share * total) - left < 2 * max(geometry.group_parameters.values())
        same = select(table, geometry, fitted.ratio, constraints, parameter_costs(geometry))
        assert same == plan


@pytest.mark.parametrize("shape", ["ragged", "uniform", "depth"])
def test_the_smallest_size_is_reached_and_a_byte_less_is_refused_with_it(geometry, shape):
    constraints = Constraints(shape=shape, min_keep_mlp=0 if shape == "depth" else 3)
    with pytest.raises(BudgetError, match=r"weights in bfloat16 are at least [\d,]+ bytes") as error:
        FitOptions("1B").solved(geometry, "bfloat16", constraints)
    smallest = int(re.search(r"at least ([\d,]+) bytes", str(error.value))[1].replace(",", ""))
    with pytest.raises(BudgetError):
        FitOptions(f"{smallest - 1}B").solved(geometry, "bfloat16", constraints)
    fitted = FitOptions(f"{smallest}B").solved(geometry, "bfloat16", constraints)
    table, costs = build_table(geometry, importance(geometry)), fitted.target.costs(geometry)
    plan = select(table, geometry, fitted.ratio, fitted.constraints, costs)
    assert costs.left(plan.kept_widths) == smallest


@pytest.mark.parametrize(("saved_in", "weight", "number"), [("float32", 4, 4), ("bfloat16", 2, 2)])
def test_memory_with_the_cache(geometry, saved_in, weight, number):
    """Beside the weights each number of the keys and values of 3 sequences of 50 tokens, in the weights' dtype."""
    numbers = sum(2 * widths["attention"] * geometry.head_dim * 50 * 3 for widths in geometry.widths)
    total = weight * geometry.total_parameters + number * numbers
    limit = int(0.8 * total)
    fitted = FitOptions(memory=f"{limit}B", context=50, batch=3).solved(geometry, saved_in, Constraints())
    costs = fitted.target.costs(geometry)
    assert costs.total == total
    plan = select(build_table(geometry, importance(geometry)), geometry, fitted.ratio, fitted.constraints, costs)
    kept = sum(2 * widths["attention"] * geometry.head_dim * 50 * 3 for widths in plan.kept_widths)
    assert weight * geometry.parameters_left(plan.kept_widths) + number * kept <= limit


def test_the_cache_beside_a_gguf_file_is_in_f16(geometry):
    numbers = sum(2 * widths["attention"] * geometry.head_dim * 50 for widths in geometry.widths)
    both, file = (TargetOptions(name, 50, storage="F32").costs(geometry) for name in ("memory", "size"))
    assert both.total - file.total == 2 * numbers


def test_types_in_blocks_keep_whole_blocks(geometry):
    fitted = FitOptions("30000:q4_0").solved(geometry, "float32", Constraints(align=3))
    assert fitted.constraints.align == math.lcm(3, 32)
    assert (fitted.target.name, fitted.target.storage) == ("size", "Q4_0")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            "1TB",
            r"the model fits as it is: its bytes of weights in float32 are .*MB, and `fit.size` leaves it 1000.00GB",
        ),
        ("much", "`fit.size` is 'much'; write a size such as 8GB"),
        ("1MB:Q9", "type 'Q9' is unknown"),
    ],
)
def test_sizes_that_cannot_be(geometry, size, message):
    with pytest.raises(OptionError, match=message):
        FitOptions(size).solved(geometry, "float32", Constraints())


def test_as_typed(capsys, tmp_path, folder):
    dense = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    limit = f"{int(0.8 * dense)}B"
    words = ["prune", folder, "--out", tmp_path / "small", *QUICK]
    facts = run_json(capsys, *words, "--fit", limit)
    weights = sum(tensor.nbytes for tensor in load_file(tmp_path / "small" / "model.safetensors").values())
    assert weights == facts["target"]["after"] <= parse_bytes(limit)
    assert facts["target"]["before"] == dense
    assert facts["fit"]["size"] == limit
    # The recipe of the result says the size, and gives the same again; a ratio in its place is taken.
    recipe = tmp_path / "small" / "prunus" / "recipe.yaml"
    assert read_job(str(recipe), [], {}).fit.size == limit
    run(capsys, "prune", "--recipe", recipe, "--out", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "prunus" / "metrics.json").read_text())
    assert again["plan"] == facts["plan"]
    other = run_json(capsys, "prune", "--recipe", recipe, "--out", tmp_path / "other", "--ratio", "0.1")
    assert other["ratio"] == 0.1
    said = fails(capsys, *words, "--fit", limit, "--ratio", "0.1", "--overwrite")
    assert "--ratio and --fit both say how much to remove" in said


def test_a_multimodal_model_fits_with_its_towers(capsys, tmp_path):
    model = multimodal("gemma3")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    whole = sum(tensor.nbytes for tensor in load_file(tmp_path / "model" / "model.safetensors").values())
    words = ["prune", tmp_path / "model", *QUICK, "--samples", "4", "--seq-len", "16"]
    limit = int(0.85 * whole)
    facts = run_json(capsys, *words, "--out", tmp_path / "small", "--fit", f"{limit}B")
    weights = sum(tensor.nbytes for tensor in load_file(tmp_path / "small" / "model.safetensors").values())
    assert 0.8 * limit < weights <= limit
    # By itself the language model fits; and towers that are larger than the limit stay as large.
    alone = ["--set", "output.text_only=true", "--out", tmp_path / "none"]
    assert "the model fits as it is" in fails(capsys, *words, "--fit", f"{limit}B", *alone)
    towers = whole - facts["target"]["before"]
    assert "what stands around the language model alone takes" in fails(
        capsys, *words, *alone[2:], "--fit", f"{towers}B"
    )


def test_a_size_is_not_counted_of_weights_in_blocks(capsys, tmp_path):
    folder = make_stored("mxfp4", tmp_path / "model")
    words = ["prune", folder, "--out", tmp_path / "out", *QUICK]
    for more in (["--fit", "100KB"], ["--ratio", "0.3", "--target", "size"]):
        assert "weights are stored in MXFP4" in (said := fails(capsys, *words, *more))
        assert "--experts" in said
