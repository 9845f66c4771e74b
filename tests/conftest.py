"""Fixtures and settings for the whole suite."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from tiny_families import make_model, random_tokens
from tiny_folder import TEXT, save_tiny_folder
from torch import Tensor
from tqdm import tqdm

from prunus.machine import compute_dtype
from prunus.model.geometry import Geometry
from prunus.pipeline import probe

# tqdm's lock is shared with processes that a test forks: one that is killed while it holds the lock would stop all
# others for good. A lock of threads is each process' own, and a forked one begins with a free one.
tqdm.set_lock(threading.RLock())
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))

# The same examples in every run: a failure in CI is one at home. `--hypothesis-profile=search` looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=30)
# For `make mutations`: that a test fails is all that is asked there, and the smallest example takes minutes to find.
settings.register_profile(
    "unshrunk", parent=settings.get_profile("repeatable"), phases=(Phase.explicit, Phase.reuse, Phase.generate)
)
settings.register_profile(
    "search", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """Seven thousand tests and all libraries stay to the end: the garbage collector need not look through them again.

    Training and its libraries call it after each run, and it took a second every time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small are slower on many threads, and several test processes would fight over the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def half_precision_is_fast() -> Iterator[None]:
    """Models compute in the dtype of their checkpoint on every machine; tests of the other case say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_dtype, "_measured", lambda *_: 1.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def forecasts_are_rough() -> Iterator[None]:
    """Every command begins by measuring the machine; of what it finds, tests ask only that it is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "ALLOWANCE", 0.005)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Tests kill processes, but the power stays on: `fsync` looks at its descriptor and does not wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`benchmark("kinds")`: a program of the folder benchmarks, as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Makes models of a family: `tiny_model("qwen3", "gqa-wide-heads", num_hidden_layers=4)`."""
    return make_model


@pytest.fixture
def llama() -> Any:
    """A Llama of four layers, three attention groups of two query heads, and twenty channels."""
    return make_model("llama", "gqa", num_hidden_layers=4)


@pytest.fixture
def geometry(llama: Any) -> Geometry:
    return Geometry.of(llama)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers with a tokenizer, on disk; a test that changes it works on a copy."""
    return save_tiny_folder(tmp_path_factory.mktemp("models") / "tiny", "llama", "gqa", num_hidden_layers=3)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file to calibrate and measure on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def tokens() -> Tensor:
    """Two sequences of twelve tokens."""
    return random_tokens()
