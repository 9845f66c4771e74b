"""Jobs of mlx_check.py in mlx-lm: `python mlx_answer.py JOB.json ANSWER.json …`. Float32, on the CPU."""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def main() -> None:
    mx.set_default_device(mx.cpu)
    files = [Path(name) for name in sys.argv[1:]]
    for job_file, answer_file in zip(files[::2], files[1::2], strict=True):
        try:
            found = answer(json.loads(job_file.read_text()))
        except Exception as error:
            found = {"refused": f"{type(error).__name__}: {error}"}
        answer_file.write_text(json.dumps(found))


def answer(job: dict[str, Any]) -> dict[str, Any]:
    model, _ = load_model(Path(job["model"]))
    found: dict[str, Any] = {"tokens": [], "log_probabilities": []}
    for prompt, continuation in zip(job["prompts"], job["continuations"], strict=True):
        cache, tokens = make_prompt_cache(model), []
        logits = model(mx.array([prompt]), cache=cache)
        for _ in range(job["tokens"]):
            tokens.append(int(mx.argmax(logits[0, -1])))
            logits = model(mx.array([tokens[-1:]]), cache=cache)
        found["tokens"].append(tokens)
        scores = model(mx.array([prompt + continuation]))[0, len(prompt) - 1 : -1].astype(mx.float32)
        scores = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
        found["log_probabilities"].append([float(row[token]) for row, token in zip(scores, continuation, strict=True)])
    return found


if __name__ == "__main__":
    main()
