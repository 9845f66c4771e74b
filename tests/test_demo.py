"""`make demo` runs from end to end; here on a tiny model in the place of SmolLM2."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from tiny_folder import save_tiny_folder

EXAMPLE = Path(__file__).parents[1] / "examples" / "prune_smollm2.py"


def test_the_demo(tmp_path, monkeypatch, capsys):
    source = save_tiny_folder(tmp_path / "dense", "llama", "gqa")
    (source / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    spec = importlib.util.spec_from_file_location("prune_smollm2", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "smollm2_135m", lambda: source)
    monkeypatch.setattr(sys, "argv", ["prune_smollm2.py", "--samples", "4", "--out", str(tmp_path / "out")])
    module.main()
    said = capsys.readouterr().out
    assert "give equal logits" in said
    assert said.rstrip().endswith(f"the model is in {tmp_path / 'out'}")
