"""Weights that are stored in blocks of small numbers which share a scale: MXFP4 (gpt-oss) and FP8 (Qwen3 and others).

Read, they are what they stand for, in the dtype that config.json names; one expert at a time is decoded, so that no
more than a layer is ever there. They are never encoded again: what is cut out of such a model is saved as the blocks
that it had (`prunus.checkpoint.stored_blocks`).

Sources: Open Compute Project 2023, "OCP Microscaling Formats (MX) Specification", version 1.0, sections 5.1 and 6.3,
for MXFP4; Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (arXiv 2209.05433), for E4M3; DeepSeek-AI 2024,
"DeepSeek-V3 Technical Report" (arXiv 2412.19437), section 3.3, for scales of blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.checkpoint.weights import StoredWeights
from prunus.errors import CheckpointError, UnsupportedModelError
from prunus.files.json_file import read_json
from prunus.files.tensor_file import NAMES, TensorLayout
from prunus.machine.placement import DTYPES
from prunus.model.families import FAMILIES

__all__ = ["BlockFormat", "DecodedWeights", "block_format", "format_in"]


class BlockFormat(ABC):
    """How a weight is stored as two tensors: small numbers, and the scales of their blocks.

    Attributes:
        title: the name people use.
        stacked: whether the two hold all experts of a layer, one after another along the first dimension.
        suffixes: what the names of the two add to that of the weight.
        dtypes: that each of the two may have, in the words of safetensors.
    """

    title: str
    stacked: bool
    suffixes: tuple[str, str]
    dtypes: tuple[tuple[str, ...], tuple[str, ...]]

    def parts(self, name: str) -> tuple[str, str]:
        """Names of the tensors that a weight is stored as."""
        return name + self.suffixes[0], name + self.suffixes[1]

    @abstractmethod
    def holds(self, name: str, dtype: str) -> bool:
        """Whether a stored tensor is the small numbers of a weight.

        Args:
            name: of the tensor.
            dtype: in the words of safetensors.
        """

    @abstractmethod
    def shape(self, values: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of a weight by that of its small numbers; None if they cannot have that shape."""

    @abstractmethod
    def scales_shape(self, values: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales by that of the small numbers."""

    @abstractmethod
    def decode(self, values: Tensor, scales: Tensor, out: Tensor) -> None:
        """Write what the tensors stand for to `out`; of stacked ones, of one expert."""


class Mxfp4(BlockFormat):
    """Rows of blocks of 32 numbers of 4 bits (E2M1), two in a byte, the first in its low half; a power of 2 for each.

    `blocks` is (experts, rows, blocks, 16), `scales` (experts, rows, blocks) with exponents that are 127 too large,
    both uint8; the weight is transposed: (experts, 32 · blocks, rows).
    """

    title, stacked, suffixes, dtypes = "MXFP4", True, ("_blocks", "_scales"), (("U8",), ("U8",))
    #: of 4 bits: sign, two of exponent, one of fraction
    NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    BYTES, BIAS = 16, 127

    def holds(self, name: str, dtype: str) -> bool:
        """By their names."""
        return name.endswith(self.suffixes[0])

    def shape(self, values: tuple[int, ...]) -> tuple[int, ...] | None:
        """All blocks of a row beside one another, transposed."""
        if len(values) != 4 or values[3] != self.BYTES:
            return None
        return values[0], values[2] * 2 * self.BYTES, values[1]

    def scales_shape(self, values: tuple[int, ...]) -> tuple[int, ...]:
        """One for each block."""
        return values[:3]

    def decode(self, values: Tensor, scales: Tensor, out: Tensor) -> None:
        """Look each byte's two numbers up, and scale them; exact in every dtype with as large an exponent."""
        # In that of the result, which is the time of memory: half of that in float32. float16 has too few powers of 2.
        dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
        numbers = torch.tensor([*self.NUMBERS, *(-number for number in self.NUMBERS)], dtype=dtype)
        pairs = torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], dim=1)
        decoded = pairs.index_select(0, values.flatten().int()).view(*scales.shape, 2 * self.BYTES)
        powers = torch.ldexp(torch.ones(scales.shape), scales.int() - self.BIAS)
        decoded *= powers.to(dtype)[..., None]
        out.copy_(decoded.flatten(1).T)


class Fp8Blocks(BlockFormat):
    """Numbers of 8 bits (E4M3), with a scale for each block of so many rows and columns, by which they are multiplied.

    Args:
        block: rows and columns of a block; those at the edge may be smaller.
    """

    title, stacked, suffixes, dtypes = "FP8", False, ("", "_scale_inv"), (("F8_E4M3",), ("BF16", "F16", "F32"))

    def __init__(self, block: tuple[int, int]):
        self._block = block

    def holds(self, name: str, dtype: str) -> bool:
        """By their dtype."""
        return dtype in self.dtypes[0] and name.endswith(".weight")

    def shape(self, values: tuple[int, ...]) -> tuple[int, ...] | None:
        """As it is stored."""
        return values if len(values) == 2 else None

    def scales_shape(self, values: tuple[int, ...]) -> tuple[int, ...]:
        """One for each block, also for those at the edge."""
        return tuple(-(-size // block) for size, block in zip(values, self._block, strict=True))

    def decode(self, values: Tensor, scales: Tensor, out: Tensor) -> None:
        """Multiply in float32, as transformers does."""
        rows, columns = self._block
        repeated = scales.float().repeat_interleave(rows, dim=0)[: len(values)]
        factors = repeated.repeat_interleave(columns, dim=1)[:, : values.shape[1]]
        out.copy_(values.float() * factors)


def block_format(values: Mapping[str, Any]) -> BlockFormat | None:
    """The format that the weights of a mixture of experts are stored in; None if it is none that can be cut.

    Args:
        values: the content of config.json.
    """
    stored = values.get("quantization_config")
    family = FAMILIES.get(str(values.get("model_type")))
    if not isinstance(stored, dict) or family is None or family.mixture is None:
        return None
    method, block = stored.get("quant_method"), stored.get("weight_block_size")
    if method == "mxfp4" and family.model_type == "gpt_oss":
        return Mxfp4()
    sizes = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if method == "fp8" and sizes and stored.get("fmt") in (None, "e4m3") and stored.get("scale_fmt") is None:
        assert isinstance(block, list)
        return Fp8Blocks((block[0], block[1]))
    return None


def format_in(folder: Path) -> BlockFormat | None:
    """The format that the weights of a model folder are stored in; None if it is none that can be cut."""
    return block_format(read_json(folder / "config.json"))


class DecodedWeights(StoredWeights):
    """The weights of a folder as they are when they are decoded, by the names they would have if they were stored so.

    Args:
        folder: of the model.
        values: the content of its config.json, of a model that `block_format` knows.

    Attributes:
        form: what they are stored in.
        stored_config: the field `quantization_config`.
        held_in: dtype that they are decoded to, which config.json names.

    Raises:
        CheckpointError: as of `StoredWeights`, or blocks lack their scales, or have those of another shape.
        UnsupportedModelError: a tensor outside the decoder layers is stored in blocks.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any]):
        super().__init__(folder)
        form = block_format(values)
        assert form is not None
        self.form, self.stored_config = form, dict(values["quantization_config"])
        named = values.get("dtype") or values.get("torch_dtype")
        self.held_in = DTYPES.get(str(named), torch.bfloat16)
        self._parts: dict[str, tuple[str, str]] = {}
        raw, layers = list(self), FAMILIES[values["model_type"]].layers
        for name in raw:
            if form.holds(name, super().stored_dtype(name)):
                weight = name.removesuffix(form.suffixes[0]) if form.suffixes[0] else name
                if not weight.startswith(f"{layers}."):
                    raise UnsupportedModelError(
                        f"{super().path(name)}: {weight!r} is stored in {form.title}, and prunus reads that only "
                        "inside of decoder layers; use the bf16 checkpoint"
                    )
                self._parts[weight] = form.parts(weight)
                self._check(weight)
        if not self._parts:
            raise CheckpointError(
                f"{folder / 'config.json'} says that weights are stored in {form.title}, and none is; remove "
                "quantization_config, or fetch the model again"
            )
        weight_of = {parts[0]: weight for weight, parts in self._parts.items()}
        scales = {parts[1] for parts in self._parts.values()}
        if alone := sorted(name for name in raw if name.endswith(form.suffixes[1]) and name not in scales):
            raise CheckpointError(
                f"{super().path(alone[0])}: {alone[0]!r} holds scales of blocks that are not there; fetch the model "
                "again"
            )
        self._names = dict.fromkeys(weight_of.get(name, name) for name in raw if name not in scales)

    def _check(self, weight: str) -> None:
        """Raise unless a weight's blocks and scales belong together."""
        values, scales = self._parts[weight]
        if scales not in self._places:
            raise CheckpointError(
                f"{self.folder} holds {values!r} in {self.form.title} and lacks its scales, {scales!r}; fetch the "
                "model again"
            )
        shape = super().shape(values)
        if self.form.shape(shape) is None:
            raise CheckpointError(
                f"{super().path(values)}: {values!r} has shape {shape}, which blocks of {self.form.title} do not have; "
                "fetch the model again"
            )
        if (found := super().shape(scales)) != (expected := self.form.scales_shape(shape)):
            raise CheckpointError(
                f"{super().path(scales)}: {scales!r} has shape {found}, and blocks of shape {shape} have scales of "
                f"shape {expected}; fetch the model again, or correct quantization_config in config.json"
            )
        dtypes = super().stored_dtype(values), super().stored_dtype(scales)
        if not all(dtype in known for dtype, known in zip(dtypes, self.form.dtypes, strict=True)):
            raise UnsupportedModelError(
                f"{super().path(values)}: {weight!r} is stored as {dtypes[0]} with scales in {dtypes[1]}, which prunus "
                "does not read; use the bf16 checkpoint"
            )

    def raw(self, name: str) -> tuple[str, ...]:
        """Names of the tensors in the files that a tensor is stored as."""
        return self._parts.get(name, (name,))

    def renamed(self, name: str, new: str) -> tuple[str, ...]:
        """What the tensors that a tensor is stored as are called if it has another name."""
        return self.form.parts(new) if name in self._parts else (new,)

    def sliceable(self, name: str, dim: int) -> bool:
        """Whether entries along a dimension of a tensor can be taken out of what it is stored as."""
        return name not in self._parts or (self.form.stacked and dim == 0)

    def raw_layout(self, name: str) -> TensorLayout:
        """Dtype and shape of a tensor of the files."""
        return super().layout(name)

    def read_raw(self, name: str, entries: list[int] | None = None) -> Tensor:
        """A tensor of the files as it is stored, or some entries along its first dimension.

        Args:
            name: in the files.
            entries: which ones; None = all.
        """
        layout = super().layout(name)
        if entries is None:
            out = torch.empty(layout.shape, dtype=layout.dtype)
            super().read_into(name, out)
            return out
        out = torch.empty((len(entries), *layout.shape[1:]), dtype=layout.dtype)
        for number, entry in enumerate(entries):
            super().read_into(name, out[number], entry)
        return out

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return super().path(self.raw(name)[0])

    def stored_dtype(self, name: str) -> str:
        """Dtype of a tensor in the words of safetensors, when it is decoded."""
        return NAMES[self.held_in] if name in self._parts else super().stored_dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor when it is decoded."""
        shape = super().shape(self.raw(name)[0])
        if name not in self._parts:
            return shape
        decoded = self.form.shape(shape)
        assert decoded is not None
        return decoded

    def layout(self, name: str) -> TensorLayout:
        """Dtype and shape of a tensor when it is decoded."""
        return TensorLayout(self.held_in, self.shape(name)) if name in self._parts else super().layout(name)

    def will_need(self, name: str, entries: Sequence[int] | None = None) -> None:
        """Tell the system that what a tensor is stored as will be read soon."""
        for part in self.raw(name):
            super().will_need(part, entries if self.sliceable(name, 0) else None)

    def read_into(self, name: str, out: Tensor, entry: int | None = None) -> None:
        """Read and decode one tensor, or one entry along its first dimension, to where it is wanted."""
        if name not in self._parts:
            super().read_into(name, out, entry)
            return
        if not self.form.stacked:
            values, scales = (self.read_raw(part) for part in self._parts[name])
            whole = out if entry is None else torch.empty(self.shape(name), dtype=out.dtype)
            self.form.decode(values, scales, whole)
            if entry is not None:
                out.copy_(whole[entry])
            return
        for number, place in [(entry, out)] if entry is not None else enumerate(out):
            values, scales = (self.read_raw(part, [number])[0] for part in self._parts[name])
            self.form.decode(values, scales, place)
