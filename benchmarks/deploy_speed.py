"""How much faster pruned models are, on transformers, llama.cpp and vLLM. Run by `make deploy-check`.

Cuts SmolLM2-135M by 20 and 40 %, with any widths and with aligned ones, and times the prefill of a prompt and the
decoding of tokens after it. Every model sits in a process of its own, and waits there for its turn: the models run one
after another, in every second round in reverse, and what is shown are medians of the ratios to the dense model in the
same round. The dense model runs twice; its second row is the noise.

    python benchmarks/deploy_speed.py --out benchmarks/results/speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: name → share of the parameters that is cut, alignment of MLP widths; the first is what others are compared with
MODELS = {
    "dense": (0.0, 1),
    "dense again": (0.0, 1),
    "20 %": (0.2, 1),
    "20 %, aligned": (0.2, 64),
    "40 %": (0.4, 1),
    "40 %, aligned": (0.4, 64),
}
#: seconds of one run: (prompt, tokens after it) → prefill, decode
Run = Callable[[list[int], list[int]], tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-repack", action="store_true", help="as llama.cpp's; its AMX kernels crash in 0.3.36")
    parser.add_argument("--work", type=Path, help="folder for models and files; without it a temporary one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    parser.add_argument("--worker", nargs=2, metavar=("PROGRAM", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        program, path = args.worker
        serve(program, path, args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        paths = make_models(args.model, work, args.programs)
        report: dict[str, Any] = {
            "model": args.model,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "repeats": args.repeats,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} threads",
            "programs": {},
        }
        for program in args.programs:
            report["programs"][program] = measure(program, paths[program], args)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))


def make_models(model: str, work: Path, programs: list[str]) -> dict[str, dict[str, Path]]:
    """Cut the model in every way; program → name → what the program loads."""
    import prunus
    from prunus.export import export_gguf
    from prunus.pipeline.apply import apply_checkpoint
    from prunus.selection.constraints import Constraints

    live, tokenizer = prunus.load_model(model)
    calibration = prunus.load_calibration("default", tokenizer, samples=8, seq_len=128)
    scored = prunus.score(live, calibration, prunus.ScoringOptions(noise=0.0))
    del live
    paths: dict[str, dict[str, Path]] = {program: {} for program in programs}
    for name, (ratio, align) in MODELS.items():
        folder = work / name.replace(" %", "").replace(", ", "-").replace(" again", "")
        plan = prunus.select(scored.table, scored.geometry, ratio, Constraints(align=align))
        if not folder.exists():
            apply_checkpoint(model, plan, folder)
        for program in programs:
            paths[program][name] = folder
            if program.startswith("llama.cpp"):
                paths[program][name] = folder.with_name(f"{folder.name}-q8_0.gguf")
                export_gguf(str(folder), paths[program][name], type="q8_0", overwrite=True)
    return paths


def measure(
    program: str, paths: dict[str, Path], args: argparse.Namespace, python: str = sys.executable
) -> dict[str, Any]:
    """Speed of every model, and its ratio to that of `dense` in the same round; `python` has the program."""
    here = [python, __file__, "--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
    here += ["--no-repack"] * args.no_repack
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    workers = {
        name: subprocess.Popen(
            [*here, "--threads", str(args.threads), "--worker", program, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            # vLLM starts processes of its own, which have to end with it.
            start_new_session=True,
        )
        for name, path in paths.items()
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    try:
        for worker in workers.values():
            _answer(worker)  # loaded and warm
            os.killpg(worker.pid, signal.SIGSTOP)
        for number in range(args.repeats):
            for name in list(workers)[:: -1 if number % 2 else 1]:
                # Idle threads may spin: whoever is not at work stands still.
                os.killpg(workers[name].pid, signal.SIGCONT)
                workers[name].stdin.write("run\n")  # type: ignore[union-attr]
                workers[name].stdin.flush()  # type: ignore[union-attr]
                prefill, decode = _answer(workers[name])
                seconds[name].append((prefill, decode))
                os.killpg(workers[name].pid, signal.SIGSTOP)
    finally:
        for worker in workers.values():
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, runs in seconds.items():
        found[name] = {}
        for what, place, tokens in (("prefill", 0, args.prompt_tokens), ("decode", 1, args.new_tokens)):
            ratios = sorted(first[place] / run[place] for first, run in zip(seconds["dense"], runs, strict=True))
            found[name][what] = {
                "tokens_per_second": tokens / statistics.median(run[place] for run in runs),
                "ratio": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
            }
    return found


def _answer(worker: subprocess.Popen[str]) -> list[float]:
    """The next line of a worker that is JSON; programs talk on stdout, too."""
    for line in worker.stdout:  # type: ignore[union-attr]
        if line.startswith("ANSWER "):
            answer: list[float] = json.loads(line.removeprefix("ANSWER "))
            return answer
    raise RuntimeError(f"{' '.join(map(str, worker.args))} ended with status {worker.wait()}")  # type: ignore[arg-type]


def serve(program: str, path: str, args: argparse.Namespace) -> None:
    """Hold a model, and run it whenever a line comes in."""
    prompt = [100 + 37 * number % 1000 for number in range(args.prompt_tokens)]
    after = [100 + 53 * number % 1000 for number in range(args.new_tokens)]
    run = PROGRAMS[program](path, args)
    run(prompt, after)
    print("ANSWER []", flush=True)
    for _ in sys.stdin:
        print("ANSWER", json.dumps(run(prompt, after)), flush=True)


def transformers_bfloat16(path: str, args: argparse.Namespace) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    import prunus  # noqa: F401  (registers the classes of pruned models)

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(prompt: list[int], after: list[int]) -> tuple[float, float]:
        start = time.perf_counter()
        cache = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).past_key_values
        between = time.perf_counter()
        for token in after:
            cache = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
        return between - start, time.perf_counter() - between

    return run


def llama_cpp_q8_0(path: str, args: argparse.Namespace) -> Run:
    from llama_cpp import Llama

    if args.no_repack:
        without_repacking()
    size = args.prompt_tokens + args.new_tokens + 8
    model = Llama(path, n_ctx=size, n_batch=size, n_threads=args.threads, n_threads_batch=args.threads, verbose=False)

    def run(prompt: list[int], after: list[int]) -> tuple[float, float]:
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        between = time.perf_counter()
        for token in after:
            model.eval([token])
        return between - start, time.perf_counter() - between

    return run


def without_repacking() -> None:
    """Keep llama.cpp from repacking weights, as its `--no-repack` does; llama-cpp-python has no option for that."""
    from llama_cpp import llama_cpp

    default = llama_cpp.llama_model_default_params

    def params() -> Any:
        found = default()
        found.use_extra_bufts = False
        return found

    llama_cpp.llama_model_default_params = params


def vllm_bfloat16(path: str, args: argparse.Namespace) -> Run:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    size = args.prompt_tokens + args.new_tokens + 8
    model = LLM(
        path,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=size,
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def timed(prompt: list[int], tokens: int) -> float:
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        model.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
        return time.perf_counter() - start

    def run(prompt: list[int], after: list[int]) -> tuple[float, float]:
        prefill = timed(prompt, 1)
        return prefill, timed(prompt, 1 + len(after)) - prefill

    return run


PROGRAMS: dict[str, Callable[[str, argparse.Namespace], Run]] = {
    "transformers bfloat16": transformers_bfloat16,
    "llama.cpp q8_0": llama_cpp_q8_0,
    "vLLM bfloat16": vllm_bfloat16,
}


def markdown(report: dict[str, Any]) -> str:
    """The table of RESULTS.md."""
    rows = ["| program | model | prefill, × dense | decode, × dense |", "|---|---|---:|---:|"]
    for program, models in report["programs"].items():
        for name, found in models.items():
            cells = [
                f"{found[what]['ratio']:.2f} ({found[what]['lowest']:.2f}–{found[what]['highest']:.2f})"
                for what in ("prefill", "decode")
            ]
            if name != "dense":
                rows.append(f"| {program} | {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
