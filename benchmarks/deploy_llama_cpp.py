"""One job of deploy_check.py in llama.cpp: `python deploy_llama_cpp.py JOB.json ANSWER.json`.

The cache is float32 and flash attention is off, so that what differs from the reference is the file and its arithmetic.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from deploy_speed import without_repacking
from llama_cpp import Llama, llama_cpp


def log_probabilities(logits: np.ndarray, tokens: list[int]) -> list[float]:
    """That of a token in each row; a table of all tokens in float64 would take longer than a small model."""
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = shifted[np.arange(len(tokens)), tokens].astype(np.float64)
    return (chosen - np.log(np.exp(shifted).sum(-1, dtype=np.float64))).tolist()


def quantized(file: str, kind: str) -> str:
    """The file as llama.cpp stores it in blocks of a type such as Q4_K_M."""
    out = file.removesuffix(".gguf") + f"-{kind}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    if llama_cpp.llama_model_quantize(file.encode(), out.encode(), params):
        raise SystemExit(f"llama.cpp could not quantise {file} to {kind}")
    return out


job = json.loads(Path(sys.argv[1]).read_text())
if job.get("quantize"):
    job["model"] = quantized(job["model"], job["quantize"])
if job.get("no_repack"):
    without_repacking()
longest = max(map(len, job["prompts"])) + max(job["tokens"], *map(len, job["continuations"]))
how = {"n_ctx": longest + 8, "n_threads": job.get("threads"), "n_threads_batch": job.get("threads")}
model = Llama(job["model"], **how, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False)
answer: dict[str, Any] = {"prompts": [], "tokens": [], "log_probabilities": []}
for text, prompt, continuation in zip(job["texts"], job["prompts"], job["continuations"], strict=True):
    answer["prompts"].append(model.tokenize(text.encode(), add_bos=False, special=True))
    model.reset()
    model.eval(prompt)
    found = []
    for _ in range(job["tokens"]):
        found.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(found[-1:])
    answer["tokens"].append(found)
    model.reset()
    model.eval(prompt + continuation)
    steps = model.scores[len(prompt) - 1 : len(prompt) + len(continuation) - 1]
    answer["log_probabilities"].append(log_probabilities(steps, continuation))
Path(sys.argv[2]).write_text(json.dumps(answer))
