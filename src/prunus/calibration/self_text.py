"""Repair on text of more kinds than the calibration's: a part of its sequences is written by the dense model.

A repair fits the remaining weights to the inputs that they get on its text; it holds for that kind of text, and far
less for another. What the dense model writes by itself, from first tokens drawn from the whole vocabulary, is of all
kinds that it was trained on; with such sequences beside the given ones, a model repaired on text from the web loses far
less on other text (benchmarks/LOG.md).

Source: https://arxiv.org/abs/2305.17888 (LLM-QAT), section 2.1; see `prunus.calibration.sampled`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.calibration import Calibration, calibration_from_tokens
from prunus.calibration.begin_token import shared_begin_token
from prunus.calibration.sampled import sample_from_model
from prunus.files.records import Records
from prunus.model.digest import digest_model
from prunus.model.layers import layers_of
from prunus.model.live import live_model

__all__ = ["text_for_repair"]

logger = logging.getLogger(__name__)


def text_for_repair(
    model: Any,
    calibration: Calibration,
    share: float,
    *,
    seed: int = 0,
    work: Path | None = None,
    progress: bool = True,
) -> Calibration:
    """The sequences that a repair is made on: given ones and, for a share of them, ones that the model writes.

    Args:
        model: the dense model. One whose layers stay on disk would be read once per token: it writes nothing.
        calibration: the given sequences; as many of the last as the model writes are left out.
        share: of the sequences that the model writes, see `RepairOptions.self_text`.
        seed: of what is written, and of the order.
        work: folder that the text is kept in, so that a killed run need not write it again.
        progress: show a bar on a terminal.

    Returns:
        As many sequences as there were, both kinds mixed, so that any first part has both; `calibration` itself where
        nothing is to be written.

    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
        StatisticsError: `work` holds what was made from other inputs.
    """
    model = live_model(model)
    number = int(share * len(calibration))
    if number and layers_of(model).stored:
        logger.info("the model writes no text for its repair, as its layers are read from disk: the given text is used")
        number = 0
    if not number:
        return calibration
    seq_len = calibration.input_ids.shape[1]
    begin = None if calibration.attention_mask is not None else shared_begin_token(calibration.input_ids)
    written = _written(model, number, seq_len, seed, begin, work, progress)
    given = len(calibration) - number
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))
    ids, mask = torch.cat([calibration.input_ids[:given], written])[order], calibration.attention_mask
    if mask is not None:
        mask = torch.cat([mask[:given], torch.ones_like(written)])[order]
    name = f"{given} sequences of {calibration.provenance.source}, {number} sampled from the model"
    return calibration_from_tokens(ids, mask, source=name)


def _written(
    model: Any, number: int, seq_len: int, seed: int, begin: int | None, work: Path | None, progress: bool
) -> Tensor:
    made_from = {}
    if work is not None:
        made_from = {"model": digest_model(model), "sequences": number, "seq_len": seq_len, "seed": seed}
        made_from["begin token"] = begin
    records = Records(work, made_from)
    if 0 in records:
        return records[0]["input_ids"]
    ids = sample_from_model(model, samples=number, seq_len=seq_len, seed=seed, begin=begin, progress=progress)
    records.put(0, {"input_ids": ids}, {})
    return ids
