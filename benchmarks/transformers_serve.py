"""Does `transformers serve` answer with a pruned model what `generate` answers? Run by `make deploy-check`.

Cuts SmolLM2-135M twice, with equal layers (a stock class) and with ragged ones (code of the folder, so
`--trust-remote-code`), and fills the ragged one up to a stock class. Starts a server for each, asks it once over HTTP,
greedily, and stops it. Where a server does not start, its last words are the result.

    python benchmarks/transformers_serve.py --out benchmarks/results/transformers-serve.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus
from prunus.checkpoint import load_model
from prunus.export import export_dense
from prunus.model.geometry import Geometry
from prunus.pipeline.apply import apply_checkpoint
from prunus.selection.plan import Plan

MODEL, QUESTION = "smollm2-135m", "What is the capital of France, and what is it known for?"


def main() -> None:
    """Serve both folders; the facts go to stdout and to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--patience", type=int, default=400, help="seconds to wait for a server")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, _ = load_model(MODEL)
    geometry = Geometry.of(model)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "transformers": importlib.metadata.version("transformers"),
        "prunus": prunus.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in plans(geometry).items():
            apply_checkpoint(MODEL, plan, Path(folder) / name)
        export_dense(str(Path(folder) / "ragged"), Path(folder) / "dense")
        for name in ("stock", "ragged", "dense"):
            result[name] = check(Path(folder) / name, args)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def plans(geometry: Geometry) -> dict[str, Plan]:
    """A tenth of the channels gone, the same number in every layer or not, without attention in one layer."""
    groups, channels, layers = (
        geometry.widths[0].num_key_value_heads,
        geometry.widths[0].intermediate_size,
        range(len(geometry.widths)),
    )
    whole = range(groups)
    ragged: list[dict[Any, Any]] = [
        {"attention": () if i == 12 else whole, "mlp": range(channels - 8 * i)} for i in layers
    ]
    equal: list[dict[Any, Any]] = [{"attention": whole, "mlp": range(i, i + channels - 128)} for i in layers]
    return {"stock": Plan.from_kept(geometry, equal), "ragged": Plan.from_kept(geometry, ragged)}


def check(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Serve one folder, ask, stop."""
    expected = generated(folder, args.tokens)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    trusted = ["--trust-remote-code"] if "auto_map" in json.loads((folder / "config.json").read_text()) else []
    log = folder.with_name("server.log")
    with log.open("w") as output:
        server = subprocess.Popen([*command, *options, *trusted], stdout=output, stderr=output)
        try:
            answer = ask(f"http://127.0.0.1:{port}", str(folder), args, server)
        finally:
            server.terminate()
            server.wait(timeout=60)
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    if answer is None:
        return {"model_type": model_type, "stopped": log.read_text().strip().splitlines()[-1]}
    return {"model_type": model_type, "answer": answer, "same_as_generate": answer.strip() == expected.strip()}


def generated(folder: Path, tokens: int) -> str:
    """What `generate` says, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def ask(url: str, model: str, args: argparse.Namespace, server: subprocess.Popen[bytes]) -> str | None:
    """The answer of a server, once it listens; None if it stops instead."""
    request = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": args.tokens,
        "temperature": 0,
        "stream": False,
        "generation_config": json.dumps({"do_sample": False, "max_new_tokens": args.tokens}),
    }
    for _ in range(args.patience):
        if server.poll() is not None:
            return None
        try:
            call = urllib.request.Request(
                f"{url}/v1/chat/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(call, timeout=args.patience) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            sys.exit(f"the server answered {error.code}: {error.read().decode()}")
        except urllib.error.URLError:
            time.sleep(1)
    sys.exit(f"the server did not answer within {args.patience} seconds")


if __name__ == "__main__":
    main()
