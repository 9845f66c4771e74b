"""Figures of other models beside those of a result: only those of what it was cut from are called its base's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prunus.report.contents import _tiles
from prunus.results.card import MeasuredFacts, updated_card
from prunus.results.result_folder import _merged, base_called, measured_facts, speed_notes

ONCE = {"base_model": "dense"}
TWICE = {"base_model": "half", "original": {"model": "org/dense", "parameters": 9}}


def figures(model: str, text: str = "a.txt", value: float = 5.0) -> dict:
    return {"model": model, "perplexities": [{"text": text, "protocol": "windows", "perplexity": value}]}


def evaluation(dense: dict | None, text: str = "a.txt", value: float = 9.0) -> dict:
    return {**figures("small", text, value), "dense": dense}


@pytest.mark.parametrize(
    ("model", "metrics", "called"),
    [
        ("dense", ONCE, "base"),
        ("somebody/dense@main", ONCE, "base"),
        ("other", ONCE, None),
        (None, ONCE, None),
        ("half", TWICE, "base"),
        ("dense", TWICE, "original"),
    ],
)
def test_what_a_model_is_called(model, metrics, called):
    assert base_called(model, metrics) == called


def test_another_model_takes_nothing_away():
    kept = _merged({}, evaluation(figures("dense")), ONCE)
    kept = _merged(kept, evaluation(figures("other", "b.txt", 7.0), "b.txt"), ONCE)
    rows = {facts.dataset: facts for facts in measured_facts(ONCE, kept)}
    assert (rows["a.txt"].before, rows["b.txt"].before) == (5.0, None)
    assert kept["others"]["other"]["perplexities"][0]["perplexity"] == 7.0
    # Measured again, the earlier figures of both are of another run.
    kept = _merged(kept, evaluation(None, "b.txt"), ONCE)
    assert kept["others"]["other"]["perplexities"] == []


def test_base_and_original_are_told_apart():
    metrics = {
        **TWICE,
        "perplexity_text": "held-out",
        "perplexity_protocol": "windows",
        "perplexity_before": 20.0,
        "perplexity_after": 45.0,
    }
    kept = _merged({}, evaluation(figures("dense")), metrics)
    kept = _merged(kept, evaluation(figures("half", "b.txt", 6.0), "b.txt"), metrics)
    shown = {facts.dataset: facts.shown_before for facts in measured_facts(metrics, kept)}
    assert shown == {"held-out": "20.00", "a.txt": "5.00 (original model)", "b.txt": "6.00"}
    card = updated_card("---\n{}\n---\n# small\n", "small", measured_facts(metrics, kept))
    assert card.count("perplexity of the original model") == 1
    assert card.count("perplexity of the base model") == 2
    # The held-out text of a training, measured with another teacher, has no figure of the base.
    (held_out, *_) = measured_facts({**metrics, "perplexity_before_of": "other"}, {})
    assert held_out.before is None
    (held_out, *_) = measured_facts({**metrics, "perplexity_before_of": "dense"}, {})
    assert held_out.shown_before == "20.00 (original model)"


def test_a_figure_measured_again_takes_that_of_the_base_away():
    card = updated_card(
        "---\n{}\n---\n# small\n", "small", measured_facts(ONCE, _merged({}, evaluation(figures("dense")), ONCE))
    )
    again = updated_card(card, "small", measured_facts(ONCE, _merged({}, evaluation(None, value=8.0), ONCE)))
    assert "perplexity of the base model" in card
    assert "base model" not in again.partition("\n---\n")[0]


@pytest.mark.parametrize(
    ("first", "called"), [("dense", "the base model"), ("other", "other"), ("org/dense@v1", "the base model")]
)
def test_speed_is_beside_the_model_that_it_was_measured_beside(first, called):
    spread = {"median": 2.0, "low": 1.0, "high": 3.0}
    both = [
        {
            "model": model,
            "dtype": "float32",
            "kv_cache_bytes_per_token": 8,
            **dict.fromkeys(
                (
                    "prefill_tokens_per_second",
                    "decode_tokens_per_second",
                    "first_token_seconds",
                    "prefill_ratio",
                    "decode_ratio",
                ),
                spread,
            ),
        }
        for model in (first, "small")
    ]
    options = {"prompt_tokens": 8, "new_tokens": 4, "batch_size": 1}
    (said,) = speed_notes({"options": options, "device": "cpu", "threads": 1, "torch": "2", "results": both}, ONCE)
    assert f"(2.00 and 2.00 times those of {called})" in said
    assert f"({called}: 8)" in said


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["base", "base"], "base model 40.0%"),
        (["original"] * 2, "original model 40.0%"),
        (["base", "original"], "models that it was cut from 40.0%"),
    ],
)
def test_mean_accuracy_is_beside_the_model_that_it_is_of(tmp_path, kinds, said):
    facts = [MeasuredFacts(f"task {i}", "t", "accuracy", "acc", "p", 0.4, 0.3, of=of) for i, of in enumerate(kinds)]
    metrics = {"parameters_before": 10, "parameters_after": 8}
    result = SimpleNamespace(folder=tmp_path, metrics=metrics, evaluation={})
    assert [tile.note for tile in _tiles(result, facts) if tile.title.startswith("accuracy")] == [said]
