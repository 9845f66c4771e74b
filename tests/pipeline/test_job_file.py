"""Recipes as files: round trips, overrides, and what is wrong with a key is said with its line."""

from __future__ import annotations

import dataclasses
import time
import typing
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from plain import UNMEASURED
from safetensors.torch import load_file
from tiny_folder import SIZES, run

from prunus.calibration import Calibration
from prunus.errors import OptionError
from prunus.pipeline.job import Job, OutputOptions
from prunus.pipeline.job_file import JOB, PRESETS, job_text, read_job
from prunus.pipeline.measured import MEASURED
from prunus.pipeline.options import CalibrationOptions, EvaluationOptions
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.recovery_rounds import RecoveryRounds
from prunus.recovery.options import RecoveryOptions
from prunus.repair.block_repair import RepairOptions
from prunus.scoring.adaptive import AdaptiveOptions
from prunus.scoring.score import ScoringOptions
from prunus.selection.constraints import Constraints
from prunus.selection.fit import FitOptions
from prunus.selection.targets import TargetOptions
from prunus.sweep.engine import ModelOptions

share = st.floats(0, 0.99)
names = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)
METHODS = ("taylor", "taylor_2nd", "gate_fisher", "wanda", "magnitude", "random")
recipes = st.builds(
    Recipe,
    rounds=st.integers(1, 9),
    scoring=st.builds(
        ScoringOptions,
        method=st.sampled_from([*METHODS, "hybrid", "adaptive"]),
        normalize=st.sampled_from(["none", "layer_sum", "layer_mean"]),
        hybrid=st.lists(st.sampled_from(METHODS), min_size=1, unique=True).map(
            lambda chosen: tuple((name, 0.5) for name in chosen)
        ),
        adaptive=st.builds(AdaptiveOptions, st.lists(st.sampled_from(METHODS), min_size=1, unique=True).map(tuple)),
        attention_weight=st.floats(1e-9, 1e9),
        noise=share,
        random_seed=st.none() | st.integers(0, 2**31),
    ),
    selection=st.builds(
        Constraints,
        axes=st.sampled_from([("attention", "mlp"), ("mlp",), ("attention",)]),
        layer_start=st.integers(0, 9),
        layer_end=st.none() | st.integers(10, 99),
        align=st.integers(1, 256),
        shape=st.sampled_from(["ragged", "uniform", "depth"]),
        at_least=st.booleans(),
    ),
    target=st.builds(TargetOptions, st.sampled_from(["params", "flops", "kv_cache", "size"]), st.integers(1, 10**6)),
    repair=st.none()
    | st.builds(
        RepairOptions,
        damping=st.floats(1e-12, 1e3),
        residual=share,
        noise=share,
        fit_logits=st.booleans(),
    ),
    recovery=st.builds(
        RecoveryRounds,
        minutes=st.none() | st.floats(0.01, 1e4),
        tokens=st.none() | st.integers(1, 10**9),
        text=st.none() | st.lists(names.filter(lambda n: ":" not in n), min_size=1, max_size=2, unique=True).map(tuple),
        seq_len=st.none() | st.integers(2, 999),
        training=st.builds(RecoveryOptions, batch_size=st.integers(1, 64), train=st.sampled_from(["layers", "lora"])),
    ),
)
jobs = st.builds(
    Job,
    names,
    share,
    recipes,
    st.builds(CalibrationOptions, names, st.integers(1, 9999), st.integers(2, 9999), st.integers(0, 2**31), names),
    st.builds(EvaluationOptions, st.none() | names, held_out=st.integers(0, 99)),
    st.builds(ModelOptions, names, engine=st.sampled_from(["auto", "resident", "streamed"])),
    st.builds(OutputOptions, st.booleans(), st.sampled_from(["auto", "float16"]), st.none() | names),
    st.builds(FitOptions, st.sampled_from([None, "300MB", "90MB:q4_k_m"]), context=st.integers(1, 10**6)),
)


@given(job=jobs)
def test_a_job_is_the_same_after_a_file(job, tmp_path_factory):
    path = tmp_path_factory.mktemp("jobs") / "job.yaml"
    path.write_text(job_text(job, {"prunus": "1", "plan": "2"}), encoding="utf-8")
    again = read_job(str(path), [], {})
    assert dataclasses.replace(again, made_by={}) == job
    assert again.made_by == {"prunus": "1", "plan": "2"}


@given(job=jobs, data=st.data())
def test_set_changes_one_key_and_nothing_else(job, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("jobs") / "job.yaml"
    path.write_text(job_text(job), encoding="utf-8")
    changes = {"rounds": 7, "scoring.noise": 0.125, "run.device": "cuda:3", "evaluation.held_out": 5}
    key = data.draw(st.sampled_from(sorted(changes)))
    found = yaml.safe_load(job_text(read_job(str(path), [f"{key}={changes[key]}"], {})))
    expected = yaml.safe_load(path.read_text(encoding="utf-8"))
    section, _, name = key.rpartition(".")
    (expected[section] if section else expected)[name] = changes[key]
    assert found == expected


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_by_name_and_written_out(name, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(job_text(read_job(name, [], {})))
    assert read_job(str(path), [], {}).recipe == PRESETS[name]() == read_job(name, [], {}).recipe


def test_a_file_gives_a_part_and_options_of_the_command_line_win(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("ratio: 0.4\nscoring: {method: wanda, normalize: layer_sum}\nselection: {align: gguf}\n")
    job = read_job(str(path), ["ratio=0.3", "scoring.attention_weight=2"], {"scoring.method": "random", "ratio": None})
    default = Recipe()
    assert job == Job(
        "",
        0.3,
        dataclasses.replace(
            default,
            scoring=ScoringOptions(method="random", normalize="layer_sum", attention_weight=2.0),
            selection=Constraints(align=256),
        ),
    )


def test_repair_can_be_left_out_and_brought_back(tmp_path):
    assert read_job(None, ["repair=null"], {}).recipe == dataclasses.replace(Recipe(), repair=None)
    assert read_job(None, ["repair=none"], {}).recipe.repair is None
    brought_back = read_job("original", ["repair.damping=0.5"], {}).recipe.repair
    assert brought_back == RepairOptions(damping=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio: 0.2\nscoring:\n  methd: wanda\n", "line 3: unknown key 'scoring.methd'; did you mean scoring.method?"),
        ("damping: 0.2\n", "line 1: unknown key 'damping'; did you mean repair.damping?"),
        ("rounds: 2.5\n", "line 1: rounds is 2.5; it must be a whole number"),
        ("rounds: true\n", "line 1: rounds is true; it must be a whole number"),
        ("rounds: [2]\n", r"line 1: rounds is \[2\]; it must be a whole number"),
        ("scoring: wanda\n", "line 1: scoring is 'wanda'; it has keys: "),
        ("scoring:\n  normalize: layer_max\n", "line 2: .*it must be one of none, layer_sum, layer_mean"),
        ("repair:\n  damping: .inf\n", "line 2: repair.damping is .inf; it must be a number"),
        ("ratio: 0.1\nratio: 0.2\n", "line 2: ratio is set twice"),
        ("- ratio\n", "must be a mapping"),
        ("ratio: [\n", "is not YAML"),
        ("ratio: &a 0.1\nrounds: *a\n", "aliases"),
        ("scoring:\n  hybrid: taylor\n", "write {taylor: 0.5, wanda: 0.5}"),
        ("selection:\n  align: many\n", "line 2: .*a whole number or one of gpu, gpu128, gguf"),
        ("? [a]\n: 1\n", "a key must be a word"),
        ("[" * 3000, "is not YAML|nested too deeply"),
        ("scoring:\n  x: {y: {z: 1}}\n", "unknown key 'scoring.x'"),
        ("ratio: 2\n", "`ratio` is 2"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        read_job(str(path), [], {})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("damping", "write KEY=VALUE"),
        ("repair.dampin=1", "--set repair.dampin=1: unknown key 'repair.dampin'; did you mean repair.damping?"),
        ("scoring.method=[", "is not a YAML value"),
        ("scoring.method=" + "[" * 5000, "is not a YAML value"),
        ("rounds=0", "`rounds` is 0"),
        ("run.batch_size=0", "`batch_size` is 0"),
    ],
)
def test_what_is_wrong_with_a_setting(setting, message):
    with pytest.raises(OptionError, match=message):
        read_job(None, [setting], {})


def test_a_deeply_nested_file_is_refused_at_once(tmp_path):
    """A scan of its tokens takes the square of their depth."""
    path = tmp_path / "recipe.yaml"
    path.write_text("[" * 200_000)
    begun = time.process_time()
    with pytest.raises(OptionError, match="nested too deeply"):
        read_job(str(path), [], {})
    assert time.process_time() - begun < 5


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(OptionError, match=r"neither a file nor one of .*Did you mean original\?"):
        read_job("orginal", [], {})
    with pytest.raises(OptionError, match="is a folder"):
        read_job(str(tmp_path), [], {})
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(OptionError, match="cannot be read"):
        read_job(str(tmp_path / "noise"), [], {})


def test_every_field_of_every_option_class_is_a_key_with_a_meaning():
    classes = {
        "scoring.": ScoringOptions,
        "selection.": Constraints,
        "target.": TargetOptions,
        "repair.": RepairOptions,
        "recovery.": RecoveryRounds,
        "recovery.training.": RecoveryOptions,
        "calibration.": CalibrationOptions,
        "evaluation.": EvaluationOptions,
        "run.": ModelOptions,
        "output.": OutputOptions,
        "fit.": FitOptions,
    }
    expected = {"model", "ratio", "experts", "rounds", "scoring.adaptive.candidates"}
    expected |= {prefix + field.name for prefix, cls in classes.items() for field in dataclasses.fields(cls)}
    assert set(JOB.keys) == expected - {"scoring.adaptive", "recovery.training"} - JOB.left_out
    assert all((key.meaning and key.allowed != "a value") or key.path == "scoring.hybrid" for key in JOB.keys.values())
    assert typing.get_type_hints(Calibration)  # the classes resolve


def test_a_command_refuses_settings_that_it_does_not_use(tmp_path):
    with pytest.raises(
        OptionError, match=r"--set repair\.damping=1: `prunus score` does not use repair\.damping; it uses"
    ):
        read_job(None, ["repair.damping=1"], {}, command="prunus score")
    with pytest.raises(OptionError, match=r"`prunus plan` does not use scoring\.method"):
        read_job(None, ["scoring={method: taylor, noise: 0.1}"], {}, command="prunus plan")
    with pytest.raises(OptionError, match=r"`prunus score` does not use output\.report"):
        read_job(None, ["output.report=false"], {}, command="prunus score")
    # A file is for other commands as well.
    (tmp_path / "recipe.yaml").write_text("repair: null\nscoring: {noise: 0.1}\n")
    job = read_job(str(tmp_path / "recipe.yaml"), ["scoring.method=wanda"], {}, command="prunus score")
    assert (job.recipe.scoring.method, job.recipe.scoring.noise, job.recipe.repair) == ("wanda", 0.1, None)
    used = {command: [key for key in JOB.keys if JOB.is_used(key, command)] for command in JOB.used}
    assert not [key for key in used["prunus compare"] if key.split(".")[0] in ("model", "ratio", "fit", "recovery")]
    assert {key.split(".")[0] for key in used["prunus plan"]} == {"selection", "target"}


def test_effects_are_of_keys_that_there_are():
    assert MEASURED.keys() <= JOB.keys.keys()


def test_the_page_of_settings_is_the_one_in_the_documentation(benchmark):
    page = Path(__file__).parents[2] / "docs" / "recipe.md"
    assert page.read_text(encoding="utf-8") == benchmark("recipe_page").recipe_page(), (
        "run: python benchmarks/recipe_page.py > docs/recipe.md"
    )


def test_a_result_can_be_made_again_from_its_own_recipe(capsys, tmp_path, folder, text):
    first, again = tmp_path / "first", tmp_path / "again"
    settings = ["--set", "repair.damping=0.2", *UNMEASURED, "--seed", "3", "--ratio", "0.3"]
    run(capsys, "prune", folder, "--out", first, "--calibration", text, *SIZES, *settings)
    run(capsys, "prune", "--recipe", first / "prunus" / "recipe.yaml", "--out", again)
    for name in ("prunus/plan.json", "prunus/groups.csv", "config.json", "prunus/recipe.yaml"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    one, other = (load_file(path / "model.safetensors") for path in (first, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
