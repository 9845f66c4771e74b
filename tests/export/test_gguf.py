"""GGUF files: what is in them, and that llama.cpp's arithmetic on it gives the model's logits."""

from __future__ import annotations

import sys
from typing import Any

import gguf
import pytest
import torch
from llama_cpp_graph import GgufFile, logits_of
from tiny_families import LLAMA3_ROPE, VARIANTS, YARN, logits, make_model, random_tokens
from tiny_mixtures import EXPERTS, make_mixture
from tiny_tokenizers import byte_level, sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus
from prunus.errors import CheckpointError, NonFiniteError, OptionError, UnsupportedModelError
from prunus.export import export_gguf
from prunus.export.llama_cpp import CANDIDATES, UNWRITTEN
from prunus.model.families import FAMILIES
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan

TOKENS, VOCABULARY = 276, 280
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
#: layer 0 without attention, one without channels, one narrow, one whole, and one that goes altogether
RAGGED = [
    {"attention": [], "mlp": range(3, 20)},
    {"attention": [0, 2], "mlp": []},
    {"attention": [], "mlp": [4]},
    {"attention": [], "mlp": []},
    {"attention": [1], "mlp": range(0, 20, 2)},
    {"attention": [0, 1, 2], "mlp": range(20)},
]
UNIFORM = [{"attention": sorted({0, 1 + layer % 2}), "mlp": range(layer, layer + 12)} for layer in range(6)]
TIED = {"qwen3": {"tie_word_embeddings": True}}
#: what llama.cpp has built in where a family lets a config choose
BUILT_IN = {
    "hunyuan_v1_dense": {"attention_bias": False},
    "gemma": {"attention_bias": False},
    "smollm3": {"no_rope_layer_interval": 4, "use_sliding_window": False},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 12, "sliding_window_pattern": 6, "hidden_size": 48},
    "olmo2": {"attention_bias": False},
    "olmo3": {"layer_types": [*["sliding_attention"] * 3, "full_attention", *["sliding_attention"] * 2]},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 6},
}


def model_of(family: str, kept: Any = None, variant: str | None = None, **fields: Any) -> Any:
    """A model of six layers with three attention groups and twenty channels, cut or whole."""
    settings = {"num_hidden_layers": 6, "vocab_size": VOCABULARY, **TIED.get(family, {}), **BUILT_IN.get(family, {})}
    settings |= fields
    model = make_model(family, variant or next(iter(VARIANTS[family])), **settings)
    if kept is None:
        return model
    geometry = Geometry.of(model)
    if geometry.family.block("attention").indivisible:
        whole = range(geometry.widths[0].num_key_value_heads)
        kept = [{**layer, "attention": whole if layer["attention"] else []} for layer in kept]
    if geometry.widths[0].num_key_value_heads == 1:
        kept = [{**layer, "attention": [0] if layer["attention"] else []} for layer in kept]
    return prunus.apply_plan(model, Plan.from_kept(geometry, kept))


def same_logits(model: Any, path: Any, tolerance: float = 2e-4) -> None:
    tokens = random_tokens(batch=1, seq_len=11)
    expected = logits(model.float(), tokens)[0]
    assert (logits_of(GgufFile(path), tokens[0]) - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "architecture", "fields"),
    [
        ("llama", "deci", {}),
        ("llama", "deci", {"attention_bias": True, "mlp_bias": True}),
        ("llama", "deci", {"tie_word_embeddings": True}),
        ("mistral", "deci", {}),
        ("qwen2", "deci", {}),
        ("qwen3", "openelm", {}),
        ("seed_oss", "deci", {}),
        # It rotates pairs of neighbours, as deci does: no row moves.
        ("ernie4_5", "deci", {}),
    ],
)
def test_a_ragged_model_keeps_its_logits(family, architecture, fields, saved, tmp_path):
    model = model_of(family, RAGGED, **fields)
    facts = export_gguf(str(saved(model)), tmp_path / "a.gguf", type="f32")
    file = GgufFile(tmp_path / "a.gguf")
    assert facts["architecture"] == file.architecture == architecture
    same_logits(model, tmp_path / "a.gguf")


def test_widths_of_the_layers_are_the_models_with_zeros_where_llama_cpp_needs_a_block(saved, tmp_path):
    folder = saved(model_of("llama", RAGGED))
    export_gguf(str(folder), tmp_path / "a.gguf", type="f32")
    file = GgufFile(tmp_path / "a.gguf")
    assert file["attention.head_count_kv"] == [1, 2, 0, 1, 3]
    assert file["attention.head_count"] == [2, 4, 0, 2, 6]
    assert file["feed_forward_length"] == [17, 32, 1, 10, 20]
    assert file["block_count"] == 5
    assert "blk.2.attn_q.weight" not in file.tensors
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        assert not file.tensors[f"blk.0.{name}.weight"].any()
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        assert not file.tensors[f"blk.1.{name}.weight"].any()


@pytest.mark.parametrize(
    ("family", "architecture", "fields"),
    [
        ("llama", "llama", {}),
        ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", "llama", {}),
        ("qwen2", "qwen2", {"hidden_size": 32}),
        # Four heads of 8 no longer span a hidden size of 48, which llama.cpp's qwen2 takes for granted.
        ("qwen2", "deci", {}),
        ("qwen3", "qwen3", {}),
        ("qwen3", "qwen3", {"tie_word_embeddings": False}),
        ("granite", "granite", {}),
        ("smollm3", "smollm3", {}),
        ("olmo2", "olmo2", {}),
        ("olmo3", "olmo2", {}),
        ("exaone4", "exaone4", {}),
        ("exaone4", "exaone4", {"rope_parameters": LLAMA3_ROPE}),
        ("ministral3", "mistral3", {}),
        ("phi3", "phi3", {}),
        ("seed_oss", "seed_oss", {"attention_out_bias": False, "mlp_bias": False}),
        # Biases that the stock architecture has no place for.
        ("seed_oss", "deci", {}),
        ("ernie4_5", "ernie4_5", {"use_bias": False}),
        ("ernie4_5", "deci", {}),
        ("hunyuan_v1_dense", "hunyuan-dense", {"attention_bias": False}),
        ("glm", "chatglm", {}),
        ("glm4", "glm4", {}),
        ("gemma", "gemma", {"attention_bias": False}),
        ("gemma2", "gemma2", {}),
        ("gemma3_text", "gemma3", {}),
    ],
)
def test_equal_layers_go_out_as_the_stock_architecture(family, architecture, fields, saved, tmp_path):
    model = model_of(family, UNIFORM, **fields)
    facts = export_gguf(str(saved(model)), tmp_path / "a.gguf", type="f32")
    assert facts["architecture"] == architecture
    same_logits(model, tmp_path / "a.gguf")
    if architecture != "deci":
        heads = {"olmo2": 6, "exaone4": 6, "phi3": 6, "chatglm": 6}.get(architecture, 4)  # those span the hidden size
        assert GgufFile(tmp_path / "a.gguf")["attention.head_count"] == heads  # one number, not one per layer


@pytest.mark.parametrize(
    ("family", "variant", "layers"),
    [
        ("qwen3", None, 5),
        ("granite", None, 5),
        ("olmo2", None, 5),
        ("olmo2", "mha", 5),
        ("olmo3", None, 5),
        ("exaone4", None, 5),
        ("ministral3", None, 5),
        ("phi3", None, 5),
        ("phi3", "mqa-longrope", 5),
        ("gemma2", None, 5),
        ("gemma3_text", None, 5),
        ("glm", None, 5),
        ("glm4", None, 5),
        ("glm4", "mqa", 5),
        ("hunyuan_v1_dense", None, 5),
        ("gemma", None, 5),
        ("smollm3", None, 6),
    ],
)
def test_ragged_layers_are_filled_up_where_llama_cpp_wants_equal_ones(family, variant, layers, saved, tmp_path, caplog):
    """With a layer removed as well, where the layers' numbers do not say what they are."""
    kept = RAGGED if layers == 5 else [*RAGGED[:3], {"attention": [0], "mlp": [5]}, *RAGGED[4:]]
    fields = {"tie_word_embeddings": False} if family == "qwen3" else {}
    model = model_of(family, kept, variant, **fields)
    facts = export_gguf(str(saved(model)), tmp_path / "a.gguf", type="f32")
    assert len(set(facts["feed_forward_length"])) == len(set(facts["head_count_kv"])) == 1
    assert len(facts["head_count"]) == layers
    same_logits(model, tmp_path / "a.gguf")
    assert "filled up with zeros" in caplog.text
    file = GgufFile(tmp_path / "a.gguf")
    extra = sum(t.numel() for name, t in file.tensors.items() if name.startswith("rope"))
    if family in ("olmo2", "olmo3") and model.config.tie_word_embeddings:
        extra += file.tensors["output.weight"].numel()
    assert facts["of_them_zeros"] == facts["parameters"] - model.num_parameters() - extra > 0


#: what llama.cpp has built in where mixtures let a config choose
MIXTURES = {
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 6},
    "mixtral": {},
    "qwen2_moe": {},
    "granitemoe": {},
    "glm4_moe": {"attention_bias": True},
    "ernie4_5_moe": {},
}


def mixture_of(family: str, *, experts: int = EXPERTS, heads: int | None = None, **fields: Any) -> Any:
    """A mixture that has lost experts, and attention groups if their number is given; other ones in each layer."""
    model = make_mixture(family, vocab_size=VOCABULARY, num_hidden_layers=3, **MIXTURES.get(family, {}), **fields)
    kept: list[Any] = []
    for layer, widths in enumerate(Geometry.of(model).widths):
        groups = widths.num_key_value_heads
        kept.append(
            {
                "attention": sorted((layer + i) % groups for i in range(heads or groups)),
                "mlp": range(widths.intermediate_size),
                "expert": sorted((layer + i) % EXPERTS for i in range(experts)) if widths.num_experts else [],
            }
        )
    return prunus.apply_plan(model, Plan.from_kept(Geometry.of(model), kept))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_keeps_its_logits(family, saved, tmp_path):
    model = mixture_of(family, experts=4)
    facts = export_gguf(str(saved(model)), tmp_path / "a.gguf", type="f32")
    file = GgufFile(tmp_path / "a.gguf")
    assert facts["architecture"] == CANDIDATES[family][0].replace("mixtral", "llama")
    assert facts["parameters"] == sum(tensor.numel() for tensor in file.tensors.values())
    assert file["expert_count"] == 4
    assert facts["of_them_zeros"] == 0
    same_logits(model, tmp_path / "a.gguf")


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_a_mixture_with_fewer_heads_keeps_its_logits(family, saved, tmp_path):
    """llama.cpp takes the heads of Qwen2 mixtures to span the hidden size: zeros for those that are gone."""
    model = mixture_of(family, experts=5, heads=2)
    before = Geometry.of(model).widths[0].num_key_value_heads
    facts = export_gguf(str(saved(model)), tmp_path / "a.gguf", type="f32")
    assert facts["head_count_kv"][0] == (4 if family == "qwen2_moe" else before)
    assert (facts["of_them_zeros"] > 0) == (family == "qwen2_moe")
    same_logits(model, tmp_path / "a.gguf")


def test_routers_are_not_rounded(saved, tmp_path):
    export_gguf(str(saved(mixture_of("qwen2_moe"))), tmp_path / "a.gguf", type="q8_0")
    kinds = GgufFile(tmp_path / "a.gguf").kinds
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.ffn_gate_inp_shexp.weight"] == "F32"
    assert kinds["blk.0.ffn_up_exps.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down_exps.weight"] == "F16"  # rows of 16 values are no whole blocks


@pytest.mark.parametrize(
    ("family", "fields", "options", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, {}, "divides the weights .*norm_topk_prob False"),
        ("qwen2_moe", {"norm_topk_prob": True}, {}, "does not divide the weights .*norm_topk_prob True"),
        ("olmoe", {"clip_qkv": 8.0}, {}, "clip_qkv 8"),
        ("olmoe", {"num_key_value_heads": 3}, {}, "as many heads as queries, and in the model 2 query heads share one"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, {}, "layer 1 to have experts, and in the model it has none"),
        ("ernie4_5_moe", {"moe_layer_end_index": 1}, {}, "layer 2 to have experts, and in the model it has none"),
        ("gpt_oss", {}, {}, r"gpt-oss.*cannot be written as GGUF: .*MXFP4.*`prunus apply`"),
        ("mixtral", {}, {"mlp_multiple": 256}, "experts cannot be filled up"),
    ],
)
def test_mixtures_that_llama_cpp_computes_differently_are_refused(family, fields, options, message, saved, tmp_path):
    folder = saved(
        make_mixture(family, **{"vocab_size": VOCABULARY, "num_hidden_layers": 3, **MIXTURES.get(family, {}), **fields})
    )
    with pytest.raises(UnsupportedModelError, match=message):
        export_gguf(str(folder), tmp_path / "a.gguf", **options)
    assert not (tmp_path / "a.gguf").exists()


def test_kinds_of_layers_are_written_where_a_removed_layer_shifts_them(saved, tmp_path, caplog):
    """Layers 0 to 5 have windows but the last; without layer 3 that is the fifth."""
    for name, kept, expected in (("a", RAGGED, [True, True, True, True, False]), ("b", UNIFORM, None)):
        export_gguf(str(saved(model_of("gemma3_text", kept), name=name)), tmp_path / f"{name}.gguf", type="f32")
        assert GgufFile(tmp_path / f"{name}.gguf").get("attention.sliding_window_pattern") == expected
    assert caplog.text.count("too old to read it") == 1


def test_exaone_has_windows_in_models_of_64_layers(saved, tmp_path):
    """As in EXAONE 4 32B: positions in layers with a window only, and one of them gone would be another model."""
    windows = [*["sliding_attention"] * 3, "full_attention"] * 16
    fields = {"num_hidden_layers": 64, "sliding_window": 6, "layer_types": windows}
    model = model_of("exaone4", [RAGGED[layer % 3] for layer in range(64)], **fields)
    export_gguf(str(saved(model)), tmp_path / "a.gguf", type="f32")
    same_logits(model, tmp_path / "a.gguf")
    for name, changes, message in (
        ("short", {"num_hidden_layers": 63, "layer_types": windows[1:]}, "has 63 layers, and sliding windows"),
        ("whole", {"sliding_window": None, "layer_types": ["full_attention"] * 64}, "has 64 layers, and no sliding"),
    ):
        model = model_of("exaone4", **{**fields, **changes})
        with pytest.raises(
            UnsupportedModelError, match=f"windows in models of 64 layers, and in no others; the model {message}"
        ):
            export_gguf(str(saved(model, name=name)), tmp_path / "b.gguf")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_loads_a_stock_file_and_speaks_the_same(family, saved, tmp_path):
    # Of a Qwen3 file, transformers reads no head_dim and takes it to be 128.
    model = model_of(family, head_dim=128 if family == "qwen3" else 8, tie_word_embeddings=False)
    export_gguf(str(saved(model)), tmp_path / "a.gguf", type="f32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    tokens = random_tokens()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.5},
        # As in Ministral 3, but for the numbers.
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 128,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
)
def test_scaled_rotary_frequencies(rope, saved, tmp_path):
    model = model_of("llama", RAGGED, rope_parameters={"rope_theta": 500.0, **rope}, max_position_embeddings=128)
    export_gguf(str(saved(model)), tmp_path / "a.gguf", type="f32")
    same_logits(model, tmp_path / "a.gguf")


def rounded(model: Any, kind: str) -> Any:
    """The model with its matrices rounded as a file of this type has them, to be compared in exact arithmetic."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                columns = parameter.shape[1]
                whole_blocks = torch.nn.functional.pad(parameter, (0, -columns % 32)).numpy()
                packed = gguf.quants.quantize(whole_blocks, gguf.GGMLQuantizationType[kind])
                values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])[:, :columns]
                parameter.copy_(torch.from_numpy(values.copy()))
    return model


@pytest.mark.parametrize(("type", "kind"), [("f16", "F16"), ("bf16", "BF16")])
def test_types(type, kind, saved, tmp_path):
    model = model_of("llama", RAGGED)
    facts = export_gguf(str(saved(model)), tmp_path / "a.gguf", type=type)
    file = GgufFile(tmp_path / "a.gguf")
    assert {file.kinds[name] for name, tensor in file.tensors.items() if tensor.ndim == 2} == {kind}
    assert {file.kinds[name] for name, tensor in file.tensors.items() if tensor.ndim == 1} == {"F32"}
    assert facts["bytes"] == (tmp_path / "a.gguf").stat().st_size
    same_logits(rounded(model, kind), tmp_path / "a.gguf")


def test_q8_0_fills_channels_up_to_whole_blocks(saved, tmp_path):
    model = model_of("llama", RAGGED, hidden_size=96, head_dim=32)
    export_gguf(str(saved(model)), tmp_path / "a.gguf", type="q8_0")
    file = GgufFile(tmp_path / "a.gguf")
    assert file["feed_forward_length"] == [32, 32, 32, 32, 32]
    assert {file.kinds[name] for name, tensor in file.tensors.items() if tensor.ndim == 2} == {"Q8_0"}
    same_logits(rounded(model, "Q8_0"), tmp_path / "a.gguf")


def test_q8_0_leaves_rows_that_are_no_whole_blocks_in_f16(saved, tmp_path):
    export_gguf(str(saved(model_of("llama", RAGGED))), tmp_path / "a.gguf", type="q8_0")  # rows of 48
    assert GgufFile(tmp_path / "a.gguf").kinds["token_embd.weight"] == "F16"


def test_channels_in_multiples(saved, tmp_path):
    model = model_of("llama", RAGGED)
    export_gguf(str(saved(model)), tmp_path / "a.gguf", type="f32", mlp_multiple=16)
    assert GgufFile(tmp_path / "a.gguf")["feed_forward_length"] == [32, 32, 16, 16, 32]
    same_logits(model, tmp_path / "a.gguf")


def test_weights_are_those_of_the_checkpoint(saved, tmp_path):
    """Value by value, for a layer that nothing is added to: only queries and keys have their rows in another order."""
    model = model_of("llama", RAGGED)
    export_gguf(str(saved(model)), tmp_path / "a.gguf", type="f32")
    file, layer = GgufFile(tmp_path / "a.gguf"), model.model.layers[4]
    for name, module in (("attn_v", layer.self_attn.v_proj), ("ffn_down", layer.mlp.down_proj)):
        assert torch.equal(file.tensors[f"blk.4.{name}.weight"], module.weight)
    for name, module in (("attn_q", layer.self_attn.q_proj), ("attn_k", layer.self_attn.k_proj)):
        written = file.tensors[f"blk.4.{name}.weight"]
        for head in range(len(written) // 8):
            for pair in range(4):
                assert torch.equal(written[8 * head + 2 * pair], module.weight[8 * head + pair])
                assert torch.equal(written[8 * head + 2 * pair + 1], module.weight[8 * head + pair + 4])


def test_the_context_ends_where_a_sliding_window_would_begin_to_matter(saved, tmp_path, caplog):
    model = model_of("mistral", RAGGED, "mqa-window")
    export_gguf(str(saved(model)), tmp_path / "a.gguf", type="f32")
    assert GgufFile(tmp_path / "a.gguf")["context_length"] == 6
    assert "6 tokens" in caplog.text


# --- what cannot go ---


def test_a_family_that_nobody_has_checked_is_refused(saved, tmp_path, monkeypatch):
    folder = saved(make_model("granite", vocab_size=VOCABULARY))
    monkeypatch.delitem(CANDIDATES, "granite")
    with pytest.raises(UnsupportedModelError, match=r"granite.*cannot be written as GGUF.*checked are llama"):
        export_gguf(str(folder), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == [folder]


def test_architectures_are_of_families():
    assert FAMILIES.keys() == CANDIDATES.keys() | UNWRITTEN.keys()


def test_other_refusals(saved, tmp_path):
    for name, model, message in (
        (
            "yarn",
            model_of("llama", rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}),
            "dynamic",
        ),
        (
            "alpha",
            # What Hunyuan computes from alpha, Llama does not.
            model_of("llama", rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0, "alpha": 9.0}),
            "dynamic",
        ),
        ("gelu", model_of("llama", hidden_act="gelu"), "'gelu'"),
        ("bias", model_of("qwen3", UNIFORM, attention_bias=True), "no bias for ATTN_OUT"),
        (
            "order",
            model_of("smollm3", RAGGED),
            r"layer 3 to have no rotary positions, .*4th layer.* the model it has them",
        ),
        ("scale", model_of("gemma2", UNIFORM, query_pre_attn_scalar=16), r"root of 8, .*query_pre_attn_scalar 16"),
        ("partial", model_of("llama", UNIFORM, rope_parameters=HALF), "rotates whole heads, and the model 4 of 8"),
        (
            "scaled queries",
            model_of("llama", UNIFORM, rope_parameters={**YARN, "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}),
            "does not scale queries by their position",
        ),
        (
            "bases",
            model_of(
                "olmo3",
                rope_parameters={
                    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
                },
            ),
            "one base of rotary frequencies for all layers, and the model 10000, and .*window 1000",
        ),
        ("head", model_of("gemma2", UNIFORM, tie_word_embeddings=False), "no output head of its own"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            export_gguf(str(saved(model, name=name)), tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_weights_beyond_f16(saved, tmp_path):
    model = model_of("llama", RAGGED)
    model.model.embed_tokens.weight.data[7, 7] = 1e5
    folder = saved(model)
    with pytest.raises(NonFiniteError, match=r"token_embd.weight holds 100000.*`type=bf16`"):
        export_gguf(str(folder), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == [folder]  # nothing half-written
    export_gguf(str(folder), tmp_path / "a.gguf", type="bf16")


def test_a_file_is_not_replaced_unasked(saved, tmp_path):
    folder, out = str(saved(model_of("llama", RAGGED))), tmp_path / "a.gguf"
    out.write_text("mine")
    for overwrite in (False, True):  # no file of another kind is replaced
        with pytest.raises(OptionError, match="`overwrite`"):
            export_gguf(folder, out, overwrite=overwrite)
        assert out.read_text() == "mine"
    out.unlink()
    export_gguf(folder, out)
    with pytest.raises(OptionError, match="`overwrite`"):
        export_gguf(folder, out)
    export_gguf(folder, out, overwrite=True)
    assert GgufFile(out).architecture == "deci"
    with pytest.raises(OptionError, match="folder"):
        export_gguf(folder, tmp_path)
    with pytest.raises(OptionError, match="q4"):
        export_gguf(folder, out, type="q4", overwrite=True)


def test_without_the_package(saved, tmp_path, monkeypatch):
    folder = str(saved(model_of("llama", RAGGED)))
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'gguf>=0\.10'"):
        export_gguf(folder, tmp_path / "a.gguf")


# --- tokenizer ---


def test_tokenizer_of_bytes(saved, tmp_path):
    tokenizer = byte_level()
    export_gguf(str(saved(model_of("llama", RAGGED), tokenizer)), tmp_path / "a.gguf")
    fields = GgufFile(tmp_path / "a.gguf").fields
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"][:TOKENS] == tokenizer.convert_ids_to_tokens(range(TOKENS))
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert len(fields["tokenizer.ggml.merges"]) == TOKENS - 256 - 3
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def test_transformers_reads_the_tokenizer_back(saved, tmp_path):
    tokenizer = byte_level()
    export_gguf(str(saved(model_of("llama", UNIFORM), tokenizer)), tmp_path / "a.gguf")
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in ("Once upon a time", "the little foxes, and more:  ünïcode\n\n", "1999"):
        assert (
            back(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        )


def test_sentencepiece_tokenizer(saved, tmp_path):
    tokenizer = sentencepiece()
    rows = len(tokenizer) + 3
    export_gguf(str(saved(model_of("llama", RAGGED, vocab_size=rows), tokenizer)), tmp_path / "a.gguf")
    fields = GgufFile(tmp_path / "a.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert tokens[-3:] == [f"[PAD{token_id}]" for token_id in range(rows - 3, rows)]
    assert fields["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    assert fields["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    ranked = sorted(("he", "▁t", "the", "▁the", "a"), key=lambda piece: -scores[piece])
    assert ranked == ["he", "▁t", "the", "▁the", "a"]
