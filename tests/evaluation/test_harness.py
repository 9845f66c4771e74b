"""lm-evaluation-harness itself answers as our own zero-shot tasks do; skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import json

import pytest
from test_zero_shot import RECORDS
from tiny_folder import save_tiny_folder

from benchmarks.harness_check import METRICS, write_task
from prunus.checkpoint import load_model
from prunus.errors import OptionError
from prunus.evaluation.harness import check_harness, run_harness
from prunus.evaluation.zero_shot import answers, load_task

installed = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not installed, reason="lm-evaluation-harness is not installed")


@needs_harness
def test_both_give_the_same_accuracies(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_model(save_tiny_folder(tmp_path / "model", "llama", "gqa", max_position_embeddings=96))
    names = {}
    for name, records in RECORDS.items():
        items = tmp_path / f"{name}.jsonl"
        items.write_text("".join(json.dumps(record) + "\n" for record in records))
        names[name] = write_task(tmp_path, name, items)
    results = run_harness(model, tokenizer, list(names.values()), include=[tmp_path], batch_size=2)
    assert [result.task for result in results] == list(names.values())
    for result, name in zip(results, names, strict=True):
        right = answers(model, tokenizer, load_task(tmp_path / f"{name}.jsonl"), batch_size=2)
        shares = [sum(verdicts) / len(right) for verdicts in zip(*right, strict=True)]
        assert result.metrics == pytest.approx(dict(zip(METRICS[name], shares, strict=False)))
        assert (result.items, result.few_shot) == (len(right), 0)


@needs_harness
def test_unknown_tasks_and_folders(tmp_path):
    with pytest.raises(OptionError, match="knows no task 'nonsuch_task'"):
        check_harness(["nonsuch_task"])
    with pytest.raises(OptionError, match="missing is no folder"):
        check_harness(["piqa"], [tmp_path / "missing"])


@pytest.mark.skipif(installed, reason="lm-evaluation-harness is installed")
def test_without_the_harness():
    with pytest.raises(OptionError, match=r"pip install 'lm-eval\[hf\]>=0\.4\.9'"):
        check_harness(["piqa"])
