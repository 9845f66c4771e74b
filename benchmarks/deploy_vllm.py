"""Jobs of deploy_check.py and vllm_families.py in vLLM: `python deploy_vllm.py JOB.json ANSWER.json …`.

Float32, on the CPU, eager. With several jobs, one that vLLM refuses is answered with its words, and the next is run.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# One engine after another in this process, where what they refuse can be read off the exception.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, ModelRegistry, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from prunus.serving.vllm import ARCHITECTURES
from prunus.serving.vllm_models import served_class


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]]
    if len(files) > 2:  # vLLM would start a process to look at each class
        for architecture in ARCHITECTURES:
            ModelRegistry.register_model(architecture, served_class(architecture))
    for job_file, answer_file in zip(files[::2], files[1::2], strict=True):
        try:
            found = answer(json.loads(job_file.read_text()))
        except Exception as error:
            if len(files) == 2:
                raise
            found = {"refused": f"{type(error).__name__}: {error}"}
        answer_file.write_text(json.dumps(found))
        cleanup_dist_env_and_memory()


def answer(job: dict[str, Any]) -> dict[str, Any]:
    processes = job.get("tensor_parallel", 1)
    # By itself vLLM gives each process a NUMA node of its own; here each gets a core, of those that there are.
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    shares = "|".join(cores[number % len(cores)] for number in range(processes))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "auto" if processes == 1 else shares
    longest = max(map(len, job["prompts"])) + job["tokens"]
    model = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=longest + 8,
        max_num_seqs=4,
        tensor_parallel_size=processes,
        skip_tokenizer_init=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    found = model.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], greedy, use_tqdm=False)
    whole = [a + b for a, b in zip(job["prompts"], job["continuations"], strict=True)]
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    scored = model.generate([{"prompt_token_ids": tokens} for tokens in whole], scoring, use_tqdm=False)
    model.llm_engine.engine_core.shutdown()
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in found],
        "log_probabilities": [
            [step[token].logprob for step, token in zip(output.prompt_logprobs, tokens, strict=True) if step][
                -job["tokens"] :
            ]
            for output, tokens in zip(scored, whole, strict=True)
        ],
    }


if __name__ == "__main__":
    main()
