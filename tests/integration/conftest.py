"""Fixtures of the tests that use pruned models as transformers and its neighbours do."""

from __future__ import annotations

import pytest
from shaped_models import Shaped
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from prunus.checkpoint import save_checkpoint


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 … w95 as the tokens 3 … 95."""
    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    words = Tokenizer(WordLevel({**special, **{f"w{i}": i for i in range(3, 96)}}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


@pytest.fixture(scope="session")
def folder_of(tokenizer, tmp_path_factory):
    """The folder of a pruned model, written once for all tests, which must leave it as it is."""
    root, written = tmp_path_factory.mktemp("models"), {}

    def folder(shaped: Shaped):
        if shaped not in written:
            written[shaped] = save_checkpoint(shaped.pruned, tokenizer, root / str(shaped), card="", extras={})
        return written[shaped]

    return folder
