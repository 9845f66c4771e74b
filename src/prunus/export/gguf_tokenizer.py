"""A Hugging Face tokenizer in the words of GGUF.

llama.cpp runs two kinds of tokenizer that language models here have: byte-level BPE (`gpt2`), whose way of splitting
text before merging is named by `tokenizer.ggml.pre` out of a list compiled into llama.cpp, and SentencePiece BPE
(`llama`), which merges by the scores of pieces instead of a list of merges. What is neither is refused: a file with the
wrong name in it loads, and tokenizes other text than the model was trained on.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from prunus.errors import UnsupportedModelError
from prunus.export.gguf_source import gguf_package

__all__ = ["PRE_TOKENIZERS", "GgufTokenizer", "TokenType", "gguf_tokenizer"]

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: how text is split before merging → llama.cpp's name for it. Steps are those of tokenizer.json; `bytes` is its
#: ByteLevel without a regular expression, `words` with its own one (that of GPT-2).
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_LLAMA_3, "bytes"): "llama-bpe",
    (_QWEN_2, "bytes"): "qwen2",
    (_TEKKEN, "bytes"): "tekken",
}

_METASPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenType:
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class GgufTokenizer:
    """The fields `tokenizer.*` of a GGUF file.

    Attributes:
        model: `gpt2` or `llama`.
        pre: llama.cpp's name for how text is split before merging.
        tokens: text of every token, one per row of the embeddings.
        types: one `TokenType` per token.
        special: gguf's `SpecialVocab`: special tokens, which of them are put around a text, chat template, and, for
            `gpt2` only, merges.
        scores: of pieces, for `llama` only; higher merges first.
        add_space_prefix: whether a space goes before a text, for `llama` only.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    special: Any
    scores: Sequence[float] | None = None
    add_space_prefix: bool | None = None

    def write(self, writer: Any) -> None:
        """Add the fields to a file.

        Args:
            writer: gguf's `GGUFWriter`.
        """
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        if self.scores is not None:
            writer.add_token_scores(list(self.scores))
        writer.add_token_types(list(self.types))
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        self.special.add_to_gguf(writer, quiet=True)


def gguf_tokenizer(tokenizer: Any, vocab_size: int, end_of_turn: Sequence[int] = ()) -> GgufTokenizer:
    """Translate a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocab_size: rows of the embeddings; rows without a token get a name and the type of an unused one.
        end_of_turn: ids that end a generation, from the generation config; one beside the eos token becomes `eot`.

    Raises:
        UnsupportedModelError: llama.cpp has no tokenizer that does the same, or it has more tokens than there are
            rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json behind it, which is what is translated to GGUF; load "
            "the model with a fast tokenizer and save it again"
        )
    state = json.loads(backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"the tokenizer is of type {model.get('type')!r}; only BPE tokenizers are known to split text in "
            "llama.cpp as they do here"
        )
    vocabulary: dict[str, int] = {
        **model["vocab"],
        **{token["content"]: token["id"] for token in state["added_tokens"]},
    }
    if max(vocabulary.values()) >= vocab_size:
        raise UnsupportedModelError(
            f"the tokenizer has a token of id {max(vocabulary.values())}, the embeddings have {vocab_size} rows; "
            "llama.cpp needs a row for every token"
        )
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokens, types = _tokens(vocabulary, state["added_tokens"], model, vocab_size)
    pieces = bool(model.get("byte_fallback"))
    special = _special(tokenizer, vocab_size, end_of_turn, merges=not pieces)
    if pieces:
        added = {token["content"] for token in state["added_tokens"]}
        scores, space = _scores(tokens, model["vocab"].keys() - added, merges), _adds_space(state)
        return GgufTokenizer("llama", "default", tokens, types, special, scores, space)
    return GgufTokenizer("gpt2", _pre(state), tokens, types, special)


def _tokens(
    vocabulary: Mapping[str, int], added: Sequence[Mapping[str, Any]], model: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{token_id}]" for token_id in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, token_id in vocabulary.items():
        tokens[token_id] = token
        types[token_id] = TokenType.BYTE if model.get("byte_fallback") and _BYTE.fullmatch(token) else TokenType.NORMAL
    for entry in added:
        types[entry["id"]] = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
    if model.get("unk_token") is not None and model.get("byte_fallback"):
        types[vocabulary[model["unk_token"]]] = TokenType.UNKNOWN
    return tokens, types


def _added_ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether bos and eos are put around a text, as the tokenizer does it."""
    text = "a"
    bare, whole = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
    for add_bos, add_eos in ((False, False), (True, False), (False, True), (True, True)):
        bos = [tokenizer.bos_token_id] if add_bos else []
        eos = [tokenizer.eos_token_id] if add_eos else []
        if whole == [*bos, *bare, *eos]:
            return add_bos, add_eos
    raise UnsupportedModelError(
        f"the tokenizer turns {text!r} into {tokenizer.convert_ids_to_tokens(whole)}; llama.cpp can only put a bos "
        "token before a text and an eos token behind it"
    )


def _special(tokenizer: Any, vocab_size: int, end_of_turn: Sequence[int], merges: bool) -> Any:
    """The special tokens as gguf reads them off a tokenizer's files, and what those do not say."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = gguf_package().SpecialVocab(folder, load_merges=merges, n_vocab=vocab_size)
    special.add_special_token = dict(zip(("bos", "eos"), _added_ends(tokenizer), strict=True))
    for token_id in end_of_turn:
        if token_id != tokenizer.eos_token_id:
            special.special_token_ids.setdefault("eot", int(token_id))
    return special


def _pre(state: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level BPE tokenizer splits text."""
    normalizer = state.get("normalizer")
    # llama.cpp does not normalise; text that is not in Unicode's composed form is rare, and its own converter agrees.
    if normalizer is not None and normalizer["type"] != "NFC":
        raise UnsupportedModelError(
            f"the tokenizer normalises text ({_short(normalizer)}), which llama.cpp would not do with byte-level BPE"
        )
    pre_tokenizer = state.get("pre_tokenizer") or {"type": "none"}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    name = PRE_TOKENIZERS.get(tuple(_step(step) for step in steps))
    if name is None:
        raise UnsupportedModelError(
            f"the tokenizer splits text by {_short(pre_tokenizer)}, for which prunus knows no name of llama.cpp "
            f"(tokenizer.ggml.pre); known: {', '.join(PRE_TOKENIZERS.values())}. A wrong name would split text in "
            "another way than in training. If llama.cpp has it, prunus can learn it: open an issue"
        )
    return name


def _step(step: Mapping[str, Any]) -> str:
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
        return "words" if step.get("use_regex", True) else "bytes"
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "digits"
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", ""))
    return ""


def _adds_space(state: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text; spaces become `▁` in either case."""
    normalizer, pre_tokenizer = state.get("normalizer"), state.get("pre_tokenizer")
    if pre_tokenizer is not None and pre_tokenizer["type"] == "Metaspace" and normalizer is None:
        if pre_tokenizer.get("replacement") == _METASPACE and not pre_tokenizer.get("split", True):
            return pre_tokenizer.get("prepend_scheme", "always") != "never"
    elif pre_tokenizer is None and normalizer is not None:
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        prepends = [step for step in steps if step == {"type": "Prepend", "prepend": _METASPACE}]
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _METASPACE}
        if steps == [*prepends, spaces]:
            return bool(prepends)
    raise UnsupportedModelError(
        f"a SentencePiece tokenizer with normalizer {_short(normalizer)} and pre-tokenizer {_short(pre_tokenizer)}: "
        "llama.cpp only turns spaces into ▁, with or without one before the text"
    )


def _scores(tokens: Sequence[str], vocabulary: Set[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """Scores of pieces that merge in the order of the list of merges.

    A list of merges ranks pairs, SentencePiece the piece that a pair becomes: its rank is that of its first pair. Both
    do the same where the list has every pair of pieces that joins into a third, and all pairs of a piece in a row, as
    in lists that were made from a SentencePiece model.
    """
    first: dict[str, int] = {}
    last = ""
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        if piece != last and piece in first:
            raise UnsupportedModelError(
                f"the tokenizer merges other pieces between two ways of merging {piece!r}; SentencePiece, as llama.cpp "
                "runs it, gives a piece one rank, so it would split some texts in another way"
            )
        first.setdefault(piece, rank)
        last = piece
    listed = set(merges)
    for piece in sorted(vocabulary):
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in listed and not _BYTE.fullmatch(piece):
                raise UnsupportedModelError(
                    f"the tokenizer never merges {pair[0]!r} and {pair[1]!r} though {piece!r} is a piece; "
                    "SentencePiece, as llama.cpp runs it, would"
                )
    return [-float(first[token]) if token in first else -float(len(merges)) for token in tokens]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "…"
