"""The page docs/recipe.md, made from the option classes so that it cannot drift.

python -m prunus.pipeline.recipe_page > docs/recipe.md
"""

from __future__ import annotations

from prunus.pipeline.job_file import PRESETS, Key, job_keys

__all__ = ["recipe_page"]

HEAD = """# Recipes and settings

A recipe says how a model is pruned. `--recipe` takes a name ({names}) or a YAML file; `--set KEY=VALUE` overrides any
key of this page. A file may give any part; everything else is the default. `prunus recipe default` prints a recipe
with all its keys, and every result holds prunus/recipe.yaml, from which the same command makes it again:

```sh
prunus prune --recipe RESULT/prunus/recipe.yaml --out again
```

The same keys are the fields of the classes in Python: `Recipe(rounds=1, scoring=ScoringOptions(method="taylor"))`.
This page is generated: `python -m prunus.pipeline.recipe_page > docs/recipe.md`.
"""

SECTIONS = {
    "": "Job",
    "scoring": "How groups are ranked",
    "selection": "Which groups may be cut",
    "target": "What the ratio is a share of",
    "repair": "How the remaining weights are repaired (`repair: null` = plain slicing)",
    "calibration": "The text that importance is measured on",
    "evaluation": "How the models before and after are compared",
    "run": "Where and how the model runs",
    "output": "What is kept beside the result",
}


def recipe_page() -> str:
    """The page as Markdown."""
    lines = [HEAD.format(names=", ".join(PRESETS))]
    by_section: dict[str, list[Key]] = {}
    for key in job_keys().values():
        by_section.setdefault(key.path.split(".")[0] if "." in key.path else "", []).append(key)
    for section, keys in by_section.items():
        lines += [f"## {SECTIONS[section]}", "", "| key | default | values | meaning |", "|---|---|---|---|"]
        for key in keys:
            cells = (f"`{key.path}`", f"`{key.shown_default}`", key.allowed, key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(recipe_page(), end="")
