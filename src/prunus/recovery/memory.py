"""How much memory training takes, from shapes alone.

In bytes, per process. w and w' are the sizes of a number of the passes and of the pruned model's weights, P and D the
parameters of the pruned and the dense model, A those that are trained (adapters, P, or P without embeddings), L layers,
b T tokens per pass of width H, a vocabulary of V:

    process + P w' + D w + 12 A + 4 A·[adapters] + P w·[weights, in bfloat16] + activations + head

    12 A          gradients and both moments of AdamW, in float32; adapters are weights beside the model's
    P w           weights cast for the passes, which are kept until the backward pass
    activations   b T times what each layer keeps of a token (`prunus.sweep.estimate`); with gradient checkpointing
                  what the widest keeps, and the inputs of all
    head          the logits of a piece of tokens, of both models, with their softmax and gradients; 4 V H where the
                  head is trained
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import empty_model, read_config
from prunus.machine.byte_sizes import parse_bytes
from prunus.machine.memory import resident_set
from prunus.model.geometry import Geometry
from prunus.model.modules import submodule
from prunus.recovery.job import RecoveryJob
from prunus.recovery.student import logits_at_once
from prunus.sweep.estimate import FIRST_USE, SLACK, activation_bytes, check_limit

__all__ = ["check_memory", "training_bytes"]

#: on the CPU: what peft, accelerate and Trainer take once they are imported
LIBRARIES = 160 * 2**20
#: bytes per logit of a piece: both models', in the passes' dtype and in float32, softmax and gradients
LOGIT_BYTES = 32


def check_memory(
    job: RecoveryJob, folder: Path, teacher: Path | None, device: torch.device, *, bfloat16: bool, tokens: int
) -> None:
    """Check the estimate against the memory that the job may use.

    Args:
        job: with the limit.
        folder: of the pruned model.
        teacher: of the dense model, if there is one.
        device: where it is trained.
        bfloat16: dtype of the passes; else float32.
        tokens: of one pass.

    Raises:
        OptionError: the estimate is larger than `max_memory`.
    """
    if job.run.max_memory is not None:
        needed = training_bytes(job, folder, teacher, device, bfloat16=bfloat16, tokens=tokens)
        less = ". A smaller `micro_batch` or `seq_len`, `gradient_checkpointing` or `train=lora` needs less"
        check_limit(needed, parse_bytes(job.run.max_memory), "training needs", less)


def training_bytes(
    job: RecoveryJob, folder: Path, teacher: Path | None, device: torch.device, *, bfloat16: bool, tokens: int
) -> int:
    """Peak memory of one process by the formula above; arguments as for `check_memory`."""
    options, w = job.recovery, 2 if bfloat16 else 4
    full, lora = options.train == "full", options.train == "lora"
    model = empty_model(read_config(folder), torch.float32)
    geometry = Geometry.of(model)
    trained = _adapter_parameters(model, geometry, options.lora_rank) if lora else geometry.total_parameters
    if options.train == "layers":
        embeddings = model.get_input_embeddings(), model.get_output_embeddings()
        trained -= sum(each.numel() for each in {part for module in embeddings for part in module.parameters()})
    needed = geometry.total_parameters * (w if lora else 4) + (16 if lora else 12) * trained
    needed += geometry.total_parameters * w * (bfloat16 and not lora)
    layers = len(geometry.widths)
    if teacher is not None:
        dense = Geometry.of(empty_model(read_config(teacher), torch.float32))
        needed += dense.total_parameters * w
    kept = [tokens * each for each in _each_token(geometry, w)]
    needed += max(kept) + layers * tokens * geometry.hidden_size * w if options.gradient_checkpointing else sum(kept)
    needed += min(logits_at_once(device), tokens * geometry.vocab_size) * LOGIT_BYTES
    needed += 4 * geometry.vocab_size * geometry.hidden_size * full
    process = resident_set() + FIRST_USE + LIBRARIES if device.type == "cpu" else 0
    return process + int(needed * SLACK)


def _each_token(geometry: Geometry, w: int) -> list[int]:
    """What each layer keeps of a token for its backward pass."""
    sizes = []
    for widths in geometry.widths:
        key_value = widths.num_key_value_heads * geometry.head_dim
        query = key_value * geometry.num_key_value_groups
        sizes.append(activation_bytes(geometry.hidden_size, query, key_value, widths.intermediate_size, w))
    return sizes


def _adapter_parameters(model: Any, geometry: Geometry, rank: int) -> int:
    """Parameters of adapters on every projection of the decoder layers."""
    names = tuple(projection.name for projection in geometry.family.projections)
    return sum(
        rank * sum(module.weight.shape)
        for name, module in submodule(model, geometry.family.layers).named_modules()
        if name.rpartition(".")[2] in names
    )
