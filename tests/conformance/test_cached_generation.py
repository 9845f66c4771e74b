"""Greedy generation from a pruned model is the same with and without a key/value cache."""

from __future__ import annotations

import torch
from tiny_families import zeroed

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def generate(model, input_ids, **kwargs):
    return model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **GREEDY, **kwargs)


def test_as_without_a_cache_and_as_the_whole_model_without_the_cut_groups(tiny):
    pruned = tiny.pruned("both")
    cached = generate(pruned, tiny.input_ids, use_cache=True)
    assert cached.shape == (2, tiny.input_ids.shape[1] + 6)
    assert torch.equal(cached, generate(pruned, tiny.input_ids, use_cache=False))
    assert torch.equal(cached, generate(zeroed(tiny.model, tiny.plan("both").layers), tiny.input_ids, use_cache=False))
