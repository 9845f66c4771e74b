"""Safetensors files one tensor at a time, with plain reads and writes.

The safetensors library maps whole files into memory, which an enforced limit (`ulimit -v`, RLIMIT_DATA) counts in full,
and writes a file only from tensors that are all in memory. Here a file may be larger than memory both ways.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prunus.errors import CheckpointError
from prunus.files.outputs import whole_file

__all__ = ["DTYPES", "NAMES", "TensorFile", "TensorLayout", "TensorReader", "write_tensors"]

#: names of safetensors for the dtypes of torch
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: one system call moves no more than 2 GiB
MOVED_AT_ONCE = 2**30
#: of a longer part, Linux reads no more than its readahead window, 128 KiB unless somebody has changed it
ADVISED_AT_ONCE = 2**17
#: as in the safetensors library; the header of a damaged file could claim to be as large as the file
LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorLayout:
    """Dtype and shape of a tensor that is not there yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorLayout:
        """The layout of a tensor, which may be on the meta device."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def bytes(self) -> int:
        """Size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorReader(ABC):
    """Tensors that are read by name."""

    @abstractmethod
    def layout(self, name: str) -> TensorLayout:
        """Dtype and shape of a tensor."""

    @abstractmethod
    def read_into(self, name: str, out: Tensor, entry: int | None = None) -> None:
        """Read one tensor, or one entry along its first dimension, to where it is wanted."""

    @abstractmethod
    def will_need(self, name: str, entries: Sequence[int] | None = None) -> None:
        """Tell the system that a tensor, or entries along its first dimension, will be read soon.

        What is on its way to the system's cache while something else is done need not be waited for. On systems that
        cannot be told, nothing happens.
        """

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own, on the CPU.

        Raises:
            CheckpointError: its file changed since it was opened, or has a dtype that is not read here.
        """
        layout = self.layout(name)
        out = torch.empty(layout.shape, dtype=layout.dtype)
        self.read_into(name, out)
        return out


class TensorFile(TensorReader):
    """A safetensors file to read from. It is opened anew for every read, so that threads may share it.

    Every read checks that the file is still the one whose header was read: the same size, time of modification and
    header.

    Args:
        path: the file.

    Attributes:
        entries: per tensor its `dtype`, `shape` and `data_offsets`, as in the file's header.
        metadata: of the file.

    Raises:
        CheckpointError: the file cannot be read, is not safetensors, or shorter or longer than its header says.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                size, self._state = status.st_size, (status.st_size, status.st_mtime_ns)
                first = file.read(8)
                length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
                self._start = 8 + length
                if self._start > size:
                    raise CheckpointError(
                        f"{path} is truncated or not safetensors: {size} bytes, too few for its header; fetch it again"
                    )
                if length > LARGEST_HEADER:
                    raise CheckpointError(
                        f"{path} is not a safetensors file: it says that its header has {length:,} bytes; fetch it "
                        "again"
                    )
                header = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self._header = hashlib.sha256(first + header).digest()
        try:
            self.entries: dict[str, dict[str, Any]] = json.loads(header)
            self.metadata: dict[str, str] = self.entries.pop("__metadata__", {})
            for name, entry in self.entries.items():
                _check_entry(name, entry)
            end = 0
            for start, stop in sorted(entry["data_offsets"] for entry in self.entries.values()):
                if start != end:
                    raise ValueError(f"a tensor starts at {start}, the one before it ends at {end}")
                end = stop
            end += self._start
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a safetensors file: its header cannot be read ({error})") from error
        if size != end:
            raise CheckpointError(
                f"{path} is {'truncated' if size < end else 'damaged'}: {size} bytes, its header says {end}; fetch it "
                "again"
            )

    def layout(self, name: str) -> TensorLayout:
        """Dtype and shape of a tensor.

        Raises:
            CheckpointError: it has a dtype that is not read here.
        """
        entry = self.entries[name]
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {name!r} has dtype {entry['dtype']}; use a bf16, fp16 or fp32 checkpoint"
            )
        return TensorLayout(DTYPES[entry["dtype"]], tuple(entry["shape"]))

    def read_into(self, name: str, out: Tensor, entry: int | None = None) -> None:
        """Read one tensor, or one entry along its first dimension, to where it is wanted.

        Args:
            name: of the tensor.
            out: contiguous, on the CPU, of the tensor's dtype, and of its shape or that of an entry.
            entry: which one; None = the whole tensor.

        Raises:
            CheckpointError: see `read`.
        """
        layout = self.layout(name)
        shape = layout.shape if entry is None else layout.shape[1:]
        if out.dtype != layout.dtype or tuple(out.shape) != shape or not out.is_contiguous():
            raise ValueError(f"{name!r} of {layout} cannot be read into {TensorLayout.of(out)}")
        start = self.entries[name]["data_offsets"][0] + (entry or 0) * out.numel() * layout.dtype.itemsize
        with self._opened() as file:
            self._fill(file, name, start, out.view(-1).view(torch.uint8))

    def will_need(self, name: str, entries: Sequence[int] | None = None) -> None:
        """Tell the system that a tensor, or entries along its first dimension, will be read soon."""
        if not hasattr(os, "posix_fadvise"):
            return
        start, end = self.entries[name]["data_offsets"]
        each = (end - start) // self.layout(name).shape[0] if entries is not None else end - start
        with self.path.open("rb", buffering=0) as file:
            for entry in [0] if entries is None else entries:
                first = self._start + start + entry * each
                for place in range(first, first + each, ADVISED_AT_ONCE):
                    length = min(ADVISED_AT_ONCE, first + each - place)
                    os.posix_fadvise(file.fileno(), place, length, os.POSIX_FADV_WILLNEED)

    def read_in_pieces(self, name: str, elements: int) -> Iterator[Tensor]:
        """Read one tensor, flattened, as pieces of so many elements.

        Args:
            name: of the tensor.
            elements: of each piece but the last.

        Raises:
            CheckpointError: see `read`.
        """
        dtype = self.layout(name).dtype
        start, end = self.entries[name]["data_offsets"]
        with self._opened() as file:
            for first in range(start, end, elements * dtype.itemsize):
                yield self._read(file, name, first, min(end, first + elements * dtype.itemsize)).view(dtype)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The file, open at its data, if it is still the same."""
        try:
            with self.path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                header = file.read(self._start)
                now = (status.st_size, status.st_mtime_ns), hashlib.sha256(header).digest()
                if now != (self._state, self._header):
                    raise CheckpointError(
                        f"{self.path} was replaced or changed while it was in use: its "
                        f"{'size' if status.st_size != self._state[0] else 'time or header'} is another. Leave the "
                        "files of a model alone while it is worked on, and start again"
                    )
                yield file
        except OSError as error:
            raise CheckpointError(f"{self.path} can no longer be read: {error}") from error

    def _read(self, file: BinaryIO, name: str, start: int, end: int) -> Tensor:
        """Bytes of the data section as a tensor of uint8."""
        tensor = torch.empty(end - start, dtype=torch.uint8)
        self._fill(file, name, start, tensor)
        return tensor

    def _fill(self, file: BinaryIO, name: str, start: int, tensor: Tensor) -> None:
        """Read bytes of the data section, from `start` on, into a tensor of uint8."""
        memory = tensor.numpy().data
        file.seek(self._start + start)
        done = 0
        while done < len(memory):
            count = file.readinto(memory[done : done + MOVED_AT_ONCE])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{self.path} ends within {name!r}; fetch it again")
            done += count


def write_tensors(
    path: Path,
    layouts: Mapping[str, TensorLayout],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file from tensors that come one after another.

    Args:
        path: the file; it appears when it is complete.
        layouts: what will come, in this order.
        tensors: names and tensors, on any device.
        metadata: of the file.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, layout in layouts.items():
        start, end = end, end + layout.bytes
        entries[name] = {"dtype": NAMES[layout.dtype], "shape": list(layout.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    expected = iter(layouts.items())
    with whole_file(path) as partial, partial.open("wb", buffering=0) as file:
        _write_all(file, memoryview(struct.pack("<Q", len(header)) + header))
        for name, tensor in tensors:
            if next(expected, None) != (name, TensorLayout.of(tensor)):
                raise ValueError(f"{name}, {TensorLayout.of(tensor)} does not come where the layout of {path} has it")
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            _write_all(file, data.data)
        if (absent := next(expected, None)) is not None:
            raise ValueError(f"{absent[0]}, which belongs into {path}, did not come")


def _check_entry(name: str, entry: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError unless an entry of a header describes a tensor.

    Nothing but these numbers says which bytes are which weights, so that a wrong one must not get any further.
    """
    (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise TypeError(f"{name!r} has dtype {dtype!r} and shape {shape!r}")
    if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
        raise ValueError(f"{name!r} has shape {shape} and offsets {[start, end]}, not whole numbers from 0 on")
    if end < start or (dtype in DTYPES and end - start != math.prod(shape) * DTYPES[dtype].itemsize):
        raise ValueError(f"{name!r} has {end - start} bytes for {dtype} of shape {shape}")


def _write_all(file: Any, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += file.write(data[done : done + MOVED_AT_ONCE])
