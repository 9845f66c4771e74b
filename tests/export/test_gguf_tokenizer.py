"""Tokenizers: the name that llama.cpp has for each, and refusals in place of guesses."""

from __future__ import annotations

import pytest
from tiny_tokenizers import byte_level, sentencepiece
from tokenizers import Regex, normalizers, pre_tokenizers, processors

from prunus.errors import UnsupportedModelError
from prunus.export.gguf_tokenizer import gguf_tokenizer

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ((WORDS,), "gpt-2"),
        ((pre_tokenizers.Digits(individual_digits=True), WORDS), "smollm"),
        ((split(LLAMA_3), BYTES), "llama-bpe"),
        ((split(LLAMA_3.replace("{1,3}", "")), BYTES), "qwen2"),
    ],
)
def test_names_of_the_ways_to_split(steps, name):
    assert gguf_tokenizer(byte_level(*steps), 300).pre == name


@pytest.mark.parametrize(
    "steps",
    [
        (split(LLAMA_3.replace("{1,3}", "{1,2}")), BYTES),
        (BYTES,),
        (pre_tokenizers.Digits(individual_digits=False), WORDS),
        (pre_tokenizers.ByteLevel(add_prefix_space=True),),
        (pre_tokenizers.Punctuation(), WORDS),
    ],
)
def test_an_unknown_way_to_split_is_refused(steps):
    with pytest.raises(UnsupportedModelError, match=r"splits text by .*known: gpt-2, smollm"):
        gguf_tokenizer(byte_level(*steps), 300)


def test_a_tokenizer_that_normalises_is_refused_unless_it_composes():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert gguf_tokenizer(tokenizer, 300).pre == "gpt-2"
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UnsupportedModelError, match="Lowercase"):
        gguf_tokenizer(tokenizer, 300)


def test_bos_and_eos_as_the_tokenizer_puts_them():
    tokenizer = byte_level()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>", "<pad>")]
    for single, expected in (
        ("<bos> $A", (True, False)),
        ("$A <eos>", (False, True)),
        ("<bos> $A <eos>", (True, True)),
    ):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=special)
        written = gguf_tokenizer(tokenizer, 300)
        assert written.special.add_special_token == dict(zip(("bos", "eos"), expected, strict=True))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<pad> $A", special_tokens=special)
    with pytest.raises(UnsupportedModelError, match="<pad>"):
        gguf_tokenizer(tokenizer, 300)


def test_more_tokens_than_rows():
    with pytest.raises(UnsupportedModelError, match="embeddings have 100 rows"):
        gguf_tokenizer(byte_level(), 100)


def test_a_second_end_of_text_is_the_end_of_a_turn():
    tokenizer = byte_level()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert gguf_tokenizer(tokenizer, 300, [eos, pad]).special.special_token_ids["eot"] == pad
    assert "eot" not in gguf_tokenizer(tokenizer, 300, [eos]).special.special_token_ids


def test_sentencepiece_with_merges_that_have_no_rank_per_piece_is_refused():
    tokenizer = sentencepiece(merges=[("t", "h"), ("h", "e"), ("th", "e"), ("a", "b"), ("t", "he")])
    with pytest.raises(UnsupportedModelError, match="two ways of merging 'the'"):
        gguf_tokenizer(tokenizer, 400)
    tokenizer = sentencepiece(merges=[("t", "h"), ("h", "e"), ("th", "e")])
    with pytest.raises(UnsupportedModelError, match="never merges 't' and 'he'"):
        gguf_tokenizer(tokenizer, 400)


def test_sentencepiece_without_a_space_before_the_text():
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    assert gguf_tokenizer(tokenizer, 400).add_space_prefix is False
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UnsupportedModelError, match="Lowercase"):
        gguf_tokenizer(tokenizer, 400)
