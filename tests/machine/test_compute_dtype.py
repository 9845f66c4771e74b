"""Which dtype a model computes in, by a measurement of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import prunus
from prunus.machine import compute_dtype as module
from prunus.machine.compute_dtype import compute_dtype

CPU, SIZES = torch.device("cpu"), {"hidden_size": 64, "channels": 176}
#: names that CPUs have for instructions on bfloat16: the suite may know them, the package measures
NATIVE = ("avx512_bf16", "amx_bf16", "bf16")
#: the real measurement, without its cache: the suite puts an answer in its place
MEASURED = module._measured.__wrapped__


@pytest.fixture
def measured(monkeypatch):
    """`measured(times)`: half precision takes so many times as long as float32, and nothing has been said of it."""

    def pretend(times):
        monkeypatch.setattr(module, "_measured", lambda *_: times)
        module._say_slow.cache_clear()

    return pretend


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("times", "slow"), [(0.4, False), (1.4, False), (1.6, True), (17.0, True), (float("inf"), True)]
)
def test_half_precision_where_it_is_not_slow(measured, caplog, half, times, slow):
    measured(times)
    assert compute_dtype(half, CPU, **SIZES) == (torch.float32 if slow else half)
    assert ("computing in float32" in caplog.text) == slow
    if times == 17.0:
        assert "take 17 × as long on this cpu" in caplog.text
        assert compute_dtype(half, CPU, **SIZES) == torch.float32
        assert len(caplog.records) == 1, "it is said once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_no_half_precision_is_not_measured(monkeypatch, dtype):
    monkeypatch.setattr(module, "_measured", lambda *_: pytest.fail("measured"))
    assert compute_dtype(dtype, CPU, **SIZES) == dtype


@pytest.mark.parametrize(("native", "bfloat16"), [(True, torch.bfloat16), (False, torch.float32)])
def test_on_cuda_the_driver_knows(monkeypatch, native, bfloat16):
    monkeypatch.setattr(module, "_measured", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    cuda = torch.device("cuda")
    assert compute_dtype(torch.bfloat16, cuda, **SIZES) == bfloat16
    assert compute_dtype(torch.float16, cuda, **SIZES) == torch.float16


def test_the_measured_ratio_is_that_of_the_times():
    seconds = {torch.float32: 0.002, torch.bfloat16: 0.008}

    def product(left, right):
        end = time.thread_time() + seconds[left.dtype]
        while time.thread_time() < end:
            pass
        return left

    assert module._ratio(product, (torch.ones(1, 1), torch.ones(1, 1)), torch.bfloat16) == pytest.approx(4, rel=0.3)


def test_a_device_without_such_numbers(monkeypatch):
    def refuse(*_):
        raise TypeError("no bfloat16 here")

    monkeypatch.setattr(module, "_ratio", refuse)
    assert MEASURED(torch.bfloat16, CPU, 256, 256) == float("inf")


def test_threads_are_as_before():
    torch.set_num_threads(2)
    try:
        MEASURED(torch.bfloat16, CPU, 256, 256)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["all instructions", "AVX2"])
def test_this_machine(masked):
    """The measurement agrees with the CPU's instructions, and with those that are left when some are masked."""
    native = any(torch.cpu.get_capabilities().get(name) for name in NATIVE)
    if masked and sys.platform != "linux":
        pytest.skip("instructions are masked by a setting of oneDNN")
    program = (
        "import torch; from prunus.machine.compute_dtype import compute_dtype as c; "
        "print(c(torch.bfloat16, torch.device('cpu'), hidden_size=576, channels=1536))"
    )
    mask = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"} if masked else {}
    environment = {**os.environ, **mask, "PYTHONPATH": str(Path(prunus.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == ("torch.bfloat16" if native and not masked else "torch.float32")
