"""`prunus export` and the selection flags that shape a result, as a user types them."""

from __future__ import annotations

import pytest
from llama_cpp_graph import GgufFile
from tiny_families import make_model
from tiny_folder import fails, run, run_json
from transformers import AutoConfig

import prunus
from prunus.cli import main
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan


@pytest.fixture
def ragged(saved):
    whole = make_model("llama", num_hidden_layers=2, vocab_size=280)
    kept = [{"attention": [0, 2], "mlp": range(9)}, {"attention": [1], "mlp": range(4)}]
    return saved(prunus.apply_plan(whole, Plan.from_kept(Geometry.of(whole), kept)))


def test_options_of_a_gguf_file_are_no_options_of_a_folder(capsys, ragged, tmp_path):
    for option in (["--type", "q8_0"], ["--mlp-multiple", "64"]):
        said = fails(capsys, "export", ragged, "--to", "dense", "--out", tmp_path / "out", *option)
        assert f"{option[0]} is one of GGUF files" in said
    assert not (tmp_path / "out").exists()


def test_export_gguf(capsys, ragged, tmp_path):
    out = tmp_path / "a.gguf"
    facts = run_json(capsys, "export", ragged, "--to", "gguf", "--out", out, "--type", "bf16", "--mlp-multiple", 8)
    file = GgufFile(out)
    assert facts["architecture"] == file.architecture == "deci"
    assert facts["feed_forward_length"] == file["feed_forward_length"] == [16, 8]
    assert facts["head_count_kv"] == file["attention.head_count_kv"] == [2, 1]
    assert facts["parameters"] == sum(tensor.numel() for tensor in file.tensors.values())


def test_export_dense(capsys, ragged, tmp_path):
    facts = run_json(capsys, "export", ragged, "--to", "dense", "--out", tmp_path / "dense")
    config = AutoConfig.from_pretrained(tmp_path / "dense")
    assert (config.num_key_value_heads, config.intermediate_size) == (2, 9)
    assert (facts["num_key_value_heads"], facts["intermediate_size"]) == (2, 9)


def test_an_export_that_cannot_be_is_one_line(capsys, ragged, tmp_path):
    (tmp_path / "a.gguf").touch()
    assert main(["export", str(ragged), "--to", "gguf", "--out", str(tmp_path / "a.gguf")]) == 1
    error = capsys.readouterr().err
    assert "--overwrite" in error
    assert "Traceback" not in error
    assert main(["export", str(ragged), "--to", "onnx", "--out", str(tmp_path / "a.onnx")]) == 2


def test_shape_and_named_alignment(capsys, saved, tmp_path):
    folder = saved(make_model("llama", num_hidden_layers=3, vocab_size=280, intermediate_size=320))
    scores = ["score", folder, "--out", tmp_path / "scores", "--method", "magnitude"]
    run(capsys, *scores)
    for flags, multiple in ((["--align", "gpu"], 64), (["--align", "gpu128"], 128), (["--align", "10"], 10)):
        plan = tmp_path / "plan.json"
        run(capsys, "plan", tmp_path / "scores", "--ratio", 0.2, "--out", plan, "--overwrite", *flags)
        widths = [layer.intermediate_size for layer in Plan.load(plan).kept_widths]
        assert all(width % multiple == 0 or width == 320 for width in widths)
        assert any(width % multiple == 0 and width < 320 for width in widths)
    run(
        capsys,
        *("plan", tmp_path / "scores", "--ratio", 0.2, "--out", tmp_path / "plan.json", "--overwrite"),
        *("--shape", "uniform", "--align", "gpu"),
    )
    kept = Plan.load(tmp_path / "plan.json").kept_widths
    assert len(set(kept)) == 1
    assert kept[0].intermediate_size % 64 == 0
    assert main(["plan", str(tmp_path / "scores"), "--ratio", "0.2", "--align", "tpu"]) == 1
    captured = capsys.readouterr()
    assert "gpu128" in captured.out + captured.err
