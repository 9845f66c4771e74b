"""The batch size that is chosen where the user leaves it open."""

from __future__ import annotations

import pytest
import torch

from prunus.sweep.batch_size import chosen_batch_size
from prunus.sweep.engine import ModelOptions, config_of, memory_needed, settled
from prunus.sweep.estimate import Workload

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("seq_len", "sequences", "expected"),
    [(512, 128, 1), (2048, 128, 1), (256, 128, 2), (128, 128, 4), (24, 128, 16), (24, 6, 4), (24, 1, 1), (0, 0, 1)],
)
def test_on_a_cpu_as_many_sequences_as_make_512_tokens(seq_len, sequences, expected):
    assert chosen_batch_size(Workload(sequences=sequences, seq_len=seq_len), CPU, lambda size: True) == expected


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (3, 2), (8, 8), (100, 32)])
def test_on_cuda_the_largest_that_fits(most, expected):
    workload = Workload(sequences=128, seq_len=512)
    assert chosen_batch_size(workload, CUDA, lambda size: size <= most) == expected


def test_by_the_estimate_of_the_engine_that_will_run(folder):
    """Within a limit under which two sequences fit and four do not, two are taken."""
    work = {"needs": frozenset({"gates"}), "sequences": 16, "seq_len": 64}
    needed = {
        size: memory_needed(str(folder), ModelOptions(), Workload(batch_size=size, **work)) for size in (1, 2, 4, 8)
    }
    assert needed[8].resident > needed[4].resident > needed[2].resident
    for engine in ("resident", "streamed"):
        limit = needed[2].of(engine) + (needed[4].of(engine) - needed[2].of(engine)) // 2
        options = ModelOptions(engine=engine, max_memory=f"{limit}B")
        assert settled(config_of(str(folder)), options, Workload(**work)).batch_size == 2
    assert settled(config_of(str(folder)), ModelOptions(batch_size=3), Workload(**work)).batch_size == 3
