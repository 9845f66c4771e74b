"""Peak memory of one greedy run, measured in a process of its own.

In a process that has held other models before, the resident set tells little: what was freed may still be counted, and
what a second model needs may come out of it. So each model gets a fresh process, which loads it and runs it once.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from prunus.checkpoint import load_model
from prunus.evaluation.greedy import greedy_run
from prunus.machine.memory import resident_set
from prunus.machine.metering import metered

__all__ = ["PeakMemory", "peak_memory"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeakMemory:
    """What a process that held nothing but one model needed.

    Attributes:
        peak_bytes: largest memory in use during the run. On CUDA that of the allocator: weights, cache and activations.
            Elsewhere the resident set: these, and Python with its libraries. None where the system does not say.
        before_bytes: of that, what was in use before the model was loaded: 0 on CUDA, elsewhere the resident set of
            Python with its libraries. None where the system does not say.
    """

    peak_bytes: int | None = None
    before_bytes: int | None = None


def peak_memory(
    folder: Path, *, prompt_tokens: int, new_tokens: int, batch_size: int, device: str, dtype: str
) -> PeakMemory:
    """Load a model in a fresh process and measure the memory of one greedy run.

    Loading itself is not counted, where the system lets the high-water mark be reset (Linux, CUDA).

    Args:
        folder: the model folder.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens made after each.
        batch_size: prompts at a time.
        device: as for `load_model`.
        dtype: as for `load_model`.

    Returns:
        The figures; all None, with a warning, if the process failed, for instance for lack of memory.
    """
    task = {"folder": str(folder), "sizes": [batch_size, prompt_tokens, new_tokens], "device": device, "dtype": dtype}
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(task)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        logger.warning("the peak memory of %s is not known: the process that measured it failed: %s", folder, reason)
        return PeakMemory()
    return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))


def _measure(folder: str, sizes: tuple[int, int, int], device: str, dtype: str) -> PeakMemory:
    batch_size, prompt_tokens, new_tokens = sizes
    resident = resident_set()
    model, _ = load_model(folder, device=device, dtype=dtype)
    # Which tokens they are makes no difference to memory; id 0 is in every vocabulary.
    input_ids = torch.zeros(batch_size, prompt_tokens, dtype=torch.int64, device=model.device)
    with metered(model.device) as cost:
        greedy_run(model, input_ids, new_tokens)
    if model.device.type == "cuda":
        return PeakMemory(cost.peak_bytes, 0)
    return PeakMemory(cost.peak_bytes, resident or None)


if __name__ == "__main__":
    transformers_logging.disable_progress_bar()
    print(json.dumps(asdict(_measure(**json.loads(sys.argv[1])))))
