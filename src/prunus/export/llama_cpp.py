"""Which of llama.cpp's architectures computes what a model computes, and what each asks of the layers.

llama.cpp has no architecture for pruned models, but two of its own read one width per layer: `deci` (Nemotron) and
`openelm`. A model of equal layers goes out as its family's stock architecture instead, and so does a ragged one of a
family whose arithmetic neither of the two has: its layers are filled up with zeros to the widest. Architectures are
data: what each can hold, as read from its graph in llama.cpp and checked by running it (`make deploy-check`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prunus.errors import OptionError, UnsupportedModelError
from prunus.export.fill import largest_widths
from prunus.export.gguf_rope import Rope
from prunus.model.families import AXES, family_of
from prunus.model.geometry import Geometry
from prunus.model.widths import LayerWidths
from prunus.selection.constraints import Constraints

__all__ = [
    "ARCHITECTURES",
    "CANDIDATES",
    "GGUF_NAMES",
    "UNWRITTEN",
    "ZERO_CHANNELS",
    "Architecture",
    "LayerKinds",
    "as_files_hold_it",
    "candidates",
    "choose_architecture",
    "expert_channels",
    "widths_to_write",
]

logger = logging.getLogger(__name__)

#: channels of zeros in place of an absent MLP: one block of Q8_0
ZERO_CHANNELS = 32


@dataclass(frozen=True)
class LayerKinds:
    """Layers of two kinds, told apart by their numbers.

    Attributes:
        what: that a layer of the kind has, in words.
        config: field of the model's config with one entry per layer.
        entry: its entry for a layer of the kind.
        period: in llama.cpp every layer of the file is of the kind but each `period`-th.
        key: field of the file that says it for every layer instead; None where there is none.
    """

    what: str
    config: str
    entry: str | int
    period: int
    key: str | None = None

    def of_model(self, config: Any) -> list[bool]:
        """For every layer, whether it is of the kind."""
        return [entry == self.entry for entry in getattr(config, self.config)]

    def of_llama_cpp(self, layers: int) -> list[bool]:
        """What llama.cpp takes the layers of a file to be."""
        return [number % self.period != 0 for number in range(1, layers + 1)]


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's model graphs.

    Attributes:
        name: `general.architecture` of the file.
        names: gguf's `MODEL_ARCH` that has the names of its tensors. That of Qwen3 has every kind that Llamas have.
        per_layer: widths are arrays, one entry per layer.
        absent_attention: a layer may lack attention. Never the first one: its number of heads is read as the model's.
        interleaved: a head rotates the pairs (0, 1), (2, 3), … and not (0, n/2), (1, n/2 + 1), …: where the family does
            the latter, as most do in transformers, rows of queries and keys are stored in another order.
        fused: queries, keys and values are one tensor, and three in the model.
        heads_span_hidden: heads times head_dim has to be the hidden size.
        equal_heads: there have to be as many key/value heads as query heads.
        untied: there may be an output head of its own.
        own_head: there has to be one.
        rope_factors: it divides rotary frequencies by a stored tensor, as Llama 3 needs.
        long_factors: it divides them by one of two tensors, by the length of the context.
        partial_rotary: a part of each head may go without rotation.
        windows: layers may look back a number of tokens only.
        window_layers: they do so in files of so many layers, and in no others; None where a field of the file says it.
        window_base: layers with a window may have a base of rotary frequencies of their own.
        position_scale: queries may be scaled by their position.
        kinds: what it derives from the numbers of layers.
        activation: built into its MLPs.
        fields: its own number fields → fields of the model's config that they are.
        scale_by_head: it divides scores by the root of head_dim, but in a model of so many layers by that of the hidden
            size per head; None where it reads the divisor, or has no other.
        biases: kinds of projection that may have a bias.
        renormalises: it divides the weights of a token's experts by their sum, or never does; None where it reads that,
            or has no experts.
    """

    name: str
    names: str = "QWEN3"
    per_layer: bool = False
    absent_attention: bool = False
    interleaved: bool = False
    fused: bool = False
    heads_span_hidden: bool = False
    equal_heads: bool = False
    untied: bool = True
    own_head: bool = False
    rope_factors: bool = False
    long_factors: bool = False
    partial_rotary: bool = False
    windows: bool = False
    window_layers: int | None = None
    window_base: bool = False
    position_scale: bool = False
    kinds: LayerKinds | None = None
    activation: str = "silu"
    fields: Mapping[str, str] = field(default_factory=dict)
    scale_by_head: int | None = None
    biases: frozenset[str] = frozenset()
    renormalises: bool | None = None

    def has_windows(self, config: Any) -> bool:
        """Whether the layers of a model, or some of them, look back a number of tokens only."""
        return self.windows and config.sliding_window is not None


_INPUT_BIASES = frozenset({"ATTN_Q", "ATTN_K", "ATTN_V"})
_ALL_BIASES = _INPUT_BIASES | {"ATTN_OUT", "FFN_GATE", "FFN_UP", "FFN_DOWN"}
_SCALES = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}
#: which layers have experts
DENSE_FIRST, EXPERT_STEP = "leading_dense_block_count", "interleave_moe_layer_step"
_GLM_MOE = {
    DENSE_FIRST: "first_k_dense_replace",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
}
_ERNIE_MOE = {DENSE_FIRST: "moe_layer_start_index", EXPERT_STEP: "moe_layer_interval"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_GEMMA_3 = {**_WINDOW, "final_logit_softcapping": "final_logit_softcapping"}
_GEMMA_2 = {**_GEMMA_3, "attn_logit_softcapping": "attn_logit_softcapping"}


def _window_but_each(period: int) -> LayerKinds:
    key = "attention.sliding_window_pattern"
    return LayerKinds("a sliding window", "layer_types", "sliding_attention", period, key)


_POSITIONS_BUT_EACH_4TH = LayerKinds("rotary positions", "no_rope_layers", 1, 4)

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", interleaved=True, rope_factors=True, biases=_ALL_BIASES),
        Architecture("qwen2", heads_span_hidden=True, biases=_INPUT_BIASES),
        Architecture("qwen3", biases=_INPUT_BIASES),
        Architecture("granite", "GRANITE", interleaved=True, rope_factors=True, fields=_SCALES, biases=_ALL_BIASES),
        Architecture("smollm3", "SMOLLM3", interleaved=True, kinds=_POSITIONS_BUT_EACH_4TH, biases=_INPUT_BIASES),
        Architecture("olmo2", "OLMO2", heads_span_hidden=True, own_head=True, biases=_INPUT_BIASES),
        Architecture("mistral3", interleaved=True, rope_factors=True, position_scale=True),
        Architecture(
            "exaone4",
            "EXAONE4",
            heads_span_hidden=True,
            rope_factors=True,
            windows=True,
            window_layers=64,
            kinds=_window_but_each(4),
            fields=_WINDOW,
        ),
        Architecture("seed_oss", "SEED_OSS", biases=_INPUT_BIASES),
        Architecture("ernie4_5", interleaved=True, biases=_INPUT_BIASES),
        Architecture(
            "chatglm",
            "CHATGLM",
            interleaved=True,
            heads_span_hidden=True,
            partial_rotary=True,
            biases=_INPUT_BIASES,
        ),
        Architecture("glm4", "GLM4", interleaved=True, partial_rotary=True, biases=_INPUT_BIASES),
        Architecture("hunyuan-dense", "HUNYUAN_DENSE", biases=_INPUT_BIASES),
        Architecture("phi3", "PHI3", heads_span_hidden=True, long_factors=True, partial_rotary=True),
        Architecture("gemma", untied=False, activation="gelu_pytorch_tanh", biases=_INPUT_BIASES),
        Architecture(
            "gemma2",
            "GEMMA2",
            untied=False,
            windows=True,
            kinds=_window_but_each(2),
            activation="gelu_pytorch_tanh",
            fields=_GEMMA_2,
            scale_by_head=46,
            biases=_INPUT_BIASES,
        ),
        Architecture(
            "gemma3",
            "GEMMA3",
            windows=True,
            window_base=True,
            kinds=_window_but_each(6),
            activation="gelu_pytorch_tanh",
            fields=_GEMMA_3,
            scale_by_head=62,
            biases=_INPUT_BIASES,
        ),
        Architecture(
            "deci", per_layer=True, absent_attention=True, interleaved=True, rope_factors=True, biases=_ALL_BIASES
        ),
        Architecture("openelm", per_layer=True, fused=True, untied=False),
        Architecture("qwen3moe", "QWEN3MOE", biases=_INPUT_BIASES, renormalises=True),
        Architecture(
            "qwen2moe", "QWEN2MOE", heads_span_hidden=True, own_head=True, biases=_INPUT_BIASES, renormalises=False
        ),
        Architecture(
            "olmoe",
            "OLMOE",
            heads_span_hidden=True,
            equal_heads=True,
            own_head=True,
            biases=_INPUT_BIASES,
            renormalises=False,
        ),
        Architecture(
            "granitemoe",
            "GRANITE_MOE",
            interleaved=True,
            rope_factors=True,
            fields=_SCALES,
            biases=_INPUT_BIASES | {"ATTN_OUT"},
            renormalises=True,
        ),
        Architecture("glm4moe", "GLM4_MOE", partial_rotary=True, fields=_GLM_MOE, biases=_INPUT_BIASES),
        Architecture(
            "ernie4_5-moe",
            "ERNIE4_5_MOE",
            interleaved=True,
            fields=_ERNIE_MOE,
            biases=_INPUT_BIASES,
            renormalises=True,
        ),
    )
}
#: the architecture of OLMo 2, where a file says that there are windows
ARCHITECTURES["olmo3"] = replace(ARCHITECTURES["olmo2"], windows=True, kinds=_window_but_each(4), fields=_WINDOW)
#: the architecture of Llamas, where a file says that there are experts
ARCHITECTURES["mixtral"] = replace(ARCHITECTURES["llama"], names="LLAMA", renormalises=True)

#: family → keys of architectures that have its arithmetic, the one to prefer first
CANDIDATES: dict[str, tuple[str, ...]] = {
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "ministral3": ("mistral3",),
    "qwen2": ("qwen2", "deci"),
    "qwen3": ("qwen3", "openelm"),
    "granite": ("granite",),
    "smollm3": ("smollm3",),
    "olmo2": ("olmo2",),
    "olmo3": ("olmo3",),
    "exaone4": ("exaone4",),
    "phi3": ("phi3",),
    "glm": ("chatglm",),
    "glm4": ("glm4",),
    "seed_oss": ("seed_oss", "deci"),
    "ernie4_5": ("ernie4_5", "deci"),
    "hunyuan_v1_dense": ("hunyuan-dense",),
    "gemma": ("gemma",),
    "gemma2": ("gemma2",),
    "gemma3_text": ("gemma3",),
    "qwen3_moe": ("qwen3moe",),
    "olmoe": ("olmoe",),
    "mixtral": ("mixtral",),
    "qwen2_moe": ("qwen2moe",),
    "granitemoe": ("granitemoe",),
    "glm4_moe": ("glm4moe",),
    "ernie4_5_moe": ("ernie4_5-moe",),
}

#: family that is not written → why
UNWRITTEN: dict[str, str] = {
    "gpt_oss": "experts of its GGUF files are in MXFP4, and prunus cuts such files (`prunus apply`) and makes none",
}

#: family → architectures that a GGUF file of one of its models can have, whoever wrote it
GGUF_NAMES: dict[str, tuple[str, ...]] = {
    **{family: tuple(ARCHITECTURES[key].name for key in keys) for family, keys in CANDIDATES.items()},
    "gpt_oss": ("gpt-oss",),
}


def expert_channels(config: Any) -> int:
    """Channels of one routed expert of a mixture, as its config says."""
    return int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)


def candidates(config: Any) -> tuple[Architecture, ...]:
    """The architectures that have a family's arithmetic, the one to prefer first.

    Raises:
        UnsupportedModelError: it is not known which have.
    """
    family = family_of(config)
    if family.model_type in UNWRITTEN:
        raise UnsupportedModelError(
            f"{family.title} ({family.model_type!r}) cannot be written as GGUF: {UNWRITTEN[family.model_type]}"
        )
    if family.model_type not in CANDIDATES:
        raise UnsupportedModelError(
            f"{family.title} ({family.model_type!r}) cannot be written as GGUF: it is not checked which of llama.cpp's "
            f"architectures computes it; checked are {', '.join(CANDIDATES)}. llama.cpp's own convert_hf_to_gguf.py "
            "may take its folder where all layers are equal (`shape=uniform`)"
        )
    return tuple(ARCHITECTURES[name] for name in CANDIDATES[family.model_type])


def choose_architecture(config: Any, geometry: Geometry, biases: frozenset[str], rope: Rope) -> Architecture:
    """The first of a family's architectures that can hold a model as it is, or else filled up to equal layers.

    Args:
        config: of the model, stock or prunus.
        geometry: of the model.
        biases: kinds of projection that have a bias, in the words of GGUF (`ATTN_Q`, …).
        rope: of the model.

    Raises:
        UnsupportedModelError: none can; the message has the reason for each.
    """
    reasons = [
        (architecture, next(_obstacles(architecture, config, geometry, biases, rope), None))
        for architecture in candidates(config)
    ]
    possible = [architecture for architecture, reason in reasons if reason is None]
    if not possible:
        raise UnsupportedModelError(
            "llama.cpp has no architecture for this model. "
            + "; ".join(f"{architecture.name}: {reason}" for architecture, reason in reasons)
        )
    for architecture in possible:
        if _uneven(architecture, geometry) is None:
            return architecture
    architecture = possible[0]
    logger.warning(
        "llama.cpp's %s %s: the layers are filled up with zeros",
        architecture.name,
        _uneven(architecture, geometry),
    )
    return architecture


def as_files_hold_it(config: Any, constraints: Constraints) -> Constraints:
    """Constraints that leave only what a GGUF file holds as it is, so that nothing has to be filled up with zeros.

    Args:
        config: of the model that will be cut.
        constraints: what may be cut.

    Raises:
        OptionError: they ask for layers that differ, or for fewer attention groups, and no file of the family has them.
        UnsupportedModelError: see `candidates`.
    """
    able = [each for each in candidates(config) if each.untied or config.tie_word_embeddings]
    title = family_of(config).title
    if family_of(config).mixture is not None:
        return constraints
    if constraints.shape == "depth":
        if constraints.axes is not None and set(constraints.axes) != set(AXES):
            raise OptionError(
                f"`axes={','.join(constraints.axes)}` with `shape=depth`: in GGUF files every layer has both blocks, "
                "so that one without the other saves nothing there; leave `axes` out, or give the size without a type"
            )
        return constraints
    if not any(each.per_layer for each in able):
        if constraints.shape == "ragged":
            raise OptionError(
                f"`shape=ragged`: in GGUF files of {title} all layers are equally wide, so that narrower ones save "
                "nothing there; leave `shape` out, or give the size without a type"
            )
        constraints = replace(constraints, shape="uniform")
    if not any(each.absent_attention for each in able):
        constraints = replace(constraints, min_keep_attention=max(1, constraints.min_keep_attention))
    if all(each.heads_span_hidden for each in able):
        if constraints.axes is not None and "attention" in constraints.axes:
            raise OptionError(
                f"`axes=attention`: GGUF files of {title} hold all attention heads, so that fewer save nothing there; "
                "leave `axes` out, or give the size without a type"
            )
        constraints = replace(constraints, axes=("mlp",))
    return replace(constraints, min_keep_mlp=max(1, constraints.min_keep_mlp))


def widths_to_write(architecture: Architecture, geometry: Geometry, mlp_multiple: int = 1) -> tuple[LayerWidths, ...]:
    """Widths of the layers in the file: the model's own, and zero groups where the architecture asks for more.

    Args:
        architecture: from `choose_architecture`.
        geometry: of the model.
        mlp_multiple: MLP widths are filled up to multiples of this.

    Returns:
        One entry per layer, none smaller than the model's; those of a mixture with its own channels and experts.
    """
    mixture = geometry.family.mixture is not None
    widths = geometry.widths if architecture.per_layer or mixture else largest_widths(geometry.widths)
    spanning = geometry.hidden_size // (geometry.head_dim * geometry.num_key_value_groups)
    written = []
    for layer_idx, layer in enumerate(widths):
        heads, channels = layer.num_key_value_heads, layer.intermediate_size
        if architecture.heads_span_hidden:
            heads = spanning
        if not heads and (layer_idx == 0 or not architecture.absent_attention):
            heads = 1
        if not mixture:
            # deci, too: it drops what attention added to the residual stream where a layer has no channels.
            channels = -(-(channels or ZERO_CHANNELS) // mlp_multiple) * mlp_multiple
        written.append(LayerWidths(heads, channels, layer.num_experts))
    return tuple(written)


def _uneven(architecture: Architecture, geometry: Geometry) -> str | None:
    """Why a model has to be filled up for an architecture, if it has to."""
    widths = geometry.widths
    if not architecture.per_layer and geometry.family.mixture is None:
        other = next((i for i, layer in enumerate(widths) if layer != widths[0]), None)
        if other is not None:
            return (
                f"has one width for all layers, and layer {other} has {_in_words(widths[other])} where layer 0 has "
                f"{_in_words(widths[0])}"
            )
        if not widths[0].num_key_value_heads or not widths[0].intermediate_size:
            return f"lets no layer lack a block, and layer 0 has {_in_words(widths[0])}"
    heads = widths[0].num_key_value_heads * geometry.num_key_value_groups
    if architecture.heads_span_hidden and heads * geometry.head_dim != geometry.hidden_size:
        return (
            f"takes the {heads} heads of {geometry.head_dim} to span the hidden size, and that is "
            f"{geometry.hidden_size}"
        )
    return None


def _obstacles(
    architecture: Architecture, config: Any, geometry: Geometry, biases: frozenset[str], rope: Rope
) -> Iterator[str]:
    """Why an architecture cannot hold a model, even with its layers filled up."""
    group = geometry.head_dim * geometry.num_key_value_groups
    most = max(layer.num_key_value_heads for layer in geometry.widths)
    if architecture.heads_span_hidden and (geometry.hidden_size % group or most * group > geometry.hidden_size):
        yield (
            f"its heads span the hidden size, and no number of groups of {geometry.num_key_value_groups} heads of "
            f"{geometry.head_dim} spans {geometry.hidden_size}"
        )
    if architecture.equal_heads and geometry.num_key_value_groups > 1:
        yield (
            "it takes keys to have as many heads as queries, and in the model "
            f"{geometry.num_key_value_groups} query heads share one"
        )
    if not architecture.untied and not config.tie_word_embeddings:
        yield "it has no output head of its own, and the model's is not tied to the embeddings"
    if geometry.family.rotates_pairs and not architecture.interleaved:
        yield "it rotates the two halves of a head, and the model its pairs of neighbours"
    if rope.factors is not None and not architecture.rope_factors:
        yield f"it has no tensor for the rotary frequencies of rope_type {config.rope_parameters['rope_type']!r}"
    if rope.long_factors is not None and not architecture.long_factors:
        yield "it has no tensors for two sets of rotary frequencies (rope_type 'longrope')"
    if rope.position_scale and not architecture.position_scale:
        yield "it does not scale queries by their position, and the model does (llama_4_scaling_beta)"
    if rope.window_base not in (None, rope.base) and not architecture.window_base:
        yield (
            f"it has one base of rotary frequencies for all layers, and the model {rope.base:g}, and in layers with a "
            f"sliding window {rope.window_base:g}"
        )
    if rope.dimensions != geometry.head_dim and not architecture.partial_rotary:
        yield f"it rotates whole heads, and the model {rope.dimensions} of {geometry.head_dim} values of each"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if {"swish": "silu"}.get(activation, activation) != architecture.activation:
        yield f"it has {architecture.activation!r} built into its MLPs, and the model has {activation!r}"
    if excess := sorted(biases - architecture.biases):
        yield f"it has no bias for {', '.join(excess)}, and the model has"
    if architecture.window_layers is not None:
        count, windows = len(geometry.widths), architecture.has_windows(config)
        if windows != (count == architecture.window_layers):
            yield (
                f"it has sliding windows in models of {architecture.window_layers} layers, and in no others; the model "
                f"has {count} layers, and {'' if windows else 'no '}sliding windows"
            )
    kinds = architecture.kinds
    if kinds is not None and kinds.key is None:
        found, taken = kinds.of_model(config), kinds.of_llama_cpp(len(geometry.widths))
        if found != taken:
            layer = next(i for i, pair in enumerate(zip(found, taken, strict=True)) if pair[0] != pair[1])
            yield (
                f"it takes layer {layer} to have {'' if taken[layer] else 'no '}{kinds.what}, as every "
                f"{kinds.period}th layer of a file has none; in the model it has {'them' if found[layer] else 'none'}"
            )
    if geometry.family.mixture is not None:
        yield from _obstacles_to_experts(architecture, config, geometry)
    if architecture.scale_by_head is not None:
        divisor = float(geometry.head_dim)
        if len(geometry.widths) == architecture.scale_by_head:
            heads = widths_to_write(architecture, geometry)[0].num_key_value_heads * geometry.num_key_value_groups
            divisor = float(geometry.hidden_size // heads)
        if not math.isclose(divisor, config.query_pre_attn_scalar):
            yield (
                f"in a model of {len(geometry.widths)} layers it divides scores by the root of {divisor:g}, and the "
                f"model by that of query_pre_attn_scalar {config.query_pre_attn_scalar}"
            )


def _obstacles_to_experts(architecture: Architecture, config: Any, geometry: Geometry) -> Iterator[str]:
    sums = architecture.renormalises
    if sums is not None and getattr(config, "norm_topk_prob", sums) != sums:
        yield (
            f"it {'divides' if sums else 'does not divide'} the weights of a token's experts by their sum, and the "
            f"model has norm_topk_prob {config.norm_topk_prob}"
        )
    if getattr(config, "clip_qkv", None) is not None:
        yield f"it does not clip queries, keys and values, and the model does (clip_qkv {config.clip_qkv})"
    first, step = (
        getattr(config, architecture.fields[key]) if key in architecture.fields else default
        for key, default in ((DENSE_FIRST, 0), (EXPERT_STEP, 1))
    )
    for layer_idx, widths in enumerate(geometry.widths):
        taken = layer_idx >= first and (layer_idx + 1) % step == 0
        if taken != bool(widths.num_experts):
            yield (
                f"it takes layer {layer_idx} to have {'' if taken else 'no '}experts, and in the model it has "
                f"{'some' if widths.num_experts else 'none'}"
            )


def _in_words(layer: LayerWidths) -> str:
    return f"{layer.num_key_value_heads} key/value heads and {layer.intermediate_size} channels"
