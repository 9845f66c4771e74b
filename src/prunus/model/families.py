"""The model families prunus can cut, described as data.

A family says, for each projection of a decoder layer, where it lives and which *space* its output rows and input
columns belong to. Everything that carries the same space is cut at the same indices; nothing else in prunus knows the
name of a projection. Adding a family means adding an entry to `FAMILIES`, and the conformance tests pick it up.

Spaces:
    residual   the hidden states between blocks; never cut
    query      outputs of the query heads, `num_key_value_groups * head_dim` rows per attention group
    key_value  outputs of the key (or value) heads, `head_dim` rows per attention group
    channel    the MLP's intermediate activations, one row per MLP group
    head       query heads, `num_key_value_groups` entries per attention group
    expert     routed experts of a mixture, one entry per expert
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from prunus.errors import UnsupportedModelError
from prunus.model.known_types import fields_of, what_is_known

__all__ = [
    "ALL_AXES",
    "AXES",
    "FAMILIES",
    "MULTIMODAL",
    "PRUNED_PREFIX",
    "UNFIT",
    "Axis",
    "Block",
    "Family",
    "Mixture",
    "Multimodal",
    "Projection",
    "Space",
    "Stack",
    "family_of",
    "multimodal_of",
]

Axis = Literal["attention", "mlp", "expert"]
Space = Literal["residual", "query", "key_value", "channel", "head", "expert"]
#: the axes of a dense layer
AXES: tuple[Axis, ...] = ("attention", "mlp")
#: all axes, in the order in which tables and plans list them; a family has some of them
ALL_AXES: tuple[Axis, ...] = (*AXES, "expert")

#: `model_type` of a checkpoint with unequal layers is this prefix before the family's own model type.
PRUNED_PREFIX = "prunus_"


@dataclass(frozen=True)
class Projection:
    """One linear module of a decoder layer.

    Attributes:
        path: where it lives inside the decoder layer, e.g. `self_attn.q_proj`.
        outputs: spaces of its output rows, in order; more than one for a fused projection.
        inputs: space of its input columns.
    """

    path: str
    outputs: tuple[Space, ...]
    inputs: Space

    @property
    def name(self) -> str:
        """Last part of the path, unique within a decoder layer: `q_proj`."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Stack:
    """A tensor of a decoder layer that belongs to no linear module, with entries for every group along one dimension.

    Attributes:
        path: of the parameter or buffer inside the decoder layer, e.g. `mlp.experts.down_proj`.
        space: what that dimension carries.
        dim: which dimension it is.
    """

    path: str
    space: Space
    dim: int = 0


@dataclass(frozen=True)
class Block:
    """Attention, MLP or experts of a decoder layer: what one axis cuts.

    Attributes:
        axis: the kind of group it is made of.
        module: path of the block inside the decoder layer.
        norms: paths of the norms that serve only this block and leave with it.
        projections: its linear modules.
        untouched: modules inside the block that no cut changes (per-head norms, which all heads share).
        post_norm: that one of `norms` which stands between the block and the residual stream; None where the output
            projection is added to it directly.
        indivisible: its groups stay or go together, because a norm runs over all of them: without some, those that
            stay would compute something else.
        stacks: its tensors that belong to no linear module.
        experts: path of the module that computes what the routed experts make of tokens; None without experts.
        router: path of the module that chooses experts and weighs them.
        beside_experts: it is a part of the module of the layer's experts, and adds to the residual stream with them.
    """

    axis: Axis
    module: str
    norms: tuple[str, ...]
    projections: tuple[Projection, ...]
    untouched: tuple[str, ...] = ()
    post_norm: str | None = None
    indivisible: bool = False
    stacks: tuple[Stack, ...] = ()
    experts: str | None = None
    router: str | None = None
    beside_experts: bool = False

    @property
    def output(self) -> Projection:
        """The projection that writes back into the residual stream: `o_proj` or `down_proj`."""
        return next(p for p in self.projections if p.outputs == ("residual",))

    @property
    def begins(self) -> str:
        """Path of the module that reads the residual stream: the norm in front of the block, or the block itself."""
        return next((norm for norm in self.norms if norm != self.post_norm), self.module)


@dataclass(frozen=True)
class Mixture:
    """What a family with routed experts says of the layers that have some.

    Attributes:
        blocks: of such a layer, in the order in which it runs them; shared experts before the routed ones.
        count: config field with the number of experts.
        in_layer: config and index of a layer → whether it has experts.
        shared_channels: config → channels of the shared experts beside them.
        shared_field: config field with that number; None where it follows from fields that say more.
        routing_groups: config field with the number of groups of experts that routing goes by; None without.
    """

    blocks: tuple[Block, ...]
    count: str = "num_experts"
    in_layer: Callable[[Any, int], bool] = lambda config, layer_idx: True
    shared_channels: Callable[[Any], int] = lambda config: 0
    shared_field: str | None = None
    routing_groups: str | None = None


@dataclass(frozen=True)
class Family:
    """One architecture: the names that a pruner needs, and nothing else.

    Attributes:
        model_type: `config.model_type` of transformers.
        title: the name people use.
        blocks: attention and MLP, in the order in which a decoder layer runs them; of a mixture, those of a layer
            without experts.
        embedding: path of the token embedding in the causal language model.
        layers: path of the list of decoder layers.
        final_norm: path of the norm before the head.
        head: path of the output head.
        residual_multiplier: config field that holds a factor on all that blocks add to the residual stream; None where
            there is no such factor.
        norm_offset: what its norms add to their weights before they multiply by them.
        rotates_pairs: a head rotates the pairs (0, 1), (2, 3), … and not (0, n/2), (1, n/2 + 1), …
        notes: what is particular about it, for the tables of the documentation.
        mixture: its layers with experts; None in a dense family.
    """

    model_type: str
    title: str
    blocks: tuple[Block, ...]
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    residual_multiplier: str | None = None
    norm_offset: float = 0.0
    rotates_pairs: bool = False
    notes: str = ""
    mixture: Mixture | None = None

    @property
    def all_blocks(self) -> tuple[Block, ...]:
        """The blocks of all kinds of its decoder layers."""
        return self.blocks + (self.mixture.blocks if self.mixture else ())

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The kinds of group that its layers consist of, in the order of `ALL_AXES`."""
        there = {block.axis for block in self.all_blocks}
        return tuple(axis for axis in ALL_AXES if axis in there)

    def block(self, axis: Axis) -> Block:
        """The block of one axis; of a mixture, that of a layer without experts where such a layer has one."""
        return next(block for block in self.all_blocks if block.axis == axis)

    def blocks_of(self, experts: int) -> tuple[Block, ...]:
        """The blocks of a decoder layer that has so many experts."""
        return self.mixture.blocks if self.mixture and experts else self.blocks

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections of a decoder layer; of a mixture, of all kinds of layers."""
        return tuple(projection for block in self.all_blocks for projection in block.projections)

    def residual_scale(self, config: Any) -> float:
        """The factor on all that the blocks of a model with this config add to the residual stream."""
        return float(getattr(config, self.residual_multiplier)) if self.residual_multiplier else 1.0


@dataclass(frozen=True)
class Multimodal:
    """A model that holds a language model of a described family beside what sees images: only the former is cut.

    Attributes:
        model_type: `config.model_type` of the whole.
        title: the name people use.
        parts: model type of its `text_config` → the family that computes the same of text.
        decoder: path of the language model's decoder in the whole; its head is beside, as in a language model.
        axes: the kinds of group that its class can hold fewer of.
        early_layers: field of the vision config with one entry for each decoder layer, from the first on, behind which
            features of images are added: those layers must stay. None where there are none.
    """

    model_type: str
    title: str
    parts: Mapping[str, str]
    decoder: str = "model.language_model"
    axes: tuple[Axis, ...] = AXES
    early_layers: str | None = None

    @property
    def default_part(self) -> str:
        """Model type of a `text_config` that does not say."""
        return next(iter(self.parts))


#: norms of queries and keys: where they work on each head by itself, all heads share their weights
_QUERY_KEY_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_HUNYUAN_QUERY_KEY_NORMS = ("self_attn.query_layernorm", "self_attn.key_layernorm")


def _attention(
    *,
    norms: tuple[str, ...] = ("input_layernorm",),
    untouched: tuple[str, ...] = (),
    post_norm: str | None = None,
    indivisible: bool = False,
) -> Block:
    return Block(
        axis="attention",
        module="self_attn",
        norms=norms,
        projections=(
            Projection("self_attn.q_proj", ("query",), "residual"),
            Projection("self_attn.k_proj", ("key_value",), "residual"),
            Projection("self_attn.v_proj", ("key_value",), "residual"),
            Projection("self_attn.o_proj", ("residual",), "query"),
        ),
        untouched=untouched,
        post_norm=post_norm,
        indivisible=indivisible,
    )


def _gated_mlp(
    *, norms: tuple[str, ...] = ("post_attention_layernorm",), post_norm: str | None = None, fused: bool = False
) -> Block:
    into = (
        (Projection("mlp.gate_up_proj", ("channel", "channel"), "residual"),)
        if fused
        else (
            Projection("mlp.gate_proj", ("channel",), "residual"),
            Projection("mlp.up_proj", ("channel",), "residual"),
        )
    )
    return Block(
        axis="mlp",
        module="mlp",
        norms=norms,
        projections=(*into, Projection("mlp.down_proj", ("residual",), "channel")),
        post_norm=post_norm,
    )


def _between_norms(*, untouched: tuple[str, ...] = ()) -> tuple[Block, Block]:
    """Attention and MLP with one norm before and another after each block."""
    return (
        _attention(
            norms=("input_layernorm", "post_attention_layernorm"),
            untouched=untouched,
            post_norm="post_attention_layernorm",
        ),
        _gated_mlp(
            norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            post_norm="post_feedforward_layernorm",
        ),
    )


def _norms_after(*, over_all_heads: bool) -> tuple[Block, Block]:
    """Attention and MLP with a norm after each block and none before, and norms of queries and keys.

    Args:
        over_all_heads: whether those run over the queries, and the keys, of all heads (OLMo 2), not of each.
    """
    return (
        _attention(
            norms=("post_attention_layernorm",),
            untouched=_QUERY_KEY_NORMS,
            post_norm="post_attention_layernorm",
            indivisible=over_all_heads,
        ),
        _gated_mlp(norms=("post_feedforward_layernorm",), post_norm="post_feedforward_layernorm"),
    )


#: Phi-3: q, k and v in one projection, gate and up in another
_FUSED = (
    Block(
        axis="attention",
        module="self_attn",
        norms=("input_layernorm",),
        projections=(
            Projection("self_attn.qkv_proj", ("query", "key_value", "key_value"), "residual"),
            Projection("self_attn.o_proj", ("residual",), "query"),
        ),
    ),
    _gated_mlp(fused=True),
)

#: GLM-4-0414: gate and up in one projection, one norm before and another after each block
_GLM4 = (
    _attention(norms=("input_layernorm", "post_self_attn_layernorm"), post_norm="post_self_attn_layernorm"),
    _gated_mlp(norms=("post_attention_layernorm", "post_mlp_layernorm"), post_norm="post_mlp_layernorm", fused=True),
)

#: in the notes on a mixture
_EXPERTS = "experts are removed whole"
#: of a layer with experts: the norm in front of them serves the shared ones, too
_BEFORE_EXPERTS = ("post_attention_layernorm",)
_FUSED_EXPERTS = ("gate_up_proj", "down_proj")


def _experts(
    *, module: str = "mlp", router: str = "gate", tensors: tuple[str, ...] = _FUSED_EXPERTS, routing: tuple[Stack, ...]
) -> Block:
    """Routed experts, with their weights in one tensor for all of them.

    Args:
        module: the block.
        router: in the block.
        tensors: of the experts' module.
        routing: those of the router, their paths inside it.
    """
    return Block(
        axis="expert",
        module=module,
        norms=_BEFORE_EXPERTS,
        projections=(),
        stacks=(
            *(Stack(f"{module}.experts.{name}", "expert") for name in tensors),
            *(Stack(f"{module}.{router}.{stack.path}", "expert", stack.dim) for stack in routing),
        ),
        experts=f"{module}.experts",
        router=f"{module}.{router}",
    )


_ROUTER_ROWS = (Stack("weight", "expert"),)


def _shared_experts(module: str, *, untouched: tuple[str, ...] = ()) -> Block:
    return Block(
        axis="mlp",
        module=module,
        norms=(),
        projections=(
            Projection(f"{module}.gate_proj", ("channel",), "residual"),
            Projection(f"{module}.up_proj", ("channel",), "residual"),
            Projection(f"{module}.down_proj", ("residual",), "channel"),
        ),
        untouched=untouched,
        beside_experts=True,
    )


def _in_every_few_layers(config: Any, layer_idx: int) -> bool:
    """Where Qwen's mixtures have experts."""
    if layer_idx in config.mlp_only_layers or not config.num_experts:
        return False
    return (layer_idx + 1) % int(config.decoder_sparse_step) == 0


def _between_layers(config: Any, layer_idx: int) -> bool:
    """Where ERNIE 4.5 has experts."""
    there = config.moe_layer_start_index <= layer_idx <= config.moe_layer_end_index
    return there and (layer_idx + 1) % int(config.moe_layer_interval) == 0


#: OLMoE: norms that run over the queries, and the keys, of all heads
_OLMOE = Mixture((_attention(untouched=_QUERY_KEY_NORMS, indivisible=True), _experts(routing=_ROUTER_ROWS)))
_MIXTRAL = Mixture((_attention(), _experts(routing=_ROUTER_ROWS)), count="num_local_experts")
_QWEN3_MOE = Mixture(
    (_attention(untouched=_QUERY_KEY_NORMS), _experts(routing=_ROUTER_ROWS)), in_layer=_in_every_few_layers
)
_QWEN2_MOE = Mixture(
    (
        _attention(),
        _shared_experts("mlp.shared_expert", untouched=("mlp.shared_expert_gate",)),
        _experts(routing=_ROUTER_ROWS),
    ),
    in_layer=_in_every_few_layers,
    shared_channels=lambda config: int(config.shared_expert_intermediate_size),
    shared_field="shared_expert_intermediate_size",
)
_GRANITE_MOE = Mixture(
    (_attention(), _experts(module="block_sparse_moe", router="router", routing=_ROUTER_ROWS)),
    count="num_local_experts",
)
#: a learned sink per query head, which the softmax of its attention counts beside the tokens
_ATTENTION_WITH_SINKS = replace(_attention(), stacks=(Stack("self_attn.sinks", "head"),))
_GPT_OSS = Mixture(
    (
        _ATTENTION_WITH_SINKS,
        _experts(
            router="router",
            tensors=("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
            routing=(*_ROUTER_ROWS, Stack("bias", "expert")),
        ),
    ),
    count="num_local_experts",
)
_GLM4_MOE = Mixture(
    (
        _attention(untouched=_QUERY_KEY_NORMS),
        _shared_experts("mlp.shared_experts"),
        _experts(routing=(*_ROUTER_ROWS, Stack("e_score_correction_bias", "expert"))),
    ),
    count="n_routed_experts",
    in_layer=lambda config, layer_idx: layer_idx >= config.first_k_dense_replace,
    shared_channels=lambda config: int(config.moe_intermediate_size * config.n_shared_experts),
    routing_groups="n_group",
)
_ERNIE_MOE = Mixture(
    (
        _attention(),
        _shared_experts("mlp.shared_experts"),
        _experts(routing=(*_ROUTER_ROWS, Stack("moe_statics.e_score_correction_bias", "expert", dim=1))),
    ),
    count="moe_num_experts",
    in_layer=_between_layers,
    shared_channels=lambda config: int(config.moe_intermediate_size * config.moe_num_shared_experts),
)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "Llama 2, 3, 3.x; SmolLM2; TinyLlama",
            (_attention(), _gated_mlp()),
            notes="GQA, MHA, MQA; tied and untied embeddings",
        ),
        Family("mistral", "Mistral", (_attention(), _gated_mlp())),
        Family(
            "ministral3", "Ministral 3 (text)", (_attention(), _gated_mlp()), notes="queries scaled by their position"
        ),
        Family("qwen2", "Qwen2, Qwen2.5", (_attention(), _gated_mlp()), notes="biases of q, k, v"),
        Family(
            "qwen3",
            "Qwen3",
            (_attention(untouched=_QUERY_KEY_NORMS), _gated_mlp()),
            notes="norms per head; head_dim independent of the hidden size",
        ),
        Family(
            "granite",
            "Granite 3 (dense)",
            (_attention(), _gated_mlp()),
            residual_multiplier="residual_multiplier",
            notes="multipliers of embeddings, residual stream, attention and logits",
        ),
        Family(
            "smollm3",
            "SmolLM3",
            (_attention(), _gated_mlp()),
            notes="layers without rotary positions stay so when other layers are removed",
        ),
        Family(
            "olmo2",
            "OLMo 2",
            _norms_after(over_all_heads=True),
            notes="norms over all heads: a layer's attention is kept or removed as a whole",
        ),
        Family("olmo3", "OLMo 3", _norms_after(over_all_heads=True), notes="as OLMo 2, and sliding windows by layer"),
        Family(
            "exaone4",
            "EXAONE 4",
            _norms_after(over_all_heads=False),
            notes="a norm after each block; norms per head; positions in layers with a sliding window only",
        ),
        Family(
            "phi3",
            "Phi-3, Phi-3.5, Phi-4 (text)",
            _FUSED,
            notes="fused `qkv_proj` and `gate_up_proj`; long rope",
        ),
        Family(
            "glm",
            "GLM-4-9B (2024), GLM-Edge",
            (_attention(), _gated_mlp(fused=True)),
            rotates_pairs=True,
            notes="fused `gate_up_proj`; part of each head is rotated",
        ),
        Family("glm4", "GLM-4-0414, GLM-Z1", _GLM4, rotates_pairs=True, notes="as GLM, and a norm after each block"),
        Family("seed_oss", "Seed-OSS", (_attention(), _gated_mlp()), notes="biases of q, k, v"),
        Family("ernie4_5", "ERNIE 4.5 (dense)", (_attention(), _gated_mlp()), rotates_pairs=True),
        Family(
            "hunyuan_v1_dense",
            "Hunyuan (dense)",
            (_attention(untouched=_HUNYUAN_QUERY_KEY_NORMS), _gated_mlp()),
            notes="norms per head, behind the rotation",
        ),
        Family("gemma", "Gemma", (_attention(), _gated_mlp()), norm_offset=1.0),
        Family(
            "gemma2",
            "Gemma 2",
            _between_norms(),
            norm_offset=1.0,
            notes="a norm after each block; sliding windows by layer; transformers 4 needs "
            '`attn_implementation="eager"`, pruned or not',
        ),
        Family(
            "gemma3_text",
            "Gemma 3 1B, other text models of Gemma 3",
            _between_norms(untouched=_QUERY_KEY_NORMS),
            norm_offset=1.0,
            notes="as Gemma 2, and norms per head; rotary frequencies by layer",
        ),
        Family(
            "qwen3_moe",
            "Qwen3 mixtures, such as Qwen3-30B-A3B",
            (_attention(untouched=_QUERY_KEY_NORMS), _gated_mlp()),
            mixture=_QWEN3_MOE,
            notes=_EXPERTS,
        ),
        Family("olmoe", "OLMoE", (), mixture=_OLMOE, notes=f"{_EXPERTS}; attention as in OLMo 2"),
        Family("mixtral", "Mixtral", (), mixture=_MIXTRAL, notes=_EXPERTS),
        Family(
            "qwen2_moe",
            "Qwen1.5-MoE, Qwen2 mixtures",
            (_attention(), _gated_mlp()),
            mixture=_QWEN2_MOE,
            notes=f"{_EXPERTS}; keeps the shared expert",
        ),
        Family(
            "granitemoe",
            "Granite 3 mixtures",
            (),
            residual_multiplier="residual_multiplier",
            mixture=_GRANITE_MOE,
            notes=_EXPERTS,
        ),
        Family("gpt_oss", "gpt-oss", (), mixture=_GPT_OSS, notes=f"{_EXPERTS}; a sink per query head"),
        Family(
            "glm4_moe",
            "GLM-4.5, 4.6",
            (_attention(untouched=_QUERY_KEY_NORMS), _gated_mlp()),
            mixture=_GLM4_MOE,
            notes=f"{_EXPERTS}; keeps shared experts; the first layers have none",
        ),
        Family(
            "ernie4_5_moe",
            "ERNIE 4.5 mixtures",
            (_attention(), _gated_mlp()),
            rotates_pairs=True,
            mixture=_ERNIE_MOE,
            notes=f"{_EXPERTS}; keeps shared experts; the first layers have none",
        ),
    )
}

MULTIMODAL: dict[str, Multimodal] = {
    kind.model_type: kind
    for kind in (
        Multimodal("gemma3", "Gemma 3 (4B and up)", {"gemma3_text": "gemma3_text"}),
        Multimodal(
            "mistral3", "Mistral Small 3.1, 3.2; Ministral 3", {"mistral": "mistral", "ministral3": "ministral3"}
        ),
        Multimodal("qwen3_vl", "Qwen3-VL (dense)", {"qwen3_vl_text": "qwen3"}, early_layers="deepstack_visual_indexes"),
        # Its heads always span the hidden size.
        Multimodal("qwen2_5_vl", "Qwen2.5-VL", {"qwen2_5_vl_text": "qwen2"}, axes=("mlp",)),
    )
}

_SIDE_BY_SIDE = (
    "its attention and its MLP read the same norm side by side, and prunus repairs and removes them one after the other"
)
#: dense model types that are not described because they do not fit, and why
UNFIT: dict[str, str] = {
    "cohere": _SIDE_BY_SIDE,
    "cohere2": _SIDE_BY_SIDE,
    "phi": _SIDE_BY_SIDE,
    "helium": "transformers builds its o_proj for heads that span the hidden size, so that none can be cut",
}


def multimodal_of(config: Any) -> Multimodal | None:
    """The multimodal model that a config describes, or the content of a config.json; None for any other model."""
    model_type = str(fields_of(config).get("model_type") or getattr(config, "model_type", ""))
    return MULTIMODAL.get(model_type.removeprefix(PRUNED_PREFIX))


def family_of(config: Any) -> Family:
    """The family a config belongs to; that of a checkpoint that prunus wrote is the one it was cut from.

    Args:
        config: a transformers `PreTrainedConfig`.

    Raises:
        UnsupportedModelError: the model type is not described in `FAMILIES`; what is known of it is said.
    """
    model_type = str(getattr(config, "model_type", ""))
    family = FAMILIES.get(model_type.removeprefix(PRUNED_PREFIX))
    if family is not None:
        return family
    supported = ", ".join(sorted(FAMILIES))
    if model_type in UNFIT:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported: {UNFIT[model_type]}. Supported: {supported}."
        )
    known = what_is_known(config)
    if not known:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported: no entry in prunus.model.families.FAMILIES says which "
            f"projections carry its attention groups and MLP channels. Supported: {supported}. To add it, describe its "
            "decoder layer in src/prunus/model/families.py (about 15 lines)."
        )
    advice = ""
    if known.endswith("mixture of experts"):
        advice = (
            " Of mixtures of experts, prunus cuts those of type "
            f"{', '.join(sorted(name for name, family in FAMILIES.items() if family.mixture))}."
        )
    elif model_type.removeprefix(PRUNED_PREFIX) in MULTIMODAL:
        advice = (
            " Give its folder: prunus.load_model takes the language model out, and what is saved of that is the whole "
            "again."
        )
    elif any(known.endswith(f"is of type {name!r}") for name in FAMILIES):
        advice = " That part can be cut: save it as a language model of its own, and give that folder."
    raise UnsupportedModelError(
        f"model type {model_type!r} is not supported: it is {known}.{advice} Supported: {supported}."
    )
