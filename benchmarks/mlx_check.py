"""Does mlx-lm say what transformers says, for pruned models of stock shape? Run by `make mlx-check`.

Small models of every family (family_models.py), cut with equal layers, with a layer removed, ragged ones that `prunus
export --to dense` filled up, and mixtures with experts removed, are loaded by mlx-lm in another Python and continued
greedily in both. The whole model beside them tells what is mlx-lm's own. Ragged folders themselves it cannot load:
their model type is prunus' own.

    python benchmarks/mlx_check.py --mlx-python build/mlx-venv/bin/python --out benchmarks/results/mlx-families.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from family_cases import Case
from family_models import FIELDS as MODEL_FIELDS
from family_models import LAYERS, SEED, depth_plan, experts_plan, has_shape, ragged_plan, uniform_plan
from vllm_families import markdown

from prunus.checkpoint import save_checkpoint
from prunus.export.dense import fill_model
from prunus.model.families import FAMILIES
from prunus.selection.plan import Plan

#: shape → its plan, and its title
SHAPES = {
    "whole": (Plan.keep_all, "whole"),
    "experts": (experts_plan, "`--experts`"),
    "uniform": (uniform_plan, "`uniform`"),
    "depth": (depth_plan, "`depth`"),
    "dense": (ragged_plan, "ragged, `export --to dense`"),
}

#: as published; mlx-lm takes no other
FIELDS: dict[str, dict[str, Any]] = {
    "exaone4": {"rope_parameters": MODEL_FIELDS["llama"]["rope_parameters"]},
    "glm4": {"tie_word_embeddings": False},
    "hunyuan_v1_dense": {"rope_parameters": {**MODEL_FIELDS["hunyuan_v1_dense"]["rope_parameters"], "type": "dynamic"}},
}


def main() -> None:
    """Run the families; the table goes to stdout, everything measured to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlx-python", required=True, help="a Python that has mlx and mlx-lm")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=100, help="generated per prompt; there are three")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"families": {}}
    versions = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('mlx', 'mlx-lm')}))"
    result |= {
        "models": f"{LAYERS} layers of random weights, seed {SEED}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": json.loads(subprocess.check_output([args.mlx_python, "-c", versions], text=True)),
    }
    script = Path(__file__).with_name("mlx_answer.py")
    for family in args.families:
        folder = Path(tempfile.mkdtemp())
        try:
            cases, files = {}, []
            for name in args.shapes:
                if not has_shape(family, name):
                    continue
                plan, fields = SHAPES[name][0], FIELDS.get(family, {})
                case = cases[name] = Case.made(family, plan, args.tokens, folder / name, **fields)
                if name == "dense":  # as the command does it
                    save_checkpoint(fill_model(case.model), None, case.folder, card="", extras={}, overwrite=True)
                files += case.ask()
            subprocess.run([args.mlx_python, str(script), *files], check=True)
            for name, case in cases.items():
                result["families"].setdefault(family, {})[name] = case.compared()
                print(family, name, result["families"][family][name], file=sys.stderr, flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
        finally:
            shutil.rmtree(folder)
    print(markdown(result["families"], {name: title for name, (_, title) in SHAPES.items()}))


if __name__ == "__main__":
    main()
