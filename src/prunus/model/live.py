"""A model that a user gives in Python, made ready for everything in prunus that works on weights."""

from __future__ import annotations

from typing import Any

from prunus.errors import UnsupportedModelError
from prunus.model.kind import causal_language_model
from prunus.model.layers import layers_of

__all__ = ["live_model"]


def live_model(model: Any) -> Any:
    """The causal language model in what a user gives, with its weights in reach.

    Args:
        model: a causal language model in memory, or one that `open_model` opened; perhaps inside the wrappers of
            `torch.compile` or data parallelism.

    Raises:
        UnsupportedModelError: it is of another kind, see `causal_language_model`, or its weights are elsewhere:
            offloaded by accelerate, on several devices, or divided among processes.
    """
    model = causal_language_model(model)
    devices = {str(parameter.device) for parameter in model.parameters() if not parameter.is_meta}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the model is spread over {', '.join(sorted(devices))} (device_map). Load it on one device; if it does "
            "not fit, open its folder with prunus.open_model, which holds one layer at a time"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not layers_of(model).stored:
            raise UnsupportedModelError(
                f"{name} has no values in memory (device_map has offloaded it, or nothing was loaded). Load the model "
                "without device_map; if it does not fit, open its folder with prunus.open_model, which reads one layer "
                "at a time"
            )
        if hasattr(parameter, "device_mesh"):
            raise UnsupportedModelError(
                f"{name} is divided among processes (FSDP or tensor parallelism). Load the whole model in each: under "
                "torchrun each takes a share of the calibration sequences"
            )
    return model
