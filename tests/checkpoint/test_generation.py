"""Generation with a cache gives what the zeroed dense model gives without one, whatever attention is missing."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import ALL, RAGGED, Kept, cut, dense_model, zeroed
from transformers import ContinuousBatchingConfig

NEW = 14
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 5},
    "chunked static prefill": {"prefill_chunk_size": 5, "cache_implementation": "static", "disable_compile": True},
}
WHOLE = Kept((0, 1), ALL)
FIRST_TWO_ABSENT = (Kept((), ALL[:9]), Kept((), ALL[:4]), Kept((1,), ALL), WHOLE)
NO_ATTENTION = (Kept((), ALL[:9]), Kept((), ALL[:4]), Kept((), ALL), Kept((), ALL))
#: window, first layer that has one: the cache then has two kinds of entries, and its masks come from one entry of each
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
SLIDING_CASES = {
    "one of each kind": (Kept((), ALL), Kept((1,), ALL), Kept((), ALL[:3]), WHOLE),
    "windows only": (Kept((), ALL), Kept((), ALL), WHOLE, Kept((1,), ALL)),
    "no windows": (WHOLE, Kept((1,), ALL), Kept((), ALL), Kept((), ALL)),
    "a full layer gone": (Kept((), ()), Kept((), ALL), WHOLE, Kept((1,), ALL)),
}


def prompt(padding: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(input_ids)
    input_ids[0, :padding] = 256
    mask[0, :padding] = 0
    return input_ids, mask


@cache
def whole(family: str, **fields: Any) -> Any:
    """The dense model, shared: leave it as it is."""
    return dense_model(family, **fields)


@cache
def expected_of(family: str, kept: tuple[Kept, ...], beams: int, **fields: Any) -> torch.Tensor:
    """What the model says without cache and without the cut groups, for all modes of so many beams."""
    return generate(zeroed(whole(family, **fields), kept), use_cache=False, num_beams=beams)


def generate(model: Any, **kwargs: Any) -> torch.Tensor:
    input_ids, mask = prompt()
    return model.generate(input_ids, attention_mask=mask, **{**GREEDY, **kwargs})


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("kept", [RAGGED, FIRST_TWO_ABSENT], ids=["ragged", "no attention in the first two"])
def test_cached_generation(family, mode, kept):
    expected = expected_of(family, kept, mode.get("num_beams", 1))
    assert torch.equal(generate(cut(whole(family), kept), use_cache=True, **mode), expected)
    assert not torch.equal(expected_of(family, (WHOLE,) * 4, mode.get("num_beams", 1)), expected)


def test_without_any_attention(family):
    model = dense_model(family)
    expected = generate(zeroed(model, NO_ATTENTION), use_cache=False)
    assert torch.equal(generate(cut(model, NO_ATTENTION), use_cache=True), expected)


def test_sampling_is_the_same_for_a_seed(family):
    model = dense_model(family)
    results = []
    for candidate, use_cache in ((cut(model, RAGGED), True), (zeroed(model, RAGGED), False)):
        torch.manual_seed(3)
        results.append(generate(candidate, use_cache=use_cache, do_sample=True, temperature=2.0))
    assert torch.equal(*results)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("kept", SLIDING_CASES.values(), ids=SLIDING_CASES)
def test_mixed_layer_types(family, mode, kept):
    model = whole(family, **SLIDING)
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    ragged = cut(model, kept)
    survivors = [i for i, keep in enumerate(kept) if keep.heads or keep.channels]
    assert ragged.config.layer_types == [model.config.layer_types[i] for i in survivors]
    assert ragged.config.max_window_layers == sum(i < 2 for i in survivors)
    expected = expected_of(family, kept, mode.get("num_beams", 1), **SLIDING)
    assert torch.equal(generate(ragged, use_cache=True, **mode), expected)


def test_sliding_window_in_every_layer():
    model = dense_model("mistral", sliding_window=6)
    expected = generate(zeroed(model, RAGGED), use_cache=False)
    assert torch.equal(generate(cut(model, RAGGED), use_cache=True), expected)
    assert not torch.equal(generate(dense_model("mistral"), use_cache=False), generate(model, use_cache=False))


def test_positions_continue_from_the_cache(family):
    """Token by token, every step's logits equal those of one pass over the whole text."""
    ragged = cut(dense_model(family), FIRST_TWO_ABSENT)
    input_ids, _ = prompt(padding=0)
    with torch.no_grad():
        whole = ragged(input_ids).logits
        reversed_order = ragged(input_ids.flip(1)).logits
        out = ragged(input_ids[:, :5], use_cache=True)
        steps = [out.logits]
        name = "cache" if "cache" in out else "past_key_values"  # renamed in transformers 5.24
        for i in range(5, input_ids.shape[1]):
            out = ragged(input_ids[:, i : i + 1], **{name: out[name]}, use_cache=True)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[:, -1], reversed_order[:, 0], atol=1e-2), "order must matter for this to be a test"
    assert out[name].get_seq_length() == input_ids.shape[1]


PROMPTS = [[5, 6, 7], [8, 9]]
#: channels by layer, all key/value heads in each: what a paged cache has room for
UNEQUAL_MLPS = tuple(Kept((0, 1), ALL[:channels]) for channels in (3, 0, 9, 24))
ONE_HEAD_EACH = tuple(Kept((1,), ALL[:channels]) for channels in (3, 5, 9, 24))


def test_continuous_batching_gives_the_same_tokens(family):
    model = cut(dense_model(family), UNEQUAL_MLPS)
    model.generation_config.do_sample = False
    # By itself the cache takes as much as the machine has, and is filled at once: gigabytes.
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    answers = model.generate_batch(PROMPTS, continuous_batching_config=small, max_new_tokens=4)
    for prompt_ids, answer in zip(PROMPTS, answers.values(), strict=True):
        expected = model.generate(torch.tensor([prompt_ids]), max_new_tokens=4)[0, len(prompt_ids) :]
        assert answer.generated_tokens == expected.tolist()


@pytest.mark.parametrize("kept", [RAGGED, FIRST_TWO_ABSENT, NO_ATTENTION, ONE_HEAD_EACH])
def test_continuous_batching_is_refused_where_heads_are_unequal(family, kept):
    model = cut(dense_model(family), kept)
    with pytest.raises(ValueError, match=r"continuous batching needs the 2 of the dense model.*generate"):
        model.generate_batch(PROMPTS, max_new_tokens=4)
