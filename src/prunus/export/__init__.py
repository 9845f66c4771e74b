"""Pruned models in the forms that other programs load."""

from prunus.export.dense import export_dense, fill_model
from prunus.export.gguf_file import GGUF_TYPES, GgufType, export_gguf

__all__ = ["GGUF_TYPES", "GgufType", "export_dense", "export_gguf", "fill_model"]
