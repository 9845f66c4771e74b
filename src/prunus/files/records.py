"""What is finished of a long job, layer by layer, in a folder from which a killed run goes on.

    made_from.json              hashes and options of everything that the records depend on
    layer-00012.safetensors     what is known of one finished layer; appears when it is complete

A folder is gone on with only if it was made from the same inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prunus.errors import CheckpointError, StatisticsError
from prunus.files.json_file import parse_json, read_json
from prunus.files.outputs import whole_file
from prunus.files.tensor_file import TensorFile, TensorLayout, write_tensors

__all__ = ["Records"]

MADE_FROM = "made_from.json"


class Records:
    """Tensors, and a few plain values, of the layers that are finished.

    Args:
        folder: where they are kept; None for memory alone.
        made_from: everything that the records depend on, as plain values: hashes of weights and tokens, options.
        writes: False for a process that only reads what another one writes.

    Raises:
        StatisticsError: the folder holds records that were made from other inputs, or damaged ones.
    """

    def __init__(self, folder: Path | None = None, made_from: Mapping[str, Any] | None = None, *, writes: bool = True):
        #: what is in memory; of a folder's records only their files are known
        self._tensors: dict[int, Mapping[str, Tensor]] = {}
        self._files: dict[int, TensorFile] = {}
        self._about: dict[int, Mapping[str, Any]] = {}
        self._folder = folder if writes else None
        if folder is not None:
            self._go_on(folder, json.loads(json.dumps(dict(made_from or {}))))

    def __len__(self) -> int:
        return len(self._about)

    def __contains__(self, layer_idx: object) -> bool:
        return layer_idx in self._about

    def __getitem__(self, layer_idx: int) -> Mapping[str, Tensor]:
        if layer_idx in self._tensors:
            return self._tensors[layer_idx]
        file = self._files[layer_idx]
        return {name: file.read(name) for name in file.entries}

    def about(self, layer_idx: int) -> Mapping[str, Any]:
        """The plain values of a layer."""
        return self._about[layer_idx]

    def put(self, layer_idx: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Note that a layer is finished.

        Args:
            layer_idx: which one.
            tensors: on the CPU.
            about: plain values, which come back exactly.
        """
        if self._folder is None:
            self._tensors[layer_idx] = tensors
        else:
            path = self._folder / f"layer-{layer_idx:05d}.safetensors"
            layouts = {name: TensorLayout.of(tensor) for name, tensor in tensors.items()}
            write_tensors(path, layouts, tensors.items(), {"about": json.dumps(dict(about))})
            self._files[layer_idx] = TensorFile(path)
        self._about[layer_idx] = about

    def _go_on(self, folder: Path, made_from: dict[str, Any]) -> None:
        path = folder / MADE_FROM
        if not path.is_file():
            if self._folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                with whole_file(path) as partial:
                    partial.write_text(json.dumps(made_from, indent=1) + "\n", encoding="utf-8")
            return
        try:
            there = read_json(path)
        except CheckpointError as error:
            raise StatisticsError(f"{error}; remove the folder {folder}") from error
        if there != made_from:
            differing = [
                f"{name} ({_short(there.get(name))} there, {_short(made_from.get(name))} now)"
                for name in sorted({*there, *made_from})
                if there.get(name) != made_from.get(name)
            ]
            raise StatisticsError(
                f"{folder} holds what an unfinished run made from other inputs: {'; '.join(differing)}. Give the "
                "inputs of that run to go on with it; else remove the folder, or name another with `work`"
            )
        for record in sorted(folder.glob("layer-*.safetensors")):
            try:
                layer_idx = int(record.stem.removeprefix("layer-"))
                file = TensorFile(record)
                about = parse_json(file.metadata["about"], "its metadata `about`")
                if not isinstance(about, dict):
                    raise TypeError(f"its metadata `about` is {about!r}, not an object")
            except (CheckpointError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
                raise StatisticsError(
                    f"{record} is not the record of a finished layer ({error}); remove the folder {folder}"
                ) from error
            self._files[layer_idx], self._about[layer_idx] = file, about


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:12] + "…" if " " not in text else text[:60] + "…"
