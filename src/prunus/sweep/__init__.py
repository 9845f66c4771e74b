"""How calibration batches go through the model while statistics are taken: one interface, two orders."""

from prunus.sweep.sweep import ENGINES, Engine, EngineChoice, sweep

__all__ = ["ENGINES", "Engine", "EngineChoice", "sweep"]
