"""Everything that can be wrong with a model folder is found before its weights are read, and named."""

from __future__ import annotations

import json
import logging
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import RAGGED, cut, dense_model
from transformers import AutoModelForCausalLM

from prunus.checkpoint import check_finite, load_model, locate, resolve_device, resolve_dtype, save_checkpoint
from prunus.errors import CheckpointError, NonFiniteError, OptionError, UnsupportedModelError

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A stock model, as transformers saves it."""
    dense_model("qwen2").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tokenizer, tmp_path):
    dense_model("llama").save_pretrained(tmp_path / "model", max_shard_size=30_000)
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_weights_read(monkeypatch):
    """Fails the test if the weights are read: the check has to come before."""

    def forbidden(*args, **kwargs):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(path: Path, **changes: torch.Tensor | None) -> None:
    weights = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_dtype(name, dtype, tokenizer, tmp_path):
    dense_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_model(tmp_path, dtype=name)[0].parameters()} == {dtype}


def test_unknown_placement(folder, no_weights_read):
    with pytest.raises(OptionError, match="'int8' cannot be used; choose one of auto, float32"):
        load_model(folder, dtype="int8")
    with pytest.raises(OptionError, match="'gpu' is not known"):
        load_model(folder, device="gpu")


def test_placement(monkeypatch):
    assert resolve_dtype(torch.bfloat16) is torch.bfloat16
    with pytest.raises(OptionError, match=r"torch\.int8"):
        resolve_dtype(torch.int8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    for missing in ("cuda", "cuda:1", "mps"):
        with pytest.raises(OptionError, match=f"{missing}.*`device=cpu`"):
            resolve_device(missing)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(OptionError, match="has 2 CUDA GPUs"):
        resolve_device("cuda:2")


# --- what a user may write for MODEL -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["./gone", "../gone/model", "/gone/model", "~/gone", "a/b/c", "gone/", "C:\\models\\x"]
)
def test_a_path_that_is_not_there(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no model folder .*Check the path"):
        locate(spec)


def test_places_that_are_no_model_folder(tmp_path, folder, no_weights_read):
    with pytest.raises(CheckpointError, match=r"no model folder .*missing-folder"):
        load_model(tmp_path / "missing-folder")
    with pytest.raises(CheckpointError, match="has no config"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="is a file, not a model folder"):
        load_model(folder / "config.json")
    with pytest.raises(OptionError, match="empty"):
        load_model("")


def test_a_folder_below_the_home_folder(monkeypatch, folder):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate(f"~/{folder.name}") == folder


def test_unknown_family(folder, no_weights_read):
    edit(folder / "config.json", model_type="qwen22")
    with pytest.raises(UnsupportedModelError, match=r"'qwen22' is not supported.*does not know"):
        load_model(folder)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"format": "pack-quantized"}, "pack-quantized"),
    ],
)
def test_quantised_models(folder, config, name, no_weights_read):
    edit(folder / "config.json", quantization_config=config)
    with pytest.raises(UnsupportedModelError, match=rf"already quantised \({name}\).*Prune the bf16"):
        load_model(folder)


def test_quantised_weights_without_a_word_in_the_config(folder, no_weights_read):
    name = "model.layers.1.mlp.up_proj.weight"
    weights = load_file(folder / WEIGHTS)
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*F8_E4M3.*quantised"):
        load_model(folder)


def test_gguf(tmp_path, folder, no_weights_read):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for source in (tmp_path / "m.gguf", tmp_path):
        with pytest.raises(UnsupportedModelError, match=r"m\.gguf is a GGUF file.*gguf_file="):
            load_model(source)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_pickles_are_never_opened(folder, monkeypatch, tmp_path, no_weights_read):
    monkeypatch.chdir(tmp_path)
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UnsupportedModelError, match=r"only as pickles \(pytorch_model\.bin\)"):
        load_model(folder)
    assert not Path("exploded").exists()


def test_a_pickle_beside_the_weights_is_ignored(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    load_model(folder)
    assert not Path("exploded").exists()


def test_code_beside_the_weights_is_not_run(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = save_checkpoint(cut(dense_model("llama"), RAGGED), tokenizer, tmp_path / "out", card="", extras={})
    for file in out.glob("*.py"):
        file.write_text("from pathlib import Path\nPath('exploded').touch()\n" + file.read_text())
    load_model(out)
    assert not Path("exploded").exists()


def test_no_weights(folder, no_weights_read):
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_model(folder)


def test_missing_shard(sharded, no_weights_read):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of the {len(shards)} weight files.*{shards[1].name}"):
        load_model(sharded)


def test_shard_without_what_the_index_places_there(sharded, no_weights_read):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(CheckpointError, match=f"{shards[0].name} does not hold"):
        load_model(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_broken_index(sharded, text, no_weights_read):
    (sharded / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_model(sharded)


@pytest.mark.parametrize("left", [0, 4, 100, -1, -5000])
def test_truncated_weights(folder, left, no_weights_read):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load_model(folder)


def test_truncated_shard(sharded, no_weights_read):
    shard = sorted(sharded.glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated: {len(whole) - 8} bytes.*{len(whole)}"):
        load_model(sharded)


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b'{"a": {"dtype": "F32"}}'])
def test_other_files_named_safetensors(folder, header, no_weights_read):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_model(folder)


def test_a_page_of_html_instead_of_weights(folder, no_weights_read):
    (folder / WEIGHTS).write_bytes(b"<!DOCTYPE html><html>rate limit</html>")
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_config(folder, text, no_weights_read):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(folder)


def test_config_that_contradicts_itself(sharded, tokenizer, tmp_path, no_weights_read):
    edit(sharded / "config.json", num_attention_heads=5)
    with pytest.raises(CheckpointError, match=r"(?s)config\.json describes no model.*not a multiple"):
        load_model(sharded)
    out = save_checkpoint(cut(dense_model("llama"), RAGGED), tokenizer, tmp_path / "out", card="", extras={})
    edit(out / "config.json", num_hidden_layers=7)
    with pytest.raises(CheckpointError, match=r"(?s)config\.json describes no model.*layer_widths describes 4 layers"):
        load_model(out)


def test_no_tokenizer(folder, no_weights_read):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_model(folder)


def test_broken_tokenizer(folder, no_weights_read):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer in .* cannot be read"):
        load_model(folder)


def test_missing_tensor(folder):
    edit_weights(folder / WEIGHTS, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_missing_head_of_an_untied_model(folder):
    edit_weights(folder / WEIGHTS, lm_head__weight=None)
    with pytest.raises(CheckpointError, match="lm_head"):
        load_model(folder)


def test_unexpected_tensor(folder, caplog):
    edit_weights(folder / WEIGHTS, model__layers__0__extra__weight=torch.zeros(3))
    with caplog.at_level(logging.WARNING, logger="prunus"):
        load_model(folder)
    assert "model.layers.0.extra.weight" in caplog.text


def test_wrong_shape(folder):
    edit_weights(folder / WEIGHTS, model__layers__1__mlp__up_proj__weight=torch.zeros(5, 32))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_weights(tokenizer, tmp_path, value, dtype):
    model = dense_model("llama").to(dtype)
    check_finite(model)
    model.model.layers[2].self_attn.k_proj.weight.data[3, 4] = value
    with pytest.raises(NonFiniteError, match=r"layers\.2\.self_attn\.k_proj\.weight \(layer 2\) holds 1 NaN or inf"):
        check_finite(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(NonFiniteError, match="layer 2"):
        load_model(tmp_path)


def test_non_finite_embedding():
    model = dense_model("llama")
    model.model.embed_tokens.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.embed_tokens\.weight holds 1"):
        check_finite(model)
