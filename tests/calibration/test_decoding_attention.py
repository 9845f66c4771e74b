"""Attention for one new token: the logits of all families are those of whole texts, which no cache is needed for."""

from __future__ import annotations

import pytest
import torch
from tiny_families import ONE_EACH, case_id, logits, make_model, random_tokens, shared_model
from torch.nn import functional

from prunus.calibration.decoding_attention import decoding_attention
from prunus.calibration.sampled import cache_argument, token_cache

GIVEN = 4


def one_by_one(model, ids, mask=None):
    """Logits of each token but the first ones, which are read together."""
    cache = {cache_argument(model): token_cache(model.config, ids.shape[1])}
    found, begin = [], 0
    for end in range(GIVEN, ids.shape[1] + 1):
        beside = {} if mask is None else {"attention_mask": mask[:, :end]}
        with torch.no_grad():
            output = model(input_ids=ids[:, begin:end], **cache, **beside, use_cache=True)
        found.append(output.logits[:, -1])
        begin = end
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("case", ONE_EACH, ids=case_id)
def test_a_token_at_a_time_is_the_whole_text(case):
    model, ids = shared_model(*case), random_tokens(2, 12)
    before = model.config.get_text_config()._attn_implementation
    with decoding_attention(model):
        assert (model.config.get_text_config()._attn_implementation == before) == (before != "sdpa")
        found = one_by_one(model, ids)
    assert model.config.get_text_config()._attn_implementation == before
    torch.testing.assert_close(found, logits(model, ids)[:, GIVEN - 1 :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [0, 3])
def test_hidden_tokens_stay_hidden(hidden):
    model, ids = make_model("llama", "gqa"), random_tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :hidden] = 0
    expected = one_by_one(model, ids, mask)
    with decoding_attention(model):
        found = one_by_one(model, ids, mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bool(hidden) != torch.allclose(found, one_by_one(model, ids), atol=1e-4)


def test_query_heads_of_a_group_are_the_queries_of_one_head(monkeypatch):
    """The point of it: torch is given as many heads as there are keys for."""
    model, ids = make_model("llama", "gqa"), random_tokens(2, 12)
    shapes, attend = [], functional.scaled_dot_product_attention

    def spy(query, key, *arguments, **options):
        shapes.append((query.shape[1], key.shape[1], query.shape[2]))
        return attend(query, key, *arguments, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    with decoding_attention(model):
        one_by_one(model, ids)
    assert set(shapes[len(model.model.layers) :]) == {(3, 3, 2)}


def test_a_failure_leaves_the_model_as_it_was():
    model = make_model("llama", "gqa")
    with pytest.raises(KeyError), decoding_attention(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_what_torch_s_attention_cannot_do_is_refused_as_transformers_does():
    model, ids = make_model("llama", "gqa"), random_tokens(2, 12)
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *arguments, **options: forward(*arguments, **options, softcap=30.0)
    with pytest.raises(ValueError, match="softcap"), decoding_attention(model):
        model(input_ids=ids[:, :1])
