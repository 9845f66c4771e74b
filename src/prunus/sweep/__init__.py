"""How calibration batches go through the model while statistics are taken: one interface, two orders."""

from prunus.sweep.sweep import ENGINES, Engine, sweep

__all__ = ["ENGINES", "Engine", "sweep"]
