"""The whole words of a tokenizer's vocabulary, by the script that they are written in."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Words", "words_of"]

#: what a token of a word's beginning starts with, in the vocabularies of byte-level and of sentencepiece tokenizers
_MARKS = ("Ġ", "▁")
#: scripts without spaces between words: any token of theirs may begin one
_WITHOUT_SPACES = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"}
#: letters of the shortest word, in a script with spaces and in one without
_SHORTEST, _SHORTEST_WITHOUT_SPACES = 3, 2
#: a script with fewer words is as good as unknown to a tokenizer
FEWEST = 200


@dataclass(frozen=True)
class Words:
    """Whole words of a vocabulary.

    Attributes:
        by_script: script, by its name in Unicode → words, in the order of the vocabulary.
        letters: what stands in for the words of a tokenizer that has none: its tokens of letters.
    """

    by_script: Mapping[str, Sequence[str]]
    letters: Sequence[str]

    def knows(self, scripts: Sequence[str]) -> bool:
        """Whether there are enough words in some scripts."""
        return sum(len(self.by_script.get(script, ())) for script in scripts) >= FEWEST

    def of(self, scripts: Sequence[str]) -> Sequence[str]:
        """The words in some scripts; where there are too few, of all; where there are none, letters."""
        if self.knows(scripts):
            return [word for script in scripts for word in self.by_script.get(script, ())]
        return [word for known in self.by_script.values() for word in known] or self.letters


def words_of(tokenizer: Any) -> Words:
    """The whole words that are one token each.

    A word begins where a space would stand before it, as far as its script has spaces. Beginnings of longer words look
    the same: they are among the words, too.

    Args:
        tokenizer: a transformers tokenizer.
    """
    by_script: dict[str, list[str]] = {}
    letters: list[str] = []
    special = set(tokenizer.all_special_ids)
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if number in special:
            continue
        text = tokenizer.decode([number])
        word = text.strip()
        if not word.isalpha():
            continue
        letters.append(word)
        scripts = {unicodedata.name(letter, "?").partition(" ")[0] for letter in word}
        if len(scripts) > 1:
            continue
        (script,) = scripts
        spaced = script not in _WITHOUT_SPACES
        begins = token.startswith(_MARKS) or text.startswith(" ")
        if len(word) >= (_SHORTEST if spaced else _SHORTEST_WITHOUT_SPACES) and (begins or not spaced):
            by_script.setdefault(script, []).append(word.lower())
    return Words({script: list(dict.fromkeys(words)) for script, words in by_script.items()}, letters or ["a"])
