"""What recovery adds to the card of a pruned model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from prunus.errors import CheckpointError
from prunus.escaping import markdown_block, markdown_text
from prunus.files.json_file import read_json_if_whole
from prunus.model.loss import perplexity_of_loss
from prunus.results.card import MeasuredFacts, text_of_card, updated_card
from prunus.results.result_folder import base_called

__all__ = ["card_with_recovery"]


def card_with_recovery(folder: Path, name: str, facts: Mapping[str, Any], command: str) -> str:
    """The card of a pruned model under its new name, with a section on recovery at its end.

    Args:
        folder: of the pruned model.
        name: of the recovered one.
        facts: what goes into prunus/recovery.json.
        command: what the user typed.
    """
    folder_name = folder.resolve().name
    text, name_in_card = card_without_figures(folder)
    metrics = read_json_if_whole(folder / "prunus" / "metrics.json") or {}
    card = updated_card(text, name, [_measured(facts, base_called(facts["teacher"], metrics))])
    # The folder may have been renamed since it was pruned. A title is as prunus writes it, or as somebody typed it.
    for old in {folder_name, name_in_card or folder_name}:
        titles = "|".join(map(re.escape, (markdown_text(old), old)))
        card = re.sub(rf"^# (?:{titles})$", lambda _: f"# {markdown_text(name)}", card, count=1, flags=re.MULTILINE)
        card = card.replace(f"from_pretrained({json.dumps(old)}", f"from_pretrained({json.dumps(name)}")
    number = 1 + len(re.findall(r"^## Recovery\b", card, flags=re.MULTILINE))
    return f"{card.rstrip()}\n\n{_section(facts, command, number)}\n"


def card_without_figures(folder: Path) -> tuple[str, str | None]:
    """The card of a pruned model without what was measured on it (a new one where there is none), and its model's name.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else f"# {markdown_text(folder.resolve().name)}\n"
        card = ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}")
    except Exception as error:  # any YAML that somebody wrote by hand, any bytes
        raise CheckpointError(f"the card of the pruned model, {path}, cannot be read: {error}") from error
    name = card.data.model_name
    card.data.eval_results = card.data.model_name = card.data.metrics = None
    return text_of_card(card), name if isinstance(name, str) else None


def _measured(facts: Mapping[str, Any], of: str | None) -> MeasuredFacts:
    """Of the held-out text; the teacher's figure beside it if that is what the model was cut from, as `of` says."""
    loss, text = facts["held_out_loss"], f"held-out sequences ({facts['held_out']['source']})"
    dense = None if loss["dense"] is None or of is None else perplexity_of_loss(loss["dense"])
    values = dense, perplexity_of_loss(loss["after"])
    return MeasuredFacts(text, text, "perplexity", "perplexity", facts["protocol"], *values, of=of or "base")


def _section(facts: Mapping[str, Any], command: str, number: int) -> str:
    options, text, loss = facts["options"], facts["text"], facts["held_out_loss"]
    parts = {"kl_weight": "distillation", "ce_weight": "next token"}
    shares = ", ".join(f"{title} {options[weight]:g}" for weight, title in parts.items() if options[weight])
    trained = {
        "lora": f"adapters of rank {options['lora_rank']}, merged",
        "layers": "all weights but the embeddings",
        "full": "all weights",
    }[options["train"]]
    rows = {
        "trained": trained,
        "loss": shares,
        "teacher": facts["teacher"] or "none",
        "text": f"{text['source']}, {text['samples']} sequences of {text['seq_len']} tokens, seed {text['seed']}",
        "tokens of the text, SHA-256": text["sha256"],
        "steps": f"{facts['best_step']} of {facts['steps']} (lowest held-out loss), {options['batch_size']} sequences",
        "peak learning rate": f"{options['learning_rate']:g}",
        "seconds": f"{facts['seconds']:.0f}",
        "prunus": facts["prunus"],
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {row} | {markdown_text(value)} |" for row, value in rows.items())])
    dense = "" if loss["dense"] is None else f" (teacher: {perplexity_of_loss(loss['dense']):.2f})"
    title, when = (
        ("", "After pruning the model was trained.") if number == 1 else (f" {number}", "It was trained again.")
    )
    if not facts["best_step"]:
        when += " No checkpoint was better, so it is as it was before."
    return (
        f"## Recovery{title}\n\n{when} Perplexity on held-out sequences of the training text: "
        f"{perplexity_of_loss(loss['before']):.2f} before, {perplexity_of_loss(loss['after']):.2f} after{dense}.\n\n"
        f"{table}\n\n{markdown_block(command, 'sh')}\n\n"
        "`prunus/recovery.json` has all options and losses."
    )
