"""How much memory a job will need, from shapes alone, and which engine that means.

All in bytes. w is the size of a number of the dtype that is computed with, s of the file's and s' the smaller of both,
P the model's parameters, P_out those outside the decoder layers, P_l those of the largest layer and P_p those of its
largest projection; L layers of width H with Q query, K key/value and C channel columns (in layers with experts, those
of the experts that a token goes to), a vocabulary of V; N sequences of T tokens in batches of b.

    resident   process + P w + 4 (P − P_out)·[weight gradients] + L a·[backward pass] + a + head + products
    streamed   process + P_out s' + P_l w + P_p s·[s ≠ w] + 4 P_l·[weight gradients] + a + head + products
               + 2 b T H w with the layers' inputs on disk, (L + 2) N T H w with them in memory
    a          b T (w (12 H + 4 Q + 4 K + 6 C) + 24 H): what one layer keeps of one batch for its backward pass
    head       min(512, b T) V (2 w + 12): logits, their float32 copy, its softmax and its gradient
               + min(2²⁴, V H) w·[streamed, s < w]: the piece of the head that is converted
    products   P_p (w + 8)·[weight gradients]: the gradient of one projection and its float32 copies

Streamed, one layer is held, and its tensors are read and converted one by one; on CUDA the next is on its way, P_l s
more for each model that is no mixture of experts. A model that is cut shares P_out with the result, which has its own
only where it is saved in a dtype that does not hold the file's numbers; to cut a tensor takes P_p w, of experts
nothing: those that go are not read. Repair adds a second model (resident) or its layer (streamed), the normal equations
of the widest block and what solving them takes, the larger of 12 C² + 4 C H and 8 C² + 14 C H + 48 C min(H, 1024), of
experts those of all, twice for text of several sources, and, unless they wait on disk (streamed), N T w (2 H + Q) for
both models' residual streams and the inputs of o_proj. Each further cut that is repaired in the same go adds itself, N
T w (H + Q), and 4 C² + 4 C H, twice that for text of several sources.
Text that the model writes takes P w (streamed: its layer at work) + 64 (2 t L K w + 2 V w) + 24 V: keys and values of
64 documents of t = min(T, 384) + 64 tokens, and the chances of the next. A smaller model that is cut adds itself, at
most P w (streamed: its layer at work). Perplexity needs the hidden states of as many tokens as go through the layers at
once, with `a` for the tokens of its own batch.

What the process has already (interpreter, libraries) is measured when the estimate is made, and what libraries take at
their first use is added, with 600 bytes for every group of the table; on CUDA all of that is nothing. The rest is an
estimate: allocators keep some freed memory, so it is rounded up by a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from prunus.calibration.self_text import AT_ONCE, LONGEST_PROMPT, MOST_NEW
from prunus.errors import OptionError
from prunus.machine.byte_sizes import show_bytes
from prunus.machine.memory import available_bytes, resident_set
from prunus.model.compact import PIECE, kept
from prunus.model.geometry import Geometry
from prunus.model.layers import layers_of, outside_layers
from prunus.model.modules import submodule
from prunus.model.saved_dtype import saved_dtype
from prunus.sweep.blocks import TOKENS_AT_ONCE

__all__ = [
    "Estimate",
    "Workload",
    "activation_bytes",
    "available_memory",
    "bytes_of_a_cut",
    "check_limit",
    "choose_engine",
    "estimate",
    "expert_width",
    "free_memory",
]

#: allocators keep some of what was freed
SLACK = 1.1
#: on the CPU: what libraries load and set up for the first products and the first backward pass, and for the first
#: factorisation of a matrix
FIRST_USE, FIRST_SOLUTION = 32 * 2**20, 64 * 2**20
#: rows of a projection that are solved at a time, see `prunus.repair.least_squares`
SOLVED_AT_ONCE = 1024
#: a row of the table of groups, with the lists that a plan is chosen by
GROUP_BYTES = 600


@dataclass(frozen=True)
class Workload:
    """What will be done with a model.

    Attributes:
        needs: what is read of the statistics, see `Method.needs`; empty = no pass.
        sequences: calibration sequences.
        seq_len: tokens in each.
        batch_size: sequences per pass.
        repairs: whether weights are repaired.
        writes_text: whether the model writes text.
        cuts: whether a smaller model is made of it, which is in memory beside it.
        evaluation_tokens: tokens that perplexity is measured on; 0 = it is not.
        evaluation_window: of these, how many go through the model at a time; 0 = as many as of the calibration.
        inputs_on_disk: whether what enters the layers waits on disk in the streamed order.
        sources: of the calibration sequences.
    """

    needs: frozenset[str] = frozenset()
    sequences: int = 0
    seq_len: int = 0
    batch_size: int = 1
    repairs: bool = False
    writes_text: bool = False
    cuts: bool = False
    evaluation_tokens: int = 0
    evaluation_window: int = 0
    inputs_on_disk: bool = True
    sources: int = 1


@dataclass(frozen=True)
class Estimate:
    """Peak memory of a job under each engine, in bytes."""

    resident: int
    streamed: int

    def of(self, engine: Literal["resident", "streamed"]) -> int:
        """That of one engine."""
        return self.resident if engine == "resident" else self.streamed


def estimate(
    model: Any, dtype: torch.dtype, workload: Workload, device: torch.device, stored: torch.dtype | None = None
) -> Estimate:
    """Peak memory by the formulas above.

    Args:
        model: the causal language model, which may be on the meta device.
        dtype: dtype that it will be computed with.
        workload: what will be done with it.
        device: where it will run.
        stored: dtype of its file; None = `dtype`.
    """
    geometry = Geometry.of(model)
    w = dtype.itemsize
    stored = stored or dtype
    layers = submodule(model, geometry.family.layers)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    projections = [parameter.numel() for layer in layers for parameter in layer.parameters() if parameter.ndim >= 2]
    largest, widest = max(sizes), max(projections)
    outside = sum(tensor.numel() for tensor in outside_layers(model).values())
    hidden, channels = geometry.hidden_size, max(widths.intermediate_size for widths in geometry.widths)
    experts, width = max(widths.num_experts for widths in geometry.widths), expert_width(geometry)
    key_value = max(widths.num_key_value_heads for widths in geometry.widths) * geometry.head_dim
    query = key_value * geometry.num_key_value_groups

    gradients = bool(workload.needs & {"gradients", "squares"})
    backward = gradients or "gates" in workload.needs
    tokens = min(workload.batch_size, workload.sequences) * workload.seq_len
    each_token = activation_bytes(hidden, query, key_value, channels, w)
    each_token += w * geometry.experts_per_token * (6 * width + 2 * hidden)
    activations = tokens * each_token
    vocabulary = int(model.config.vocab_size)
    head = min(512, tokens) * vocabulary * (2 * w + 12) if backward else 0
    piece = min(PIECE, vocabulary * hidden) * w if stored.itemsize < w else 0
    products = widest * (w + 8) if gradients else 0
    whole = workload.sequences * workload.seq_len * hidden * w
    passes = activations + head + products
    outside = outside * min(stored.itemsize, w)
    converted = 0 if stored.itemsize == w else widest * stored.itemsize
    mixture = geometry.family.mixture is not None
    ahead = largest * stored.itemsize * (device.type == "cuda" and not mixture)
    weights = outside + largest * w + converted + ahead
    own = _outside_of_a_cut(model, dtype, stored)

    resident = geometry.total_parameters * w + 4 * sum(sizes) * gradients + len(sizes) * activations * backward + passes
    streamed = weights + 4 * largest * gradients + passes + piece * backward
    streamed += 2 * tokens * hidden * w if workload.inputs_on_disk else (len(sizes) + 2) * whole
    if workload.repairs:
        repair = activations + _solving(channels, hidden)
        repair += 4 * min(workload.sources, 2) * experts * width * (width + hidden)
        waiting = 2 * whole + whole * query // hidden
        resident = max(resident, 2 * geometry.total_parameters * w + repair + waiting)
        streamed = max(streamed, weights + largest * w + ahead + own + repair + waiting * (not workload.inputs_on_disk))
    if workload.writes_text:
        keys_and_values = (min(workload.seq_len, MOST_NEW) + LONGEST_PROMPT) * len(sizes) * 2 * key_value * w
        written = AT_ONCE * (keys_and_values + 2 * vocabulary * w) + 24 * vocabulary
        resident = max(resident, geometry.total_parameters * w + written)
        streamed = max(streamed, weights + written + piece)
    copies = 1 + workload.cuts
    resident = max(resident, copies * geometry.total_parameters * w)
    # Measured and saved one after the other, both models hold no layer at once: a tensor is there before it is cut.
    cut = weights + (own + (0 if mixture else widest * w)) * workload.cuts
    streamed = max(streamed, cut)
    evaluation = min(workload.evaluation_tokens, TOKENS_AT_ONCE) * hidden * w + 512 * vocabulary * (w + 8)
    evaluation += (workload.evaluation_window or tokens) * each_token
    if workload.evaluation_tokens:
        resident = max(resident, copies * geometry.total_parameters * w + evaluation)
        streamed = max(streamed, cut + evaluation + piece)
    process = 0
    if device.type == "cpu":
        groups = sum(widths[axis] for widths in geometry.widths for axis in geometry.axes)
        process = resident_set() + FIRST_USE + FIRST_SOLUTION * workload.repairs
        process += GROUP_BYTES * groups if workload.needs else 0
    return Estimate(process + int(resident * SLACK), process + int(streamed * SLACK))


def _outside_of_a_cut(model: Any, dtype: torch.dtype, stored: torch.dtype) -> int:
    """Bytes of embeddings, head and final norm that a model which is cut does not share with the dense one."""
    held, saved = stored if stored.itemsize < dtype.itemsize else dtype, saved_dtype(model)
    if torch.promote_types(held, saved) == saved:
        return 0
    return sum(tensor.numel() for tensor in outside_layers(model).values()) * min(saved.itemsize, dtype.itemsize)


def _solving(inputs: int, outputs: int) -> int:
    """The normal equations of a projection while they become float64, or what solving them takes then."""
    parts = min(outputs, SOLVED_AT_ONCE)
    return max(12 * inputs**2 + 4 * inputs * outputs, 8 * inputs**2 + 14 * inputs * outputs + 48 * inputs * parts)


def activation_bytes(hidden: int, query: int, key_value: int, channels: int, w: int) -> int:
    """What a layer keeps of one token for its backward pass: `a` of the formulas above, by b and T.

    Args:
        hidden: H.
        query: Q.
        key_value: K.
        channels: C.
        w: bytes of a number.
    """
    return w * (12 * hidden + 4 * query + 4 * key_value + 6 * channels) + 24 * hidden


def expert_width(geometry: Geometry) -> int:
    """Channels inside one expert: a third of its parameters, by the width of the residual stream."""
    return geometry.group_parameters.get("expert", 0) // (3 * geometry.hidden_size)


def bytes_of_a_cut(model: Any, parameters: int, tokens: int, sources: int = 1) -> int:
    """Memory that one more cut takes where several are repaired together, by the formulas above.

    Args:
        model: the dense model, in memory or opened.
        parameters: of the cut.
        tokens: that it is repaired on.
        sources: of these tokens.
    """
    geometry, layers = Geometry.of(model), layers_of(model)
    w = model.dtype.itemsize
    hidden, channels = geometry.hidden_size, max(widths.intermediate_size for widths in geometry.widths)
    query = max(widths.num_key_value_heads for widths in geometry.widths) * geometry.num_key_value_groups
    own = parameters * w
    if layers.stored:
        largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers.modules)
        own = largest * w + _outside_of_a_cut(model, model.dtype, kept(model.get_input_embeddings().weight).dtype)
    waiting = tokens * (hidden + query * geometry.head_dim) * w
    experts, width = max(widths.num_experts for widths in geometry.widths), expert_width(geometry)
    equations = channels * (channels + hidden) + experts * width * (width + hidden)
    return int((own + waiting + 4 * min(sources, 2) * equations) * SLACK)


def choose_engine(
    needed: Estimate, asked: Literal["auto", "resident", "streamed"], limit: int | None, free: int | None
) -> Literal["resident", "streamed"]:
    """The engine that is asked for, or the faster one that fits.

    Args:
        needed: peak memory under each.
        asked: what the user said.
        limit: memory that may be used, if the user said so.
        free: memory that there is, as far as it is known.

    Raises:
        OptionError: no engine, or not the one asked for, stays within `limit`.
    """
    bound = limit if limit is not None else free
    fitting: Literal["resident", "streamed"] = "resident" if bound is None or needed.resident <= bound else "streamed"
    engine = fitting if asked == "auto" else asked
    other = ""
    if engine == "resident" and needed.streamed < needed.resident:
        other = f"; `engine=streamed` needs {show_bytes(needed.streamed)}"
    less = f"{other}. A smaller `batch_size` or `seq_len`, or bfloat16, needs less"
    check_limit(needed.of(engine), limit, f"the {engine} engine needs", less)
    return engine


def check_limit(needed: int, limit: int | None, what: str, less: str) -> None:
    """Check an estimate against the memory that may be used.

    Args:
        needed: estimated bytes.
        limit: bytes that the user allows; None = as many as there are.
        what: needs them, with its verb.
        less: end of the message: what needs less.

    Raises:
        OptionError: the estimate is larger, with the smallest limit that would do.
    """
    if limit is not None and needed > limit:
        raise OptionError(
            f"`max_memory` is {show_bytes(limit)}, and {what} about {show_bytes(needed)} for this model and these "
            f"options: the smallest `max_memory` that would do is {show_bytes(needed)}{less}"
        )


def available_memory(device: torch.device) -> int | None:
    """Memory that a job on a device may take altogether, with what this process has; None if it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes() + resident_set()


def free_memory(device: torch.device, limit: int | None = None) -> int | None:
    """Memory on a device that this process may still take; None if it is not known.

    Args:
        device: where a job runs.
        limit: memory that the process may use altogether, if the user said so.
    """
    available = available_memory(device)
    taken = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_set()
    if available is not None and device.type != "cuda":
        available -= taken
    bounds = [bound for bound in (available, None if limit is None else limit - taken) if bound is not None]
    return max(0, min(bounds)) if bounds else None
