"""Damaged files: an error that names the file and the reason, no traceback, and no cut that they do not ask for."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import plain_recipe, plain_scoring
from safetensors import SafetensorError
from safetensors.torch import load_file
from strategies import changed_json, damaged, overwritten
from tiny_folder import SIZES, fails, save_tiny_folder

import prunus
from prunus.checkpoint import load_model, open_model, save_checkpoint
from prunus.cli import main
from prunus.errors import CheckpointError, PlanError, PrunusError, StatisticsError
from prunus.files.records import Records
from prunus.files.tensor_file import TensorFile
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.model.widths import LayerWidths, layer_widths_of
from prunus.scoring.score import Score
from prunus.selection.plan import Plan
from prunus.statistics import Statistics


@pytest.fixture(scope="module")
def scores(folder, text, tmp_path_factory) -> Path:
    """What `prunus score` writes."""
    out = tmp_path_factory.mktemp("scores") / "scores"
    words = [
        "score",
        folder,
        "--out",
        out,
        "--method",
        "wanda",
        "--set",
        "scoring.normalize=layer_sum",
        "--calibration",
        text,
    ]
    assert outcome(*words, *SIZES)[0] == 0
    return out


@pytest.fixture(scope="module")
def pruned(folder, scores, tmp_path_factory) -> Path:
    """A ragged model folder, as `prunus apply` writes it."""
    place = tmp_path_factory.mktemp("pruned")
    assert outcome("plan", scores, "--ratio", "0.3", "--out", place / "plan.json")[0] == 0
    assert outcome("apply", folder, place / "plan.json", "--out", place / "small")[0] == 0
    return place / "small"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder for the examples of a property, which overwrite each other's files."""
    return tmp_path_factory.mktemp("damaged")


def outcome(*words) -> tuple[int, str, str]:
    """Exit status, output and errors of a command; an exception that it lets through fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


def refused(result: tuple[int, str, str], *named: str) -> bool:
    """Whether a command failed, and then with nothing but a message that names one of these."""
    status, out, err = result
    if status == 0:
        return False
    assert status == 1
    assert out == ""
    assert "error: " in err
    assert "Traceback" not in err
    assert any(name in err for name in named), err
    return True


def copy_with(folder: Path, copy: Path, name: str, content: bytes) -> Path:
    """A copy of a folder in which one file holds something else."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(content)
    return copy


# --- plan.json ---


@settings(max_examples=40)
@given(data=st.data())
def test_plans(data, folder, pruned, place):
    content = data.draw(damaged((pruned / "prunus" / "plan.json").read_bytes()))
    path, out = place / "plan.json", place / "out"
    path.write_bytes(content)
    shutil.rmtree(out, ignore_errors=True)
    if refused(outcome("apply", folder, path, "--out", out), "plan"):
        assert not out.exists()
        return
    # It is a plan after all: then it is that plan, and no other, that was followed.
    plan, config = Plan.load(path), load_model(out)[0].config
    assert layer_widths_of(config) == tuple(plan.kept_widths[i] for i in plan.surviving_layers)


# --- groups.csv and score.json ---


@given(data=st.data())
def test_tables(data, scores, place):
    content = data.draw(overwritten((scores / "groups.csv").read_bytes()))
    check_planned(copy_with(scores, place / "scores", "groups.csv", content), place / "planned.json")


@given(data=st.data())
def test_what_a_table_was_made_from(data, scores, place):
    content = data.draw(damaged((scores / "score.json").read_bytes()))
    check_planned(copy_with(scores, place / "scores", "score.json", content), place / "planned.json")


def check_planned(scores: Path, out: Path) -> None:
    """A plan for the table's model that removes what was asked for, or none."""
    out.unlink(missing_ok=True)
    if refused(outcome("plan", scores, "--ratio", "0.2", "--out", out), "groups.csv", "score.json", "table", "ratio"):
        assert not out.exists()
        return
    read, plan = Score.load(scores), Plan.load(out)
    counts = read.table.groupby(["layer_idx", "group_type"]).size()
    for layer_idx, widths in enumerate(plan.widths):
        assert all(counts.get((layer_idx, axis), 0) == widths[axis] for axis in AXES)
    assert read.geometry.parameters_left(plan.kept_widths) <= 0.8 * read.geometry.total_parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_parameters": 0}, "its layers have"),
        ({"total_parameters": 1000}, "its layers have"),
        ({"total_parameters": 10**5 + 0.5}, "total_parameters is 100000.5; it must be a whole number"),
        ({"total_parameters": "1e6"}, 'total_parameters is "1e6"; it must be a whole number'),
        ({"group_parameters": {"attention": 0, "mlp": 144}}, "groups of attention without parameters"),
        ({"group_parameters": {"attention": -1, "mlp": 144}}, "group_parameters.attention is -1; it must be"),
        ({"block_parameters": {"attention": float("nan"), "mlp": 48}}, "it holds NaN, which is no number in JSON"),
        ({"layers": [[3, 20], [3, True], [3, 20]]}, "layers.1.1 is true; it must be a whole number"),
        ({"layers": [[3, 20], [3, 20]]}, "windows of 3 layers, widths of 2"),
        ({"layers": [[3, 10], [3, 20], [3, 30]]}, "layer 0 mlp"),
        ({"layers": [[3, 10**12], [3, 20], [3, 20]], "total_parameters": 10**18}, "describes 1,000,000,000,049"),
        ({"layers": [], "windows": []}, "its layers have 0 parameters"),
        ({"layers": [[3, 20], [3, 20], [3, 20, 1]]}, "geometry"),
        ({"model_type": ["llama"]}, "geometry"),
        ({"model_type": "gpt2"}, "gpt2"),
    ],
)
def test_shapes_that_cannot_be(capsys, scores, tmp_path, changes, message):
    about = json.loads((scores / "score.json").read_text())
    about["geometry"] |= changes
    copy = copy_with(scores, tmp_path / "scores", "score.json", json.dumps(about).encode())
    said = fails(capsys, "plan", copy, "--ratio", "0.2", "--out", tmp_path / "plan.json")
    assert message in said
    assert "score.json" in said or "the table lists" in said
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (3, "routing is 3; it must be an object"),
        ({}, "routing.tokens_of_experts is missing"),
        ({"tokens_of_experts": [[1], None, []]}, "routing.tokens_of_experts.1 is null; it must be an array"),
        ({"tokens_of_experts": [[1]] * 7}, "routing.tokens_of_experts has 7 entries, and there are 3 layers"),
    ],
)
def test_tokens_of_experts_that_cannot_be(capsys, scores, tmp_path, routing, message):
    about = json.loads((scores / "score.json").read_text()) | {"routing": routing}
    copy = copy_with(scores, tmp_path / "scores", "score.json", json.dumps(about).encode())
    said = fails(capsys, "plan", copy, "--ratio", "0.2", "--out", tmp_path / "plan.json")
    assert message in said
    assert "score.json" in said


def test_geometries_read_back(llama):
    geometry = Geometry.of(llama)
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry
    with pytest.raises(PlanError, match="its layers have 0 parameters"):
        Geometry.from_dict({**geometry.to_dict(), "layers": [[0, 0]] * 4})
    assert geometry.parameters_left([LayerWidths(0, 0)] * 4) == 2 * 96 * 48 + 48, "embeddings, head and final norm"


# --- config.json of a pruned folder ---


@settings(max_examples=20)
@given(data=st.data())
def test_configs(data, pruned, place):
    """Whether its weights are read at once or layer by layer, a model of other shapes than its weights' is refused."""
    content = data.draw(damaged((pruned / "config.json").read_bytes()))
    copy = copy_with(pruned, place / "model", "config.json", content)
    refused(outcome("inspect", copy), "config", "model type", "quantised")
    for load in (load_model, open_model):
        try:
            model, _ = load(copy)
        except PrunusError as error:
            assert str(error)  # noqa: PT017 (either way will do)
            continue
        weights = load_file(copy / "model.safetensors")
        assert all(
            tensor.shape == weights[name].shape for name, tensor in model.state_dict().items() if name in weights
        )


IMPOSSIBLE = {
    "an activation that is not there": {"hidden_act": "swish-er"},
    "no key/value heads": {"num_key_value_heads": 0},
    "a negative size": {"hidden_size": -48},
    "more layers than memory": {"num_hidden_layers": 10**9},
    "a vocabulary larger than memory": {"vocab_size": 10**12},
    "other channels": {"intermediate_size": 21},
    "other heads": {"head_dim": 16},
    "positions in words": {"max_position_embeddings": "many"},
    "rotary positions of no kind": {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
    "widths in words": {"layer_widths": "narrow"},
    "widths of other layers": {"layer_widths": []},
    "quantised, in a word": {"quantization_config": "gptq"},
    "no model type": {"model_type": None},
    "a list of model types": {"model_type": ["llama"]},
}


@pytest.mark.parametrize("fields", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
@pytest.mark.parametrize("kind", ["stock", "ragged"])
def test_configs_that_cannot_be(folder, pruned, tmp_path, fields, kind):
    source = folder if kind == "stock" else pruned
    if kind == "stock" and "layer_widths" in fields:
        pytest.skip("a stock config ignores the field")
    if kind == "ragged" and "intermediate_size" in fields:
        fields = {**fields, "layer_widths": None}  # the field by itself is of the dense model
    config = {**json.loads((source / "config.json").read_text()), **fields}
    copy = copy_with(source, tmp_path / "model", "config.json", json.dumps(config).encode())
    result = outcome("eval", copy, "--windows", "1", "--seq-len", "8")
    assert refused(result, "config.json", "the config", "model type", "quantised", "cannot be loaded")
    with pytest.raises(PrunusError):
        open_model(copy)


# --- safetensors: weights, statistics and records ---


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def damaged_tensors(draw, path: Path) -> bytes:
    """A safetensors file with another header, or with bytes of the header or the length before it overwritten."""
    header, data = header_of(path)
    if draw(st.booleans()):
        return with_header(draw(changed_json(header)), data)
    content = path.read_bytes()
    front = len(content) - len(data)
    return draw(overwritten(content[:front])) + data


@given(data=st.data())
def test_tensors_are_what_the_header_says_or_refused(data, folder, place):
    """Whatever is read of a damaged file, the safetensors library reads it alike; it may refuse more."""
    path = place / "weights.safetensors"
    path.write_bytes(data.draw(damaged_tensors(folder / "model.safetensors")))
    try:
        file = TensorFile(path)
        found = {name: file.read(name) for name in file.entries}
    except CheckpointError as error:
        assert "weights.safetensors" in str(error)  # noqa: PT017 (either way will do)
        return
    try:
        expected = load_file(path)
    except SafetensorError:
        return
    assert found.keys() == expected.keys()
    # By their bytes: a header may well call floats integers, and NaN is not equal to itself.
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": 7, "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        7,
        None,
    ],
    ids=repr,
)
def test_entries_that_describe_no_tensor(tmp_path, entry):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(with_header({"a": entry}, bytes(8)))
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is not a safetensors file"):
        TensorFile(path)


def test_tensors_that_lie_on_each_other(tmp_path):
    path = tmp_path / "weights.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path.write_bytes(with_header({"a": entry, "b": entry}, bytes(8)))
    with pytest.raises(CheckpointError, match="starts at 0, the one before it ends at 8"):
        TensorFile(path)


def test_dtypes_that_are_not_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(with_header({"a": {"dtype": "F8_E5M2", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)))
    with pytest.raises(CheckpointError, match=r"'a' has dtype F8_E5M2; use a bf16"):
        TensorFile(path).read("a")


@given(data=st.data())
def test_statistics(data, scores, place):
    path = place / "statistics.safetensors"
    path.write_bytes(data.draw(damaged_tensors(scores / path.name)))
    try:
        found = Statistics.load(path)
    except StatisticsError as error:
        assert path.name in str(error)  # noqa: PT017 (either way will do)
        return
    assert all(isinstance(tensor, torch.Tensor) for layer in found.layers for tensor in layer.values())


@pytest.mark.parametrize("layers", [10**12, -1, "3", None, [3], 2.0])
def test_statistics_of_a_number_of_layers_that_cannot_be(scores, tmp_path, layers):
    header, data = header_of(scores / "statistics.safetensors")
    about = json.loads(header["__metadata__"]["prunus_statistics"])
    header["__metadata__"]["prunus_statistics"] = json.dumps({**about, "layers": layers})
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(with_header(header, data))
    with pytest.raises(StatisticsError, match=r"statistics\.safetensors is not a prunus"):
        Statistics.load(path)


@given(data=st.data())
def test_records(data, place):
    """What an unfinished run left is gone on with as it was, or the folder is refused."""
    folder = place / "records"
    shutil.rmtree(folder, ignore_errors=True)
    made_from = {"model": "a1b2", "layers": [1, 2]}
    records = Records(folder, made_from)
    for layer_idx in range(2):
        records.put(layer_idx, {"weight": torch.arange(5.0) + layer_idx}, {"loss": 0.1 * layer_idx})
    path = folder / data.draw(st.sampled_from(["made_from.json", "layer-00001.safetensors"]))
    whole = damaged(path.read_bytes()) if path.suffix == ".json" else damaged_tensors(path)
    path.write_bytes(data.draw(whole))
    try:
        again = Records(folder, made_from)
    except StatisticsError as error:
        assert str(folder) in str(error)  # noqa: PT017 (either way will do)
        return
    assert len(again) == 2
    assert again[0]["weight"].tolist() == [0, 1, 2, 3, 4]
    assert again.about(0) == {"loss": 0.0}


@pytest.mark.parametrize("name", ["layer-first.safetensors", "layer-.safetensors", "layer-00002.safetensors"])
def test_files_that_are_no_records(tmp_path, name):
    Records(tmp_path, {})
    (tmp_path / name).write_bytes(with_header({}, b""))
    with pytest.raises(StatisticsError, match=f"{name} is not the record of a finished layer"):
        Records(tmp_path, {})


# --- pickles ---


class Bomb:
    """Opening a pickle of it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_and_never_opened(capsys, tmp_path, name):
    exploded, folder = tmp_path / "exploded", save_tiny_folder(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    bomb = pickle.dumps({"model.norm.weight": Bomb(exploded)})
    (folder / name).write_bytes(bomb)
    (folder / "training_args.bin").write_bytes(bomb)
    commands = [
        ["prune", folder, "--out", tmp_path / "out", "--ratio", "0.1"],
        ["score", folder, "--out", tmp_path / "out", "--set", "run.engine=streamed"],
        ["eval", folder],
        ["bench", folder],
        ["export", folder, "--to", "dense", "--out", tmp_path / "out"],
        ["export", folder, "--to", "gguf", "--out", tmp_path / "a.gguf"],
    ]
    for words in commands:
        message = fails(capsys, *words)
        assert name in message
        assert "Convert them to safetensors" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    pickle.loads(bomb)
    assert exploded.exists(), "the bomb works"


def test_pickles_beside_safetensors_are_left_alone(tmp_path):
    exploded, folder = tmp_path / "exploded", save_tiny_folder(tmp_path / "model", "llama")
    for name in ("pytorch_model.bin", "optimizer.pt", "adapter_model.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(exploded)))
    model, tokenizer = load_model(folder)
    result = prunus.prune(model, 0.1, recipe=plain_recipe(plain_scoring(method="magnitude")), progress=False)
    save_checkpoint(result.model, tokenizer, tmp_path / "out", card="", extras={})
    open_model(folder)
    assert not exploded.exists()


# --- tokenizer.json ---


@pytest.mark.parametrize("number", [10**9, 2**31, -1])
def test_numbers_of_tokens_that_no_vocabulary_reaches(capsys, folder, tmp_path, number):
    """The tokenizers library would make a table of so many entries, and end the process without memory for it."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = number
    copy = copy_with(folder, tmp_path / "model", "tokenizer.json", json.dumps(content).encode())
    assert f"gives a token the number {number}" in fails(capsys, "eval", copy)


def test_fields_of_a_tokenizer_of_another_type(capsys, folder, tmp_path):
    for name, value in (("model_max_length", "long"), ("added", "\ud800")):
        content = json.loads((folder / "tokenizer_config.json").read_text())
        content[name] = value
        copy = copy_with(folder, tmp_path / "model", "tokenizer_config.json", json.dumps(content).encode())
        assert "cannot be read" in fails(capsys, "eval", copy)
