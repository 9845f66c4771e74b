"""Tensors that wait between two passes over the layers, in memory or on disk.

A series holds one tensor per batch, under a name; it is written in one go and read batch by batch. Slots hold one
tensor per batch, each of which is replaced by itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from prunus.files.tensor_file import TensorFile, TensorLayout, write_tensors

__all__ = ["DiskSlots", "DiskSpool", "Slots", "Spool"]


class Spool:
    """Series in memory, on the CPU."""

    def __init__(self) -> None:
        self._series: dict[str, list[Tensor]] = {}

    def write(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Take a series, one tensor after another; it is there when all of it is."""
        self._series[name] = [tensor.detach().cpu() for tensor in tensors]

    def read(self, name: str, number: int) -> Tensor:
        """One tensor of a series, on the CPU."""
        return self._series[name][number]

    def has(self, name: str) -> bool:
        """Whether a series is there."""
        return name in self._series

    def drop(self, name: str) -> None:
        """Forget a series, if it is there."""
        self._series.pop(name, None)

    def close(self) -> None:
        """Forget everything."""
        self._series.clear()


class DiskSpool(Spool):
    """Series in files of a folder, which another process may read on from.

    Files are read and written, not mapped: mapped pages count as memory of the process.

    Args:
        folder: made if it is not there.
        layouts: of the tensors of every series.
    """

    def __init__(self, folder: Path, layouts: Sequence[TensorLayout]):
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._layouts = {str(number): layout for number, layout in enumerate(layouts)}

    def write(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Write a series to a file, which appears when it is complete."""
        write_tensors(self._path(name), self._layouts, ((str(n), tensor) for n, tensor in enumerate(tensors)))

    def read(self, name: str, number: int) -> Tensor:
        """Read one tensor of a series."""
        return TensorFile(self._path(name)).read(str(number))

    def has(self, name: str) -> bool:
        """Whether the file of a series is complete."""
        return self._path(name).is_file()

    def drop(self, name: str) -> None:
        """Delete the file of a series, if it is there."""
        self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


class Slots:
    """Tensors by number, in memory, on the device that they came from."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}

    def __getitem__(self, number: int) -> Tensor:
        return self._tensors[number]

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        self._tensors[number] = tensor.detach()

    def __delitem__(self, number: int) -> None:
        del self._tensors[number]


class DiskSlots(Slots):
    """Tensors by number, each in a file of its own.

    Args:
        folder: made anew; what an earlier run left there is deleted.
        device: where tensors go when they are read.
    """

    def __init__(self, folder: Path, device: torch.device):
        super().__init__()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder, self._device = folder, device

    def __getitem__(self, number: int) -> Tensor:
        return TensorFile(self._path(number)).read("tensor").to(self._device)

    def __setitem__(self, number: int, tensor: Tensor) -> None:
        write_tensors(self._path(number), {"tensor": TensorLayout.of(tensor)}, [("tensor", tensor)])

    def __delitem__(self, number: int) -> None:
        self._path(number).unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.safetensors"
