"""The page docs/recipe.md, made from the option classes so that it cannot drift.

python benchmarks/recipe_page.py > docs/recipe.md
"""

from __future__ import annotations

from prunus.pipeline.job_file import PRESETS
from prunus.pipeline.measured import MEASURED
from prunus.pipeline.sheets import SHEETS
from prunus.settings import Key

__all__ = ["recipe_page"]

HEAD = """# Recipes and settings

A recipe says how a model is pruned. `--recipe` takes a name ({names}) or a YAML file; `--set KEY=VALUE` overrides any
key of this page. A file may give any part; everything else is the default. `prunus recipe default` prints a recipe
with all its keys, and every result holds prunus/recipe.yaml, from which the same command makes it again:

```sh
prunus prune --recipe RESULT/prunus/recipe.yaml --out again
```

[`prunus recover`](#prunus-recover) and [`prunus eval`](#prunus-eval) take `--recipe FILE` and `--set KEY=VALUE` with
keys of their own; `prunus recipe --command recover` lists them.

The same keys are the fields of the classes in Python: `Recipe(rounds=1, scoring=ScoringOptions(method="taylor"))`.
"Measured" is the perplexity of SmolLM2-135M as multiples of the dense model's, calibrated on 128 sequences of 512
tokens of C4 unless something else is said; tables, commands and machines are in
[RESULTS.md](../benchmarks/RESULTS.md) and [LOG.md](../benchmarks/LOG.md).

This page is generated: `python benchmarks/recipe_page.py > docs/recipe.md`.
"""

#: command → section → what it is about
SECTIONS = {
    "prune": {
        "": "Job",
        "scoring": "How groups are ranked",
        "selection": "Which groups may be cut",
        "target": "What the ratio is a share of",
        "repair": "How the remaining weights are repaired (`repair: null` = plain slicing)",
        "recovery": "Training after each round (`prunus recover` trains a model that is cut already)",
        "calibration": "The text that importance is measured on",
        "evaluation": "How the models before and after are compared",
        "run": "Where and how the model runs",
        "output": "What is kept beside the result",
        "fit": "A size to fit in place of the ratio",
    },
    "recover": {
        "": "Models",
        "text": "The text to train on",
        "recovery": "How the pruned model is trained",
        "run": "Where it is trained",
        "output": "What is kept meanwhile",
    },
    "eval": {
        "": "Models",
        "evaluation": "What is measured",
        "speed": "How speed is measured",
        "run": "Where and how the models run",
    },
}

#: what stands above the tables of a command other than `prune`
HEADS = {
    "recover": """## `prunus recover`

[Recovery training](recovery.md). Every result holds prunus/recovery.yaml, from which the same command makes it again:
`prunus recover --recipe RESULT/prunus/recovery.yaml --out again`.
""",
    "eval": """## `prunus eval`

[Evaluation](evaluation.md).
""",
}


def recipe_page() -> str:
    """The page as Markdown."""
    lines = [HEAD.format(names=", ".join(PRESETS))]
    for command, sheet in SHEETS.items():
        lines += [HEADS[command]] if command in HEADS else []
        mark = "###" if command in HEADS else "##"
        by_section: dict[str, list[Key]] = {}
        for key in sheet.keys.values():
            by_section.setdefault(key.path.split(".")[0] if "." in key.path else "", []).append(key)
        for section, keys in by_section.items():
            lines += [f"{mark} {SECTIONS[command][section]}", "", "| key | default | values | meaning |"]
            lines += ["|---|---|---|---|"]
            for key in keys:
                cells = (f"`{key.path}`", f"`{key.shown_default}`", key.allowed, key.meaning)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            lines.append("")
            effects = [f"- `{key.path}`: {MEASURED[key.path]}" for key in keys if key.path in MEASURED]
            if command == "prune" and effects:
                lines += ["Measured:", "", *effects, ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(recipe_page(), end="")
