"""Folders of tiny models to export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import byte_level

from prunus.checkpoint import save_checkpoint


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Saves a model with a tokenizer as `prunus` does: `saved(model)`, `saved(model, tokenizer)`."""

    def save(model: Any, tokenizer: Any = None, name: str = "model") -> Path:
        return save_checkpoint(model, tokenizer or byte_level(), tmp_path / name, card="", extras={})

    return save
