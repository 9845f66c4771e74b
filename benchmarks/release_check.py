r"""Build the package, check its metadata, install the wheel into a fresh environment and run it there.

    python benchmarks/release_check.py --tools build/release-tools/bin/python --work build/release

`--tools` is a Python with `build` and `twine`. The fresh environment takes prunus from the wheel, and its requirements
from the environment that runs this script.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="a Python with build and twine")
    parser.add_argument("--work", type=Path, required=True, help="folder for packages, environment and model")
    options = parser.parse_args()
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    run(options.tools, "-m", "build", "--outdir", work / "dist", ROOT)
    wheel, sdist = (next((work / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    run(options.tools, "-m", "twine", "check", "--strict", wheel, sdist)
    metadata = check_wheel(wheel)
    check_sdist(sdist)
    prunus = install(wheel, work / "venv")
    said = run(prunus, "--version", cwd=work)
    assert said.strip() == metadata["Version"], f"prunus --version says {said!r}, the wheel is {metadata['Version']}"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    model.save_pretrained(work / "model")
    facts = run(prunus, "inspect", work / "model", "--ratio", "0.2", cwd=work)
    assert f"{model.num_parameters():,}" in facts, facts
    print(f"{wheel.name} and {sdist.name} are built, checked, installed and run")


def check_wheel(wheel: Path) -> Message:
    """The metadata of a wheel, if it is complete."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(archive.read(next(name for name in names if name.endswith("/METADATA"))).decode())
        licence = next(name for name in names if name.endswith("/licenses/LICENSE"))
        assert archive.read(licence).decode() == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert metadata["License-Expression"] == "Apache-2.0", metadata["License-Expression"]
    assert metadata["Description-Content-Type"] == "text/markdown", metadata["Description-Content-Type"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert str(metadata.get_payload()).strip() == readme.strip(), "the wheel holds another README.md"
    source = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "prunus").rglob("*.py")}
    assert source <= set(names), f"the wheel lacks {min(source - set(names))}"
    if not metadata.get_all("Project-URL"):
        print(
            "warning: the metadata has no URL; add [project.urls] to pyproject.toml before a release", file=sys.stderr
        )
    return metadata


def check_sdist(sdist: Path) -> None:
    """Check that the source package has what a build and the tests need."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"README.md", "LICENSE", "pyproject.toml", "src/prunus/__init__.py", "tests/conftest.py"}
    assert wanted <= names, f"the source package lacks {min(wanted - names)}"


def install(wheel: Path, place: Path) -> Path:
    """Install a wheel into a fresh environment; its prunus command."""
    venv.create(place, with_pip=True)
    binaries = place / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", wheel)
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # After the environment's own packages, so that prunus is the wheel's.
    (own / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    where = Path(run(python, "-c", "import prunus; print(prunus.__file__)", cwd=place).strip())
    assert where.is_relative_to(own), f"prunus came from {where} and not from the wheel"
    return binaries / "prunus"


def run(*words: object, cwd: Path | None = None) -> str:
    """Run a program; what it printed. An error ends the check."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
