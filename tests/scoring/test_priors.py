"""Layer priors against models that really lack the layer, and hidden states that transformers reports."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_families import make_model, random_tokens

from prunus.calibration import calibration_from_tokens
from prunus.errors import CalibrationError, OptionError, PlanError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.scoring.priors import SEQUENCES, Prior, PriorOptions, measure_prior, weigh
from prunus.scoring.score import Score, ScoringOptions, score
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "gqa", num_hidden_layers=3)


@pytest.fixture(scope="module")
def calibration():
    return calibration_from_tokens(random_tokens(SEQUENCES + 3, 12))


@torch.no_grad()
def mean_loss(model, ids):
    log_probabilities = torch.log_softmax(model(ids).logits[:, :-1].double(), dim=-1)
    return -float(log_probabilities.gather(-1, ids[:, 1:, None]).mean())


def without(model, layer_idx, axes):
    geometry = Geometry.of(model)
    kept = [
        {a: range(0 if (i, a) in {(layer_idx, x) for x in axes} else w[a]) for a in AXES}
        for i, w in enumerate(geometry.widths)
    ]
    return apply_plan(model, Plan.from_kept(geometry, kept))


def test_skip_loss_is_the_loss_of_the_model_without_it(model, calibration):
    ids = calibration.input_ids[:SEQUENCES]
    prior = measure_prior(model, calibration, "skip_loss", progress=False)
    dense = mean_loss(model, ids)
    for layer_idx in range(3):
        for name, axes in (("layer", AXES), ("attention", ("attention",)), ("mlp", ("mlp",))):
            expected = mean_loss(without(model, layer_idx, axes), ids) - dense
            assert getattr(prior, name)[layer_idx] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("kind", ["skip_loss", "cosine"])
def test_padding_does_not_count(model, calibration, kind):
    ids = calibration.input_ids
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :5])], dim=1)
    padded = calibration_from_tokens(torch.cat([ids, random_tokens(len(ids), 5)], dim=1), mask)
    found, expected = (measure_prior(model, each, kind, progress=False) for each in (padded, calibration))
    for name in ("layer", *AXES):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=2e-6)


@torch.no_grad()
def test_cosine_is_that_of_the_hidden_states(model, calibration):
    ids = calibration.input_ids[:SEQUENCES]
    prior = measure_prior(model, calibration, "cosine", progress=False)
    streams = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    states = list(model(ids, output_hidden_states=True).hidden_states[:-1])
    handle.remove()
    states.append(streams[0])  # transformers reports the last one after the final norm
    for layer_idx, layer in enumerate(model.model.layers):
        before, after = states[layer_idx], states[layer_idx + 1]
        position = model.model.rotary_emb(before, torch.arange(ids.shape[1])[None])
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        middle = (
            before
            + layer.self_attn(layer.input_layernorm(before), position_embeddings=position, attention_mask=mask)[0]
        )
        for name, (x, y) in {"layer": (before, after), "attention": (before, middle), "mlp": (middle, after)}.items():
            cosine = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
            assert getattr(prior, name)[layer_idx] == pytest.approx(float((1 - cosine).mean()), abs=1e-5)


def test_blocks_that_are_not_there_have_none(model, calibration):
    pruned = without(model, 1, ("attention",))
    for kind in ("skip_loss", "cosine"):
        prior = measure_prior(pruned, calibration, kind, progress=False)
        assert prior.attention[1] == 0.0
        assert prior.layer[1] == pytest.approx(prior.mlp[1], abs=1e-9)


PRIOR = Prior(layer=(1.0, 2.0, 0.5), attention=(0.5, -0.1, 0.2), mlp=(0.1, 3.0, 0.3))


@pytest.mark.parametrize(("temperature", "tau"), [(1.0, 0.0), (1.0, 1.0), (2.0, 0.25), (0.0, 0.5)])
def test_scores_are_multiplied(model, temperature, tau):
    table = score(model, None, ScoringOptions(method="random"), progress=False).table
    weighed = weigh(table, PRIOR, PriorOptions("skip_loss", temperature, tau))
    before = {(r.layer_idx, r.group_type, r.group_idx): r for r in table.itertuples()}
    for row in weighed.itertuples():
        prior = tau * PRIOR.layer[row.layer_idx] + (1 - tau) * getattr(PRIOR, row.group_type)[row.layer_idx]
        old = before[row.layer_idx, row.group_type, row.group_idx]
        assert row.score == pytest.approx(old.score * np.log(1 + max(prior, 0)) ** temperature)
        assert row.importance == old.importance
    assert weighed["score"].is_monotonic_increasing


def test_scoring_with_a_prior_keeps_it_on_disk(model, calibration, tmp_path):
    options = ScoringOptions(method="taylor", priors=PriorOptions("cosine", 0.5))
    found = score(model, calibration, options, progress=False)
    plain = score(model, calibration, ScoringOptions(method="taylor"), progress=False)
    assert found.prior == measure_prior(model, calibration, "cosine", progress=False)
    assert found.table.equals(weigh(plain.table, found.prior, options.priors))
    found.save(tmp_path)
    assert Score.load(tmp_path).prior == found.prior


def test_what_cannot_be(model, calibration):
    with pytest.raises(CalibrationError, match="needs calibration"):
        score(model, None, ScoringOptions(method="random", priors=PriorOptions("cosine")), progress=False)
    for options, message in (
        ({"prior": "gut"}, "prior 'gut' is unknown; choose one of none, skip_loss, cosine"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"tau": 1.5}, "tau is 1.5"),
    ):
        with pytest.raises(OptionError, match=message):
            PriorOptions(**options)
    with pytest.raises(OptionError, match="choose another normalisation"):
        score(
            model,
            calibration,
            ScoringOptions(method="taylor", normalize="zscore", priors=PriorOptions("cosine")),
            progress=False,
        )
    table = score(model, None, ScoringOptions(method="random"), progress=False).table
    with pytest.raises(PlanError, match="the priors are of 1 layers"):
        weigh(table, Prior((1.0,), (1.0,), (1.0,)), PriorOptions("cosine"))
    with pytest.raises(PlanError, match="malformed layer priors"):
        Prior.from_dict({"layer": [1.0]})
