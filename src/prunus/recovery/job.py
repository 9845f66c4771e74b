"""A recovery job: a pruned model, a text, how it is trained and where; everything that `prunus recover` is told.

As a YAML file, see `prunus.settings`:

    model: small
    teacher: smollm2-135m
    text:
      source: my-text.jsonl
    recovery:
      max_minutes: 20
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prunus.calibration.sources import SOURCES
from prunus.machine.byte_sizes import parse_bytes
from prunus.recovery.options import RecoveryOptions, TextOptions
from prunus.settings import Sheet

__all__ = ["RECOVERY", "PlaceOptions", "RecoveryJob", "WorkOptions"]


@dataclass(frozen=True)
class PlaceOptions:
    """Where the model is trained.

    Attributes:
        device: auto, cpu, cuda or mps.
        max_memory: memory that each process may use, e.g. 8GB: RAM, or the GPU's if the device is one. Jobs estimated
            to exceed it are rejected, naming the smallest sufficient limit.
    """

    device: str = "auto"
    max_memory: str | None = None

    def __post_init__(self) -> None:
        if self.max_memory is not None:
            parse_bytes(self.max_memory)


@dataclass(frozen=True)
class WorkOptions:
    """What is kept while the model is trained.

    Attributes:
        work: folder for checkpoints; by default OUT.work. Removed at the end.
    """

    work: str | None = None


@dataclass(frozen=True)
class RecoveryJob:
    """Everything that decides what a pruned model learns.

    Attributes:
        model: folder of a pruned model; any model of a described family will do.
        teacher: the dense model, folder or Hub id; by default the one that the folder names, if it can be found.
        text: what it is trained on.
        recovery: how.
        run: where.
        output: what is kept meanwhile.
        made_by: of a job that was done: versions, and the digest of the sequences.
    """

    model: str
    teacher: str | None = None
    text: TextOptions = field(default_factory=lambda: TextOptions(()))
    recovery: RecoveryOptions = field(default_factory=RecoveryOptions)
    run: PlaceOptions = field(default_factory=PlaceOptions)
    output: WorkOptions = field(default_factory=WorkOptions)
    made_by: Mapping[str, str] = field(default_factory=dict)


#: the settings of `prunus recover`
RECOVERY = Sheet(
    RecoveryJob(""),
    command="prunus recover",
    listing="prunus recipe --command recover",
    example="recovery.lora_rank=16",
    forms={"text.source": SOURCES},
)
