"""How calibration batches go through the model while statistics are taken."""

from prunus.sweep.resident import sweep

__all__ = ["sweep"]
