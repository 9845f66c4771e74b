"""A pruned model in a folder and what transformers makes of some prompts, to ask another program the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deploy_check import compare, greedy, scores_of
from family_models import SEED, dense_model

import prunus
from prunus.checkpoint import save_checkpoint
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan

__all__ = ["Case"]

VOCABULARY = 2048
#: of random tokens; the longest is longer than the windows of families that have some
PROMPT_LENGTHS = (7, 20, 60)


@dataclass(frozen=True)
class Case:
    """A model, the folder it is saved in, prompts, and their greedy continuations in transformers."""

    model: Any
    folder: Path
    prompts: list[list[int]]
    continuations: list[list[int]]

    @classmethod
    def made(cls, family: str, plan: Callable[[Geometry], Plan], tokens: int, folder: Path, **fields: Any) -> Case:
        """Cut a model, save it, and let transformers continue the prompts.

        Args:
            family: see family_models.py.
            plan: what is kept.
            tokens: per prompt.
            folder: where to.
            fields: of the model's config.
        """
        model = dense_model(family, VOCABULARY, **fields)
        model = prunus.apply_plan(model, plan(Geometry.of(model)))
        save_checkpoint(model, None, folder, card="", extras={})
        draws = torch.Generator().manual_seed(SEED)
        prompts = [torch.randint(3, VOCABULARY, (length,), generator=draws).tolist() for length in PROMPT_LENGTHS]
        return cls(model, folder, prompts, [greedy(model, prompt, tokens) for prompt in prompts])

    @property
    def answer(self) -> Path:
        """Where the program's answer is expected."""
        return self.folder.with_name(f"{self.folder.name}.answer.json")

    def ask(self, **settings: Any) -> list[str]:
        """Write what the program is asked; the names of the files of question and answer."""
        tokens = len(self.continuations[0])
        job = {"model": str(self.folder), "prompts": self.prompts, "continuations": self.continuations}
        file = self.folder.with_name(f"{self.folder.name}.job.json")
        file.write_text(json.dumps({**job, "tokens": tokens, **settings}))
        return [str(file), str(self.answer)]

    def compared(self) -> dict[str, Any]:
        """How the answer differs; where the program refused, its words."""
        answer = json.loads(self.answer.read_text())
        if "refused" in answer:
            return dict(answer)
        scored = [scores_of(self.model, *pair) for pair in zip(self.prompts, self.continuations, strict=True)]
        distinct = len({token for continuation in self.continuations for token in continuation})
        found = compare(self.continuations, scored, answer)
        return {"class": type(self.model).__name__, "distinct_tokens": distinct, **found}
