"""What is said about memory before a job, against arithmetic by hand and against the system's own count."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_opened import save
from tiny_families import make_model
from tiny_folder import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import prunus
from prunus.checkpoint import open_model, save_checkpoint
from prunus.errors import OptionError
from prunus.machine.byte_sizes import parse_bytes, show_bytes
from prunus.model.saved_dtype import save_in_
from prunus.sweep import estimate as module
from prunus.sweep.estimate import (
    Estimate,
    Workload,
    bytes_of_a_cut,
    choose_engine,
    estimate,
    free_memory,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_process(monkeypatch):
    monkeypatch.setattr(module, "resident_set", lambda: 0)
    for constant in ("FIRST_USE", "FIRST_SOLUTION", "GROUP_BYTES"):
        monkeypatch.setattr(module, constant, 0)


def test_the_formula_by_hand():
    """Llama with 4 layers, H 48, Q 48, K 24, C 20, V 96, untied; float32; 6 sequences of 10 in batches of 2."""
    model = make_model("llama", "gqa", num_hidden_layers=4)
    layer = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 20 + 2 * 48
    outside = 2 * 96 * 48 + 48
    kept = 2 * 10 * (4 * (12 * 48 + 4 * 48 + 4 * 24 + 6 * 20) + 24 * 48)
    head = 20 * 96 * 20
    products = 48 * 48 * 12
    found = estimate(model, torch.float32, Workload(frozenset({"gradients"}), 6, 10, 2), CPU)
    assert found.resident == int(((outside + 4 * layer) * 4 + 4 * 4 * layer + 5 * kept + head + products) * 1.1)
    streamed = (outside + layer) * 4 + 4 * layer + kept + head + products
    assert found.streamed == int((streamed + 2 * 20 * 48 * 4) * 1.1)
    in_memory = estimate(model, torch.float32, Workload(frozenset({"gradients"}), 6, 10, 2, inputs_on_disk=False), CPU)
    assert in_memory.streamed == int((streamed + 6 * 60 * 48 * 4) * 1.1)
    # Stored in half precision: embeddings and head stay so, a tensor is converted at a time, and a piece of the head.
    half = estimate(model, torch.float32, Workload(frozenset({"gradients"}), 6, 10, 2), CPU, torch.bfloat16)
    converted = outside * 2 + (layer + 96 * 48) * 4 + 48 * 48 * 2
    assert half.streamed == int((converted + 4 * layer + kept + head + products + 2 * 20 * 48 * 4) * 1.1)
    assert half.resident == found.resident


def test_repair_by_hand(tmp_path):
    """The same Llama, repaired on 6 sequences of 10: L 4, H 48, Q 48, C 20."""
    model = make_model("llama", "gqa", num_hidden_layers=4)
    layer = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 20 + 2 * 48
    outside = 2 * 96 * 48 + 48
    kept = 2 * 10 * (4 * (12 * 48 + 4 * 48 + 4 * 24 + 6 * 20) + 24 * 48)
    work = Workload(frozenset(), 6, 10, 2, repairs=True)
    found = estimate(model, torch.float32, work, CPU)
    solving, waiting = 8 * 20 * 20 + 14 * 20 * 48 + 48 * 20 * 48, 60 * 4 * (2 * 48 + 48)
    assert found.resident == int((2 * (outside + 4 * layer) * 4 + kept + solving + waiting) * 1.1)
    held = (outside + 2 * layer) * 4
    assert found.streamed == int((held + kept + solving) * 1.1)
    in_memory = estimate(model, torch.float32, replace(work, inputs_on_disk=False), CPU)
    assert in_memory.streamed == int((held + kept + solving + waiting) * 1.1)
    one_more = 60 * 4 * (48 + 48) + 4 * 20 * (20 + 48)
    assert bytes_of_a_cut(model, 12345, 60) == int((12345 * 4 + one_more) * 1.1)
    opened = open_model(save(model, tmp_path / "model"))[0]
    assert bytes_of_a_cut(opened, 12345, 60) == int((layer * 4 + one_more) * 1.1)
    # What is saved in less than the file's dtype cannot share embeddings and head.
    for each in (model, opened):
        save_in_(each, torch.bfloat16)
    narrower = estimate(model, torch.float32, work, CPU)
    assert narrower.streamed == int((held + outside * 2 + kept + solving) * 1.1)
    assert bytes_of_a_cut(opened, 12345, 60) == int((layer * 4 + outside * 2 + one_more) * 1.1)
    cuts = [estimate(model, torch.float32, Workload(cuts=cuts), CPU).streamed for cuts in (False, True)]
    assert cuts == [int((outside + layer) * 4 * 1.1), int(((outside + layer + 48 * 48) * 4 + outside * 2) * 1.1)]


def test_what_is_free(monkeypatch):
    monkeypatch.setattr(module, "resident_set", lambda: 300)
    for available, limit, free in ((1000, None, 700), (1000, 800, 500), (1000, 5000, 700), (None, 800, 500)):
        monkeypatch.setattr(module, "available_memory", lambda device, available=available: available)
        assert free_memory(CPU, limit) == free
    assert free_memory(CPU) is None
    assert free_memory(CPU, 200) == 0, "never less than nothing"


def test_forward_passes_need_no_gradients_and_depth_does_not_matter_to_the_streamed_engine():
    shallow, deep = (make_model("qwen2", num_hidden_layers=n) for n in (2, 8))
    for needs in ({"activations"}, {"gates"}, {"gradients", "squares"}):
        work = Workload(frozenset(needs), 4, 16, 1)
        assert estimate(deep, torch.float32, work, CPU).streamed == estimate(shallow, torch.float32, work, CPU).streamed
        assert estimate(deep, torch.float32, work, CPU).resident > estimate(shallow, torch.float32, work, CPU).resident
    sizes = [estimate(deep, torch.float32, Workload(frozenset({n}), 4, 16, 1), CPU) for n in ("gates", "gradients")]
    assert sizes[0].resident < sizes[1].resident
    assert sizes[0].streamed < sizes[1].streamed


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("1.5GiB", 3 * 2**29), ("512 mb", 512 * 10**6), ("4096", 4096), ("7B", 7)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size
    assert parse_bytes(show_bytes(size * 10**6)) >= size * 10**6


@pytest.mark.parametrize("text", ["", "8 gigs", "-1GB", "0GB", "GB", "1e9x"])
def test_what_is_no_size(text):
    with pytest.raises(OptionError, match="`max_memory` is"):
        parse_bytes(text)


def test_the_choice():
    needed = Estimate(resident=8 * 10**9, streamed=10**9)
    assert choose_engine(needed, "auto", None, None) == "resident"
    assert choose_engine(needed, "auto", None, 9 * 10**9) == "resident"
    assert choose_engine(needed, "auto", None, 7 * 10**9) == "streamed"
    assert choose_engine(needed, "auto", 7 * 10**9, 99 * 10**9) == "streamed"
    assert choose_engine(needed, "streamed", 10**9, None) == "streamed"
    assert choose_engine(needed, "resident", None, 1) == "resident", "without a limit, what is asked for is done"
    with pytest.raises(OptionError, match=r"smallest `max_memory` that would do is 1\.00GB"):
        choose_engine(needed, "auto", 10**9 - 1, None)
    with pytest.raises(OptionError, match=r"resident engine needs about 8\.00GB.*`engine=streamed` needs 1\.00GB"):
        choose_engine(needed, "resident", 7 * 10**9, None)


#: a process that has freed nothing yet; each engine in a fork of it, with the figure of the estimate and the peak
PROGRAM = """
import os, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
from prunus.calibration import Batch
from prunus.checkpoint import open_model
from prunus.machine.metering import metered
from prunus.statistics import WeightGradients
from prunus.sweep import sweep
from prunus.sweep.estimate import Workload, estimate

def measure(engine, folder):
    if engine == "resident":
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    else:
        model, _ = open_model(folder)
    batches = [Batch(torch.randint(0, 4096, (1, 128)), None) for _ in range(3)]
    weights = sum(p.numel() * 4 for p in model.parameters() if not p.is_meta)
    needed = estimate(model, torch.float32, Workload(frozenset({"gradients"}), 3, 128, 1), torch.device("cpu"))
    with metered() as cost:
        sweep(model, batches, [WeightGradients()], engine=engine, work=folder / "work", progress=False)
    # The weights that are there are a part of the base here, as of the need.
    print(needed.of(engine) - weights, cost.peak_bytes, flush=True)

torch.set_num_threads(1)
for engine in ("resident", "streamed"):
    if not (child := os.fork()):
        measure(engine, Path(sys.argv[1]))
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_estimate_is_close_to_the_peak_that_the_system_counts(tmp_path):
    """28 million parameters: 112 MB of weights, as much of gradients."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=4096, num_key_value_heads=4, max_position_embeddings=256, **sizes)
    folder = save(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": str(Path(prunus.__file__).parents[1])}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(found) == 2, done.stderr
    for expected, peak in found:
        assert peak <= expected <= 1.35 * peak


#: the same for a mixture whose experts are nearly all of it: scored by forward passes, cut, and saved
MIXTURE = """
import sys, torch
from pathlib import Path
from prunus.calibration import Batch
from prunus.checkpoint import open_model, save_checkpoint
from prunus.machine.metering import metered
from prunus.model.compact import kept
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan
from prunus.statistics import RoutingStatistics
from prunus.surgery import apply_plan
from prunus.sweep import sweep
from prunus.sweep.estimate import Workload, estimate

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model, tokenizer = open_model(folder, dtype=sys.argv[2])
batches = [Batch(torch.randint(0, 250, (1, 128)), None) for _ in range(3)]
weights = sum(kept(p).nbytes for p in model.parameters() if not p.is_meta)
workload = Workload(frozenset({"routing"}), 3, 128, 1, cuts=True)
needed = estimate(model, model.dtype, workload, torch.device("cpu"), torch.bfloat16)
with metered() as cost:
    sweep(model, batches, [RoutingStatistics(True)], engine="streamed", work=folder / "work", progress=False)
    geometry = Geometry.of(model)
    half = {"attention": 1, "mlp": 1, "expert": 2}
    kept = [{axis: range(w[axis] // half[axis]) for axis in geometry.axes} for w in geometry.widths]
    save_checkpoint(apply_plan(model, Plan.from_kept(geometry, kept)), tokenizer, folder / "out", card="", extras={})
print(needed.streamed - weights, cost.peak_bytes, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float32"])
def test_the_experts_of_a_layer_are_there_once(dtype, tmp_path):
    """Layers of 100 MB in bfloat16, a fifth of all that there is: a second copy would be seen."""
    experts = {"moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 2}
    sizes = {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=260, head_dim=64, tie_word_embeddings=False, **sizes, **experts
    )
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_checkpoint(model, byte_tokenizer(), folder, card="", extras={})
    del model
    environment = {**os.environ, "PYTHONPATH": str(Path(prunus.__file__).parents[1])}
    command = [sys.executable, "-c", MIXTURE, str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    expected, peak = (int(word) for word in done.stdout.split())
    assert 0.95 * peak <= expected <= 1.2 * peak
