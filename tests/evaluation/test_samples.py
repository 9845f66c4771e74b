"""Samples are what transformers' own greedy generation writes."""

from __future__ import annotations

import pytest
import torch
from tiny_folder import byte_tokenizer, write_folder

from prunus.checkpoint import load_model
from prunus.errors import OptionError
from prunus.evaluation.samples import PROMPTS, continuations, side_by_side


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_folder(tmp_path_factory.mktemp("models") / "tiny"))[0]


def generated(model, tokenizer, prompt, new_tokens):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_continuations(model):
    tokenizer = byte_tokenizer()
    prompts = ["Once", "def f(x):\n", "né "]
    expected = [generated(model, tokenizer, prompt, 12) for prompt in prompts]
    samples = continuations(model, tokenizer, prompts, new_tokens=12, progress=False)
    assert [sample.prompt for sample in samples] == prompts
    assert [sample.text for sample in samples] == expected
    assert any(expected)


def test_an_end_of_text_token_ends(model, monkeypatch):
    tokenizer = byte_tokenizer()
    whole = tokenizer(continuations(model, tokenizer, ["Once"], progress=False)[0].text)["input_ids"]
    stop = whole[3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [7777, stop])
    (sample,) = continuations(model, tokenizer, ["Once"], progress=False)
    assert sample.text == tokenizer.decode(whole[: whole.index(stop)])


def test_prompts_that_do_not_fit(model):
    tokenizer = byte_tokenizer()
    (sample,) = continuations(model, tokenizer, ["x" * 90], progress=False)
    assert len(tokenizer(sample.text)["input_ids"]) <= 6  # the context is 96
    for prompt in ("", "x" * 96):
        with pytest.raises(OptionError, match=f"has {len(prompt)} tokens"):
            continuations(model, tokenizer, [prompt], progress=False)


def test_side_by_side_leaves_out_what_does_not_fit(model, monkeypatch):
    tokenizer = byte_tokenizer()
    shown = side_by_side(model, model, tokenizer, progress=False)
    assert [sample["prompt"] for sample in shown] == list(PROMPTS)
    assert all(sample["dense"] == sample["pruned"] for sample in shown)
    monkeypatch.setattr(model.config, "max_position_embeddings", 26)
    assert [sample["prompt"] for sample in side_by_side(model, model, tokenizer, progress=False)] == [
        PROMPTS[0],
        PROMPTS[3],
    ]
    assert side_by_side(model, model, None) == []
