"""What a measurement of speed runs, and how often; imports nothing heavy, as `--help` shows it."""

from __future__ import annotations

from dataclasses import dataclass

from prunus.option_values import check_seed, check_whole

__all__ = ["SpeedOptions"]


@dataclass(frozen=True)
class SpeedOptions:
    """What is run, and how often.

    Attributes:
        prompt_tokens: tokens of each prompt; random ones, the same for all models.
        new_tokens: tokens made after each prompt, greedily, past any end-of-text token.
        batch_size: prompts at a time.
        repeats: rounds that count; each runs every model once.
        warm_up: rounds before them that do not count.
        seed: seed of the prompts.
        memory: also measure peak memory, for which each model is loaded once more in a process of its own.
    """

    prompt_tokens: int = 512
    new_tokens: int = 128
    batch_size: int = 1
    repeats: int = 5
    warm_up: int = 1
    seed: int = 0
    memory: bool = True

    def __post_init__(self) -> None:
        for name, smallest, why in (
            ("prompt_tokens", 1, "a prompt has at least one token"),
            ("new_tokens", 2, "the first new token belongs to prefill, and decode needs one more"),
            ("batch_size", 1, "at least one prompt is run"),
            ("repeats", 1, "at least one round is measured"),
            ("warm_up", 0, "use 0 for no warm-up"),
        ):
            check_whole(name, getattr(self, name), smallest=smallest, why=why)
        check_seed("seed", self.seed)
