"""The page docs/families.md and the README's table, made from the family registry so that they cannot drift.

python -m prunus.pipeline.families_page > docs/families.md
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prunus.model.families import AXES, FAMILIES, MULTIMODAL, UNFIT, Multimodal

__all__ = ["PROGRAMS", "families_page", "families_table"]

ANY, EQUAL, UNIFORM, PADDED, NOT_TRIED = ("any shape", "`uniform`, `depth`", "`uniform`", "padded", "not tried")
#: no class loads those whose layers have unequal numbers of experts
_MIXTURES = {name for name, family in FAMILIES.items() if family.mixture}
_PER_LAYER = ("llama", "mistral", "qwen2", "qwen3")

#: program → family → shapes of pruned models that were run there and agree with transformers; a family that is not
#: named was not tried
PROGRAMS: dict[str, dict[str, str]] = {
    "transformers 5": {**dict.fromkeys(FAMILIES, ANY), **dict.fromkeys(_MIXTURES, UNIFORM)},
    "transformers 4.57": {**dict.fromkeys(FAMILIES.keys() - _MIXTURES, ANY), "ministral3": "not in this version"},
    "vLLM": {
        **dict.fromkeys(_PER_LAYER, ANY),
        **dict.fromkeys(("granite", "phi3", "smollm3", "gemma2", "gemma3_text"), UNIFORM),
        "olmo2": EQUAL,
    },
    "llama.cpp": {
        **dict.fromkeys(_PER_LAYER, ANY),
        "qwen3": f"{ANY} with tied embeddings, else padded",
        **dict.fromkeys(("granite", "olmo2"), PADDED),
        "phi3": "padded; heads always to the hidden size",
        "smollm3": "padded; not with layers removed: every fourth layer of a file goes without positions",
        **dict.fromkeys(("gemma2", "gemma3_text"), "padded; with layers removed a recent llama.cpp"),
    },
    "MLX": {},
}

HEAD = """# Families

The model types that prunus cuts, and where pruned models of each were run. This page is generated:
`python -m prunus.pipeline.families_page > docs/families.md`. How to add one: [extending.md](extending.md#a-family).

"""

INSIDE = """
## Multimodal models

Of these the language model is scored on text, cut, repaired and written back; vision tower and processor files stay as
they are. The ratio is a share of the language model's parameters; results give both counts. They load with
`AutoModelForImageTextToText`. `--text-only` (`output.text_only`) saves the language model by itself, as a model of the
family.

"""

WHERE = """
## Where they run

"any shape" includes layers of different widths, absent blocks and removed layers (`--shape ragged`, the default).
"padded" files are written by `prunus export --to gguf`, with every layer filled with zeros to the widest; `--shape
uniform` avoids that. Values of `--shape` were run as the stock class; one that is not named was not tried, or gave
other numbers.

"""

CHECKS = """
| program | checked by |
|---|---|
| transformers 5 | `make test`: every family on both axes, against the dense model with the groups masked |
| transformers 4.57 | `make transformers4-check`, without prunus |
| vLLM, llama.cpp | `make deploy-check`, measurements [here](../benchmarks/RESULTS.md#deployment) and \
[there](../benchmarks/RESULTS.md#other-families-in-llamacpp-and-vllm) |
| MLX | nothing yet |

## Refused

Other mixtures of experts, encoders, state-space models and hybrids with one are refused, with the reason. These dense
types are, too:

"""


def families_table() -> str:
    """The families as the README lists them, in Markdown."""
    rows = ((f"`{family.model_type}`", family.title, family.notes) for family in FAMILIES.values())
    return _table(("family", "models", "notes"), rows)


def families_page() -> str:
    """The page as Markdown."""
    run = (
        (f"`{model_type}`", *(shapes.get(model_type, NOT_TRIED) for shapes in PROGRAMS.values()))
        for model_type in FAMILIES
    )
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
        _table(("family", *PROGRAMS), run),
        CHECKS,
        _table(("type", "reason"), refused),
    )
    return "".join(parts)


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
