"""How much there is to hold in one head: options, lines, files, imports between folders, and the time of --version.

    python benchmarks/simplicity.py [--root CHECKOUT]

Another checkout, such as one of an earlier commit, is measured with the packages of this environment.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import resource
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

COMMANDS = ("prune", "score", "plan", "compare", "recover", "eval", "bench")
IMPORTS = ("import transformers; transformers.AutoModelForCausalLM", "import prunus")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    root = parser.parse_args().root.resolve()
    imports = imports_between(root / "src" / "prunus")
    print(
        json.dumps(
            {
                "options": {command: options(root, command) for command in COMMANDS},
                "src": size(root / "src"),
                "tests": size(root / "tests"),
                "modules flat": len(list((root / "src" / "prunus").glob("[a-z]*.py"))),
                "imports between folders": sum(imports.values()),
                "upward": upward(imports),
                "CPU seconds": {
                    " ".join(words): cpu_seconds(root, "-m", "prunus", *words)
                    for words in (["--version"], *([command, "--help"] for command in COMMANDS), ["recover", "--wrong"])
                },
                "CPU seconds of imports": {code: cpu_seconds(root, "-c", code) for code in IMPORTS},
            },
            indent=1,
            ensure_ascii=False,
        )
    )


def run(root: Path, *words: str) -> str:
    """What Python prints, with the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "COLUMNS": "200"}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False).stdout


def options(root: Path, command: str) -> int:
    """Options that the help of a command lists, without the negations of switches."""
    shown = re.findall(
        r"^│ (?:[* ] {2})?(--[a-z][a-z-]+)", run(root, "-m", "prunus", command, "--help"), flags=re.MULTILINE
    )
    return len({option for option in shown if not option.startswith("--no-")})


def size(folder: Path) -> dict[str, int]:
    """Files and lines of Python."""
    files = list(folder.rglob("*.py"))
    return {"files": len(files), "lines": sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)}


def imports_between(package: Path) -> Counter[tuple[str, str]]:
    """(folder, folder that it imports) → how many imports; a flat module is a folder of its own."""
    found: Counter[tuple[str, str]] = Counter()
    for file in package.rglob("*.py"):
        own = file.relative_to(package).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in names:
                parts = name.split(".")
                if parts[0] == "prunus" and len(parts) > 1 and parts[1] != own and own != "__init__":
                    found[own, parts[1]] += 1
    return found


def upward(imports: Counter[tuple[str, str]]) -> list[str]:
    """Imports against the order of layers in pyproject.toml, between folders that are in it."""
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    places = {name.strip().removeprefix("prunus."): i for i, row in enumerate(layers) for name in row.split(":")}
    known = [pair for pair in imports if pair[0] in places and pair[1] in places]
    return sorted(f"{a} → {b}" for a, b in known if places[b] < places[a])


def cpu_seconds(root: Path, *words: str) -> float:
    """The least CPU time of three runs."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(root, *words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return round(min(taken), 2)


if __name__ == "__main__":
    main()
