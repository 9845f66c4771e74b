"""What a card and a report say about settings: those that had an effect, in words."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from prunus.results.result_content import ComparisonContent
from prunus.results.settings import in_words, settings_used
from prunus.scoring.score import ScoringOptions


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        (ScoringOptions(), {"hessian", "activation", "hybrid", "adaptive"}),
        (ScoringOptions(method="gate_fisher", hessian="sampled_fisher"), {"activation", "hybrid", "adaptive"}),
        (ScoringOptions(method="taylor_2nd"), {"activation", "hybrid", "adaptive"}),
        (ScoringOptions(method="wanda"), {"hessian", "hybrid", "adaptive"}),
        (ScoringOptions(method="magnitude"), {"hessian", "activation", "hybrid", "adaptive", "noise"}),
        (ScoringOptions(method="hybrid"), {"adaptive"}),
        (ScoringOptions(method="adaptive"), {"hybrid"}),
    ],
    ids=lambda value: value.method if isinstance(value, ScoringOptions) else "",
)
def test_settings_that_a_method_does_not_read_are_left_out(options, unread):
    scoring = asdict(options)
    assert set(settings_used({"scoring": scoring})) == {*scoring, "repair"} - unread - {"method"}


def test_words():
    scoring = asdict(ScoringOptions(method="hybrid", random_seed=3))
    said = settings_used({"scoring": scoring, "repair": {"noise": 0.3, "fit_logits": True, "experts": None}})
    assert said["hybrid"] == "taylor, 0.5, wanda, 0.5"
    assert said["repair"] == "noise 0.3, fit_logits yes"
    assert said["random_seed"] == "3"
    assert settings_used({}) == {"repair": "none"}
    assert in_words([1234567, 0.123456789, False, "a"]) == "1,234,567, 0.123457, no, a"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ([], "share removed"),
        (["kv_cache"], "share of KV-cache bytes removed"),
        (["flops", "flops"], "share of FLOPs removed"),
        (["flops", "params"], "share removed"),
        ([None, "params"], "share of parameters removed"),
        (["a target of later"], "share removed"),
    ],
)
def test_what_the_ratios_of_a_comparison_are_shares_of(targets, said):
    rest = {"scoring": {"method": "taylor"}, "selection": {"shape": "auto"}, "rounds": 1, "repair": None}
    recipes = {str(i): {**rest, **({"target": {"target": name}} if name else {})} for i, name in enumerate(targets)}
    content = ComparisonContent.model_validate({"rows": [], "recipes": recipes or None})
    assert content.share_removed == said
