"""Folders of tiny models to export, with the tokenizers that GGUF knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prunus.checkpoint import save_checkpoint

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CORPUS = ("Once upon a time there were 12 little foxes.", "They lived in the wood, and it was 1999.", "The end!") * 4


def byte_level(*steps: Any, merges: int = 20) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges; without steps it splits text as GPT-2 does."""
    from tokenizers import trainers

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.Sequence(steps) if steps else pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<pad>", "<bos>", "<eos>"],
        show_progress=False,
    )
    tokens.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


def sentencepiece() -> PreTrainedTokenizerFast:
    """What transformers makes of a SentencePiece model: bytes as a fallback, a space before the text, bos added."""
    merges = [("h", "e"), ("▁", "t"), ("t", "he"), ("▁t", "he"), ("▁", "the")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    pieces += list(dict.fromkeys(left + right for left, right in merges))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokens = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokens.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves a model with a tokenizer as `prunus` does: `saved(model)`, `saved(model, tokenizer)`."""

    def save(model: Any, tokenizer: Any = None, name: str = "model") -> Path:
        return save_checkpoint(model, tokenizer or byte_level(), tmp_path / name, card="", extras={})

    return save
