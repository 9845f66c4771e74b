"""Do pruned models of every family work in transformers 4, without prunus? Run by `make transformers4-check`.

Writes tiny random models, cut in two ways, and lets another Python (`--python`, with transformers 4 installed) load
them by the code that travels with each folder. Logits, greedy tokens of a left-padded batch, beams, sampled tokens, the
text-generation pipeline, gradients with and without checkpointing, and what transformers 4 saved in its turn, all have
to be those of the same model here.

    python benchmarks/transformers4_check.py --python build/transformers4-venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "integration")]  # the tiny models of every family are there

from shaped_models import ONE_EACH, Shaped, left_padded  # noqa: E402

from prunus.checkpoint import save_checkpoint  # noqa: E402

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
SHAPES = ("everything", "uniform")
#: answers that may differ by rounding; the others are tokens and have to be equal
ROUNDED = ("logits", "gradient", "gradient, checkpointed", "logits, saved again")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="Python of an environment with transformers 4 and torch")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        result = check(args.python, Path(scratch))
    print("\n".join(lines(result)))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(case["agrees"] for case in result["cases"].values()) else 1


def check(python: str, scratch: Path) -> dict[str, Any]:
    """Write the models, ask the other Python, and compare."""
    tokenizer = tokenizer_of_words()
    input_ids, mask = left_padded()
    save_file({"input_ids": input_ids, "attention_mask": mask}, scratch / "input.safetensors")
    known = types_known_to(python)
    names, unknown = [], []
    for case in ONE_EACH:
        if case[0] not in known:
            unknown.append(case[0])
            continue
        for shape in SHAPES:
            names.append(str(Shaped(case, shape)))
            save_checkpoint(Shaped(case, shape).pruned, tokenizer, scratch / names[-1], card="", extras={})
    script = Path(__file__).with_name("transformers4_load.py")
    environment = {**os.environ, "HF_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([python, "-I", str(script), str(scratch), *names], env=environment, check=True)
    found, said = load_file(scratch / "answers.safetensors"), json.loads((scratch / "texts.json").read_text())
    cases = {}
    for name in names:
        options = {"attn_implementation": "eager"} if "gemma2" in name else {}
        model = AutoModelForCausalLM.from_pretrained(scratch / name, **options)
        cases[name] = compare(name, answers(model, input_ids, mask), found)
        text = tokenizer("w5 w77 w12", return_tensors="pt")
        tokens = model.generate(**text, **GREEDY)[0, text.input_ids.shape[1] :]
        cases[name]["pipeline"] = (
            said["texts"][name].split() == tokenizer.decode(tokens, skip_special_tokens=True).split()
        )
        cases[name]["agrees"] = all(
            value if isinstance(value, bool) else value < 1e-4 for value in cases[name].values()
        )
    return {"transformers": said["transformers"], "unknown": unknown, "cases": cases}


def types_known_to(python: str) -> set[str]:
    """Model types that the transformers of another Python has classes for."""
    code = "from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as names; print(*names)"
    return set(subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.split())


def answers(model: Any, input_ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model says here, in the words of transformers4_load.py."""
    with torch.no_grad():
        logits = model(input_ids, attention_mask=mask).logits[mask.bool()]
    given = {"attention_mask": mask, **GREEDY}
    said = {"logits": logits, "logits, saved again": logits, "greedy": model.generate(input_ids, **given)}
    said["beams"] = model.generate(input_ids, **given, num_beams=3)
    torch.manual_seed(7)
    said["sampled"] = model.generate(input_ids, **{**given, "do_sample": True}, temperature=3.0)
    model.train()(input_ids, attention_mask=mask, labels=input_ids.masked_fill(mask == 0, -100)).loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return {**said, "gradient": gradient, "gradient, checkpointed": gradient}


def compare(name: str, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> dict[str, Any]:
    """For each answer whether it is equal, or by how much of the largest number it differs."""
    compared: dict[str, Any] = {}
    for kind, tensor in expected.items():
        other = found[f"{name} {kind}"]
        if kind in ROUNDED:
            compared[kind] = float((tensor - other).abs().max() / tensor.abs().max())
        else:
            compared[kind] = torch.equal(tensor, other)
    return compared


def lines(result: dict[str, Any]) -> list[str]:
    """A table for people."""
    kinds = list(next(iter(result["cases"].values())))
    rows = [f"| transformers {result['transformers']} | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for name, case in result["cases"].items():
        cells = (f"{value:.1e}" if isinstance(value, float) else "yes" if value else "NO" for value in case.values())
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows += [f"| {model_type}: not in this transformers |" for model_type in result["unknown"]]
    return rows


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """Words w3 … w95 as the tokens 3 … 95."""
    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    words = Tokenizer(WordLevel({**special, **{f"w{i}": i for i in range(3, 96)}}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


if __name__ == "__main__":
    sys.exit(main())
