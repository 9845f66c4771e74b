"""Which models whose layers differ in width can be shared among processes layer by layer."""

from __future__ import annotations

from typing import Any

from prunus.errors import UnsupportedModelError

__all__ = ["check_divides"]


def check_divides(config: Any, processes: int) -> None:
    """Check that heads and channels of every layer divide among processes, as vLLM divides them.

    Key/value heads that are fewer than the processes are repeated, if the processes are a multiple of them.

    Args:
        config: with `layer_widths`.
        processes: of tensor parallelism.

    Raises:
        UnsupportedModelError: those of a layer do not; it is named.
    """
    for layer_idx, widths in enumerate(config.layer_widths):
        for field, number in widths.items():
            repeated = field == "num_key_value_heads" and number and processes % number == 0
            if number % processes and not repeated:
                raise UnsupportedModelError(
                    f"tensor_parallel_size is {processes}, and layer {layer_idx} has {field} {number}, which does not "
                    "divide among so many processes. Serve the model with 1, or write it with equal layers: "
                    "``prunus export --to dense``"
                )
