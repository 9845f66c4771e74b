"""The batch size that is chosen where the user leaves it open."""

from __future__ import annotations

import pytest
import torch

from prunus.sweep.batch_size import chosen_batch_size
from prunus.sweep.engine import ModelOptions, config_of, settled
from prunus.sweep.estimate import Workload

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("seq_len", [0, 24, 512, 2048])
def test_on_a_cpu_one(seq_len):
    assert chosen_batch_size(Workload(sequences=128, seq_len=seq_len), CPU, lambda size: True) == 1


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (3, 2), (8, 8), (100, 32)])
def test_on_cuda_the_largest_that_fits(most, expected):
    workload = Workload(sequences=128, seq_len=512)
    assert chosen_batch_size(workload, CUDA, lambda size: size <= most) == expected


def test_what_is_asked_for_stays(folder):
    work = {"needs": frozenset({"gates"}), "sequences": 16, "seq_len": 64}
    assert settled(config_of(str(folder)), ModelOptions(), Workload(**work)).batch_size == 1
    assert settled(config_of(str(folder)), ModelOptions(batch_size=3), Workload(**work)).batch_size == 3
