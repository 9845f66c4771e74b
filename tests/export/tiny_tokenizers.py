"""Tokenizers of the kinds that GGUF knows, trained or written down in a moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MERGES = (("h", "e"), ("▁", "t"), ("t", "he"), ("▁t", "he"), ("▁", "the"))
CORPUS = ("Once upon a time there were 12 little foxes.", "They lived in the wood, and it was 1999.", "The end!") * 4


def byte_level(*steps: Any, merges: int = 20) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges; without steps it splits text as GPT-2 does."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = (
        pre_tokenizers.Sequence(list(steps)) if steps else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
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


def sentencepiece(merges: Sequence[tuple[str, str]] = MERGES) -> PreTrainedTokenizerFast:
    """What transformers makes of a SentencePiece model: bytes as a fallback, a space before the text, bos added."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    pieces += list(dict.fromkeys(left + right for left, right in merges))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokens = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokens.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
