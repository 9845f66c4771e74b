"""Reading and writing model folders, and the classes of models whose layers differ in width."""

from prunus.checkpoint.architecture import config_as_weighted, empty_model, is_ragged, pruned_config, register
from prunus.checkpoint.block_formats import format_in
from prunus.checkpoint.folder import check_folder, locate, read_config, whole_around
from prunus.checkpoint.held_dtype import dtype_to_save, fast_dtype, held_dtype
from prunus.checkpoint.load import check_finite, load_model
from prunus.checkpoint.open import open_model
from prunus.checkpoint.save import check_whole, model_bytes, save_checkpoint
from prunus.checkpoint.stored_blocks import attach_blocks_, blocks_in, blocks_of
from prunus.machine.placement import resolve_device, resolve_dtype

register()

__all__ = [
    "attach_blocks_",
    "blocks_in",
    "blocks_of",
    "check_finite",
    "check_folder",
    "check_whole",
    "config_as_weighted",
    "dtype_to_save",
    "empty_model",
    "fast_dtype",
    "format_in",
    "held_dtype",
    "is_ragged",
    "load_model",
    "locate",
    "model_bytes",
    "open_model",
    "pruned_config",
    "read_config",
    "register",
    "resolve_device",
    "resolve_dtype",
    "save_checkpoint",
    "whole_around",
]
