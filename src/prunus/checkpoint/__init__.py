"""Reading and writing model folders, and the classes of models whose layers differ in width."""

from prunus.checkpoint.architecture import empty_model, is_ragged, pruned_config, register
from prunus.checkpoint.placement import resolve_device, resolve_dtype

register()

__all__ = ["empty_model", "is_ragged", "pruned_config", "register", "resolve_device", "resolve_dtype"]
