"""Checkpoints load where prunus is not installed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ALL, FAMILIES, LAYERS, RAGGED, Kept, cut, dense_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from prunus.checkpoint import configuration_prunus, modeling_prunus, save_checkpoint

CHILD = """
import sys
sys.modules["prunus"] = None  # importing it raises, wherever it may be installed
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import AutoModelForTokenClassification

folder, results, *names = sys.argv[1:]
logits = {}
for name in names:
    remote = name.startswith("ragged")
    source = f"{folder}/{name}"
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=remote)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=remote, dtype="auto")
    input_ids = tokenizer("a few words", return_tensors="pt").input_ids
    again = f"{folder}/{name}-again"
    model.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=remote, dtype="auto")
    decoder = AutoModel.from_pretrained(again, trust_remote_code=remote, dtype="auto")
    with torch.no_grad():
        logits[f"{name}.logits"] = model(input_ids).logits
        logits[f"{name}.again"] = reloaded(input_ids).logits
        logits[f"{name}.decoder"] = decoder(input_ids).last_hidden_state @ model.lm_head.weight.T
    if remote:
        for kind, auto_class in {
            "sequences": AutoModelForSequenceClassification, "tokens": AutoModelForTokenClassification
        }.items():
            classifier = auto_class.from_pretrained(source, trust_remote_code=True, dtype="auto", num_labels=3)
            classifier.save_pretrained(f"{folder}/{name}-{kind}")
            with torch.no_grad():
                logits[f"{name}.classes-of-{kind}"] = classifier.eval()(input_ids).logits
    logits[f"{name}.tokens"] = model.generate(input_ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert type(model).__module__.startswith("transformers_modules." if remote else "transformers.models."), type(model)
assert not any(module.split(".")[0] == "prunus" for module in sys.modules if sys.modules[module] is not None)
save_file(logits, results)
"""

CLASSIFIERS = {"sequences": AutoModelForSequenceClassification, "tokens": AutoModelForTokenClassification}


@pytest.mark.slow
def test_without_prunus(tokenizer, tmp_path):
    models = {}
    dtypes = {"llama": torch.float32, "mistral": torch.float32, "qwen2": torch.bfloat16, "qwen3": torch.float32}
    for shape, kept in (("ragged", RAGGED), ("stock", (Kept((1,), ALL[:7]),) * LAYERS)):
        for family in FAMILIES:
            name = f"{shape}-{family}"
            dense = dense_model(family, tie_word_embeddings=family == "qwen2").to(dtypes[family])
            models[name] = cut(dense, kept)
            save_checkpoint(models[name], tokenizer, tmp_path / name, card="", extras={})
    results = tmp_path / "results.safetensors"
    command = [sys.executable, "-I", "-c", CHILD, str(tmp_path), str(results)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    child = subprocess.run([*command, *models], env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    actual = load_file(results)
    for name, model in models.items():
        input_ids = tokenizer("a few words", return_tensors="pt").input_ids
        with torch.no_grad():
            expected = model(input_ids).logits
        for kind in ("logits", "again", "decoder"):
            torch.testing.assert_close(actual[f"{name}.{kind}"], expected, msg=f"{name} {kind}")
        tokens = model.generate(input_ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert torch.equal(actual[f"{name}.tokens"], tokens)
        if name.startswith("ragged"):
            with torch.no_grad():
                hidden = model.model(input_ids).last_hidden_state
                for kind, auto_class in CLASSIFIERS.items():
                    # What was saved there, read here by the classes of the package.
                    classifier = auto_class.from_pretrained(tmp_path / f"{name}-{kind}", dtype="auto").eval()
                    expected = classifier.score(hidden[:, -1] if kind == "sequences" else hidden)
                    torch.testing.assert_close(classifier(input_ids).logits, expected, msg=f"{name} {kind}")
                    torch.testing.assert_close(actual[f"{name}.classes-of-{kind}"], expected, msg=f"{name} {kind}")


@pytest.mark.parametrize("module", [configuration_prunus, modeling_prunus])
def test_travelling_files_import_nothing_of_the_package(module):
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    allowed = {"torch", "transformers", "huggingface_hub", ".configuration_prunus"}
    assert imported - sys.stdlib_module_names <= allowed
