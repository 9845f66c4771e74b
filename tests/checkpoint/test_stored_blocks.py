"""Mixtures whose weights are stored in MXFP4 or FP8 blocks: decoded for the work, and saved as the bytes they had.

The oracle, in `tiny_blocks`, decodes number by number, from the definitions of the formats.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_blocks import ROWS, WEIGHTS, make_stored
from tiny_families import logits, random_tokens
from tiny_folder import TEXT, byte_tokenizer, fails, run, run_json
from tiny_mixtures import EXPERTS, layers_with_experts, make_mixture, token_by_token
from transformers import AutoModelForCausalLM

from prunus import calibration_from_tokens, prune
from prunus.calibration import Batch
from prunus.checkpoint import load_model, model_bytes, open_model, save_checkpoint
from prunus.errors import CheckpointError, OptionError, PrunusError, UnsupportedModelError
from prunus.model.geometry import Geometry
from prunus.model.layers import layers_of
from prunus.repair.block_repair import repair_
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan

#: the experts that stay, of six, in each layer
KEPT = {0: (0, 2, 5), 1: (1, 2, 3)}


@pytest.fixture(scope="module", params=["mxfp4", "fp8"])
def stored(request, tmp_path_factory):
    return make_stored(request.param, tmp_path_factory.mktemp("blocks") / request.param)


@pytest.fixture
def folder(stored, tmp_path):
    """A copy to be changed."""
    return shutil.copytree(stored, tmp_path / "copy")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def dense_of(stored: Path):
    return load_model(stored.with_name(f"{stored.name}-dense"), dtype="float32")[0]


def half_plan(model) -> Plan:
    geometry = Geometry.of(model)
    return Plan.from_kept(
        geometry,
        [
            {axis: KEPT[layer_idx] if axis == "expert" else range(widths[axis]) for axis in geometry.axes}
            for layer_idx, widths in enumerate(geometry.widths)
        ],
    )


def cut_folder(stored: Path, out: Path) -> Path:
    opened, tokenizer = open_model(stored, dtype="float32")
    smaller = apply_plan(opened, half_plan(opened))
    return save_checkpoint(smaller, tokenizer, out, card="", extras={}, max_shard_size="40KB")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def test_layers_are_decoded_as_the_formats_say(stored):
    opened, _ = open_model(stored, dtype="bfloat16")
    dense, _ = load_model(stored.with_name(f"{stored.name}-dense"), dtype="bfloat16")
    for layer_idx, layer in enumerate(dense.model.layers):
        with layers_of(opened).hold(layer_idx) as held:
            assert held.state_dict().keys() == layer.state_dict().keys()
            for name, tensor in layer.state_dict().items():
                assert torch.equal(held.state_dict()[name], tensor), name
    full = open_model(stored, dtype="float32")[0]
    torch.testing.assert_close(logits(full, random_tokens()), logits(dense_of(stored), random_tokens()))


def test_blocks_at_the_edge_may_be_smaller(tmp_path):
    """FP8 of sizes that are no multiples of a block's."""
    folder = make_stored("fp8", tmp_path / "edges", moe_intermediate_size=20, hidden_size=44)
    dense, _ = load_model(tmp_path / "edges-dense", dtype="bfloat16")
    opened, _ = open_model(folder, dtype="bfloat16")
    with layers_of(opened).hold(1) as held:
        for name, tensor in dense.model.layers[1].state_dict().items():
            assert torch.equal(held.state_dict()[name], tensor), name


def test_kept_experts_are_saved_bit_for_bit(stored, tmp_path):
    out = cut_folder(stored, tmp_path / "small")
    before, after = tensors_of(stored), tensors_of(out)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == json.loads((stored / "config.json").read_text())["quantization_config"]
    assert config["num_local_experts" if stored.name == "mxfp4" else "num_experts"] == 3
    expected = {}
    for name, tensor in before.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        kept = KEPT[int(layer[1])] if layer else ()
        if (alone := re.match(r"(.*\.experts\.)(\d+)(\..*)", name)) is not None:
            if int(alone[2]) in kept:
                expected[f"{alone[1]}{kept.index(int(alone[2]))}{alone[3]}"] = tensor
        elif ".experts." in name or re.search(r"mlp\.(router|gate)\.", name):
            expected[name] = tensor[list(kept)]
        else:
            expected[name] = tensor
    assert after.keys() == expected.keys()
    assert all(same_bytes(after[name], expected[name]) for name in expected)
    assert len(list(out.glob("*.safetensors"))) > 1, "shards are written, too"
    sizes = sum(tensor.numel() * tensor.itemsize for tensor in after.values())
    assert model_bytes(open_model(out)[0]) == sizes < 0.9 * model_bytes(dense_of(stored)) / 2


def test_what_is_left_computes_what_the_decoded_model_does_with_routers_that_see_only_that(stored, tmp_path):
    out = cut_folder(stored, tmp_path / "small")
    dense, tokens = dense_of(stored), random_tokens(1, 9)
    masked = {layer_idx: KEPT[layer_idx] for layer_idx, _ in layers_with_experts(dense)}
    expected = logits(token_by_token(dense, masked), tokens)
    again, _ = open_model(out, dtype="float32")
    torch.testing.assert_close(logits(again, tokens), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(dense, tokens), expected, atol=1e-2), "the cut must matter"
    assert Geometry.of(again).widths[0].num_experts == 3


def test_transformers_loads_the_result(stored, tmp_path):
    """On a CPU it decodes, too, by itself."""
    out = cut_folder(stored, tmp_path / "small")
    theirs, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours, _ = open_model(out, dtype="bfloat16")
    for layer_idx, layer in enumerate(theirs.model.layers):
        with layers_of(ours).hold(layer_idx) as held:
            for name, tensor in layer.state_dict().items():
                torch.testing.assert_close(held.state_dict()[name], tensor, rtol=0.01, atol=0), name
    assert theirs.config.get_text_config().num_experts_per_tok == 2
    tokens = random_tokens(1, 9)
    torch.testing.assert_close(logits(theirs, tokens), logits(ours, tokens), rtol=0.05, atol=0.05)


def test_cut_again_and_kept_whole(stored, tmp_path):
    out = cut_folder(stored, tmp_path / "small")
    opened, tokenizer = open_model(out)
    same = save_checkpoint(opened, tokenizer, tmp_path / "same", card="", extras={})
    smaller = tensors_of(out)
    assert all(same_bytes(tensor, smaller[name]) for name, tensor in tensors_of(same).items())
    geometry = Geometry.of(opened)
    keep = [{axis: (0, 2) if axis == "expert" else range(w[axis]) for axis in geometry.axes} for w in geometry.widths]
    twice = save_checkpoint(
        apply_plan(opened, Plan.from_kept(geometry, keep)), tokenizer, tmp_path / "twice", card="", extras={}
    )
    at_once = open_model(stored)[0]
    whole = Geometry.of(at_once)
    direct = [
        {axis: [KEPT[number][0], KEPT[number][2]] if axis == "expert" else range(w[axis]) for axis in whole.axes}
        for number, w in enumerate(whole.widths)
    ]
    once = save_checkpoint(
        apply_plan(at_once, Plan.from_kept(whole, direct)), tokenizer, tmp_path / "once", card="", extras={}
    )
    unsaved = apply_plan(apply_plan(at_once, half_plan(at_once)), Plan.from_kept(geometry, keep))
    never_saved = save_checkpoint(unsaved, tokenizer, tmp_path / "unsaved", card="", extras={})
    expected = tensors_of(once)
    for folder in (twice, never_saved):
        assert all(same_bytes(tensor, expected[name]) for name, tensor in tensors_of(folder).items())


@pytest.mark.parametrize("method", ["reap", "gate_fisher"])
def test_scored_as_the_decoded_model(method, stored, text, tmp_path, capsys):
    sized = ["--calibration", text, "--samples", "6", "--seq-len", "24", "--method", method]
    more = ["--set", "evaluation.held_out=2", "--set", "run.dtype=float32", "--set", "output.report=false"]
    for name, folder in (("small", stored), ("dense", stored.with_name(f"{stored.name}-dense"))):
        words = ["prune", folder, "--out", tmp_path / name, "--experts", "0.5", *sized, *more, "--set", "repair=null"]
        run(capsys, *words)
    plans = [Plan.load(tmp_path / name / "prunus" / "plan.json").layers for name in ("small", "dense")]
    assert plans[0] == plans[1]
    assert any(name.endswith(("_blocks", "scale_inv")) for name in tensors_of(tmp_path / "small"))
    facts = [json.loads((tmp_path / name / "prunus" / "metrics.json").read_text()) for name in ("small", "dense")]
    assert facts[0]["perplexity_after"] == pytest.approx(facts[1]["perplexity_after"], rel=1e-3)
    said = run_json(capsys, "inspect", tmp_path / "small")
    assert said["parameters"] == facts[0]["parameters_after"]
    evaluated = ["eval", tmp_path / "small", "--text", text, "--seq-len", "24", "--windows", "2"]
    run(capsys, *evaluated)


REFUSED = [
    ([], "repaired weight would have to be rounded to that again"),
    (["--set", "repair=null", "--set", "run.engine=resident"], "decodes one layer at a time; use streamed"),
    (["--set", "repair=null", "--set", "output.save_dtype=float16"], "are saved as they are"),
    (["--set", "repair=null", "--set", "selection.axes=[attention, expert]"], "only whole experts can be removed"),
    (["--set", "repair=null", "--set", "selection.shape=depth"], "only whole experts can be removed"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_would_encode_again_is_refused_at_once(words, message, stored, text, tmp_path, capsys):
    said = fails(capsys, "prune", stored, "--out", tmp_path / "out", "--ratio", "0.3", "--calibration", text, *words)
    assert message in said
    assert not (tmp_path / "out").exists()


def test_in_python_too(stored, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"never in memory as a whole"):
        load_model(stored)
    opened, tokenizer = open_model(stored)
    plan = half_plan(opened)
    smaller = apply_plan(opened, plan)
    with pytest.raises(UnsupportedModelError, match="repaired ones would have to be rounded"):
        repair_(smaller, opened, plan, [Batch(random_tokens(), None)], progress=False)
    with layers_of(smaller).hold(0):
        layers_of(smaller).keep(0)
    with pytest.raises(UnsupportedModelError, match="changed weights cannot be written"):
        save_checkpoint(smaller, tokenizer, tmp_path / "out", card="", extras={})
    calibration = calibration_from_tokens(random_tokens(batch=4))
    with pytest.raises(OptionError, match="prune without repair"):
        prune(opened, 0.3, calibration)
    geometry = Geometry.of(opened)
    fewer = [{axis: range(w[axis] - (axis == "attention")) for axis in geometry.axes} for w in geometry.widths]
    with pytest.raises(UnsupportedModelError, match="removes attention groups of layer 0"):
        apply_plan(opened, Plan.from_kept(geometry, fewer))


def scales_of(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(name for name in tensors if name.endswith(("down_proj_scales", "5.down_proj.weight_scale_inv")))[0]


def blocks_of_scales(name: str) -> str:
    return name.replace("_scales", "_blocks") if name.endswith("_scales") else name.removesuffix("_scale_inv")


@pytest.mark.parametrize("damage", ["scales of another shape", "no scales", "no blocks", "blocks of another shape"])
def test_damaged_blocks_are_named_before_anything_is_read(damage, folder, text, tmp_path, capsys):
    tensors = load_file(folder / WEIGHTS)
    scales = scales_of(tensors)
    blocks = blocks_of_scales(scales)
    if damage == "scales of another shape":
        tensors[scales] = (
            tensors[scales][..., :-1].contiguous()
            if tensors[scales].shape[-1] > 1
            else torch.cat([tensors[scales]] * 2, dim=-1)
        )
        named, message = scales, r"has shape .*, and blocks of shape .* have scales of shape"
    elif damage == "no scales":
        del tensors[scales]
        named, message = scales, "lacks its scales"
    elif damage == "no blocks":
        del tensors[blocks]
        named, message = scales, "holds scales of blocks that are not there"
    else:
        tensors[blocks] = tensors[blocks].view(torch.uint8)[..., :8].contiguous().view(tensors[blocks].dtype)
        named, message = blocks.removesuffix("_blocks"), "has shape"
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(folder)
    assert named in str(caught.value)
    words = ["prune", folder, "--out", tmp_path / "out", "--ratio", "0.3", "--calibration", text]
    assert named in fails(capsys, *words, "--set", "repair=null")
    assert not (tmp_path / "out").exists()


def test_a_model_that_only_says_it_is_stored_so(folder):
    dense = Path(str(folder) + "-none")
    shutil.copytree(folder, dense)
    tensors = {n: t for n, t in load_file(folder / WEIGHTS).items() if not n.endswith(("_scales", "_scale_inv"))}
    plain = {n: t.bfloat16() for n, t in tensors.items() if not n.endswith("_blocks")}
    save_file(plain, dense / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"says that weights are stored in .*, and none is"):
        open_model(dense)


@pytest.mark.parametrize(
    "other",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "mxfp4"},
    ],
)
def test_everything_else_stays_refused(other, tmp_path):
    """And MXFP4 of a family that transformers does not read it of."""
    model = make_mixture("qwen3_moe", vocab_size=260)
    out = save_checkpoint(model, byte_tokenizer(), tmp_path / "other", card="", extras={})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": other}))
    with pytest.raises(UnsupportedModelError, match="already quantised"):
        open_model(out)


def test_the_head_must_not_be_stored_so(folder):
    if "fp8" not in (folder / "config.json").read_text():
        pytest.skip("MXFP4 stores experts alone")
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = torch.zeros(260, 48, dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensors["lm_head.weight_scale_inv"] = torch.ones(-(-260 // ROWS), 3)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(PrunusError, match=r"lm_head.weight.* only inside of decoder layers"):
        open_model(folder)


def test_six_experts(stored):
    assert Geometry.of(open_model(stored)[0]).widths[0].num_experts == EXPERTS
