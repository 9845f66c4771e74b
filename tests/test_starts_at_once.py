"""What only looks at the command line imports nothing heavy, and the package's names come when they are asked for."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_families import make_model, plan_keeping
from tiny_folder import byte_tokenizer

import prunus
from prunus.cli import COMMANDS, app
from prunus.model.geometry import Geometry
from prunus.surgery import apply_plan

HEAVY = ("torch", "transformers", "pandas", "matplotlib", "pyarrow", "numpy")
PROGRAM = f"""
import sys
sys.argv[0] = "prunus"
from prunus.cli import main
status = main(sys.argv[1:])
print(status, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--version"], 0, prunus.__version__),
        (["--help"], 0, "Prune a model and save the smaller one"),
        (["prun"], 2, "Did you mean prune?"),
        (["--versio"], 2, "--versio"),
    ],
)
def test_nothing_heavy_is_imported(words, status, said):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stderr.splitlines()[-1] == f"{status} []"
    assert said in done.stdout + done.stderr


LOADS_LATER = """
import sys
import prunus
assert not {"transformers.modeling_utils", "prunus.checkpoint"} & sys.modules.keys(), "import prunus is to cost little"
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
assert type(AutoConfig.from_pretrained(sys.argv[1])).__module__ == "prunus.checkpoint.configuration_prunus"
assert type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__ == "prunus.checkpoint.modeling_prunus"
"""


def test_importing_prunus_costs_little_and_pruned_folders_load(tmp_path):
    model = make_model("llama", "gqa")
    kept = [{"attention": range(1), "mlp": range(5)}, {"attention": range(2), "mlp": range(9)}]
    smaller = apply_plan(model, plan_keeping(Geometry.of(model), kept))
    prunus.save_checkpoint(smaller, byte_tokenizer(), tmp_path / "pruned", card="", extras={})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", LOADS_LATER, str(tmp_path / "pruned")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


EVERY_COMMAND = f"""
import sys
sys.argv[0] = "prunus"
from prunus.cli import COMMANDS, main
for name in COMMANDS:
    for word, expected in (("--help", 0), ("--no-such-option", 2)):
        status = main([name, word])
        heavy = [module for module in {HEAVY!r} if module in sys.modules]
        assert (status, heavy) == (expected, []), (name, word, status, heavy)
"""


def test_no_command_imports_anything_heavy_for_its_help_or_a_wrong_option():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", EVERY_COMMAND], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Usage: prunus") == len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_commands_say(name):
    summary = " ".join(app[name].default_command.__doc__.split("\n\n")[0].split())
    assert COMMANDS[name][1] == summary


def test_a_command_explains_itself_in_full(capsys):
    from prunus.cli import main

    assert main(["bench", "--help"]) == 0
    assert "A, B, B, A" in capsys.readouterr().out


def test_every_name_of_the_package_comes_from_where_type_checkers_look():
    tree = ast.parse(Path(prunus.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    looked = {alias.name: node.module for node in block.body for alias in node.names}
    held = {name: module for module, names in prunus._HOMES.items() for name in names}
    assert held == looked
    assert set(prunus.__all__) == {*held, "errors", "__version__"}
    assert all(getattr(prunus, name) is not None for name in prunus.__all__)
    assert set(prunus.__all__) <= set(dir(prunus))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        prunus.nonsense  # noqa: B018
