"""What finished parts of a job on calibration batches depend on, so that a killed run goes on from its own alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prunus.calibration.batches import Batch, digest_batches
from prunus.model.digest import digest_model

__all__ = ["made_from"]


def made_from(model: Any, batches: Sequence[Batch], more: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values for `prunus.files.records.Records`.

    Args:
        model: in memory or opened; its weights are read once.
        batches: calibration sequences, as they are batched.
        more: what else the job depends on, as plain values.
    """
    return {
        "model": digest_model(model),
        "calibration tokens": digest_batches(batches),
        "sequences per batch": [len(batch.input_ids) for batch in batches],
        "source of each batch": [batch.source for batch in batches],
        "torch": torch.__version__,
        **more,
    }
