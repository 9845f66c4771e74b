"""What recovery decides where the user leaves it open."""

from __future__ import annotations

import pytest

from prunus.recovery import RecoveryOptions


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
    assert RecoveryOptions(**given).sequences_per_step(device, processes) == expected


def test_the_rate_falls_with_the_width_and_rises_with_the_root_of_the_tokens():
    options = RecoveryOptions()
    assert options.peak_rate(576, 2048) == pytest.approx(0.35 / 576)
    assert options.peak_rate(576, 512) == pytest.approx(0.35 / 576 / 2)
    assert options.peak_rate(4096, 8192) == pytest.approx(0.35 / 4096 * 2)
    assert options.peak_rate(64, 2048) == 1e-3
    assert RecoveryOptions(train="full").peak_rate(576, 512) == options.peak_rate(576, 512)
    assert RecoveryOptions(train="lora").peak_rate(576, 512) == 1e-3
    assert RecoveryOptions(learning_rate=5e-5).peak_rate(576, 512) == 5e-5
