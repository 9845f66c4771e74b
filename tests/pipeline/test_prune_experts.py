"""A mixture of experts from folder to smaller folder, as a user types it."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace

import pytest
import torch
from tiny_folder import TEXT, byte_tokenizer, fails, run, run_json
from tiny_mixtures import make_mixture
from transformers import AutoConfig

from prunus.checkpoint import save_checkpoint
from prunus.errors import CalibrationError
from prunus.model.widths import LayerWidths
from prunus.scoring.routing import check_enough_reached, routing_of, tokens_of_experts, warn_of_idle_experts
from prunus.selection.plan import KeptGroups, Plan
from prunus.statistics import Statistics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("mixture") / "tiny-moe"
    model = make_mixture("qwen3_moe", "renormalised-one-dense", vocab_size=260, max_position_embeddings=256)
    save_checkpoint(model, byte_tokenizer(), place, card="", extras={})
    return place


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


SIZES = ["--samples", "8", "--seq-len", "32", "--set", "evaluation.held_out=2"]


@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_half_of_the_experts(folder, text, tmp_path, engine, capsys):
    words = ["prune", folder, "--out", tmp_path / "half", "--experts", "0.5", "--calibration", text, *SIZES]
    run(capsys, *words, "--set", f"run.engine={engine}")
    config = AutoConfig.from_pretrained(tmp_path / "half")
    assert (config.num_experts, config.model_type) == (3, "qwen3_moe")
    metrics = json.loads((tmp_path / "half" / "prunus" / "metrics.json").read_text())
    assert metrics["target"]["target"] == "experts"
    assert metrics["achieved_ratio"] == 0.5
    assert metrics["active_parameters_before"] == metrics["active_parameters_after"] < metrics["parameters_after"]
    (layer,) = metrics["routing"]["layers"]
    assert (layer["layer_idx"], layer["experts"], layer["kept"]) == (1, 6, 3)
    assert 0 < layer["moved"] < 1
    assert len(layer["tokens_before"]) == len(layer["tokens_after"]) == 3
    card = (tmp_path / "half" / "README.md").read_text()
    assert "| parameters active per token |" in card
    assert "| 1 | 6 | 3 | 0 | 3 of 6 |" in card
    report = (tmp_path / "half" / "report.html").read_text()
    assert "3 of 6" in report
    assert "Routing" in report
    said = run(capsys, "inspect", tmp_path / "half").out
    assert "active_parameters" in said
    assert "3 of 6" in said
    assert "tokens per kept expert" in said
    assert f"{layer['moved']:.1%}" in said
    assert run_json(capsys, "inspect", tmp_path / "half")["routing"] == metrics["routing"]


def test_active_parameters_of_a_model_cut_twice_are_those_of_the_original(text, tmp_path, capsys):
    sized = ["--calibration", text, *SIZES]
    dense, shallow, cut = (tmp_path / name for name in ("dense", "shallow", "cut"))
    model = make_mixture("qwen3_moe", "renormalised-one-dense", vocab_size=260, num_hidden_layers=4)
    save_checkpoint(model, byte_tokenizer(), dense, card="", extras={})
    run(capsys, "prune", dense, "--out", shallow, "--ratio", "0.2", "--shape", "depth", *sized)
    run(capsys, "prune", shallow, "--out", cut, "--experts", "0.5", *sized)
    first, second = (json.loads((each / "prunus" / "metrics.json").read_text()) for each in (shallow, cut))
    assert second["active_parameters_before"] == first["active_parameters_after"] < first["active_parameters_before"]
    assert second["original"]["active_parameters"] == first["active_parameters_before"]
    counts = f"{first['active_parameters_before']:,} | {second['active_parameters_after']:,}"
    assert f"| parameters active per token | {counts} |" in (cut / "README.md").read_text()


def test_scored_planned_and_applied(folder, text, tmp_path, capsys):
    """reap, forward passes only: a table of experts alone."""
    sized = ["--calibration", text, *SIZES[:4]]
    run(capsys, "score", folder, "--out", tmp_path / "scores", "--method", "reap", *sized)
    ratio = ["--ratio", "0.5", "--target", "experts"]
    run(capsys, "plan", tmp_path / "scores", *ratio, "--out", tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert [layer.widths.num_experts for layer in plan.layers] == [0, 3]
    run(capsys, "apply", folder, tmp_path / "plan.json", "--out", tmp_path / "small")
    assert AutoConfig.from_pretrained(tmp_path / "small").num_experts == 3
    facts = run_json(capsys, "inspect", folder, "--group", "1:expert:2", "--table", tmp_path / "scores")
    assert facts["cost"] == sum(part["parameters"] for part in facts["parts"])
    assert facts["of"] == 6
    said = fails(capsys, "inspect", folder, "--group", "0:attention:0", "--table", tmp_path / "scores")
    assert "says nothing about 0:attention:0: it is of expert groups" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--experts", "0.9"], "--experts 0.9 means removing 5 of 6 experts, but only 4 can go"),
        (["--experts", "0.9"], "each token goes to 2 experts"),
        (["--experts", "50"], "For 50 % write 0.5"),
        (["--experts", "0.5", "--ratio", "0.4"], "give one of them"),
        (["--experts", "0.5", "--ratio", "0.25"], "--ratio and --experts both say how much to remove"),
        (["--experts", "0.5", "--fit", "480KB"], "--experts and --fit both say how much to remove"),
        (["--fit", "480KB", "--target", "flops"], "--target flops: a size to fit is one of bytes"),
        (["--experts", "0.5", "--method", "wanda"], "says nothing about expert groups"),
        (["--ratio", "0.2", "--shape", "ragged"], "no class loads a mixture"),
    ],
)
def test_what_cannot_be_is_said_before_long_work(folder, text, tmp_path, words, message, capsys):
    said = fails(capsys, "prune", folder, "--out", tmp_path / "half", "--calibration", text, *SIZES, *words)
    assert message.lower() in " ".join(said.split()).lower()
    assert not list(tmp_path.iterdir())


def test_experts_without_tokens_are_said_in_numbers(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_idle_experts({"experts": 200, "experts_without_tokens": 2, "tokens_of_experts": []})
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        warn_of_idle_experts({"experts": 200, "experts_without_tokens": 3, "tokens_of_experts": []})
    assert "3 of 200 experts (1.5 %) got no token" in caplog.text


def test_keeping_experts_that_nothing_is_known_of_is_refused():
    plan = Plan("mixtral", (LayerWidths(1, 0, 4),) * 2, (KeptGroups((0,), (), (0, 1, 2)),) * 2)
    check_enough_reached({"tokens_of_experts": [[3, 1, 1, 0], [1, 1, 1, 1]]}, plan)
    with pytest.raises(CalibrationError, match=r"layer 1: .* reached 2 of 4 experts, and 3 are to stay"):
        check_enough_reached({"tokens_of_experts": [[3, 1, 1, 0], [5, 1, 0, 0]]}, plan)
    check_enough_reached(
        {"tokens_of_experts": [[3, 0, 0, 0]] * 2},
        Plan("mixtral", plan.widths, (KeptGroups((0,), (), (0, 1, 2, 3)),) * 2),
    )


def counted(*per_layer) -> Statistics:
    """Statistics of one source of text: how many tokens each expert of each layer got."""
    return Statistics(tuple({"routing.tokens": torch.tensor(counts).double()} for counts in per_layer), sequences=1)


def test_tokens_of_all_sources_add_up():
    found = tokens_of_experts([counted([], [3, 0, 1, 0, 0]), counted([], [2, 0, 0, 4, 0])])
    assert found["tokens_of_experts"] == [[], [5, 0, 1, 4, 0]]
    assert (found["experts"], found["experts_without_tokens"]) == (5, 2)
    assert tokens_of_experts([counted([], [])]) == {}


def test_what_a_cut_does_to_routing():
    """Of ten choices, three were of experts that went."""
    routing = tokens_of_experts([counted([], [5, 0, 3, 2])])
    plan = Plan("glm4_moe", (LayerWidths(1, 4, 0), LayerWidths(1, 4, 4)), (KeptGroups((0,), (), ()),) * 2)
    plan = replace(plan, layers=(plan.layers[0], KeptGroups((0,), (), (0, 3))))
    found = routing_of(routing, plan, {1: [6, 4]})["routing"]
    assert (found["experts"], found["experts_without_tokens"]) == (4, 1)
    (layer,) = found["layers"]
    assert layer["moved"] == pytest.approx(0.3)
    assert (layer["layer_idx"], layer["experts"], layer["kept"]) == (1, 4, 2)
    assert (layer["tokens_before"], layer["tokens_after"]) == ([2, 5], [4, 6])


def test_text_that_reaches_too_few_experts(tmp_path, capsys, caplog):
    """The same token over and over goes to the same experts; nothing is known of the others."""
    folder = tmp_path / "model"
    model = make_mixture("qwen3_moe", "renormalised-one-dense", vocab_size=260, max_position_embeddings=256)
    save_checkpoint(model, byte_tokenizer(), folder, card="", extras={})
    (tmp_path / "text.txt").write_text("a" * 2000)
    words = ["prune", folder, "--out", tmp_path / "out", "--calibration", tmp_path / "text.txt", *SIZES]
    words += ["--method", "frequency", "--set", "repair=null", "--set", "scoring.noise=0", "--experts", "0.34"]
    said = " ".join(fails(capsys, *words).split())
    assert re.search(r"layer 1: the calibration text reached \d of 6 experts, and 4 are to stay", said)
    assert "Give more --samples, or text of the kinds that the model is for" in said
    assert re.search(r"\d of 6 experts \(\d\d\.\d %\) got no token", said + caplog.text)
    assert not (tmp_path / "out").exists()
