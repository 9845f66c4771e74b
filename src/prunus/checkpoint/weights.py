"""The weight files of a model folder: which tensors they hold, and that they stay what they were.

Headers are read at once, tensors when they are asked for. A streamed run reads every tensor several times, hours apart,
and a file that is replaced meanwhile would give a model made of two. So each read checks that size, modification time
and header of the file are those of the beginning (`TensorFile`), and that the tensor has the hash it had when it was
first read; `verify` reads once more what was read, before a result becomes final. (The inode is no part of the check:
network file systems give a file that is opened again another one.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from torch import Tensor

from prunus.errors import CheckpointError, UnsupportedModelError
from prunus.files.json_file import read_json
from prunus.files.links import check_inside
from prunus.files.tensor_file import DTYPES, TensorFile, TensorLayout, TensorReader
from prunus.model.whole import Whole

__all__ = ["INDEX", "WEIGHTS", "StoredWeights", "shards_of"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES_OF_MODELS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: of each tensor, while two are compared
ELEMENTS_COMPARED_AT_ONCE = 2**20


class StoredWeights(TensorReader, Collection[str]):
    """The tensors of a model folder by name.

    Args:
        folder: of the model.

    Raises:
        CheckpointError: a file is missing, damaged, outside the folder, or holds other tensors than the index says.
        UnsupportedModelError: the weights are pickles.
    """

    #: the multimodal model around a language model, where there is one
    whole: Whole | None = None

    def __init__(self, folder: Path):
        self.folder = folder
        #: of each stored tensor its file, and the name that it has there
        self._places: dict[str, tuple[TensorFile, str]] = {}
        #: of what was read: a tensor, or one entry along its first dimension
        self._digests: dict[tuple[str, int | None], bytes] = {}
        for shard, expected in shards_of(folder).items():
            file = TensorFile(shard)
            if absent := sorted(expected - file.entries.keys()):
                raise CheckpointError(
                    f"{shard} does not hold {absent[0]!r} ({len(absent)} tensors), which {INDEX} places there; "
                    "fetch the model again"
                )
            if twice := sorted(self._places.keys() & file.entries.keys()):
                raise CheckpointError(
                    f"{twice[0]!r} is stored twice, in {self.path(twice[0]).name} and in {shard.name}: which of "
                    "them counts is left to the reader. Fetch the model again"
                )
            self._places |= {name: (file, name) for name in file.entries}
        #: what the tensors are called that are made of the stored ones
        self._names: Collection[str] = self._places

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the first tensor whose numbers have one that a model can be held in."""
        layouts = (self.layout(name) for name in self if self.stored_dtype(name) in DTYPES)
        return next((layout.dtype for layout in layouts if layout.dtype in DTYPES_OF_MODELS), None)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._places[name][0].path

    def stored_dtype(self, name: str) -> str:
        """Dtype of a tensor in the words of safetensors, whether it can be read or not."""
        file, stored = self._places[name]
        return str(file.entries[stored]["dtype"])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        file, stored = self._places[name]
        return tuple(file.entries[stored]["shape"])

    def layout(self, name: str) -> TensorLayout:
        """Dtype and shape of a tensor.

        Raises:
            CheckpointError: it has a dtype that is not read here.
        """
        file, stored = self._places[name]
        return file.layout(stored)

    def read_into(self, name: str, out: Tensor, entry: int | None = None) -> None:
        """Read one tensor, or one entry along its first dimension, to where it is wanted.

        Args:
            name: of the tensor.
            out: contiguous, on the CPU, of the tensor's dtype, and of its shape or that of an entry.
            entry: which one; None = the whole tensor.

        Raises:
            CheckpointError: its file changed since it was opened.
        """
        file, stored = self._places[name]
        file.read_into(stored, out, entry)
        digest = hashlib.sha256(out.view(-1).view(torch.uint8).numpy().data).digest()
        if self._digests.setdefault((name, entry), digest) != digest:
            raise CheckpointError(
                f"{self.path(name)} changed while the model was in use: {name!r} holds other values than when it was "
                "first read. Leave the files of a model alone while it is worked on, and start again"
            )

    def will_need(self, name: str, entries: Sequence[int] | None = None) -> None:
        """Tell the system that a tensor, or entries along its first dimension, will be read soon."""
        file, stored = self._places[name]
        file.will_need(stored, entries)

    def verify(self) -> None:
        """Read again what was read so far.

        Raises:
            CheckpointError: a file changed since a tensor was first read.
        """
        for name, entry in list(self._digests):
            layout = StoredWeights.layout(self, name)
            shape = layout.shape if entry is None else layout.shape[1:]
            StoredWeights.read_into(self, name, torch.empty(shape, dtype=layout.dtype), entry)

    def same_values(self, one: str, other: str) -> bool:
        """Whether two tensors of one shape hold the same values, whatever their dtypes. Stops at the first difference.

        Args:
            one: name of a tensor.
            other: name of another one.
        """
        places = (self._places[name] for name in (one, other))
        ones, others = (file.read_in_pieces(stored, ELEMENTS_COMPARED_AT_ONCE) for file, stored in places)
        return all(torch.equal(a.double(), b.double()) for a, b in zip(ones, others, strict=True))


def shards_of(folder: Path) -> dict[Path, set[str]]:
    """The weight files of a folder, with the tensors that the index places in each (none named: there is no index).

    Raises:
        CheckpointError: there are none, or one that the index lists is missing or lies elsewhere.
        UnsupportedModelError: the weights are pickles.
    """
    if (folder / WEIGHTS).is_file():
        check_inside(folder, folder / WEIGHTS)
        return {folder / WEIGHTS: set()}
    if not (folder / INDEX).is_file():
        if pickles := sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
            raise UnsupportedModelError(
                f"{folder} has its weights only as pickles ({pickles[0].name}), which can run any code when opened; "
                "prunus never does. Convert them to safetensors, or use a revision of the model that has them"
            )
        raise CheckpointError(f"{folder} holds neither {WEIGHTS} nor {INDEX}; fetch the model again")
    check_inside(folder, folder / INDEX)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map; fetch the model again")
    shards: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not file_name or "\0" in file_name:
            raise CheckpointError(f"{folder / INDEX} places {name!r} in {file_name!r}, which is no file name")
        shards.setdefault(file_name, set()).add(name)
    for file_name in shards:
        _check_name(folder, file_name)
    if absent := sorted(file_name for file_name in shards if not _is_file(folder / file_name)):
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of the {len(shards)} weight files that {INDEX} lists, first {absent[0]}; "
            "fetch them again"
        )
    return {folder / file_name: names for file_name, names in shards.items()}


def _check_name(folder: Path, file_name: str) -> None:
    """Check that a file of a model folder lies in it, by the name that the index gives it, too."""
    for path in (PurePosixPath(file_name), PureWindowsPath(file_name)):
        if path.anchor or ".." in path.parts:
            raise CheckpointError(
                f"{folder} names {file_name!r} as one of its files, which is a place outside of the folder; a model's "
                "files lie in its folder. Fetch the model again from a source that you trust"
            )
    check_inside(folder, folder / file_name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for the file system
        return False
