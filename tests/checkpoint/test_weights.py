"""Weight files stay what they were for as long as a model is in use, and lie in the model's folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import logits, make_model, random_tokens
from tiny_folder import SIZES, byte_tokenizer, fails, save_tiny_folder
from torch import nn

from prunus.calibration import calibration_from_tokens
from prunus.checkpoint import load_model, open_model, save_checkpoint
from prunus.checkpoint.weights import StoredWeights
from prunus.errors import CheckpointError
from prunus.evaluation.evaluate import EvalOptions, evaluate
from prunus.files.tensor_file import TensorFile
from prunus.model.geometry import Geometry
from prunus.model.layers import StoredLayers, layers_of
from prunus.scoring.score import ScoringOptions, score
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def model(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def other_weights(model: Path) -> Path:
    """A file like that of the model, with the same names and shapes and other numbers."""
    other = model.parent / "other.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(model / WEIGHTS).items()}, other, {"format": "pt"})
    assert other.stat().st_size == (model / WEIGHTS).stat().st_size
    return other


def replaced(model: Path) -> None:
    other_weights(model).replace(model / WEIGHTS)


def replaced_with_the_old_time(model: Path) -> None:
    before = (model / WEIGHTS).stat()
    replaced(model)
    os.utime(model / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))


def written_over(model: Path) -> None:
    (model / WEIGHTS).write_bytes(other_weights(model).read_bytes())


def written_over_with_the_old_time(model: Path) -> None:
    before = (model / WEIGHTS).stat()
    written_over(model)
    os.utime(model / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))


def with_two_names_exchanged(model: Path) -> None:
    """Another header of the same length, and the time of before."""
    path, before = model / WEIGHTS, (model / WEIGHTS).stat()
    content = path.read_bytes()
    one, other = b"layers.0.mlp.up_proj", b"layers.1.mlp.up_proj"
    path.write_bytes(other.join(part.replace(other, one) for part in content.split(one)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def shortened(model: Path) -> None:
    os.truncate(model / WEIGHTS, (model / WEIGHTS).stat().st_size - 4)


def removed(model: Path) -> None:
    (model / WEIGHTS).unlink()


CHANGES = [
    *(replaced, replaced_with_the_old_time, written_over, written_over_with_the_old_time),
    *(with_two_names_exchanged, shortened, removed),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_is_refused_at_the_next_read(change, model):
    opened, _ = open_model(model)
    logits(opened, random_tokens())
    change(model)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} .*(changed while|can no longer be read)"):
        logits(opened, random_tokens())


def test_another_header_is_refused_though_nothing_was_read_under_the_first(model):
    opened, _ = open_model(model)
    with_two_names_exchanged(model)
    with pytest.raises(CheckpointError, match="its time or header is another"):
        logits(opened, random_tokens())


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_saved_of_two_models(change, model, tmp_path):
    """Even where every tensor is read only once: some before, some after the change."""
    opened, tokenizer = open_model(model)
    smaller = apply_plan(opened, Plan.keep_all(Geometry.of(opened)))
    with layers_of(smaller).hold(0):
        pass
    change(model)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        save_checkpoint(smaller, tokenizer, tmp_path / "out", card="", extras={})
    assert not any(path.name.startswith((".out", "out")) for path in tmp_path.iterdir())


def test_the_hash_at_the_end_finds_what_no_second_read_would(model, tmp_path):
    """All is written when weights change, at the old time: those of the first layers are from before, or from after."""
    opened, tokenizer = open_model(model)
    path, before = model / WEIGHTS, (model / WEIGHTS).stat()

    smaller = apply_plan(opened, Plan.keep_all(Geometry.of(opened)))
    original = layers_of(smaller).verify
    entry = TensorFile(path).entries["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    length = int.from_bytes(path.read_bytes()[:8], "little")

    def after_all_is_written() -> None:
        with path.open("r+b") as file:
            file.seek(8 + length + entry[0])
            file.write(b"\1\2\3\4")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        original()

    layers_of(smaller).verify = after_all_is_written
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight' holds other values"):
        save_checkpoint(smaller, tokenizer, tmp_path / "out", card="", extras={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [replaced, written_over_with_the_old_time])
@pytest.mark.parametrize("reads", [30, 45, 100, 130])
def test_prune_refuses_a_model_that_changes_meanwhile(change, reads, model, text, tmp_path, capsys, monkeypatch):
    read_into, count = TensorFile.read_into, []

    def counting(self: TensorFile, name: str, out: torch.Tensor, entry: int | None = None) -> None:
        if self.path == model / WEIGHTS:
            count.append(name)
            if len(count) == reads:
                change(model)
        read_into(self, name, out, entry)

    monkeypatch.setattr(TensorFile, "read_into", counting)
    words = ["prune", model, "--ratio", "0.2", "--calibration", text, *SIZES]
    words += ["--set", "run.engine=streamed", "--set", "evaluation.held_out=2"]
    message = fails(capsys, *words, "--method", "wanda", "--out", tmp_path / "out")
    assert WEIGHTS in message
    assert len(count) >= reads
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["wanda", "gate_fisher", "magnitude"])
def test_scores_are_of_one_model(method, model, monkeypatch):
    """Some methods read every layer no more than once."""
    opened, _ = open_model(model)
    hold = StoredLayers.hold

    @contextmanager
    def changing(self: StoredLayers, layer_idx: int, then: int | None = None) -> Iterator[nn.Module]:
        with hold(self, layer_idx, then) as layer:
            yield layer
        if layer_idx == 1:
            monkeypatch.setattr(StoredLayers, "hold", hold)
            written_over_with_the_old_time(model)

    monkeypatch.setattr(StoredLayers, "hold", changing)
    calibration = calibration_from_tokens(random_tokens(batch=4))
    with pytest.raises(CheckpointError, match=WEIGHTS):
        score(opened, calibration, ScoringOptions(method=method), engine="streamed", progress=False)


def test_figures_are_of_one_model(model, text, monkeypatch):
    read_into = TensorFile.read_into

    def last(self: TensorFile, name: str, out: torch.Tensor, entry: int | None = None) -> None:
        read_into(self, name, out, entry)
        if name == "model.layers.1.mlp.up_proj.weight":
            monkeypatch.setattr(TensorFile, "read_into", read_into)
            written_over_with_the_old_time(model)

    monkeypatch.setattr("prunus.sweep.engine.choose_engine", lambda *_: "streamed")
    monkeypatch.setattr(TensorFile, "read_into", last)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        evaluate(str(model), EvalOptions(text=(text,), seq_len=24, windows=1), progress=False)


def test_a_model_left_alone_is_read_as_often_as_one_likes(model, tmp_path):
    opened, tokenizer = open_model(model)
    assert torch.equal(logits(opened, random_tokens()), logits(opened, random_tokens()))
    shutil.copy(model / WEIGHTS, tmp_path / "read.safetensors")  # reading changes nothing
    out = save_checkpoint(opened, tokenizer, tmp_path / "out", card="", extras={})
    assert hashlib.sha256((out / WEIGHTS).read_bytes()).digest()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be told")
@pytest.mark.parametrize("entries", [None, [0, 3]])
def test_the_system_is_told_which_bytes_will_be_read(entries, model, monkeypatch):
    told, name = [], "model.layers.1.mlp.up_proj.weight"
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *rest: told.append(rest))
    monkeypatch.setattr("prunus.files.tensor_file.ADVISED_AT_ONCE", 1000)
    StoredWeights(model).will_need(name, entries)
    content = (model / WEIGHTS).read_bytes()
    found = b"".join(content[start : start + length] for start, length, _ in told)
    weight = load_file(model / WEIGHTS)[name]
    assert found == (weight if entries is None else weight[entries]).numpy().tobytes()
    assert {advice for *_, advice in told} == {os.POSIX_FADV_WILLNEED}
    assert max(length for _, length, _ in told) <= 1000


# --- where weight files may lie ---


@pytest.fixture
def sharded(tmp_path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "models" / "sharded", max_shard_size=9000)
    byte_tokenizer().save_pretrained(tmp_path / "models" / "sharded")
    return tmp_path / "models" / "sharded"


def moved_to(place: Callable[[Path, str], str]) -> Callable[[Path], None]:
    """The first shard is taken elsewhere, and the index says where."""

    def move(sharded: Path) -> None:
        index = json.loads((sharded / INDEX).read_text())
        first = next(iter(index["weight_map"].values()))
        target = sharded / place(sharded, first)
        (sharded / first).rename(target)
        index["weight_map"] = {n: place(sharded, first) if f == first else f for n, f in index["weight_map"].items()}
        (sharded / INDEX).write_text(json.dumps(index))

    return move


def linked(sharded: Path) -> None:
    shard = min(sharded.glob("*.safetensors"))
    shard.symlink_to(shard.rename(sharded.parent / shard.name))


def linked_index(sharded: Path) -> None:
    (sharded / INDEX).symlink_to((sharded / INDEX).rename(sharded.parent / INDEX))


def linked_config(sharded: Path) -> None:
    (sharded / "config.json").symlink_to((sharded / "config.json").rename(sharded.parent / "config.json"))


def linked_in_a_circle(sharded: Path) -> None:
    shard = min(sharded.glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(shard.name)


@pytest.mark.parametrize(
    "change",
    [
        moved_to(lambda folder, name: f"../{name}"),
        moved_to(lambda folder, name: str(folder.parent / name)),
        moved_to(lambda folder, name: f"../../models/{name}"),
        *(linked, linked_index, linked_config, linked_in_a_circle),
    ],
    ids=["above", "absolute", "round about", "link", "index", "config", "circle"],
)
def test_weights_outside_of_the_folder_are_refused(change, sharded):
    change(sharded)
    for load in (load_model, open_model):
        with pytest.raises(CheckpointError, match=r"outside of|leads out of|cannot be read|lacks 1"):
            load(sharded)


def test_the_hubs_cache_keeps_files_elsewhere(sharded, tmp_path):
    """Snapshots are links to blobs, which lie beside them."""
    cache = tmp_path / "models--someone--model"
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    for place in (snapshot, blobs):
        place.mkdir(parents=True)
    for path in sharded.iterdir():
        blob = path.rename(blobs / hashlib.sha256(path.name.encode()).hexdigest())
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    models = [load(snapshot)[0] for load in (load_model, open_model)]
    assert torch.equal(*(logits(model, random_tokens()) for model in models))
    shutil.copytree(blobs, tmp_path / "elsewhere")
    for path in snapshot.glob("*.safetensors"):
        target = tmp_path / "elsewhere" / path.resolve().name
        path.unlink()
        path.symlink_to(target)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        load_model(snapshot)


def test_a_link_to_the_folder_itself(sharded, tmp_path):
    (tmp_path / "link").symlink_to(sharded)
    for load in (load_model, open_model):
        load(tmp_path / "link")


def test_a_tensor_that_is_stored_twice(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second, {"format": "pt"})
    for load in (load_model, open_model):
        with pytest.raises(CheckpointError, match=f"stored twice, in {first.name} and in {second.name}"):
            load(sharded)


def test_a_header_as_large_as_its_file_is_not_read_into_memory(tmp_path):
    folder = save_tiny_folder(tmp_path / "model", "llama")
    with (folder / WEIGHTS).open("wb") as file:
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**40 + 8)  # a hole: no disk is used
    for load in (load_model, open_model):
        with pytest.raises(CheckpointError, match="its header has 1,099,511,627,776 bytes"):
            load(folder)
