"""What the tests of recovery share: a short run, its tokenizer, and an uneven cut."""

from __future__ import annotations

from collections.abc import Iterable

from tiny_families import plan_keeping
from tiny_folder import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from prunus.model.geometry import Geometry
from prunus.surgery import apply_plan

#: one step is four sequences of 32 tokens of the manual in Python's standard library
SHORT = ["--text", "default", "--seq-len", "32", "--batch-size", "4"]
SHORT += ["--set", "text.held_out=16", "--set", "recovery.micro_batch=4"]
#: the text alone
ALONE = ["--set", "recovery.kl_weight=0", "--set", "recovery.ce_weight=1"]


def last_wins(words: Iterable[object]) -> list[str]:
    """A command line in which an option that is given twice has its last value, as `--set` has by itself."""
    given = [str(word) for word in words]
    kept: list[str] = []
    for number, word in enumerate(given):
        before = given[number - 1] if number else ""
        again = word.startswith("--") and word != "--set" and word in given[number + 1 :]
        follows_dropped = before.startswith("--") and before != "--set" and before in given[number:]
        if not again and not (follows_dropped and not word.startswith("--")):
            kept.append(word)
    return kept


def chat_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """One token per byte, further ones, and a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(more))
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    return tokenizer


def cut(dense):
    """Unequal widths, a layer without attention, and a layer gone."""
    geometry = Geometry.of(dense)
    attention, mlp = geometry.widths[0]["attention"], geometry.widths[0]["mlp"]
    kept = [
        {"attention": range(attention), "mlp": range(5, mlp)},
        {"attention": [], "mlp": []},
        {"attention": [], "mlp": range(7)},
        {"attention": range(max(1, attention - 1)), "mlp": range(3)},
    ]
    plan = plan_keeping(geometry, kept)
    return plan, apply_plan(dense, plan)
