"""A model as its GGUF file will describe it: architecture, widths, names; decided before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from prunus.errors import UnsupportedModelError
from prunus.export.gguf_rope import Rope, rope_of
from prunus.export.llama_cpp import Architecture, candidates, choose_architecture, widths_to_write
from prunus.model.geometry import Geometry
from prunus.model.widths import LayerWidths

__all__ = ["BLOCK", "GGUF_TYPES", "GgufModel", "GgufType", "entry_of", "gguf_model"]

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
#: values per block of q8_0
BLOCK = 32


@dataclass(frozen=True)
class GgufModel:
    """What is written to a file.

    Attributes:
        model: the model in memory.
        geometry: its shape.
        names: gguf's table of tensor names for its architecture.
        architecture: llama.cpp's, and how the family's arithmetic is said in it.
        rope: its rotary embedding.
        widths: of every layer in the file; where they are larger than the model's, zeros fill them.
        type: of the matrices.
    """

    model: Any
    geometry: Geometry
    names: Any
    architecture: Architecture
    rope: Rope
    widths: Sequence[LayerWidths]
    type: GgufType

    @property
    def bytes_per_weight(self) -> float:
        """Of a matrix."""
        return {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / BLOCK}[self.type]

    @property
    def heads(self) -> list[int]:
        """Query heads of every layer."""
        return [layer.num_key_value_heads * self.geometry.num_key_value_groups for layer in self.widths]

    @property
    def key_value_heads(self) -> list[int]:
        """Key/value heads of every layer."""
        return [layer.num_key_value_heads for layer in self.widths]

    @property
    def channels(self) -> list[int]:
        """MLP channels of every layer; of a mixture, what its config says of all layers."""
        if self.geometry.family.mixture:
            return [self.model.config.intermediate_size] * len(self.widths)
        return [layer.intermediate_size for layer in self.widths]


def gguf_model(gguf: Any, model: Any, type: GgufType, mlp_multiple: int) -> GgufModel:
    """Decide how a model is written.

    Args:
        gguf: the package.
        model: a model in memory.
        type: of the matrices.
        mlp_multiple: fill MLP widths up to multiples of this.

    Raises:
        UnsupportedModelError: llama.cpp has no architecture for it, or channels of experts are to be filled up.
    """
    config, geometry = model.config, Geometry.of(model)
    if geometry.family.mixture and mlp_multiple > 1:
        raise UnsupportedModelError(
            f"`mlp_multiple` is {mlp_multiple}, and experts cannot be filled up with channels of zeros; leave it at 1"
        )
    rope = rope_of(config, geometry.head_dim)

    def names_of(architecture: Architecture) -> Any:
        return gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.names], len(geometry.widths))

    names = names_of(candidates(config)[0])
    biases = frozenset(entry_of(names, name)[1] for name in model.state_dict() if name.endswith(".bias"))
    architecture = choose_architecture(config, geometry, biases, rope)
    if type == "q8_0":
        mlp_multiple = -(-mlp_multiple // BLOCK) * BLOCK
    widths = widths_to_write(architecture, geometry, mlp_multiple)
    return GgufModel(model, geometry, names_of(architecture), architecture, rope, widths, type)


def entry_of(names: Any, name: str) -> tuple[str, str]:
    """Name and kind in GGUF of a tensor of the state dict."""
    module, _, parameter = name.rpartition(".")
    found = names.get_type_and_name(module)
    if found is None:
        raise UnsupportedModelError(f"GGUF has no name for {name!r}")
    return f"{found[1]}.{parameter}", found[0].name
