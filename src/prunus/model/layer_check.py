"""Whether a decoder layer is what its family and config describe."""

from __future__ import annotations

from torch import nn

from prunus.errors import UnsupportedModelError
from prunus.model.dimensions import Dimensions
from prunus.model.families import Projection, Stack
from prunus.model.modules import submodule, tensor_of

__all__ = ["check_layer"]


def check_layer(dimensions: Dimensions, layer_idx: int, layer: nn.Module) -> None:
    """Check a decoder layer.

    Raises:
        UnsupportedModelError: it has a module that the family does not describe, or one is missing or of another type
            or shape.
    """
    blocks = dimensions.blocks(layer_idx)
    described = {projection.path for block in blocks for projection in block.projections}
    untouched = tuple(path for block in blocks for path in (*block.untouched, *block.norms))
    stacks = {stack.path for block in blocks for stack in block.stacks}
    for path, module in layer.named_modules():
        own = {f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
        if own - stacks and path not in described and path not in untouched:
            raise UnsupportedModelError(
                f"layer {layer_idx} holds {path!r} ({type(module).__name__}), which the family "
                f"{dimensions.family.model_type!r} does not describe; cutting around it could break the model. "
                "Merge adapters first, or describe the module, as docs/extending.md shows."
            )
    for block in blocks:
        if dimensions.widths[layer_idx][block.axis] == 0:
            continue
        for path in (*(projection.path for projection in block.projections), *block.norms):
            try:
                submodule(layer, path)
            except AttributeError:
                raise UnsupportedModelError(
                    f"layer {layer_idx} has no {path!r}, which the family {dimensions.family.model_type!r} describes"
                ) from None
        for projection in block.projections:
            _check_projection(dimensions, layer_idx, layer, projection)
        for stack in block.stacks:
            _check_stack(dimensions, layer_idx, layer, stack)


def _check_projection(dimensions: Dimensions, layer_idx: int, layer: nn.Module, projection: Projection) -> None:
    module = submodule(layer, projection.path)
    if type(module) is not nn.Linear:
        raise UnsupportedModelError(
            f"layer {layer_idx}: {projection.path} is a {type(module).__name__}, not a plain torch.nn.Linear. "
            "Quantised weights and adapters cannot be cut: load in bf16 or fp32, and merge adapters first."
        )
    rows = sum(dimensions.size(layer_idx, space) for space in projection.outputs)
    columns = dimensions.size(layer_idx, projection.inputs)
    if tuple(module.weight.shape) != (rows, columns):
        raise UnsupportedModelError(
            f"layer {layer_idx}: {projection.path}.weight has shape {tuple(module.weight.shape)}, "
            f"the config implies {(rows, columns)}"
        )


def _check_stack(dimensions: Dimensions, layer_idx: int, layer: nn.Module, stack: Stack) -> None:
    tensor = tensor_of(layer, stack)
    if tensor is None:
        raise UnsupportedModelError(
            f"layer {layer_idx} has no {stack.path!r}, which the family {dimensions.family.model_type!r} describes. "
            "Quantised weights cannot be cut: load in bf16 or fp32"
        )
    if (found := tensor.shape[stack.dim]) != (expected := dimensions.size(layer_idx, stack.space)):
        raise UnsupportedModelError(
            f"layer {layer_idx}: {stack.path} has shape {tuple(tensor.shape)}, {found} entries where the config "
            f"implies {expected}"
        )
