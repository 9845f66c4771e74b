"""`prunus recipe`: a recipe, or what every setting means."""

from __future__ import annotations

from typing import Literal

from prunus.cli.flags import Flag

__all__ = ["recipe"]


def recipe(
    name: str | None = None, /, *, command: Literal["prune", "recover", "eval"] = "prune", json: Flag = False
) -> None:
    """List every setting with its meaning and default, or write a recipe out.

    Args:
        name: default, original, fast, or a YAML file: print it with all its settings, ready to be edited and given to
            `prunus prune --recipe`.
        command: whose settings these are; `score`, `plan` and `compare` share those of `prune`.
        json: print the settings as JSON.
    """
    import yaml

    from prunus.cli.printing import print_json
    from prunus.pipeline.measured import MEASURED
    from prunus.pipeline.sheets import SHEETS

    sheet, measured = SHEETS[command], MEASURED if command == "prune" else {}
    if name is not None:
        text = sheet.text(sheet.read(name, (), {}))
        if json:
            print_json(yaml.safe_load(text))
        else:
            print(text, end="")
    elif json:
        print_json(
            [
                {
                    "key": key.path,
                    "default": key.shown_default,
                    "allowed": key.allowed,
                    "meaning": key.meaning,
                    "measured": measured.get(key.path),
                }
                for key in sheet.keys.values()
            ]
        )
    else:
        for key in sheet.keys.values():
            print(f"{key.path} = {key.shown_default}\n    {key.meaning} ({key.allowed})")
            if key.path in measured:
                print(f"    Measured: {measured[key.path]}")
