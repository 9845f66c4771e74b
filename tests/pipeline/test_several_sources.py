"""Several sources of text from recipe files and options to the result, and text that the model writes beside it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from tiny_folder import fails, run_json

import prunus
from prunus.calibration import load_calibration, self_text
from prunus.errors import OptionError
from prunus.pipeline.job import Job
from prunus.pipeline.job_file import job_text, read_job
from prunus.pipeline.options import CalibrationOptions, EvaluationOptions
from prunus.pipeline.prune import prune_job


@pytest.fixture
def job(folder, text):
    sources = CalibrationOptions((str(text), "self"), samples=8, seq_len=24, seed=3)
    return Job(str(folder), 0.2, prunus.Recipe(), sources, EvaluationOptions(held_out=4))


def test_a_result_of_two_sources(job, tmp_path, monkeypatch):
    metrics = prune_job(job, tmp_path / "small", progress=False)
    model, tokenizer = prunus.load_model(job.model)
    drawn = load_calibration(job.calibration.source, tokenizer, samples=12, seq_len=24, seed=3, model=model)
    fitted, held_out = drawn.split(4)
    assert metrics["calibration"] == fitted.provenance.to_dict()
    by_hand = prunus.prune(model, 0.2, fitted, job.recipe, progress=False)
    assert metrics["plan"] == by_hand.plan.fingerprint
    each = held_out.each_source()
    assert [one["source"] for one in metrics["perplexity_by_source"]] == [one.provenance.source for one in each]
    for found, source in zip(metrics["perplexity_by_source"], each, strict=True):
        for measured, candidate in (("before", model), ("after", by_hand.model)):
            expected = prunus.perplexity_of_windows(candidate, source.input_ids, progress=False).perplexity
            assert found[measured] == pytest.approx(expected, rel=1e-5)
    for measured, candidate in (("before", model), ("after", by_hand.model)):
        expected = prunus.perplexity_of_windows(candidate, held_out.input_ids, progress=False).perplexity
        assert metrics[f"perplexity_{measured}"] == pytest.approx(expected, rel=1e-5)
    recipe = yaml.safe_load((tmp_path / "small" / "prunus" / "recipe.yaml").read_text())
    assert recipe["calibration"]["source"] == list(job.calibration.source)

    page = (tmp_path / "small" / "report.html").read_text()
    for one in metrics["perplexity_by_source"]:
        assert page.count(one["source"]) >= 2
        assert f"{one['after']:,.2f}" in page

    # What the model wrote lies beside the result, and is used again for another one, whatever its engine.
    (kept,) = tmp_path.glob("self-text-*.jsonl")
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(self_text, "continuations", None)
    streamed = replace(job, ratio=0.4, run=replace(job.run, engine="streamed"))
    again = prune_job(streamed, tmp_path / "smaller", progress=False)
    assert again["calibration"] == metrics["calibration"]
    assert kept.stat().st_mtime_ns == before
    # One source says nothing of others.
    alone = replace(job, calibration=replace(job.calibration, source=job.calibration.source[:1]))
    assert prune_job(alone, tmp_path / "alone", progress=False)["perplexity_by_source"] == []


def test_sources_in_files_and_options(tmp_path):
    path = tmp_path / "recipe.yaml"
    for written, found in (("a.txt", ("a.txt",)), ("[a.jsonl:2, self]", ("a.jsonl:2", "self"))):
        path.write_text(f"calibration: {{source: {written}}}\n")
        job = read_job(str(path), [], {})
        assert job.calibration.source == found
        assert read_job(None, [f"calibration.source={written}"], {}) == replace(job, made_by={})
        path.write_text(job_text(job))
        assert read_job(str(path), [], {}) == job
    assert CalibrationOptions("a.txt") == CalibrationOptions(("a.txt",))
    for wrong in ("[]", "3", "[3]", "{a: 2}"):
        with pytest.raises(OptionError, match=r"calibration\.source is"):
            read_job(None, [f"calibration.source={wrong}"], {})


def test_sources_of_the_command_line(capsys, folder, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("abcdefgh" * 400)
    words = [*("--out", tmp_path / "small", "--ratio", "0.2", "--recipe", "original", "--samples", "6")]
    words += ["--seq-len", "24", "--set", "evaluation.held_out=6", "--set", "output.report=false"]
    found = run_json(capsys, "prune", folder, *words, "--calibration", f"{text}:2", "--calibration", other)
    assert [(one["source"], one["samples"]) for one in found["calibration"]["sources"]] == [
        (text.name, 4),
        ("other.txt", 2),
    ]
    assert [one["source"] for one in found["perplexity_by_source"]] == [text.name, "other.txt"]
    assert "is there twice" in fails(capsys, "prune", folder, *words, "--calibration", text, "--calibration", text)
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"{text.name} + other.txt" in card
    assert json.loads((tmp_path / "small" / "prunus" / "metrics.json").read_text()) == found
