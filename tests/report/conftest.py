"""Real results of tiny models to report on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile import HOSTILE
from plain import plain_recipe, plain_scoring
from tiny_folder import TEXT, save_tiny_folder

from prunus.pipeline.compare import compare
from prunus.pipeline.job import Job
from prunus.pipeline.options import CalibrationOptions, EvaluationOptions
from prunus.pipeline.prune import prune_job


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    """A dense model folder with a hostile name, and a text file."""
    place = tmp_path_factory.mktemp("sources")
    text = place / "text <b>.txt"
    text.write_text(TEXT, encoding="utf-8")
    return save_tiny_folder(place / HOSTILE, "llama", "gqa", num_hidden_layers=3, max_position_embeddings=96), text


@pytest.fixture(scope="session")
def pruned(tmp_path_factory, sources) -> Path:
    """What `prune` writes."""
    dense, text = sources
    out = tmp_path_factory.mktemp("results") / f"small {HOSTILE}"
    prune_job(
        Job(
            str(dense),
            0.3,
            plain_recipe(),
            CalibrationOptions(str(text), samples=4, seq_len=24),
            EvaluationOptions(held_out=2),
        ),
        out,
        command="prunus prune </code><script>alert(2)</script>",
        progress=False,
    )
    return out


@pytest.fixture(scope="session")
def comparison(tmp_path_factory, sources) -> Path:
    """What `compare` writes."""
    dense, text = sources
    out = tmp_path_factory.mktemp("comparisons") / "comparison"
    job = Job(
        str(dense),
        calibration=CalibrationOptions(str(text), samples=4, seq_len=24),
        evaluation=EvaluationOptions(str(text), seq_len=32, windows=2),
    )
    recipes = {
        method: plain_recipe(plain_scoring(method=method, normalize="layer_sum")) for method in ("magnitude", "random")
    }
    compare(job, recipes, [0.1, 0.3], out, progress=False)
    return out
