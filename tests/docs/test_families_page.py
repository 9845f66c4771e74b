"""The tables of families in the documentation are those of the registry."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from prunus.model.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pages(benchmark):
    return benchmark("families_page")


def test_the_page_is_current(pages):
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == pages.families_page(), "run: python benchmarks/families_page.py > docs/families.md"


def test_the_readme_has_the_same_table(pages):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert pages.families_table() in readme, f"put this into README.md, under Families:\n\n{pages.families_table()}"


def test_the_chinese_readme_has_the_same_families():
    readme = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    section = readme.split("## 支持的模型系列")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE) == list(FAMILIES)


@pytest.mark.parametrize("name", ["transformers4", "vllm-families", "llama-cpp-families", "mlx-families"])
def test_results_are_there(pages, name):
    """Without its file a program reads "not tried"."""
    assert (pages.RESULTS / f"{name}.json").exists()


def test_shapes_are_those_in_which_all_tokens_are_equal(pages, tmp_path):
    equal, other, refused = (
        {"tokens": 600, "equal_tokens": 600},
        {"tokens": 600, "equal_tokens": 599},
        {"refused": "so"},
    )
    files = {
        "transformers4": {
            "unknown": ["ministral3"],
            "cases": {
                "llama-gqa-everything": {"agrees": True},
                "llama-gqa-uniform": {"agrees": True},
                "qwen3-gqa-wide-heads-everything": {"agrees": False},
                "qwen3-gqa-wide-heads-uniform": {"agrees": True},
            },
        },
        "vllm-families": {
            "families": {
                "llama": {"ragged": equal, "uniform": equal, "tensor parallel": equal},
                "qwen2": {"ragged": equal, "tensor parallel": refused},
                "qwen3": {"ragged": other, "uniform": equal, "depth": equal},
                "glm": {"ragged": refused},
                "glm4": {"whole": other, "uniform": other},
                "mixtral": {"whole": equal, "experts": equal, "uniform": refused, "depth": equal},
                "olmoe": {"whole": equal, "experts": other},
            }
        },
        "llama-cpp-families": {
            "families": {
                "llama": {**equal, "architecture": "deci"},
                "qwen3": {**equal, "architecture": "openelm"},
                "phi3": {**equal, "architecture": "phi3"},
                "granite": {**other, "architecture": "granite"},
                "olmo2": {"Q4_K_M": {"generated": 600}},
                "mixtral": {**equal, "architecture": "llama"},
                "qwen3_moe": {**equal, "architecture": "qwen3moe"},
                "qwen3_moe, uniform": {**equal, "architecture": "qwen3moe"},
            }
        },
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = pages.where_they_run(tmp_path)
    assert [found["transformers 4.57"][name] for name in ("llama", "qwen3", "ministral3", "glm")] == [
        "any shape",
        "`uniform`",
        "not in this version",
        "not tried",
    ]
    assert {name: text for name, text in found["vLLM"].items() if text != "not tried"} == {
        "llama": "any shape, × 2",
        "qwen2": "any shape",
        "qwen3": "`uniform`, `depth`",
        "glm": "does not load",
        "glm4": "other tokens, unpruned too",
        "mixtral": "experts, `depth`",
        "olmoe": "other tokens",
    }
    assert [found["llama.cpp"][name] for name in ("mixtral", "qwen3_moe")] == ["experts", "experts, `uniform`"]
    assert [found["llama.cpp"][name] for name in ("llama", "qwen3", "phi3", "granite", "olmo2")] == [
        "any shape",
        "any shape with tied embeddings, else padded",
        "padded; heads always to the hidden size",
        "other tokens",
        "not tried",
    ]
    assert set(found["MLX"].values()) == {"not tried"}
