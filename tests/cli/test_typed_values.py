"""What is typed after an option: refused before any work, in the words of the option."""

from __future__ import annotations

import pytest
from tiny_folder import SIZES, fails, run, run_json

from prunus.cli import main
from prunus.pipeline.recipe import Recipe
from prunus.selection.plan import Plan

OUT = ["--out", "never"]


def refused(capsys, *words) -> str:
    """The message of a command that fails: 1 for a value that cannot work, 2 for what is no value of its option."""
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert status in (1, 2)
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratio", "20%"], "--ratio is '20%'; write a share, 0.2"),
        (["--ratio", "20"], "For 20 % write 0.2"),
        (["--ratio", "nan"], "ratio is"),
        (["--ratio", "1"], "must lie in [0, 1). For 1 % write 0.01"),
        (["--ratio", "a fifth"], "--ratio is 'a fifth'"),
        (["--ratio", ""], "--ratio is empty"),
        (["--samples", "2.5"], "--samples is '2.5'; it takes a whole number"),
        (["--rounds", "0"], "rounds is 0; the smallest is 1"),
        (["--rounds", "1.5"], "--rounds is '1.5'; it takes a whole number"),
        (["--set", "scoring.hybrid=taylor"], "write {taylor: 0.5, wanda: 0.5}"),
        (["--set", "rounds=1.5"], "rounds is 1.5; it must be a whole number"),
        (["--device", "meta"], "device 'meta' cannot run a model here"),
        (["--device", "nonsense"], "device 'nonsense' is not known"),
        (["--max-memory", "lots"], "max-memory is 'lots'"),
        (["--max-memory", "8"], "max-memory is '8', which is 8 bytes; write a unit as well, such as 8GB"),
        (["--batch", "3"], "--context and --batch are of the KV cache in --fit-memory; give that as well"),
        (["--fit", "1MB", "--context", "512"], "--context and --batch are of the KV cache in --fit-memory"),
        (["--experts", "0.5"], "the model has no experts that could be removed"),
        (["--seed", str(-(2**63) - 1)], "a seed has at most 63 bits and a sign"),
        (["--seed", str(2**63)], "seed is 9223372036854775808; a seed has at most 63 bits and a sign"),
        (["--seed", "1" + "0" * 400], "a seed has at most 63 bits and a sign"),
        *(
            ([name, ""], f"{name} is empty")
            for name in ("--method", "--calibration", "--eval-text", "--recipe", "--out")
        ),
        *(([name, " "], f"{name} is empty") for name in ("--device", "--dtype", "--max-memory", "--set")),
        (
            ["--set", "output.work=~nobody-of-this-name/x"],
            "'~nobody-of-this-name/x' begins with a home directory that is not known",
        ),
    ],
    ids=str,
)
def test_values_that_cannot_be(capsys, folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in words else OUT
    assert message in refused(capsys, "prune", folder, *out, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["compare", "FOLDER", *OUT, "--methods", "wanda", "--ratios", "0.1,20%"],
            "--ratios is '20%'; write a share, 0.2",
        ),
        (["inspect", "FOLDER", "--ratio", "20"], "For 20 % write 0.2"),
        (["bench", "FOLDER", "--seed", str(2**63)], "a seed has at most 63 bits and a sign"),
        (
            ["recover", "FOLDER", *OUT, "--text", "default", "--seed", str(2**32)],
            "which takes 0 to 4,294,967,295",
        ),
        (["eval", "FOLDER", "--batch-size", "1e3"], "--batch-size is '1e3'; it takes a whole number"),
        (["apply", "FOLDER", "FOLDER", *OUT], "is a folder; name the plan file itself"),
        (["plan", "FOLDER/config.json", "--ratio", "0.1"], "score.json is missing"),
        (["report", "FOLDER/config.json"], "is no folder that prunus wrote"),
        (["eval", "FOLDER", "--tasks", "FOLDER/arc_easy"], "cannot read the task file"),
        (["eval", "FOLDER", "--text", "FOLDER"], "cannot read the text file"),
        (["eval", "FOLDER/config.json"], "is a file, not a model folder"),
        (["score", "FOLDER", "--out", "FOLDER/config.json"], "which is read here; name another folder"),
        (
            ["prune", "FOLDER", *OUT, "--target", "latency", "--set", "target.profile=FOLDER"],
            "is a folder; name a JSON file",
        ),
    ],
    ids=str,
)
def test_other_commands(capsys, folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("FOLDER", str(folder)) for word in words]
    assert message in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_plan_in_a_folder_is_named(capsys, folder, tmp_path):
    (tmp_path / "prunus").mkdir()
    (tmp_path / "prunus" / "plan.json").write_text("{}")
    message = fails(capsys, "apply", folder, tmp_path, "--out", tmp_path / "out")
    assert f"name the plan, {tmp_path / 'prunus' / 'plan.json'}" in message


def test_seeds_that_are_taken(capsys, folder, text, tmp_path):
    from tiny_folder import run_json

    said = [
        run_json(capsys, "score", folder, "--out", tmp_path / seed, *SIZES, "--calibration", text, "--seed", seed)
        for seed in ("0", str(2**63 - 1))
    ]
    assert said[0]["calibration"]["sha256"] != said[1]["calibration"]["sha256"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ratios", "10,20"], "--ratios is 10.0; it is a share of all parameters"),
        (["--ratios", "0.1", "--methods", "taylr"], "--methods 'taylr' is unknown. Did you mean taylor"),
        (["--ratios", "0.1", "--seeds", str(2**63)], "--seeds is 9223372036854775808"),
    ],
    ids=str,
)
def test_several_values_that_cannot_be(capsys, folder, tmp_path, words, message):
    assert message in refused(capsys, "compare", folder, "--out", tmp_path / "never", *words)


def test_a_table_without_a_group(capsys, folder):
    said = refused(capsys, "inspect", folder, "--table", "scores")
    assert "--table says what one group is worth; name it with --group, e.g. 3:mlp:17" in said


def test_a_recipe_of_another_command(capsys, folder, text, tmp_path):
    run(capsys, "prune", folder, "--out", tmp_path / "small", "--ratio", "0.2", "--calibration", text, *SIZES)
    recipe = tmp_path / "small" / "prunus" / "recipe.yaml"
    said = refused(capsys, "recover", tmp_path / "small", "--out", tmp_path / "never", "--recipe", recipe)
    assert (
        "is one of `prunus prune`, and `prunus recover` has other settings: `prunus recipe --command recover`" in said
    )


def test_a_plan_by_the_table_of_a_result(capsys, folder, text, tmp_path):
    """The folder stands for the table in it; the same ratio gives the plan that it was cut by."""
    run(capsys, "prune", folder, "--out", tmp_path / "small", "--ratio", "0.2", "--calibration", text, *SIZES)
    run(capsys, "plan", tmp_path / "small", "--ratio", "0.2", "--out", tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == Plan.load(tmp_path / "small" / "prunus" / "plan.json")


def test_settings_of_a_preset_as_json(capsys):
    settings = run_json(capsys, "recipe", "fast")
    assert (settings["rounds"], settings["scoring"]["method"]) == (Recipe.fast().rounds, Recipe.fast().scoring.method)
