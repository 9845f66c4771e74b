"""Which of llama.cpp's architectures computes what a model computes, and what each asks of the layers.

llama.cpp has no architecture for pruned models, but two of its own read one width per layer: `deci` (Nemotron) and
`openelm`. A model of equal layers goes out as its family's stock architecture instead. Architectures are data: what
each can hold, as read from its graph in llama.cpp and checked by running it (`make deploy-check`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prunus.errors import UnsupportedModelError
from prunus.model.families import family_of
from prunus.model.geometry import Geometry, LayerWidths

__all__ = [
    "ARCHITECTURES",
    "CANDIDATES",
    "STOCK_CUTS",
    "ZERO_CHANNELS",
    "Architecture",
    "StockCuts",
    "candidates",
    "choose_architecture",
    "widths_to_write",
]

#: channels of zeros in place of an absent MLP: one block of Q8_0
ZERO_CHANNELS = 32


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's model graphs.

    Attributes:
        name: `general.architecture` of the file.
        per_layer: widths are arrays, one entry per layer.
        absent_attention: a layer may lack attention. Never the first one: its number of heads is read as the model's.
        interleaved: a head rotates the pairs (0, 1), (2, 3), … and not, as in transformers, (0, n/2), (1, n/2 + 1), …:
            rows of queries and keys are stored in another order.
        fused: queries, keys and values are one tensor.
        head_norms: queries and keys have norms per head.
        heads_span_hidden: heads times head_dim has to be the hidden size.
        untied: there may be an output head of its own.
        rope_factors: it divides rotary frequencies by a stored tensor, as Llama 3 needs.
        biases: kinds of projection that may have a bias.
    """

    name: str
    per_layer: bool = False
    absent_attention: bool = False
    interleaved: bool = False
    fused: bool = False
    head_norms: bool = False
    heads_span_hidden: bool = False
    untied: bool = True
    rope_factors: bool = False
    biases: frozenset[str] = frozenset()


_INPUT_BIASES = frozenset({"ATTN_Q", "ATTN_K", "ATTN_V"})
_ALL_BIASES = _INPUT_BIASES | {"ATTN_OUT", "FFN_GATE", "FFN_UP", "FFN_DOWN"}

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", interleaved=True, rope_factors=True, biases=_ALL_BIASES),
        Architecture("qwen2", heads_span_hidden=True, biases=_INPUT_BIASES),
        Architecture("qwen3", head_norms=True, biases=_INPUT_BIASES),
        Architecture(
            "deci", per_layer=True, absent_attention=True, interleaved=True, rope_factors=True, biases=_ALL_BIASES
        ),
        Architecture("openelm", per_layer=True, fused=True, head_norms=True, untied=False),
    )
}

#: family → architectures that have its arithmetic, the one to prefer first
CANDIDATES: dict[str, tuple[str, ...]] = {
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "qwen2": ("qwen2", "deci"),
    "qwen3": ("qwen3", "openelm"),
}


@dataclass(frozen=True)
class StockCuts:
    """After which cuts llama.cpp's own converter and graph still compute a model of a family that is not written here.

    Attributes:
        flags: of `prunus prune`.
        filled: what has to hold of a ragged model that is filled up to equal layers first.
        reason: what llama.cpp takes for granted.
    """

    flags: str
    filled: str
    reason: str


_SPANS = ("--shape uniform --set selection.axes=[mlp], or --shape depth", "if a layer keeps all its heads")
_WHOLE = ("--shape uniform or --shape depth", "if a layer keeps its attention")
_COUNTS = ("--shape uniform", "if no layer was removed")

#: Each of the cuts was converted and run. After others a file does not load (heads cut in granite, phi3) or gives other
#: numbers without a word (layers removed from smollm3, gemma3_text; gemma2 once a text is longer than its window).
STOCK_CUTS: dict[str, StockCuts] = {
    "granite": StockCuts(*_SPANS, "it takes the heads to span the hidden size"),
    "phi3": StockCuts(*_SPANS, "it takes the heads to span the hidden size"),
    "smollm3": StockCuts(*_COUNTS, "it takes every fourth layer of the file to have no positions"),
    "gemma2": StockCuts(*_COUNTS, "it takes every second layer of the file to have a sliding window"),
    "olmo2": StockCuts(*_WHOLE, "it takes every layer to have attention"),
    "gemma3_text": StockCuts(*_COUNTS, "it takes all but every sixth layer of the file to have a sliding window"),
}


def candidates(config: Any) -> tuple[str, ...]:
    """Names of the architectures that have a family's arithmetic.

    Raises:
        UnsupportedModelError: it is not known which have.
    """
    family = family_of(config)
    if family.model_type not in CANDIDATES:
        remedy = ""
        if family.model_type in STOCK_CUTS:
            stock = STOCK_CUTS[family.model_type]
            remedy = (
                f". llama.cpp's own convert_hf_to_gguf.py takes the folder of a model cut with {stock.flags}, or a "
                f"ragged one filled up by `prunus export --to dense` {stock.filled}: {stock.reason}"
            )
        raise UnsupportedModelError(
            f"{family.title} ({family.model_type!r}) cannot be written as GGUF: it is not checked which of llama.cpp's "
            f"architectures computes it with layers of different widths; checked are {', '.join(CANDIDATES)}{remedy}"
        )
    return CANDIDATES[family.model_type]


def choose_architecture(config: Any, geometry: Geometry, biases: frozenset[str], rope_factors: bool) -> Architecture:
    """The first of a family's architectures that can hold a model.

    Args:
        config: of the model, stock or prunus.
        geometry: of the model.
        biases: kinds of projection that have a bias, in the words of GGUF (`ATTN_Q`, …).
        rope_factors: whether the rotary frequencies need a stored tensor.

    Raises:
        UnsupportedModelError: none can; the message has the reason for each.
    """
    reasons = []
    for name in candidates(config):
        architecture = ARCHITECTURES[name]
        reason = next(_obstacles(architecture, config, geometry, biases, rope_factors), None)
        if reason is None:
            return architecture
        reasons.append(f"{name}: {reason}")
    raise UnsupportedModelError(
        f"llama.cpp has no architecture for this model. {'; '.join(reasons)}. A model of equal layers has more to "
        "choose from: prune with `prunus prune --shape uniform`, or fill the layers up (``prunus export --to dense``)"
    )


def widths_to_write(
    architecture: Architecture, widths: Sequence[LayerWidths], mlp_multiple: int = 1
) -> tuple[LayerWidths, ...]:
    """Widths of the layers in the file: the model's own, and zero groups where the architecture asks for a block.

    Args:
        architecture: from `choose_architecture`.
        widths: of the model.
        mlp_multiple: MLP widths are filled up to multiples of this.

    Returns:
        One entry per layer, none smaller than the model's.
    """
    written = []
    for layer_idx, layer in enumerate(widths):
        heads, channels = layer.num_key_value_heads, layer.intermediate_size
        if not heads and (layer_idx == 0 or not architecture.absent_attention):
            heads = 1
        # deci, too: it drops what attention added to the residual stream where a layer has no channels.
        channels = channels or ZERO_CHANNELS
        written.append(LayerWidths(heads, -(-channels // mlp_multiple) * mlp_multiple))
    return tuple(written)


def _obstacles(
    architecture: Architecture, config: Any, geometry: Geometry, biases: frozenset[str], rope_factors: bool
) -> Iterator[str]:
    """Why an architecture cannot hold a model, if it cannot."""
    widths = geometry.widths
    if not architecture.per_layer:
        other = next((i for i, layer in enumerate(widths) if layer != widths[0]), None)
        if other is not None:
            yield (
                f"it has one width for all layers, and layer {other} has {_in_words(widths[other])} where layer 0 has "
                f"{_in_words(widths[0])}"
            )
        if not widths[0].num_key_value_heads or not widths[0].intermediate_size:
            yield f"no layer may lack a block, and layer 0 has {_in_words(widths[0])}"
    heads = widths[0].num_key_value_heads * geometry.num_key_value_groups
    if architecture.heads_span_hidden and heads * geometry.head_dim != geometry.hidden_size:
        yield (
            f"it takes the {heads} heads of {geometry.head_dim} to span the hidden size, and that is "
            f"{geometry.hidden_size}"
        )
    if not architecture.untied and not config.tie_word_embeddings:
        yield "it has no output head of its own, and the model's is not tied to the embeddings"
    if rope_factors and not architecture.rope_factors:
        yield f"it has no tensor for the rotary frequencies of rope_type {config.rope_parameters['rope_type']!r}"
    if excess := sorted(biases - architecture.biases):
        yield f"it has no bias for {', '.join(excess)}, and the model has"


def _in_words(layer: LayerWidths) -> str:
    return f"{layer.num_key_value_heads} key/value heads and {layer.intermediate_size} channels"
