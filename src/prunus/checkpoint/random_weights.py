"""Models of any shape with random weights, to measure what they cost."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["random_weights"]

#: so many numbers are drawn, and repeated in every matrix: drawing all of them would take longer than measuring
DRAWN = 2**18


def random_weights(model: Any, device: torch.device) -> Any:
    """Give an empty model weights whose products neither vanish nor overflow in any dtype.

    Args:
        model: from `empty_model`.
        device: where the weights go.

    Returns:
        The model, on the device.
    """
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        weight = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
        if weight.ndim >= 2:
            block = drawn[: weight.numel()].to(device, weight.dtype)
            whole = weight.numel() // len(block)
            weight.view(-1)[: whole * len(block)].view(whole, -1).copy_(block)
            weight.view(-1)[whole * len(block) :] = block[: weight.numel() % len(block)]
        weights[name] = weight
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            weights[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.to(device)
