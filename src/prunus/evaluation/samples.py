"""What a model writes: greedy continuations of a few prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from prunus.errors import OptionError
from prunus.evaluation.greedy import greedy_run
from prunus.machine.bars import Bar
from prunus.model.tokens import check_token_ids, longest_context

__all__ = ["NEW_TOKENS", "PROMPTS", "Sample", "check_prompt", "continuations", "side_by_side"]

#: a fact, a story, instructions, code
PROMPTS = (
    "The capital of France is",
    "Once upon a time, a little girl",
    "To make a good cup of tea, first",
    "def is_prime(n):\n",
)
NEW_TOKENS = 40
#: prompts that run side by side, which takes hardly longer than one: weights are read once for all
AT_ONCE = 8


@dataclass(frozen=True)
class Sample:
    """A prompt, and what a model continues it with.

    Attributes:
        prompt: as it was given.
        text: the continuation alone.
    """

    prompt: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    new_tokens: int = NEW_TOKENS,
    progress: bool = True,
) -> list[Sample]:
    """Continue prompts by the most likely token, again and again, up to an end-of-text token.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer, which adds the special tokens that it always adds.
        prompts: texts; `AT_ONCE` run side by side.
        new_tokens: at most so many; fewer where the model's context ends.
        progress: show a bar on a terminal.

    Raises:
        OptionError: a prompt is empty, or fills the model's context.
    """
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    context = longest_context(model.config) or 2**31
    given = [check_prompt(model.config, tokenizer, prompt) for prompt in prompts]
    room = [min(new_tokens, context - len(ids)) for ids in given]
    made: dict[int, list[int]] = {}
    with Bar("samples", total=len(prompts), unit="prompt", progress=progress) as bar:
        for count in sorted(set(room)):
            alike = [number for number, tokens in enumerate(room) if tokens == count]
            for start in range(0, len(alike), AT_ONCE):
                numbers = alike[start : start + AT_ONCE]
                ids, mask = _padded([given[number] for number in numbers], model.device)
                made |= zip(numbers, greedy_run(model, ids, count, mask).tokens.tolist(), strict=True)
                bar.update(len(numbers))
    return [
        Sample(prompt, _text(tokenizer, given[number], made[number], ends)) for number, prompt in enumerate(prompts)
    ]


def _padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts of one length, padded on the left, and their mask; none where nothing is padded."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(each)) + each for each in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts], device=device)
    return ids, None if bool(mask.all()) else mask


def _text(tokenizer: Any, ids: list[int], made: list[int], ends: Collection[int | None]) -> str:
    """What follows a prompt, up to an end-of-text token."""
    stop = next((position for position, token in enumerate(made) if token in ends), len(made))
    # What is new is cut off the whole: a token by itself may lose the space before it.
    whole: str = tokenizer.decode(ids + made[:stop], skip_special_tokens=True)
    return whole[len(tokenizer.decode(ids, skip_special_tokens=True)) :]


def check_prompt(config: Any, tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt, if a model can continue it.

    Args:
        config: of the model.
        tokenizer: its tokenizer.
        prompt: the text.

    Raises:
        OptionError: it is empty, fills the model's context, or holds tokens that the model does not embed.
    """
    ids: list[int] = tokenizer(prompt)["input_ids"]
    context = longest_context(config) or 2**31
    if not 0 < len(ids) < context:
        raise OptionError(
            f"the prompt {prompt[:40]!r} has {len(ids)} tokens; it needs at least one, and fewer than the {context} of "
            "the model's context"
        )
    check_token_ids(config, torch.tensor(ids))
    return ids


def side_by_side(dense: Any, smaller: Any, tokenizer: Any, *, progress: bool = True) -> list[dict[str, str]]:
    """Continue `PROMPTS` by two models; those that do not fit the models are left out.

    Args:
        dense: a transformers causal language model.
        smaller: another one of the same tokenizer.
        tokenizer: None gives no samples.
        progress: show bars on a terminal.

    Returns:
        For each prompt `prompt`, `dense` and `pruned`.
    """
    if tokenizer is None:
        return []
    prompts = [prompt for prompt in PROMPTS if _fits(smaller.config, tokenizer(prompt)["input_ids"])]
    runs = [continuations(model, tokenizer, prompts, progress=progress) for model in (dense, smaller)]
    return [{"prompt": one.prompt, "dense": one.text, "pruned": other.text} for one, other in zip(*runs, strict=True)]


def _fits(config: Any, ids: Sequence[int]) -> bool:
    return 0 < len(ids) < (longest_context(config) or 2**31) and max(ids) < config.get_text_config().vocab_size
