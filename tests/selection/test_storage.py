"""Bytes of stored weights: against llama.cpp's published table, and tensor by tensor against the package gguf."""

from __future__ import annotations

import pytest
import torch
from tiny_families import make_model
from transformers import LlamaConfig, Qwen3Config

from prunus.checkpoint import empty_model
from prunus.errors import OptionError
from prunus.export.llama_cpp import ARCHITECTURES, CANDIDATES
from prunus.model.geometry import Geometry
from prunus.model.widths import LayerWidths
from prunus.selection.storage import BLOCKS, FILE_TYPES, FUSED_WHERE_RAGGED, check_storage, storage_costs

gguf = pytest.importorskip("gguf")

#: bits per weight of Llama 3.1 8B, from tools/quantize/README.md of llama.cpp
PUBLISHED = {
    "Q2_K_S": 2.9697,
    "Q2_K": 3.1593,
    "Q3_K_S": 3.6429,
    "Q3_K_L": 4.2979,
    "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944,
    "Q5_K_S": 5.5704,
    "Q5_K_M": 5.7036,
    "Q6_K": 6.5633,
    "Q8_0": 8.5008,
    "F16": 16.0005,
}


@pytest.fixture(scope="module")
def llama_8b() -> Geometry:
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8)
    return Geometry.of(empty_model(config, torch.bfloat16))


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_of_llama_cpp(llama_8b, name):
    assert 8 * storage_costs(llama_8b, name).total / llama_8b.total_parameters == pytest.approx(
        PUBLISHED[name], abs=5e-5
    )


def test_blocks_are_those_of_gguf():
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert all(sizes[name] == size for name, size in BLOCKS.items())


def stored(name: str, tensor: torch.Tensor, usual: str) -> int:
    """Bytes of one tensor in a file whose matrices all have one type, but for the head."""
    if tensor.ndim == 1:
        return 4 * tensor.numel()
    rows, columns = tensor.shape
    head = "lm_head" in name or "embed" in name  # tied
    for kind in ("Q6_K" if head else usual, {"Q4_0": "F16"}.get(usual, usual), "Q8_0" if head else "F16", "F16"):
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        if columns % values == 0 and not (head and kind == usual):
            return rows * columns // values * size
    raise AssertionError


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_file_tensor_by_tensor(family):
    model = make_model(family, tie_word_embeddings=True)
    geometry = Geometry.of(model)
    named = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head")}
    assert storage_costs(geometry, "Q4_0").total == sum(stored(name, tensor, "Q4_0") for name, tensor in named.items())
    assert storage_costs(geometry, "bfloat16").total == 2 * sum(tensor.numel() for tensor in named.values())


def test_what_is_left_of_a_cut():
    """Whole blocks of channels save their rows; odd numbers of channels are filled up."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    costs = storage_costs(Geometry.of(empty_model(config, torch.float32)), "Q4_K_M")

    def left(*widths: tuple[int, int]) -> int:
        return costs.left([LayerWidths(*width) for width in widths] + [LayerWidths(2, 1024)] * (8 - len(widths)))

    # Layer 0 has down_proj in Q6_K, layer 1 in Q4_K.
    assert costs.total - left((2, 768)) == 2 * 256 * 144 + 256 * 210
    assert costs.total - left((2, 1024), (2, 768)) == 2 * 256 * 144 + 256 * 144
    assert left((2, 513)) == left((2, 544))
    assert left((2, 1024), (0, 1024)) == costs.total - (256 + 2 * 128) * 144 - 256 * 144 - 4 * 256
    assert left((0, 1024)) == left((1, 1024))  # the first layer's number of heads is read as the model's
    assert all((curve[axis][1:] >= curve[axis][:-1]).all() for curve in costs.blocks for axis in curve)


def test_files_whose_form_the_cut_decides():
    """Ragged and tied, Qwen 3 has q, k and v in one matrix of Q5_K; with a head of its own, v has Q4_K or Q6_K."""
    config = Qwen3Config(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    bytes_of = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
    apart = [(256 + 128) * bytes_of["Q4_K"] + 128 * bytes_of["Q6_K" if i in (0, 3, 6, 7) else "Q4_K"] for i in range(8)]
    fused = [(256 + 2 * 128) * bytes_of["Q5_K"]] * 8
    for tied, expected in ((False, apart), (True, map(max, apart, fused))):
        config.tie_word_embeddings = tied
        costs = storage_costs(Geometry.of(empty_model(config, torch.float32)), "Q4_K_M")
        shared = 256 * bytes_of["Q4_K"] + 4 * (256 + 2 * 64)  # the output projection; norms of the layer and of heads
        assert [curve["attention"][-1] for curve in costs.blocks] == [shared + each for each in expected]


def test_families_whose_form_the_cut_decides():
    """Those whose own architecture has other matrices than the one for layers that differ."""
    found = [family for family, names in CANDIDATES.items() if len({ARCHITECTURES[name].fused for name in names}) > 1]
    assert found == list(FUSED_WHERE_RAGGED)
    assert not any(ARCHITECTURES[name].untied for name in ARCHITECTURES if ARCHITECTURES[name].fused)


def test_names():
    assert check_storage("q4_k_m") == "Q4_K_M"
    assert check_storage("BFloat16") == "bfloat16"
    assert set(FILE_TYPES.values()) <= BLOCKS.keys()
    with pytest.raises(OptionError, match=r"type 'Q4' is unknown; choose one of float32, .*Q4_K_M"):
        check_storage("Q4")
