"""Reading and writing model folders, and the classes of models whose layers differ in width."""

from prunus.checkpoint.architecture import empty_model, is_ragged, pruned_config, register
from prunus.checkpoint.load import check_finite, load_model
from prunus.checkpoint.placement import resolve_device, resolve_dtype
from prunus.checkpoint.save import check_disk, check_output, model_bytes, save_checkpoint

register()

__all__ = [
    "check_disk",
    "check_finite",
    "check_output",
    "empty_model",
    "is_ragged",
    "load_model",
    "model_bytes",
    "pruned_config",
    "register",
    "resolve_device",
    "resolve_dtype",
    "save_checkpoint",
]
