"""A model folder is complete, or it is not there."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forked import forked
from safetensors import safe_open
from tiny_models import ALL, LAYERS, RAGGED, Kept, cut, dense_model

from prunus.checkpoint import load_model, model_bytes, save_checkpoint
from prunus.checkpoint import save as save_module
from prunus.errors import CheckpointError
from prunus.files import outputs
from prunus.files.outputs import check_disk, check_output, claimed

EXTRAS = {"plan.json": '{"a": 1}', "groups.csv": b"layer_idx\n0\n", "metrics.json": "{}"}


def save(model, tokenizer, out, **kwargs):
    return save_checkpoint(model, tokenizer, out, **{"card": "# Card\n", "extras": EXTRAS, **kwargs})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


@pytest.fixture
def model():
    return cut(dense_model("llama", tie_word_embeddings=True), RAGGED)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("ragged", [False, True], ids=["stock", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip(family, tied, ragged, dtype, tokenizer, tmp_path, input_ids):
    kept = RAGGED if ragged else (Kept((1,), ALL[:7]),) * LAYERS
    model = cut(dense_model(family, tie_word_embeddings=tied).to(dtype), kept)
    save(model, tokenizer, tmp_path / "out")
    loaded, loaded_tokenizer = load_model(tmp_path / "out", dtype=None)
    assert type(loaded) is type(model)
    assert loaded.dtype == dtype
    assert not loaded.training
    assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())
    text = "hello <eos> 123"
    assert loaded_tokenizer(text).input_ids == tokenizer(text).input_ids
    messages = [{"role": "user", "content": "hi"}]
    assert loaded_tokenizer.apply_chat_template(messages, tokenize=False) == "user: hi\n"
    assert loaded_tokenizer.padding_side == "left"


def test_again_and_again(family, tokenizer, tmp_path, input_ids):
    model = cut(dense_model(family), RAGGED)
    expected = logits(model, input_ids)
    for name in ("a", "b", "c"):
        save(model, tokenizer, tmp_path / name)
        model, tokenizer = load_model(tmp_path / name)
        assert torch.equal(logits(model, input_ids), expected)
    first, last = contents(tmp_path / "a"), contents(tmp_path / "c")
    assert first.keys() == last.keys()
    assert first["config.json"] == last["config.json"]
    assert first["model.safetensors"] == last["model.safetensors"]
    # transformers' own save_pretrained is enough, too: the code comes along.
    model.save_pretrained(tmp_path / "d")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "d"), input_ids), expected)
    assert {"modeling_prunus.py", "configuration_prunus.py"} <= contents(tmp_path / "d").keys()


def test_folder(model, tokenizer, tmp_path):
    out = save(model, tokenizer, tmp_path / "out")
    files = contents(out)
    assert out == tmp_path / "out"
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert {"tokenizer_config.json", "chat_template.jinja", "README.md"} <= files.keys()
    assert files["README.md"] == b"# Card\n"
    assert {n: files[f"prunus/{n}"] for n in EXTRAS} == {
        n: c.encode() if isinstance(c, str) else c for n, c in EXTRAS.items()
    }
    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert "lm_head.weight" not in names, "tied weights are stored once"
    assert "model.embed_tokens.weight" in names
    assert not any("layers.0.self_attn" in name or "layers.1.mlp" in name for name in names)
    config = json.loads(files["config.json"])
    assert config["auto_map"] == {
        "AutoConfig": "configuration_prunus.PrunusLlamaConfig",
        "AutoModel": "modeling_prunus.PrunusLlamaModel",
        "AutoModelForCausalLM": "modeling_prunus.PrunusLlamaForCausalLM",
        "AutoModelForSequenceClassification": "modeling_prunus.PrunusLlamaForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_prunus.PrunusLlamaForTokenClassification",
    }
    assert config["architectures"] == ["PrunusLlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert os.listdir(tmp_path) == ["out"]
    readable = [path for path in out.rglob("*") if path.is_file()]
    assert len({path.stat().st_mode & 0o777 for path in readable}) == 1
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)


def test_stock_models_bring_no_code(tokenizer, tmp_path):
    model = cut(dense_model("qwen3"), (Kept((1,), ALL),) * LAYERS)
    files = contents(save(model, tokenizer, tmp_path / "out"))
    assert not any(name.endswith(".py") for name in files)
    assert "auto_map" not in json.loads(files["config.json"])


def test_no_path_of_this_machine_is_saved(model, tokenizer, tmp_path):
    save(model, tokenizer, tmp_path / "secret-place")
    model, tokenizer = load_model(tmp_path / "secret-place")
    model.config.tokenizer_file = str(tmp_path / "tokenizer.json")  # as some published configs have
    for name, content in contents(save(model, tokenizer, tmp_path / "out")).items():
        assert b"secret-place" not in content, name
        assert os.fsencode(tmp_path) not in content, name


def test_rotary_base_is_written_for_old_readers_too(tokenizer, tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    for name, rope in (("scaled", scaled), ("plain", {"rope_type": "default", "rope_theta": 5000.0})):
        model = cut(dense_model("llama", rope_parameters=rope), RAGGED)
        out = save(model, tokenizer, tmp_path / name)
        written = json.loads((out / "config.json").read_text())
        assert written["rope_theta"] == 5000.0
        assert written["rope_scaling"] == ({"rope_type": "linear", "factor": 2.0} if name == "scaled" else None)
        loaded = load_model(out)[0]
        assert loaded.config.rope_parameters == rope
        assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_sharded(model, tokenizer, tmp_path, input_ids):
    out = save(model, tokenizer, tmp_path / "out", max_shard_size=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert {path.name for path in out.glob("*.safetensors")} == shards
    assert torch.equal(logits(load_model(out)[0], input_ids), logits(model, input_ids))


def test_non_contiguous_weights(model, tokenizer, tmp_path, input_ids):
    weight = model.model.layers[3].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    loaded, _ = load_model(save(model, tokenizer, tmp_path / "out"))
    torch.testing.assert_close(logits(loaded, input_ids), logits(model, input_ids))


def test_generation_settings_that_transformers_would_not_save(model, tokenizer, tmp_path):
    model.generation_config.temperature = 0.6  # without do_sample: transformers refuses to save it
    model.generation_config.eos_token_id = [258, 7]
    out = save(model, tokenizer, tmp_path / "out")
    written = json.loads((out / "generation_config.json").read_text())
    assert written["temperature"] == 0.6
    assert load_model(out)[0].generation_config.eos_token_id == [258, 7]
    assert model.generation_config.temperature == 0.6


def test_additional_special_tokens(model, tokenizer, tmp_path):
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    loaded = load_model(save(model, more, tmp_path / "out"))[1]
    assert "<tool>" in loaded.all_special_tokens
    assert loaded("a<tool>b").input_ids == more("a<tool>b").input_ids


def test_expected_bytes(model, tokenizer, tmp_path):
    out = save(model, tokenizer, tmp_path / "out")
    assert 0 <= (out / "model.safetensors").stat().st_size - model_bytes(model) < 10_000


@pytest.mark.parametrize("name", ["../plan.json", "a/b.json", ""])
def test_extras_stay_in_their_folder(model, tokenizer, tmp_path, name):
    with pytest.raises(CheckpointError, match="plain file name"):
        save(model, tokenizer, tmp_path / "out", extras={name: "x"})
    assert os.listdir(tmp_path) == []


# --- where it may be written ---


def test_output_must_be_empty(model, tokenizer, tmp_path):
    out = save(model, tokenizer, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"not empty.*`overwrite`"):
        check_output(out)
    with pytest.raises(CheckpointError, match="not empty"):
        save(model, tokenizer, out)
    before = contents(out)
    save(model, tokenizer, out, overwrite=True, card="# New\n")
    after = contents(out)
    assert after["README.md"] == b"# New\n"
    assert after["model.safetensors"] == before["model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


def test_overwriting_leaves_nothing_of_the_old_folder(model, tokenizer, tmp_path):
    save(model, tokenizer, tmp_path / "out", max_shard_size=20_000)
    files = contents(save(model, tokenizer, tmp_path / "out", overwrite=True))
    assert [name for name in files if name.endswith(".safetensors")] == ["model.safetensors"]
    assert "model.safetensors.index.json" not in files


def test_only_outputs_are_ever_replaced(model, tokenizer, tmp_path):
    home = tmp_path / "documents"
    home.mkdir()
    (home / "config.json").write_text("{}")
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"nor an earlier output.*thesis\.tex"):
        save(model, tokenizer, home, overwrite=True)
    assert (home / "thesis.tex").read_text() == "years of work"
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.json").write_text("{}")
    with pytest.raises(CheckpointError, match="nor an earlier output"):
        check_output(notes, overwrite=True)


def test_directories_that_people_live_in_are_refused(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    (tmp_path / "home" / "me").mkdir(parents=True)
    for place in (".", tmp_path, tmp_path / "home", "~", "/"):
        with pytest.raises(CheckpointError, match=r"current directory|home directory"):
            check_output(place, overwrite=True)
    check_output("out")
    check_output("~/out")
    check_output(tmp_path / "not" / "yet" / "there")


def test_output_on_top_of_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(CheckpointError, match="not a folder"):
        check_output(tmp_path / "file" / "out")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="no permission"):
            check_output(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_an_empty_folder_is_no_obstacle(model, tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    save(model, tokenizer, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_links_are_followed(model, tokenizer, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(model, tokenizer, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()


def test_full_disk(model, tokenizer, tmp_path, monkeypatch):
    check_disk(tmp_path / "out", 1000)
    with pytest.raises(CheckpointError, match=r"GB free, the output needs about 1000000000000\.\d\d GB"):
        check_disk(tmp_path / "a" / "b", 10**21)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, model_bytes(model)))
    with pytest.raises(CheckpointError, match="free some space"):
        save(model, tokenizer, tmp_path / "out")
    assert os.listdir(tmp_path) == []


# --- runs that die ---


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", ["_save_model", "_flush", "_move_into_place"])
def test_an_exception_leaves_the_old_folder(model, tokenizer, tmp_path, monkeypatch, error, step):
    out = save(model, tokenizer, tmp_path / "out")
    before = contents(out)

    def fail(*args):
        raise error("stop")

    monkeypatch.setattr(save_module if step == "_save_model" else outputs, step, fail)
    with pytest.raises(CheckpointError if error is OSError else error, match="stop"):
        save(model, tokenizer, out, overwrite=True, card="# New\n")
    assert contents(out) == before
    with pytest.raises(CheckpointError if error is OSError else error, match="stop"):
        save(model, tokenizer, tmp_path / "fresh")
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(model, tokenizer, tmp_path, monkeypatch):
    out = save(model, tokenizer, tmp_path / "out")
    before = contents(out)
    rename = Path.rename

    def fail(self, target):
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        save(model, tokenizer, out, overwrite=True)
    assert contents(out) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(os.name != "posix", reason="kills processes")
def test_killed_runs(model, tokenizer, tmp_path):
    """Runs that are killed without mercy, at three steps of writing."""
    places = {step: tmp_path / str(i) for i, step in enumerate(("_flush", "_move_into_place", "between the renames"))}
    for place in places.values():
        place.mkdir()
    old = save(model, tokenizer, places["between the renames"] / "out")
    before = contents(old)

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def killed(step, place):
        if step == "between the renames":
            rename = Path.rename
            Path.rename = lambda self, target: die() if ".partial-" in self.name else rename(self, target)
        else:
            setattr(outputs, step, die)
        save_checkpoint(model, tokenizer, place / "out", card="new", extras={}, overwrite=True)

    for step, place in places.items():
        assert forked(lambda step=step, place=place: killed(step, place)).status == -signal.SIGKILL

    for step in ("_flush", "_move_into_place"):
        lock, left = sorted(places[step].iterdir())
        assert lock.name == ".out.lock"
        assert left.name.startswith(".out.partial-"), "nothing may have the final name"
        assert (left / "model.safetensors").is_file(), "the test is about a run that had got far"
        with claimed(places[step] / "out"):
            pass
        assert list(places[step].iterdir()) == []

    place = places["between the renames"]
    assert sorted(path.name.split("-")[0] for path in place.iterdir()) == [".out.lock", ".out.partial", ".out.replaced"]
    with claimed(old):
        pass
    assert os.listdir(place) == ["out"]
    assert contents(old) == before


def test_leftovers_of_others_stay(tmp_path):
    keep = {".out2.partial-0123456789abcdef", ".out.partial-0123456789abcde", "out.partial-0123456789abcdef", "partial"}
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("years of work")
    for name in (*keep, ".out.partial-0123456789abcdef"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.partial-fedcba9876543210").symlink_to(tmp_path / "precious")
    with claimed(tmp_path / "out"):
        assert set(os.listdir(tmp_path)) == {*keep, "precious", ".out.lock"}
    assert set(os.listdir(tmp_path)) == {*keep, "precious"}
    assert (tmp_path / "precious" / "file").read_text() == "years of work"


def test_a_folder_is_on_disk_before_it_has_its_name(model, tokenizer, tmp_path, monkeypatch):
    """Every file is flushed before the rename; else a power failure could leave empty files under the final name."""
    flushed: set[str] = set()
    real = os.fsync

    def fsync(descriptor):
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    moved: list[set[str]] = []
    move = outputs._move_into_place
    monkeypatch.setattr(outputs, "_move_into_place", lambda *args: (moved.append(set(flushed)), move(*args))[1])
    out = save(model, tokenizer, tmp_path / "out")
    names = {Path(path).name for path in moved[0]}
    assert {Path(name).name for name in contents(out)} <= names
    assert str(tmp_path) in flushed
