"""What a ratio is a share of: parameters, or what a user wants less of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from prunus.errors import OptionError, PlanError
from prunus.files.json_file import Count, FileContent, check_content
from prunus.model.geometry import Geometry
from prunus.option_values import check_whole
from prunus.selection.costs import BYTES_PER_NUMBER, Costs, expert_costs, flop_costs, kv_cache_costs, parameter_costs
from prunus.selection.latency_profile import PHASES, LatencyProfile, Phase
from prunus.selection.storage import DTYPE_BYTES, check_storage, storage_costs

__all__ = ["QUANTITIES", "TARGETS", "TargetName", "TargetOptions"]

TargetName = Literal["params", "flops", "kv_cache", "latency", "size", "memory", "experts"]
TARGETS: tuple[TargetName, ...] = get_args(TargetName)

#: more than any context; FLOPs of it still fit into 64 bits
MOST_TOKENS = 10**9

#: how a message calls the quantity before there is a model
QUANTITIES: Mapping[TargetName, str] = {
    "params": "parameters",
    "flops": "FLOPs",
    "kv_cache": "KV-cache bytes",
    "latency": "time",
    "size": "bytes of weights",
    "memory": "bytes of weights and KV cache",
    "experts": "experts",
}
#: what a target reads, beside its name
_READS: Mapping[TargetName, tuple[str, ...]] = {
    "params": (),
    "flops": ("context",),
    "kv_cache": ("context",),
    "latency": ("phase", "profile"),
    "size": ("storage",),
    "memory": ("storage", "context", "sequences"),
    "experts": (),
}


class _TargetContent(FileContent):
    target: TargetName = "params"
    context: Count = 2048
    phase: Phase = "decode"
    profile: dict[str, Any] | None = None
    storage: str = "bfloat16"
    sequences: Count = 1


@dataclass(frozen=True)
class TargetOptions:
    """What the ratio is a share of.

    Attributes:
        name: params; flops, those of one token's forward pass, head included; kv_cache, bytes of keys and values;
            latency, time by the table in `profile`; size, bytes of the weights in `storage`; memory, these and the
            KV cache; experts, their number in a mixture of experts. Importance is divided by what a group takes of it,
            and groups that take nothing stay.
        context: tokens in the context, for flops, kv_cache and memory.
        profile: measured times, for latency (on the command line the file that `prunus profile` wrote).
        phase: the time that counts for latency: prefill, of the prompt, or decode, of each token after it.
        storage: how weights are stored, for size and memory: float32, bfloat16, float16, or a type of llama.cpp's GGUF
            files such as Q8_0 or Q4_K_M, see `prunus.selection.storage`.
        sequences: how many contexts are in the KV cache, for memory.
    """

    name: TargetName = "params"
    context: int = 2048
    profile: LatencyProfile | None = None
    phase: Phase = "decode"
    storage: str = "bfloat16"
    sequences: int = 1

    def __post_init__(self) -> None:
        if self.name not in TARGETS:
            raise OptionError(f"target {self.name!r} is unknown; choose one of {', '.join(TARGETS)}")
        if self.phase not in PHASES:
            raise OptionError(f"`phase` {self.phase!r} is unknown; choose one of {', '.join(PHASES)}")
        check_whole("context", self.context, largest=MOST_TOKENS)
        check_whole("sequences", self.sequences)
        object.__setattr__(self, "storage", check_storage(self.storage))
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
        return QUANTITIES[self.name]

    def costs(self, geometry: Geometry) -> Costs:
        """What the parts of a model take of the quantity.

        Raises:
            PlanError: the profile was made on a model of another shape.
        """
        if self.profile is not None:
            return self.profile.costs(geometry, self.phase)
        made: Mapping[TargetName, Callable[[], Costs]] = {
            "params": lambda: parameter_costs(geometry),
            "flops": lambda: flop_costs(geometry, self.context),
            "kv_cache": lambda: kv_cache_costs(geometry, self.context),
            "size": lambda: storage_costs(geometry, self.storage),
            "memory": lambda: storage_costs(geometry, self.storage).and_also(
                # llama.cpp's is in F16 whatever the file; transformers' has the dtype of the weights.
                kv_cache_costs(geometry, self.context, self.sequences, DTYPE_BYTES.get(self.storage, BYTES_PER_NUMBER))
            ),
            "experts": lambda: expert_costs(geometry),
        }
        return made[self.name]()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: those that the target reads."""
        read = {name: getattr(self, name) for name in _READS[self.name]}
        if self.profile is not None:
            read["profile"] = self.profile.to_dict()
        return {"target": self.name, **read}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; other fields are not read.

        Raises:
            PlanError: fields are missing or malformed.
        """
        content = check_content(_TargetContent, values, "malformed target", PlanError)
        profile = None if content.profile is None else LatencyProfile.from_dict(content.profile, "malformed target")
        try:
            return cls(content.target, content.context, profile, content.phase, content.storage, content.sequences)
        except OptionError as error:
            raise PlanError(f"malformed target: {error}") from error
