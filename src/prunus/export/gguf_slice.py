"""A smaller GGUF file out of a larger one, of any quantisation: experts and whole layers left out, bytes copied.

The expert axis is the outermost one of every tensor that has it, and a layer is a set of tensors. So what stays is
contiguous in the file whatever the blocks look like inside, and nothing is decoded. Channels and heads lie across the
blocks; they cannot be cut here.
"""

from __future__ import annotations

import logging
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from prunus.errors import CheckpointError, OptionError, PlanError, UnsupportedModelError
from prunus.export.gguf_source import GGUF_MARK, GgufSource, StoredTensor
from prunus.files.outputs import check_disk, check_output_file, claimed, output_file
from prunus.files.user_path import expanded
from prunus.machine.bars import tracked

__all__ = ["slice_gguf", "trunk_layers"]

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"blk\.(\d{1,6})\.(.+)")
#: what has one entry per expert along its last axis, by the part of a tensor's name that follows the layer
_EXPERTS = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale|input_scale)")
_ROUTER = re.compile(r"ffn_gate_inp\.(weight|bias)|exp_probs_b(\.bias)?")
#: any other tensor of experts: in a layout of its own (one tensor per expert, chunks of experts)
_OTHER_EXPERTS = re.compile(r"ffn_\w+\.\d+\.\w+|ffn_\w*chexps\..*|.*_exps\..*|exp_probs.*")

#: architectures whose graph treats all layers of a file alike, or as per-layer fields say. In the others, a layer's
#: number says whether it has positions, a window or experts, and a file with layers removed computes something else.
_LAYERS_ALIKE = frozenset(
    {"llama", "deci", "openelm", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "granite", "granitemoe", "phi3", "olmo2"}
    | {"olmoe", "glm4moe", "ernie4_5", "ernie4_5-moe"}
)
#: the architecture's arrays that have another meaning than one entry per layer
_NOT_PER_LAYER = ("rope.dimension_sections",)
#: says how large the whole model was, in a model's name
_SIZE_LABEL = "general.size_label"


@dataclass(frozen=True)
class _Piece:
    """What goes from one tensor to the smaller file.

    Attributes:
        name: in the smaller file.
        tensor: in the large one.
        experts: entries of its last axis that stay; None for the whole tensor.
    """

    name: str
    tensor: StoredTensor
    experts: Sequence[int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.experts is None else (*self.tensor.shape[:-1], len(self.experts))

    @property
    def size(self) -> int:
        return self.tensor.data.nbytes if self.experts is None else len(self.experts) * self._per_expert

    @property
    def _per_expert(self) -> int:
        return self.tensor.data.nbytes // self.tensor.shape[-1]

    def write(self, file: BinaryIO) -> None:
        if self.experts is None:
            file.write(self.tensor.data.data)
            return
        for expert in self.experts:
            begin = expert * self._per_expert
            file.write(self.tensor.data[begin : begin + self._per_expert].data)


def trunk_layers(source: GgufSource) -> int:
    """Layers that a forward pass runs: those of the file without the ones that only predict further tokens.

    Raises:
        CheckpointError: the file does not say how many layers it has.
    """
    count = source.number("block_count")
    trunk = (count or 0) - (source.number("nextn_predict_layers") or 0)
    if count is None or trunk <= 0:
        raise CheckpointError(f"{source.path} does not say how many layers it has ({source.architecture}.block_count)")
    return trunk


def slice_gguf(
    source: GgufSource,
    out: str | Path,
    experts: Mapping[int, Sequence[int]],
    layers: Sequence[int] | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a GGUF file with some of another's experts and layers.

    What stays is copied byte for byte, whatever its storage type; of the metadata only what counts experts or layers
    changes. Memory holds the header, never a tensor. Layers that only predict further tokens (multi-token prediction)
    are left out as soon as experts are, since the file has one number of experts for all layers.

    Args:
        source: from `open_gguf`.
        out: the file to write; complete or not there at all.
        experts: layer → its experts that stay, ascending; one entry for every layer with experts that stays, all of the
            same length.
        layers: layers that stay, ascending; None for all.
        overwrite: replace an earlier GGUF file.
        progress: show a bar on a terminal.

    Returns:
        What was written: architecture, experts, layers, parameters and bytes, before and after.

    Raises:
        PlanError: experts or layers that are not there; different numbers of experts; fewer than a token is routed to;
            parts of the groups that a router chooses among.
        CheckpointError: experts and router differ in size, tensors are missing, or `out` cannot be written.
        UnsupportedModelError: the file is of an architecture in which layers have kinds by their number, or stores
            experts in another layout.
        OptionError: `out` is the file that is read, or is there already.
    """
    out = expanded(out)
    kept = {layer: tuple(int(expert) for expert in of_layer) for layer, of_layer in sorted(experts.items())}
    request = ("slice", str(source.path), kept, layers and tuple(layers), overwrite)
    with claimed(out, is_file=True, run=request) as claim:
        if claim.finished:
            return dict(claim.facts)
        check_output_file(out, "small.gguf", GGUF_MARK, overwrite)
        if out.exists() and out.samefile(source.path):
            raise OptionError(f"{out} is the file that is read; choose another `out`")
        cut = _Cut(source, kept, layers)
        pieces = cut.pieces()
        fields = cut.fields()
        check_disk(out, sum(piece.size for piece in pieces))
        try:
            with output_file(out, "small.gguf", GGUF_MARK, overwrite=overwrite) as partial:
                _write(partial, source, fields, pieces, progress)
                claim.facts = {
                    "architecture": source.architecture,
                    "experts_before": source.number("expert_count") or 0,
                    "experts_after": cut.experts_after,
                    "layers_before": cut.layers_before,
                    "layers_after": len(cut.layers),
                    "tensors": len(pieces),
                    "parameters_before": sum(math.prod(tensor.shape) for tensor in source.tensors.values()),
                    "parameters_after": sum(math.prod(piece.shape) for piece in pieces),
                    "bytes_before": source.data.nbytes,
                    "bytes_after": partial.stat().st_size,
                }
        except OSError as error:
            raise CheckpointError(f"could not write {out}: {error}") from error
    return dict(claim.facts)


class _Cut:
    """Which layers and experts of a file stay, checked against it."""

    def __init__(self, source: GgufSource, experts: Mapping[int, Sequence[int]], layers: Sequence[int] | None):
        self.source, self.experts = source, experts
        self.layers_before = trunk_layers(source)
        self.further = source.number("nextn_predict_layers") or 0
        self.layers = tuple(range(self.layers_before)) if layers is None else tuple(layers)
        self.count = source.number("expert_count") or 0
        self.of_layer = self._tensors_by_layer()
        self._check_layers()
        self.experts_after = self._check_experts()
        self.drops_further = bool(self.further) and (
            self.experts_after != self.count or len(self.layers) < self.layers_before
        )
        if self.drops_further:
            logger.warning(
                "the %d layers behind layer %d only predict further tokens (multi-token prediction): left out",
                self.further,
                self.layers_before - 1,
            )

    def _tensors_by_layer(self) -> dict[int, dict[str, StoredTensor]]:
        found: dict[int, dict[str, StoredTensor]] = {layer: {} for layer in range(self.layers_before + self.further)}
        for name, tensor in self.source.tensors.items():
            match = _LAYER.fullmatch(name)
            if match is None:
                continue
            if int(match[1]) not in found:
                raise CheckpointError(f"{self.source.path} has {len(found)} layers and a tensor {name!r}")
            found[int(match[1])][match[2]] = tensor
            if _OTHER_EXPERTS.fullmatch(match[2]) and not (_EXPERTS.fullmatch(match[2]) or _ROUTER.fullmatch(match[2])):
                raise UnsupportedModelError(
                    f"{self.source.path} stores experts as {name!r}, a layout that prunus does not cut; convert the "
                    "model again with a current llama.cpp, or prune its Hugging Face folder and export that"
                )
        return found

    def _check_layers(self) -> None:
        layers, architecture = self.layers, self.source.architecture
        if not layers or any(b <= a for a, b in pairwise(layers)) or layers[0] < 0 or layers[-1] >= self.layers_before:
            raise PlanError(
                f"layers to keep are {list(layers)}; they have to ascend within 0..{self.layers_before - 1}"
            )
        if len(layers) == self.layers_before:
            return
        reason = None
        if architecture not in _LAYERS_ALIKE:
            reason = "its graph tells the kinds of layers by their numbers, which would change"
        elif (self.source.number("interleave_moe_layer_step") or 1) > 1:
            reason = f"{architecture}.interleave_moe_layer_step says which layers have experts by their numbers"
        elif architecture == "olmo2" and f"{architecture}.attention.sliding_window" in self.source.fields:
            reason = "its sliding windows go by the numbers of layers"
        elif architecture == "deci" and not (self.source.numbers("attention.head_count", self._all) or [1])[layers[0]]:
            reason = f"layer {layers[0]} would be the first and has no attention"
        if reason is not None:
            raise UnsupportedModelError(
                f"whole layers cannot be removed from a GGUF file of architecture {architecture!r}: {reason}. Cut the "
                "Hugging Face folder, and export that"
            )

    @property
    def _all(self) -> int:
        return self.layers_before + self.further

    def _check_experts(self) -> int:
        """The number of experts per layer after the cut; 0 in a model without."""
        holders = [i for i in self.layers if any(_EXPERTS.fullmatch(name) for name in self.of_layer[i])]
        for layer in self.experts:
            if layer not in holders:
                raise PlanError(f"layer {layer}: experts are to stay, and the file has none there")
        for layer in holders:
            self._check_layer(layer)
        if not holders:
            return 0
        first, used = len(self.experts[holders[0]]), self._most_used()
        for layer in holders:
            if len(self.experts[layer]) != first:
                raise PlanError(
                    f"layer {holders[0]} keeps {first} experts and layer {layer} {len(self.experts[layer])}; a GGUF "
                    "file has one number for all layers: make the plan with `shape=uniform`"
                )
        if first < max(used, 2):
            raise PlanError(
                f"{first} experts per layer would stay, and a token is routed to {used}; keep at least {max(used, 2)}"
            )
        return first

    def _check_layer(self, layer: int) -> None:
        tensors = self.of_layer[layer]
        missing = [name for name in ("ffn_gate_inp.weight", "ffn_down_exps.weight") if name not in tensors]
        if not missing and not {"ffn_gate_up_exps.weight", "ffn_up_exps.weight"} & tensors.keys():
            missing = ["ffn_up_exps.weight"]
        if missing:
            raise CheckpointError(f"{self.source.path}: layer {layer} has experts but no blk.{layer}.{missing[0]}")
        for name, tensor in tensors.items():
            if not (_EXPERTS.fullmatch(name) or _ROUTER.fullmatch(name)):
                continue
            if tensor.shape[-1] != self.count:
                raise CheckpointError(
                    f"{self.source.path}: {tensor.name} has {tensor.shape[-1]} experts, and "
                    f"{self.source.architecture}.expert_count is {self.count}"
                )
            if tensor.data.nbytes % self.count:
                raise CheckpointError(f"{self.source.path}: {tensor.name} packs several experts into one block")
        kept = self.experts.get(layer)
        if kept is None:
            raise PlanError(f"layer {layer} of the file has {self.count} experts, and the plan names none that stay")
        if any(b <= a for a, b in pairwise(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < self.count):
            raise PlanError(
                f"layer {layer}: experts to keep have to ascend within 0..{self.count - 1}, and are {list(kept)[:20]}"
            )

    def _most_used(self) -> int:
        return max(self.source.numbers("expert_used_count", self._all) or [1])

    def _groups_after(self) -> int | None:
        """Groups of experts among which the router chooses first; None where there are none.

        Raises:
            PlanError: what stays of the groups is not equal: routers take them to be.
        """
        groups = self.source.number("expert_group_count") or 0
        if groups <= 1:
            return None
        if self.count % groups:
            raise CheckpointError(f"{self.source.path}: {self.count} experts cannot be {groups} equal groups")
        size, left = self.count // groups, set()
        for layer, kept in self.experts.items():
            numbers = [sum(expert // size == group for expert in kept) for group in range(groups)]
            left.add((len([n for n in numbers if n]), min(n for n in numbers if n), max(numbers)))
            number, fewest, most = next(iter(left))
            used = self.source.number("expert_group_used_count") or 1
            if len(left) > 1 or fewest != most or most < 2 or number <= used or used * most < self._most_used():
                raise PlanError(
                    f"layer {layer}: the router chooses {used} of {groups} groups of {size} experts first, and of "
                    f"these groups {numbers} experts would stay; keep whole groups, more than {used} of them and as "
                    "many in each layer"
                )
        return next(iter(left))[0] if left else groups

    def fields(self) -> list[bytes]:
        """The metadata of the smaller file, field by field."""
        source, architecture = self.source, self.source.architecture
        numbers: dict[str, int] = {}
        layers = list(self.layers)
        if self.further and not self.drops_further:
            layers += range(self.layers_before, self._all)
        if len(layers) != self._all:
            numbers["block_count"] = len(layers)
            if self.drops_further:
                numbers["nextn_predict_layers"] = 0
            if dense := source.number("leading_dense_block_count"):
                numbers["leading_dense_block_count"] = sum(layer < dense for layer in layers)
        smaller = self.experts_after != self.count
        if smaller and self.experts_after:
            numbers["expert_count"] = self.experts_after
            if (groups := self._groups_after()) is not None:
                numbers["expert_group_count"] = groups
        written = []
        for key, field in source.fields.items():
            name = key.removeprefix(f"{architecture}.") if key.startswith(f"{architecture}.") else None
            if key == _SIZE_LABEL and (numbers or len(layers) != self._all):
                continue
            if name in numbers:
                written.append(_with_number(source, key, numbers[name]))
            elif name is not None and len(layers) != self._all and self._is_per_layer(name, field):
                written.append(_with_entries(source, key, layers))
            else:
                written.append(source.raw(key))
        return written

    def _is_per_layer(self, name: str, field: Any) -> bool:
        return len(field.types) == 2 and len(field.data) == self._all and name not in _NOT_PER_LAYER

    def pieces(self) -> list[_Piece]:
        """The tensors of the smaller file, in the order of the large one."""
        new_index = {layer: number for number, layer in enumerate(self.layers)}
        if self.further and not self.drops_further:
            new_index |= {layer: layer for layer in range(self.layers_before, self._all)}
        pieces = []
        for name, tensor in self.source.tensors.items():
            match = _LAYER.fullmatch(name)
            if match is None:
                pieces.append(_Piece(name, tensor, None))
            elif int(match[1]) in new_index:
                layer, inside = int(match[1]), match[2]
                cut = (_EXPERTS.fullmatch(inside) or _ROUTER.fullmatch(inside)) and layer in self.experts
                pieces.append(_Piece(f"blk.{new_index[layer]}.{inside}", tensor, self.experts[layer] if cut else None))
        return pieces


def _with_number(source: GgufSource, key: str, value: int) -> bytes:
    part = source.fields[key].parts[-1]
    return source.raw(key)[: -part.nbytes] + np.asarray([value], dtype=part.dtype).tobytes()


def _with_entries(source: GgufSource, key: str, layers: Sequence[int]) -> bytes:
    """An array of one number per layer, with those of some layers."""
    field = source.fields[key]
    # parts: length and text of the key, `array`, type and number of the entries, then each entry
    head = b"".join(part.tobytes() for part in field.parts[:4])
    entries = b"".join(field.parts[field.data[layer]].tobytes() for layer in layers)
    return head + struct.pack("<Q", len(layers)) + entries


def _write(
    partial: Path, source: GgufSource, fields: Sequence[bytes], pieces: Sequence[_Piece], progress: bool
) -> None:
    header = bytearray(struct.pack("<4sIQQ", GGUF_MARK, source.version, len(pieces), len(fields)))
    header += b"".join(fields)
    offset = 0
    for piece in pieces:
        name = piece.name.encode()
        header += struct.pack("<Q", len(name)) + name
        header += struct.pack(f"<I{len(piece.shape)}QIQ", len(piece.shape), *piece.shape, piece.tensor.type, offset)
        offset += piece.size + -piece.size % source.alignment
    header += bytes(-len(header) % source.alignment)
    with partial.open("wb") as file:
        file.write(header)
        for piece in tracked(pieces, "copying tensors", total=len(pieces), unit="tensor", progress=progress):
            piece.write(file)
            file.write(bytes(-piece.size % source.alignment))
