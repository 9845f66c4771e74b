"""Options of the commands without recipes that load a model: where and how it is held."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from prunus.cli.job_flags import NO_DEVICE, DeviceFlags

if TYPE_CHECKING:
    from prunus.sweep.engine import ModelOptions

__all__ = ["NO_DEVICE", "NO_KIND", "NO_PLACE", "DeviceFlags", "KindFlags", "PlaceFlags", "model_options"]


@dataclass(frozen=True)
class _Kind:
    """Where the model runs.

    Attributes:
        device: auto, cpu, cuda, cuda:1, mps; auto is the first of cuda, mps, cpu that there is.
        dtype: float32, bfloat16 or float16; auto is the checkpoint's own, or float32 where half precision is slow.
    """

    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class _Place:
    """Where the models run.

    Attributes:
        device: auto, cpu, cuda, cuda:1, mps; auto is the first of cuda, mps, cpu that there is.
        max_memory: memory that may be used, e.g. 8GB. Jobs estimated to exceed it are rejected, naming the smallest
            sufficient limit.
        dtype: float32, bfloat16 or float16; auto is each checkpoint's own, or float32 where half precision is slow.
    """

    device: str | None = None
    max_memory: str | None = None
    dtype: str | None = None


KindFlags = Annotated[_Kind, Parameter(name="*", group=Group("Model", sort_key=9))]
PlaceFlags = Annotated[_Place, Parameter(name="*", group=Group("Model", sort_key=9))]
NO_KIND, NO_PLACE = _Kind(), _Place()


def model_options(flags: object) -> ModelOptions:
    """Device, dtype and memory as the package takes them.

    Args:
        flags: a dataclass with some of its fields, or None in them.
    """
    from prunus.sweep.engine import ModelOptions

    known = {field.name for field in fields(ModelOptions)}
    given = {name: value for name, value in asdict(flags).items() if name in known and value is not None}  # type: ignore[call-overload]
    return ModelOptions(**given)
