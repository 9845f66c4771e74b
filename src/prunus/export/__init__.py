"""Pruned models in the forms that other programs load."""

from prunus.export.dense import export_dense, fill_model
from prunus.export.gguf_file import export_gguf
from prunus.export.gguf_model import GGUF_TYPES, GgufType
from prunus.export.gguf_plan import apply_plan_to_gguf
from prunus.export.gguf_slice import slice_gguf
from prunus.export.gguf_source import is_gguf, open_gguf

__all__ = [
    "GGUF_TYPES",
    "GgufType",
    "apply_plan_to_gguf",
    "export_dense",
    "export_gguf",
    "fill_model",
    "is_gguf",
    "open_gguf",
    "slice_gguf",
]
