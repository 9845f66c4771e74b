"""Samples are what transformers' own greedy generation writes."""

from __future__ import annotations

import pytest
import torch
from tiny_families import make_model
from tiny_folder import byte_tokenizer

from prunus.errors import OptionError
from prunus.evaluation.samples import PROMPTS, continuations, side_by_side


class LetterTokenizer:
    """A letter of its own for every token, so that a text says which tokens it was."""

    eos_token_id = 95

    def __call__(self, text):
        return {"input_ids": [ord(letter) % 90 if ord(letter) < 256 else ord(letter) - 256 for letter in text]}

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(256 + token) for token in ids)


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "gqa")


def generated(model, prompt, new_tokens, ends):
    """Tokens that `generate` chooses, up to the first that ends a text."""
    ids = torch.tensor([LetterTokenizer()(prompt)["input_ids"]])
    options = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": ends}
    new = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    return new[:-1] if new[-1] in ends else new


def test_greedy_continuations_end_where_generation_ends(model, monkeypatch):
    prompts = ["Once", "def f(x):\n", "a b c"]
    free = generated(model, "Once", 12, [95])
    assert len(free) == 12
    stop = free[5]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [94, stop])
    samples = continuations(model, LetterTokenizer(), prompts, new_tokens=12, progress=False)
    assert [sample.prompt for sample in samples] == prompts
    expected = [generated(model, prompt, 12, [94, 95, stop]) for prompt in prompts]
    assert [LetterTokenizer()(sample.text)["input_ids"] for sample in samples] == expected
    assert expected[0] == free[: free.index(stop)]


def test_prompts_that_do_not_fit(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    (sample,) = continuations(model, LetterTokenizer(), ["x" * 60], progress=False)
    assert len(sample.text) == 4  # the context is 64
    for prompt, named in (("", "has 0 tokens"), ("x" * 64, "has 64 tokens"), (chr(256 + 96), "makes token id 96")):
        with pytest.raises(OptionError, match=named):
            continuations(model, LetterTokenizer(), [prompt], progress=False)


def test_side_by_side_leaves_out_what_does_not_fit(monkeypatch):
    tokenizer = byte_tokenizer()
    model = make_model("llama", "gqa", vocab_size=260)
    shown = side_by_side(model, model, tokenizer, progress=False)
    assert [sample["prompt"] for sample in shown] == list(PROMPTS)
    assert all(sample["dense"] == sample["pruned"] for sample in shown)
    monkeypatch.setattr(model.config, "max_position_embeddings", 26)
    shown = side_by_side(model, model, tokenizer, progress=False)
    assert [sample["prompt"] for sample in shown] == [PROMPTS[0], PROMPTS[3]]
    assert side_by_side(model, model, None) == []
