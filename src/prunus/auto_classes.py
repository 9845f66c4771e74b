"""Pruned folders in transformers' Auto classes, from the first of them that is loaded.

The classes of pruned models need transformers' modeling code, which takes longer to import than everything else. So
`import prunus` only leaves word with the Auto classes; whoever opens a pruned folder has the classes registered then.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from prunus.model.families import PRUNED_PREFIX

__all__ = ["register_when_asked"]


class _Registered(dict[str, Any]):
    """Configuration classes by model type, with those of prunus from the first question for one of them."""

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and key.startswith(PRUNED_PREFIX) and not super().__contains__(key):
            import_module("prunus.checkpoint")  # registers
        return super().__contains__(key)


def register_when_asked() -> None:
    """Have transformers know the model types that prunus writes, once one of them is asked for."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = getattr(CONFIG_MAPPING, "_extra_content", None)
    if isinstance(known, dict):
        CONFIG_MAPPING._extra_content = _Registered(known)
    else:  # transformers keeps them elsewhere than in the versions that this was written for
        import_module("prunus.checkpoint")
