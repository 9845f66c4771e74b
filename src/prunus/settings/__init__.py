"""Option classes as settings: every field has a key, which YAML files and `--set KEY=VALUE` give a value.

Keys, types, defaults and meanings come from the classes, so that files, flags, `prunus recipe` and docs/recipe.md
cannot disagree.

key.py      one setting: its path, what values it takes, what it means
sheet.py    all settings of a class: read, put together, written
yaml_file.py what a file sets, with the line of whatever is wrong
"""

from prunus.settings.key import Form, Key
from prunus.settings.sheet import Sheet

__all__ = ["Form", "Key", "Sheet"]
