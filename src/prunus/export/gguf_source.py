"""GGUF files as they are read: mapped into memory, and checked before any number in them is believed."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunus.errors import CheckpointError, UnsupportedModelError
from prunus.escaping import printable
from prunus.installing import install_command

__all__ = ["GGUF_MARK", "GgufSource", "StoredTensor", "gguf_package", "is_gguf", "open_gguf"]

#: a GGUF file begins with this
GGUF_MARK = b"GGUF"
#: more than any published file has; a header is read value by value, and a few bytes must not keep it busy for hours
_MOST_ENTRIES = 2**18
_MOST_VALUES = 2**22
_ENDS_EARLY = "the file ends before what its header describes"
#: magic, version, number of tensors, number of fields
_HEADER = struct.Struct("<4sIQQ")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name: such as `blk.3.ffn_down_exps.weight`.
        type: number of its storage type in GGUF.
        shape: as llama.cpp writes it, the contiguous axis first and the expert axis last.
        data: its bytes, mapped from the file.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file whose header is sound and whose tensors lie inside it.

    Attributes:
        path: of the file.
        architecture: `general.architecture`.
        version: of the format.
        alignment: every tensor begins at a multiple of this many bytes.
        fields: gguf's fields by key, without its own about the header.
        tensors: by name, in the order of the file.
        data: all bytes of the file.
    """

    path: Path
    architecture: str
    version: int
    alignment: int
    fields: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    data: np.ndarray

    def number(self, name: str, default: int | None = None) -> int | None:
        """A whole number among the architecture's own fields.

        Raises:
            CheckpointError: the field has another type.
        """
        field = self.fields.get(f"{self.architecture}.{name}")
        if field is None:
            return default
        value = field.contents()
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(f"{self.path}: {self.architecture}.{name} is not a whole number")
        return value

    def numbers(self, name: str, layers: int) -> list[int] | None:
        """One whole number per layer; a single number in the file is that of every layer.

        Raises:
            CheckpointError: the field has another type or length.
        """
        field = self.fields.get(f"{self.architecture}.{name}")
        if field is None:
            return None
        values = field.contents()
        values = values if isinstance(values, list) else [values] * layers
        if len(values) != layers or not all(type(value) is int and value >= 0 for value in values):
            raise CheckpointError(f"{self.path}: {self.architecture}.{name} is not one whole number per layer")
        return values

    def raw(self, key: str) -> bytes:
        """A field as it stands in the file: key, type and value."""
        field = self.fields[key]
        size = sum(part.nbytes for part in field.parts)
        return self.data[field.offset : field.offset + size].tobytes()


def gguf_package() -> Any:
    """The package gguf.

    Raises:
        CheckpointError: it is not installed; the message has the command that does.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"GGUF files need the package gguf, which is not installed. Run: {install_command('gguf')}"
        )
    import gguf

    return gguf


def is_gguf(path: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file: a file that begins as they do, or any name that ends so."""
    path = Path(path)
    try:
        if not path.is_file():
            return path.suffix.lower() == ".gguf" and not path.is_dir()
        with path.open("rb") as file:
            return file.read(len(GGUF_MARK)) == GGUF_MARK or path.suffix.lower() == ".gguf"
    except (OSError, ValueError):
        return False


def open_gguf(path: Path) -> GgufSource:
    """Open a GGUF file; nothing but its header is read.

    Raises:
        CheckpointError: it is missing, no GGUF file, cut off, or its header contradicts itself.
        UnsupportedModelError: it is big-endian, or one part of several.
    """
    gguf = gguf_package()
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; name a GGUF file")
    try:
        _check_header(path)
        reader = _bounded_reader(gguf)(path)
        tensors = {tensor.name: _stored(gguf, reader, tensor) for tensor in reader.tensors}
        fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        architecture = fields["general.architecture"].contents() if "general.architecture" in fields else None
        split = fields["split.count"].contents() if "split.count" in fields else 1
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, or no GGUF file: {printable(str(error))}") from error
    if not isinstance(architecture, str) or not architecture:
        raise CheckpointError(f"{path} does not name its architecture (general.architecture)")
    if split != 1:
        raise UnsupportedModelError(
            f"{path} is one of {split} parts of a model; join them first: llama.cpp's "
            "llama-gguf-split does it, by its option merge"
        )
    return GgufSource(
        path, architecture, int(reader.fields["GGUF.version"].contents()), int(reader.alignment), fields, tensors,
        np.asarray(reader.data),
    )  # fmt: skip


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(_HEADER.size)
    if start[: len(GGUF_MARK)] != GGUF_MARK:
        raise ValueError("it does not begin with the letters GGUF")
    if len(start) < _HEADER.size:
        raise ValueError(_ENDS_EARLY)
    _, version, tensors, fields = _HEADER.unpack(start)
    if version & 0xFFFF == 0:
        raise UnsupportedModelError(f"{path} is big-endian; convert it with `gguf-convert-endian {path} little`")
    if max(tensors, fields) > _MOST_ENTRIES:
        raise ValueError(f"its header counts {tensors:,} tensors and {fields:,} fields")


def _bounded_reader(gguf: Any) -> Any:
    """The reader of gguf, which takes sizes in a file at their word, but never reads past the end or for ever."""

    class Bounded(gguf.GGUFReader):
        values = 0

        @property
        def data(self) -> np.ndarray:
            return self.plain

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self.plain = np.asarray(mapped)  # the same bytes; slices of a memmap take ten times as long

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if not 0 <= int(offset) <= self.data.nbytes - int(count) * np.dtype(dtype).itemsize:
                raise ValueError(_ENDS_EARLY)
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            self.values += 1
            if self.values > _MOST_VALUES:
                raise ValueError(f"its fields have more than {_MOST_VALUES:,} values")
            return super()._get_field_parts(orig_offs, raw_type)

    return Bounded


def _stored(gguf: Any, reader: Any, tensor: Any) -> StoredTensor:
    shape = tuple(int(size) for size in tensor.shape)
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    # In Python's numbers: gguf multiplies in 64 bits, where huge sizes become small ones.
    values = 1
    for size in shape:
        values *= size
    begin = int(tensor.data_offset)
    if not shape or values <= 0 or shape[0] % block or begin < reader.data_offset or begin % reader.alignment:
        raise ValueError(f"tensor {tensor.name!r} of shape {list(shape)} is not whole blocks in their place")
    size = values // block * block_bytes
    if begin + size > reader.data.nbytes:
        raise ValueError(_ENDS_EARLY)
    return StoredTensor(tensor.name, int(tensor.tensor_type), shape, np.asarray(reader.data[begin : begin + size]))
