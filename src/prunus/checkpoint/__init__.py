"""Reading and writing model folders, and the classes of models whose layers differ in width."""

from prunus.checkpoint.architecture import config_as_weighted, empty_model, is_ragged, pruned_config, register
from prunus.checkpoint.load import check_finite, check_folder, load_model, locate, read_config
from prunus.checkpoint.open import open_model
from prunus.checkpoint.save import model_bytes, save_checkpoint
from prunus.machine.placement import resolve_device, resolve_dtype
from prunus.results.card import (
    CalibrationFacts,
    CardFacts,
    MeasuredFacts,
    OriginalFacts,
    license_of,
    model_card,
    updated_card,
)

register()

__all__ = [
    "CalibrationFacts",
    "CardFacts",
    "MeasuredFacts",
    "OriginalFacts",
    "check_finite",
    "check_folder",
    "config_as_weighted",
    "empty_model",
    "is_ragged",
    "license_of",
    "load_model",
    "locate",
    "model_bytes",
    "model_card",
    "open_model",
    "pruned_config",
    "read_config",
    "register",
    "resolve_device",
    "resolve_dtype",
    "save_checkpoint",
    "updated_card",
]
