"""Cut, repair and train in rounds, within one budget; and the same after a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from forked import Forked
from tiny_folder import fails, run_json

import prunus
from prunus.calibration.batches import hash_tokens
from prunus.cli import main
from prunus.errors import OptionError
from prunus.pipeline.recipe import Recipe
from prunus.pipeline.recovery_rounds import RecoveryRounds
from prunus.pipeline.rounds import schedule
from prunus.recovery.curve import curve
from prunus.recovery.options import RecoveryOptions
from prunus.recovery.trainer import RecoveryTrainer
from prunus.report.contents import contents_of
from prunus.sweep.sequence_loss import perplexity_of_windows

CUT = ["--ratio", "0.3", "--rounds", "2", "--calibration", "default", "--samples", "8", "--seq-len", "32"]
CUT += ["--set", "evaluation.held_out=8", "--set", "output.report=false"]
TRAINING = {"batch_size": 4, "micro_batch": 4, "learning_rate": 5e-3, "checkpoints": 2, "train": "full"}
#: the text is what the dense model was trained on, and tells it nothing more
TRAINING |= {"kl_weight": 1.0, "ce_weight": 0.0}
#: 36 steps in all, 12 of them after the first round
TRAIN = ["tokens=4608", "seq_len=32", "held_out=8", *(f"training.{name}={value}" for name, value in TRAINING.items())]
TRAIN = [word for setting in TRAIN for word in ("--set", f"recovery.{setting}")]


@pytest.fixture(scope="module")
def trained(dense, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("progressive") / "out"
    assert main(["prune", str(dense), "--out", str(out), *CUT, *TRAIN]) == 0
    assert not out.with_name("out.work").exists()
    return out


def test_training_after_each_round(trained, dense, tmp_path, capsys):
    record = json.loads((trained / "prunus" / "recovery.json").read_text())
    first, last = record["rounds"]
    assert (first["steps"], last["steps"]) == (12, 24)
    assert first["held_out"]["sha256"] == last["held_out"]["sha256"]
    assert first["text"]["sha256"] == last["text"]["sha256"]
    # The second round cuts what the first one trained, and trains on.
    sizes = [first["parameters"], last["parameters"]]
    model, tokenizer = prunus.load_model(trained)
    whole, _ = prunus.load_model(dense)
    assert sizes[1] == model.num_parameters() < sizes[0] < whole.num_parameters()
    assert 1 - sizes[1] / whole.num_parameters() == pytest.approx(0.3, abs=0.02)
    points = record["curve"]
    assert [point["tokens"] for point in points] == [0, 768, 1536, 1536, 1536 + 1536, 4608]
    assert [point["round"] for point in points] == [1, 1, 1, 2, 2, 2]
    assert points[-1]["held_out_loss"] == last["history"][-1]["held_out_loss"]
    # The loss that is written down is that of the folder, on sequences drawn again.
    how = {"samples": 2**14 + 8, "seq_len": 32, "reading": prunus.Reading(fewer=True)}
    fitted, held_out = prunus.load_calibration("default", tokenizer, **how).split(8)
    assert held_out.provenance.sha256 == last["held_out"]["sha256"]
    measured = perplexity_of_windows(model, held_out.input_ids, progress=False).nll
    assert measured == pytest.approx(last["held_out_loss"]["after"], rel=1e-6)
    # What the result is measured on was not trained on, though both are of the same text.
    of_calibration = prunus.load_calibration("default", tokenizer, samples=8 + 8, seq_len=32).split(8)[1].input_ids
    rows = [row for row in fitted.input_ids.tolist() if row not in of_calibration.tolist()]
    assert len(rows) == len(fitted) - 8
    assert last["text"]["sha256"] == hash_tokens(torch.tensor(rows[: 4608 // 32]))
    # It is worth it.
    plain = tmp_path / "plain"
    without = run_json(capsys, "prune", dense, "--out", plain, *CUT)
    with_training = json.loads((trained / "prunus" / "metrics.json").read_text())
    assert with_training["perplexity_after"] < 0.9 * without["perplexity_after"]
    assert (with_training["base_model"], with_training["ratio"]) == (without["base_model"], without["ratio"])
    card = (trained / "README.md").read_text()
    assert "| 2 | 3,072 |" in card
    assert "## Recovery" in card
    # The plan leads from the dense model to what was saved.
    plan = json.loads((trained / "prunus" / "plan.json").read_text())
    kept = [layer["mlp"]["kept"] for layer in plan["layers"]]
    assert kept != [layer["mlp"]["kept"] for layer in json.loads((plain / "prunus/plan.json").read_text())["layers"]]
    page = contents_of(trained)
    (section,) = [section for section in page.sections if section.name == "recovery"]
    rows = section.charts[0].table.rows
    assert [row[1] for row in rows] == [f"{point['tokens']:,}" for point in points]
    assert [row[3] for row in rows] == [f"{point['held_out_loss']:.4f}" for point in points]
    recipe = (trained / "prunus" / "recipe.yaml").read_text()
    assert "tokens: 4608" in recipe


@pytest.mark.parametrize(
    "reached",
    [
        pytest.param("round-1/trained.work/checkpoint-6", marks=pytest.mark.slow),
        "round-2/trained.work/checkpoint-12",
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(trained, dense, tmp_path, reached):
    out = tmp_path / "out"
    words = ["prune", str(dense), "--out", str(out), *CUT, *TRAIN]
    process = Forked(lambda: main(words))
    process.wait_until((tmp_path / "out.work" / reached / "trainer_state.json").is_file)
    process.kill()
    process.wait()
    assert not out.exists()
    first = tmp_path / "out.work" / "round-1" / "trained" / "model.safetensors"
    before = first.stat().st_mtime_ns if first.is_file() else None
    assert main(words) == 0
    assert before is None or "round-2" in reached
    for name in ("model.safetensors", "prunus/plan.json", "prunus/groups.csv"):
        assert (out / name).read_bytes() == (trained / name).read_bytes(), name
    own, other = (json.loads((folder / "prunus" / "recovery.json").read_text()) for folder in (out, trained))
    assert [each["history"] for each in own["rounds"]] == [each["history"] for each in other["rounds"]]
    assert not (tmp_path / "out.work").exists()


def test_a_finished_round_is_not_trained_again_when_the_same_job_is_typed_in_another_way(
    trained, dense, tmp_path, monkeypatch
):
    """Another spelling of the paths, and a limit on memory: none of it changes what is trained."""
    monkeypatch.chdir(tmp_path)
    begun, real = [], RecoveryTrainer.train

    def train(self, *args, **kwargs):
        begun.append(self)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(RecoveryTrainer, "train", train)
    assert main(["prune", str(dense), "--out", "out", *CUT, *TRAIN]) == 130
    link = tmp_path / "another-name"
    link.symlink_to(dense)
    assert main(["prune", str(link), "--out", str(tmp_path / "out"), *CUT, *TRAIN, "--max-memory", "8GB"]) == 0
    assert len(begun) == 3, "the first round once, the second twice"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    record = json.loads((tmp_path / "out" / "prunus" / "recovery.json").read_text())
    assert all("command" not in each for each in record["rounds"])


def test_a_budget_that_was_changed_is_named_before_any_work(dense, tmp_path, monkeypatch, capsys):
    words = ["prune", str(dense), "--out", str(tmp_path / "out"), *CUT, *TRAIN]
    monkeypatch.setattr(RecoveryTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(words) == 130
    capsys.readouterr()
    said = fails(capsys, *words, "--set", "recovery.tokens=2304")
    assert "was begun with --set recovery.tokens 4608, now it is 2304" in said
    assert "scoring" not in said


def test_ctrl_c_says_how_to_go_on(trained, dense, tmp_path, monkeypatch, caplog):
    words, real = ["prune", str(dense), "--out", str(tmp_path / "out"), *CUT, *TRAIN], RecoveryTrainer.training_step

    def training_step(self, *args):
        if self.state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RecoveryTrainer, "training_step", training_step)
        assert main(words) == 130
    assert "checkpoint-4 is saved in" in caplog.text
    assert "and the same command goes on from there" in caplog.text
    assert main(words) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "reached",
    [
        pytest.param("round-1/trained.work/checkpoint-6/trainer_state.json", marks=pytest.mark.slow),
        "round-1/trained/config.json",
    ],
)
def test_other_text_after_a_kill_is_trained_on_from_the_first_round(dense, tmp_path, reached, capsys):
    """A text file of the same name: what was trained on another text is neither used again nor thrown away unasked."""
    text = tmp_path / "text.jsonl"

    def write(word):
        lines = (json.dumps({"text": f"{word} {n} has {n * n} letters, or so it says."}) for n in range(200))
        text.write_text("\n".join(lines))

    def words(out):
        return ["prune", str(dense), "--out", str(tmp_path / out), *CUT, *TRAIN, "--set", f"recovery.text={text}"]

    write("One")
    process = Forked(lambda: main(words("out")))
    process.wait_until((tmp_path / "out.work" / reached).is_file)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    write("Another")
    kept = sorted((tmp_path / "out.work").rglob("*"))
    capsys.readouterr()
    said = fails(capsys, *words("out"))
    assert "round-1 was begun with recovery.text [['" in said.replace("--set ", "")
    assert "--overwrite" in said
    assert sorted((tmp_path / "out.work").rglob("*")) == kept
    assert main([*words("out"), "--overwrite"]) == main(words("expected")) == 0
    own, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected"))
    assert own == other


def test_shares_of_the_budget():
    recovery = RecoveryRounds(minutes=30, tokens=9000, seq_len=10, training=RecoveryOptions(batch_size=3))
    for rounds, expected in ((1, [1.0]), (2, [1 / 3, 2 / 3]), (4, [1 / 9, 1 / 9, 1 / 9, 2 / 3])):
        steps = schedule(0.4, rounds)
        assert [recovery.share(step, rounds) for step in steps] == pytest.approx(expected)
    from prunus.pipeline.options import CalibrationOptions
    from prunus.sweep.engine import ModelOptions

    one, two = (
        recovery.job(step, 2, "cut", "dense", CalibrationOptions(source=("a.txt:2", "self"), seed=7), ModelOptions())
        for step in schedule(0.4, 2)
    )
    assert (one.recovery.max_steps, two.recovery.max_steps) == (100, 200)
    assert (one.recovery.max_minutes, two.recovery.max_minutes) == pytest.approx((10, 20))
    assert (one.text.source, one.text.seed, one.teacher) == (("a.txt:2", "self"), 7, "dense")
    assert one.text.order != two.text.order
    assert (one.text.seed, one.text.samples) == (two.text.seed, two.text.samples) == (7, 900)


def test_the_curve_goes_on_where_a_round_ended():
    def facts(steps: int, seconds: float, before: float, losses: list[float]) -> dict:
        history = [{"step": (n + 1) * steps // len(losses), "held_out_loss": x} for n, x in enumerate(losses)]
        of = {"options": {"batch_size": 2}, "text": {"seq_len": 5}, "tokens": steps * 10}
        return {**of, "steps": steps, "seconds": seconds, "held_out_loss": {"before": before}, "history": history}

    points = curve([facts(4, 8.0, 3.0, [2.5, 2.0]), facts(6, 3.0, 4.0, [1.0])])
    assert [(p["tokens"], p["seconds"], p["held_out_loss"]) for p in points] == [
        (0, 0.0, 3.0),
        (20, 4.0, 2.5),
        (40, 8.0, 2.0),
        (40, 8.0, 4.0),
        (100, 11.0, 1.0),
    ]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["recovery.minutes=0"], "recovery.minutes is 0.0; it must be a number above 0"),
        (["recovery.before_last=1", "recovery.minutes=1"], "recovery.before_last"),
        (["recovery.minutes=1", "recovery.training.max_steps=3"], "recovery.training.max_steps"),
        (["recovery.minutes=1", "recovery.text=nowhere.txt"], "nowhere.txt"),
        (["recovery.minutes=1", "recovery.seq_len=4096"], "4096"),
        (["recovery.minutes=1", "run.engine=streamed"], "resident engine"),
        (["recovery.minutes=1", "run.device=cpu:0"], "recovery takes a kind of device"),
        (["recovery.minutes=1", "recovery.text=[self, default]", "recovery.held_out=1"], "hold out one each"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(dense, tmp_path, capsys, settings, named):
    words = [word for setting in settings for word in ("--set", setting)]
    assert named in fails(capsys, "prune", dense, "--out", tmp_path / "out", *CUT, *words)
    assert not list(tmp_path.iterdir())


def test_a_short_file_beside_text_without_an_end_is_refused_before_scoring(dense, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("a few words that are not many. " * 2)
    text = f"recovery.text=[{tmp_path / 'short.txt'}, self]"
    said = fails(capsys, "prune", dense, "--out", tmp_path / "out", *CUT, *TRAIN, "--set", text)
    assert "scoring" not in said
    assert "short.txt holds" in said
    assert "--set recovery.seq_len" in said


def test_a_text_that_is_too_short_to_train_on_is_refused_before_scoring(dense, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("word " * 60)
    words = [dense, "--out", tmp_path / "out", *CUT, *TRAIN, "--set", f"recovery.text={tmp_path / 'short.txt'}"]
    capsys.readouterr()
    assert main(["prune", *map(str, words)]) == 1
    said = capsys.readouterr().err
    assert "scoring" not in said.partition("error: ")[0].partition("loading")[2]
    assert "holds 9 sequences of 32 tokens" in said
    assert "and 12 are needed, of which 8 are held out" in said
    for key in ("seq_len", "held_out", "training.batch_size"):
        assert f"--set recovery.{key}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_where_nothing_is_trained(dense, tmp_path, capsys):
    model, _ = prunus.load_model(dense)
    with pytest.raises(OptionError, match="prune_job"):
        prunus.prune(model, 0.2, recipe=Recipe(recovery=RecoveryRounds(minutes=1)))
    words = ["compare", dense, "--out", tmp_path / "out", "--ratios", "0.2", "--methods", "taylor"]
    assert "does not use recovery.minutes" in fails(capsys, *words, "--set", "recovery.minutes=1")
    (tmp_path / "trained.yaml").write_text("recovery: {minutes: 1}")
    assert "without training" in fails(capsys, *words, "--recipes", tmp_path / "trained.yaml")
    ahead = run_json(
        capsys, "prune", dense, "--out", tmp_path / "out", *CUT, "--set", "recovery.minutes=6", "--dry-run"
    )
    plain = run_json(capsys, "prune", dense, "--out", tmp_path / "out", *CUT, "--dry-run")
    assert ahead["memory_bytes"] > plain["memory_bytes"]
    between = f"{(ahead['memory_bytes'] + plain['memory_bytes']) // 2 // 2**10}KiB"
    words = ["prune", dense, "--out", tmp_path / "out", *CUT, "--set", "recovery.minutes=6", "--max-memory", between]
    assert "training needs about" in fails(capsys, *words)
    assert ahead["disk_bytes"] > 4 * plain["disk_bytes"]
    assert ahead["stages"]["training, round 1 of 2"] == pytest.approx(120)
    assert ahead["stages"]["training, round 2 of 2"] == pytest.approx(240)
