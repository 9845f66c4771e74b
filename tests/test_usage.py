"""Wrong words at the command line: for every command one line that names what was typed, and the exit status."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

import pytest
from tiny_folder import fails

import prunus
from prunus import CalibrationOptions
from prunus.cli import COMMANDS, app, eval_flags, job_flags, main, recovery_flags
from prunus.cli.usage import flags_of
from prunus.errors import OptionError
from prunus.pipeline.job_file import JOB

#: command → words that it needs
NEEDED = {
    "prune": ["MODEL", "--out", "OUT"],
    "score": ["MODEL", "--out", "OUT"],
    "plan": ["TABLE", "--ratio", "0.2"],
    "apply": ["MODEL", "PLAN", "--out", "OUT"],
    "recover": ["MODEL", "--out", "OUT", "--text", "TEXT"],
    "export": ["MODEL", "--to", "gguf", "--out", "OUT"],
    "report": ["FOLDER"],
    "bench": ["MODEL"],
    "profile": ["MODEL"],
    "inspect": ["MODEL"],
    "compare": ["MODEL", "--ratios", "0.1", "--out", "OUT"],
    "eval": ["MODEL"],
    "recipe": [],
}
#: words that mean something to those who know Python alone
PYTHON = r"\bNone\b|\bTrue\b|\bFalse\b|\bprunus\.[a-z_]+|see `|\('|=True|\bdict\b|\bint\b|\bfloat\b"


def wrong(capsys, *words: str) -> str:
    """The one line of a command that was typed wrong."""
    status = main(list(words))
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert re.search(PYTHON, line) is None
    return line


def test_every_command_is_tried():
    assert NEEDED.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistyped_flag(capsys, name):
    line = wrong(capsys, name, *NEEDED[name], "--jsno")
    assert "--jsno" in line
    assert "--json" in line
    assert f"prunus {name} --help" in line


@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_is_missing_is_named(capsys, name):
    if name in ("bench", "profile", "inspect", "eval", "report", "recipe"):
        if name not in ("bench", "recipe"):  # they take any number, and say themselves what they need
            assert re.search("MODEL|FOLDER", wrong(capsys, name))
        return
    words = NEEDED[name]
    for flag in [word for word in words if word.startswith("--")]:
        place = words.index(flag)
        assert flag in wrong(capsys, name, *words[:place], *words[place + 2 :])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_value_of_another_kind(capsys, name):
    """Every flag of every command that takes a number."""
    arguments = [a for a in app[name].assemble_argument_collection() if a.name.startswith("--")]
    tried = [a for a in arguments if a.parameter.parse is not False and {int, float} & {a.hint, *get_args(a.hint)}]
    assert tried or name in ("apply", "report", "recipe")
    for argument in tried:
        words = NEEDED[name]
        if argument.name in words:
            place = words.index(argument.name)
            words = [*words[:place], *words[place + 2 :]]
        line = wrong(capsys, name, *words, argument.name, "\x1b[31mmany")
        if argument.parameter.converter is None:
            assert line.startswith(f"error: {argument.name} is '\\x1b[31mmany'; it takes a")
        assert argument.name in line
        assert "\\x1b[31mmany'" in line


def test_words_that_are_too_many(capsys):
    assert "does not know what to do with a b" in wrong(capsys, "inspect", "MODEL", "a", "b")
    assert "Did you mean prune?" in wrong(capsys, "prun")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["prune", "m", "--out", "o", "--samples", "0"],
            "error: --samples is 0; the smallest is 1: calibration needs",
        ),
        (["prune", "m", "--out", "o", "--seq-len", "1"], "error: --seq-len is 1; "),
        (
            ["prune", "m", "--out", "o", "--max-memory", "lots"],
            "error: --max-memory is 'lots'; write a",
        ),
        (
            ["score", "m", "--out", "o", "--set", "run.batch_size=0"],
            "error: --batch-size is 0; the smallest is 1",
        ),
        (
            ["compare", "m", "--out", "o", "--ratios", "0.1", "--set", "selection.align=0"],
            "error: --set selection.align is 0; ",
        ),
        (["recover", "m", "--out", "o", "--text", "t", "--max-steps", "0"], "error: --max-steps is 0; "),
        (["bench", "m", "--new-tokens", "1"], "error: --new-tokens is 1; "),
        (["eval", "m", "--windows", "0"], "error: --windows is 0; "),
    ],
)
def test_a_value_that_cannot_work_is_named_by_its_flag(capsys, words, message):
    assert fails(capsys, *words).startswith(message)


def test_python_names_the_argument():
    with pytest.raises(OptionError, match="`seq_len` is 1"):
        CalibrationOptions(seq_len=1)


def test_settings_without_a_flag_are_named_by_their_key(capsys, tmp_path, folder, text):
    words = ["prune", folder, "--out", tmp_path / "out", "--ratio", "0.1", "--eval-text", text]
    assert "--set evaluation.seq_len is 1; " in fails(capsys, *words, "--set", "evaluation.seq_len=1")
    assert "--set repair.damping is 0.0; " in fails(capsys, *words, "--set", "repair.damping=0")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_for_people(capsys, name):
    assert main([name, "--help"]) == 0
    # Rich breaks lines within a panel.
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert re.findall(rf".{{30}}(?:{PYTHON}).{{30}}", text) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_lists_at_most_18_options(name):
    listed = [argument for argument in app[name].assemble_argument_collection() if argument.show]
    options = {argument.name for argument in listed if argument.name.startswith("--")}
    assert 1 < len(options) <= 18, sorted(options)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_a_help_does_not_list_are_named_in_it(capsys, name):
    """All but other spellings of those that it lists."""
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    arguments = app[name].assemble_argument_collection()
    hidden = [each for each in arguments if not each.show and each.parameter.parse is not False]
    names = {argument.name for argument in hidden if argument.name.startswith("--")}
    missing = {name for name in names if not re.search(rf"{name}\b", shown)}
    assert missing == ({"--text", "--max-windows", "--samples"} if name == "eval" else set())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_of_use(name):
    """Those that set a key: one that the command uses. The others are read by the command itself."""
    arguments = [each for each in app[name].assemble_argument_collection() if each.parameter.parse is not False]
    options = {each.field_info.name for each in arguments if each.name.startswith("--")}
    if name not in ("prune", "score", "plan", "compare"):
        keys = {"eval": eval_flags.KEYS, "recover": recovery_flags.KEYS}.get(name, {})
        assert name not in ("eval", "recover") or options - keys.keys() <= {
            *("recipe", "set", "json", "update_card", "out", "overwrite", "dry_run"),
        }
        return
    command = None if name == "prune" else f"prunus {name}"
    keys = [key for option, key in job_flags.KEYS.items() if option in options]
    assert [key for key in keys if not JOB.is_used(key, command)] == []


def test_flags_are_known_by_the_names_of_python():
    flags = flags_of(app, ["prune", "m"])
    assert {"seq_len": "--seq-len", "model": "MODEL", "samples": "--samples"}.items() <= flags.items()
    assert flags_of(app, []) == flags_of(app, ["--help"]) == {}


def test_messages_mark_the_options_that_they_name():
    """No message of the library holds a flag: Python has none. Advice with a whole command is for both."""
    found = {}
    for path in Path(prunus.__file__).parent.rglob("*.py"):
        if path.parent.name == "cli":
            continue
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and re.search(r"(Error|warning)$", ast.unparse(node.func))
        ]
        texts = [re.sub(r"`(prunus|pip) [^`]*`", "", ast.unparse(call)) for call in calls]
        if flags := [flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)]:
            found[path.name] = flags
    # A file of settings says where a setting was read: --set is its place.
    assert set(found.pop("sheet.py")) == {"--set"}
    assert found in ({}, {"packaged_model.py": ["--force-reinstall"]})
