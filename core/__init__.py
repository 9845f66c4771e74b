"""The original import path of global pruning, kept working over the package `prunus`.

In a checkout without `prunus` installed, importing this puts the checkout's `src` on the import path.
"""

import importlib.util
import sys
from pathlib import Path

# An installed prunus comes first: a checkout must not shadow what the user chose to install.
if importlib.util.find_spec("prunus") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
