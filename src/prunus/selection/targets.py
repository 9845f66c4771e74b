"""What a ratio is a share of: parameters, or what a user wants less of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from prunus.errors import OptionError, PlanError
from prunus.files.json_file import Count, FileContent, check_content
from prunus.model.geometry import Geometry
from prunus.option_values import check_whole
from prunus.selection.costs import Costs, flop_costs, kv_cache_costs, parameter_costs
from prunus.selection.latency_profile import PHASES, LatencyProfile, Phase

__all__ = ["TARGETS", "TargetName", "TargetOptions"]

TargetName = Literal["params", "flops", "kv_cache", "latency"]
TARGETS: tuple[TargetName, ...] = get_args(TargetName)

#: more than any context; FLOPs of it still fit into 64 bits
MOST_TOKENS = 10**9

#: how a message calls the quantity before there is a model
_QUANTITIES: Mapping[TargetName, str] = {
    "params": "parameters",
    "flops": "FLOPs",
    "kv_cache": "KV-cache bytes",
    "latency": "time",
}


class _TargetContent(FileContent):
    target: TargetName = "params"
    context: Count = 2048
    phase: Phase = "decode"
    profile: dict[str, Any] | None = None


@dataclass(frozen=True)
class TargetOptions:
    """What the ratio is a share of.

    Attributes:
        name: params; flops, those of one token's forward pass, head included; kv_cache, bytes of keys and values;
            latency, time by the table in `profile`. Importance is divided by what a group takes of it, and groups that
            take nothing stay.
        context: tokens in the context, for flops and kv_cache.
        profile: measured times, for latency (on the command line the file that `prunus profile` wrote).
        phase: the time that counts for latency: prefill, of the prompt, or decode, of each token after it.
    """

    name: TargetName = "params"
    context: int = 2048
    profile: LatencyProfile | None = None
    phase: Phase = "decode"

    def __post_init__(self) -> None:
        if self.name not in TARGETS:
            raise OptionError(f"target {self.name!r} is unknown; choose one of {', '.join(TARGETS)}")
        if self.phase not in PHASES:
            raise OptionError(f"`phase` {self.phase!r} is unknown; choose one of {', '.join(PHASES)}")
        check_whole("context", self.context, largest=MOST_TOKENS)
        if self.name == "latency" and self.profile is None:
            raise OptionError(
                "`target` latency needs measured times: make them with `prunus profile MODEL --out profile.json`, and "
                "give profile.json as `profile`"
            )
        if self.name != "latency" and self.profile is not None:
            raise OptionError(f"a profile of measured times goes with target latency, not with target {self.name}")

    @property
    def quantity(self) -> str:
        """The name of the quantity, for messages that come before there is a model."""
        return _QUANTITIES[self.name]

    def costs(self, geometry: Geometry) -> Costs:
        """What the parts of a model take of the quantity.

        Raises:
            PlanError: the profile was made on a model of another shape.
        """
        if self.profile is not None:
            return self.profile.costs(geometry, self.phase)
        costs: Callable[[Geometry, int], Costs] = flop_costs if self.name == "flops" else kv_cache_costs
        return parameter_costs(geometry) if self.name == "params" else costs(geometry, self.context)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: those that the target reads."""
        values: dict[str, Any] = {"target": self.name}
        if self.name in ("flops", "kv_cache"):
            values["context"] = self.context
        if self.profile is not None:
            values |= {"phase": self.phase, "profile": self.profile.to_dict()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; other fields are not read.

        Raises:
            PlanError: fields are missing or malformed.
        """
        content = check_content(_TargetContent, values, "malformed target", PlanError)
        profile = None if content.profile is None else LatencyProfile.from_dict(content.profile, "malformed target")
        try:
            return cls(content.target, content.context, profile, content.phase)
        except OptionError as error:
            raise PlanError(f"malformed target: {error}") from error
