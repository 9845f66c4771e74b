"""What recovery decides where the user leaves it open."""

from __future__ import annotations

import pytest

from prunus.recovery import RecoveryOptions
from prunus.recovery.step import peak_rate, sequences_per_step


@pytest.mark.parametrize(
    ("given", "device", "processes", "expected"),
    [
        ({}, "cpu", 1, 1),
        ({}, "cpu", 3, 3),
        ({}, "cuda", 1, 4),
        ({}, "cuda", 3, 6),
        ({}, "cuda", 8, 8),
        ({"micro_batch": 2}, "cpu", 1, 2),
        ({"micro_batch": 8}, "cuda", 2, 16),
        ({"batch_size": 6}, "cpu", 4, 6),
        ({"batch_size": 6, "micro_batch": 3}, "cuda", 1, 6),
    ],
)
def test_sequences_per_step(given, device, processes, expected):
    """As many as are said; else those of the device, in whole passes of every process."""
    assert sequences_per_step(RecoveryOptions(**given), device, processes) == expected


def test_the_rate_falls_with_the_width_and_rises_with_the_root_of_the_tokens():
    options = RecoveryOptions()
    assert peak_rate(options, 576, 2048) == pytest.approx(0.35 / 576)
    assert peak_rate(options, 576, 512) == pytest.approx(0.35 / 576 / 2)
    assert peak_rate(options, 4096, 8192) == pytest.approx(0.35 / 4096 * 2)
    assert peak_rate(options, 64, 2048) == 1e-3
    assert peak_rate(RecoveryOptions(train="full"), 576, 512) == peak_rate(options, 576, 512)
    assert peak_rate(RecoveryOptions(train="lora"), 576, 512) == 1e-3
    assert peak_rate(RecoveryOptions(learning_rate=5e-5), 576, 512) == 5e-5
