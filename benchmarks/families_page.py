"""The page docs/families.md and the README's table, made from the family registry so that they cannot drift.

Where pruned models run is read off what the benchmarks measured (benchmarks/results):

    python benchmarks/families_page.py > docs/families.md
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.export.llama_cpp import UNWRITTEN
from prunus.model.families import AXES, FAMILIES, MULTIMODAL, UNFIT, Multimodal

__all__ = ["RESULTS", "families_page", "families_table", "where_they_run"]

RESULTS = Path(__file__).parent / "results"
ANY, EXPERTS, UNIFORM, DEPTH, PADDED, NOT_TRIED = (
    "any shape", "experts", "`uniform`", "`depth`", "padded", "not tried",
)  # fmt: skip
#: no class loads those whose layers have unequal numbers of experts
_MIXTURES = {name for name, family in FAMILIES.items() if family.mixture}
#: architectures of llama.cpp with a width per layer, and their conditions
_PER_LAYER = {"deci": "", "openelm": " with tied embeddings, else padded"}
#: family → what else its GGUF files ask for
_GGUF_NOTES = {
    **dict.fromkeys(("phi3", "glm"), "heads always to the hidden size"),
    "exaone4": "heads always to the hidden size; sliding windows in models of 64 layers only",
    "olmoe": "needs as many key/value heads as query heads",
    "smollm3": "not with layers removed: every fourth layer of a file goes without positions",
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo3"), "with layers removed a recent llama.cpp"),
}
#: family → why tokens differ in vLLM
_VLLM_NOTES = {"ernie4_5_moe": "its router on CPUs leaves out the correction of the scores"}
HEAD = """# Families

The model types that prunus cuts, and where pruned models of each were run. This page is generated:
`python benchmarks/families_page.py > docs/families.md`. How to add one: [extending.md](extending.md#a-family).

"""

INSIDE = """
## Multimodal models

Only the language model is scored, cut, repaired and saved anew; vision tower and processor files stay as they
are. The ratio is a share of the language model's parameters; results give both counts. They load with
`AutoModelForImageTextToText`. `--text-only` (`output.text_only`) saves the language model by itself, as a model of the
family.

"""

WHERE = """
## Where they run

"any shape" includes layers of different widths, absent blocks and removed layers (`--shape ragged`). "padded" files are
written by `prunus export --to gguf`, with every layer filled with zeros to the widest; `--shape uniform` avoids that.
`uniform` and `depth` run as the stock class with that `--shape`; a shape that is not named was not tried, did not load,
or gave other tokens than transformers. "dense" is a ragged model filled up by `prunus export --to dense`. "× 2" was run
with tensor parallel 2. Mixtures have equal layers: "experts" have lost experts alone, those of `uniform`
attention groups too.

"""

CHECKS = """
| program | checked by |
|---|---|
| transformers 5 | `make test`: every family on both axes, against the dense model with the groups masked |
| transformers 4.57 | `make transformers4-check`, without prunus |
| vLLM, llama.cpp | `make deploy-check`, measurements [here](../benchmarks/RESULTS.md#deployment) and \
[there](../benchmarks/RESULTS.md#every-family-in-vllm-llamacpp-and-mlx-lm) |
| MLX | `make mlx-check`, mlx-lm on the CPU |

## Refused

Other mixtures of experts, encoders, state-space models and hybrids with one are refused, with the reason. These dense
types are, too:

"""


def families_table() -> str:
    """The families as the README lists them, in Markdown."""
    rows = ((f"`{family.model_type}`", family.title, family.notes) for family in FAMILIES.values())
    return _table(("family", "models", "notes"), rows)


def where_they_run(results: Path = RESULTS) -> dict[str, dict[str, str]]:
    """Program → family → shapes of pruned models that agree there with transformers, or "not tried".

    Args:
        results: folder with the JSON files of the benchmarks; a file that is missing makes its program "not tried".
    """
    llama_cpp = _read(results, "llama-cpp-families").get("families", {})
    columns: dict[str, dict[str, str]] = {
        # The test suite, without a file of results.
        "transformers 5": {name: UNIFORM if name in _MIXTURES else ANY for name in FAMILIES},
        "transformers 4.57": _transformers_4(_read(results, "transformers4")),
        "vLLM": {
            name: _vllm(name, facts) for name, facts in _read(results, "vllm-families").get("families", {}).items()
        },
        "llama.cpp": {
            **{name: f"not written: {why}" for name, why in UNWRITTEN.items()},
            **{name: _gguf(name, facts, llama_cpp) for name, facts in llama_cpp.items()},
        },
        "MLX": {name: _shapes(facts) for name, facts in _read(results, "mlx-families").get("families", {}).items()},
    }
    return {program: {name: found.get(name, NOT_TRIED) for name in FAMILIES} for program, found in columns.items()}


def families_page(results: Path = RESULTS) -> str:
    """The page as Markdown."""
    programs = where_they_run(results)
    run = ((f"`{name}`", *(found[name] for found in programs.values())) for name in FAMILIES)
    inside = (
        (
            f"`{kind.model_type}`",
            kind.title,
            ", ".join(f"`{family}`" for family in dict.fromkeys(kind.parts.values())),
            _limits(kind),
        )
        for kind in MULTIMODAL.values()
    )
    refused = ((f"`{model_type}`", why) for model_type, why in UNFIT.items())
    parts = (
        HEAD,
        families_table(),
        INSIDE,
        _table(("type", "models", "language model", "notes"), inside),
        WHERE,
        _table(("family", *programs), run),
        CHECKS,
        _table(("type", "reason"), refused),
    )
    return "".join(parts)


def _read(results: Path, name: str) -> Mapping[str, Any]:
    path = results / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _transformers_4(found: Mapping[str, Any]) -> dict[str, str]:
    columns = dict.fromkeys(found.get("unknown", ()), "not in this version")
    for case, facts in found.get("cases", {}).items():
        family, *_, shape = case.split("-")
        if facts["agrees"] and columns.get(family) != ANY:
            columns[family] = ANY if shape == "everything" else UNIFORM
    return columns


def _agrees(facts: Mapping[str, Any] | None) -> bool:
    return bool(facts) and facts.get("equal_tokens", -1) == facts.get("tokens")  # type: ignore[union-attr]


def _shapes(found: Mapping[str, Any]) -> str:
    """Of a program that was given several shapes, those in which all greedy tokens are equal."""
    if _agrees(found.get("ragged")):
        return ANY + (", × 2" if _agrees(found.get("tensor parallel")) else "")
    names = {"experts": EXPERTS, "uniform": UNIFORM, "depth": DEPTH, "dense": "dense"}
    agreeing = ", ".join(name for shape, name in names.items() if _agrees(found.get(shape)))
    loaded = any("tokens" in facts for facts in found.values())
    unpruned = "tokens" in found.get("whole", {}) and not _agrees(found["whole"])
    return agreeing or (f"other tokens{', unpruned too' if unpruned else ''}" if loaded else "does not load")


def _vllm(family: str, found: Mapping[str, Any]) -> str:
    return ": ".join(filter(None, (_shapes(found), _VLLM_NOTES.get(family))))


def _gguf(family: str, facts: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if not _agrees(facts):
        return "other tokens" if "tokens" in facts else NOT_TRIED
    if family in _MIXTURES:
        form = EXPERTS + (f", {UNIFORM}" if _agrees(found.get(f"{family}, uniform")) else "")
    else:
        per_layer = facts["architecture"] in _PER_LAYER
        form = ANY + _PER_LAYER[facts["architecture"]] if per_layer else PADDED
    return "; ".join((form, *filter(None, (_GGUF_NOTES.get(family),))))


def _limits(kind: Multimodal) -> str:
    """What cannot be cut of a multimodal model's language model, while it is inside."""
    limits = []
    if kind.axes != AXES:
        limits.append(f"{', '.join(kind.axes)} axis only, or with `--text-only`")
    if kind.early_layers:
        limits.append("the first layers, which take in image features, stay whole, unless with `--shape uniform`")
    return "; ".join(limits)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (f"| {' | '.join(cells)} |".replace("  ", " ") for cells in (head, *rows))
    first, *others = lines
    return "\n".join((first, "|---" * len(head) + "|", *others, ""))


if __name__ == "__main__":
    print(families_page(), end="")
