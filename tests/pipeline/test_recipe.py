"""A recipe that cannot work is refused before any pass over the model, by every door."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from tiny_families import make_model, random_tokens
from tiny_folder import TEXT, save_tiny_folder

import prunus
from prunus.calibration import calibration_from_tokens
from prunus.errors import CalibrationError, OptionError, StatisticsError
from prunus.pipeline.compare import compare
from prunus.pipeline.recipe import Recipe
from prunus.repair.compensation import CompensationOptions
from prunus.scoring.adaptive import AdaptiveOptions
from prunus.scoring.score import ScoringOptions, score
from prunus.selection.select import Constraints

RESELECT = CompensationOptions(reselect=True)
#: what is wrong, with 12 calibration sequences
REFUSED = {
    "ratio": ({"ratio": 1.5}, OptionError, "ratio is 1.5"),
    "no round": ({"rounds": 0}, OptionError, "rounds is 0"),
    "uniform in rounds": (
        {"rounds": 2, "constraints": Constraints(shape="uniform")},
        OptionError,
        "shape uniform goes with one round",
    ),
    "reselect without gradients": (
        {"scoring": ScoringOptions(method="wanda", normalize="layer_sum"), "compensation": RESELECT},
        OptionError,
        "reselect needs gradients, which method wanda does not take",
    ),
    "adaptive in rounds": (
        {"scoring": ScoringOptions(method="adaptive"), "rounds": 2},
        OptionError,
        "has 6 calibration sequences in round 2, which scores on a part of the 12; it needs at least 8",
    ),
}
BY_NAME = pytest.mark.parametrize("name", REFUSED)


@pytest.fixture
def ran(monkeypatch):
    """The layers that ran, of any model that a test makes after this."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    whole, ran = LlamaDecoderLayer.forward, []

    def forward(self, *args, **kwargs):
        ran.append(self)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    return ran


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    folder, text = tmp_path / "tiny", tmp_path / "text.txt"
    save_tiny_folder(folder, "llama", "gqa", num_hidden_layers=3)
    text.write_text(TEXT, encoding="utf-8")
    return folder, text


@BY_NAME
def test_prune(name, ran):
    change, error, message = REFUSED[name]
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(12, 12))
    with pytest.raises(error, match=message):
        prunus.prune(**{"model": model, "ratio": 0.2, "calibration": calibration, "progress": False} | change)
    assert not ran


@BY_NAME
@pytest.mark.parametrize("compares", [False, True], ids=["prune_checkpoint", "compare"])
def test_commands(name, compares, ran, paths, tmp_path):
    change, error, message = REFUSED[name]
    change = dict(change)
    folder, text = paths
    options = {"calibration": prunus.CalibrationOptions(str(text), samples=12, seq_len=24), "progress": False}
    ratio, scoring = change.pop("ratio", 0.2), change.pop("scoring", ScoringOptions())
    if compares:
        run = partial(compare, str(folder), ["taylor", scoring.method], [0.1, ratio], scoring=scoring)
    else:
        run = partial(prunus.prune_checkpoint, str(folder), ratio=ratio, scoring=scoring)
    with pytest.raises(error, match=message):
        run(out=tmp_path / "out", **options, **change)
    assert not ran
    assert not (tmp_path / "out").exists()


def test_the_pass_that_is_counted_would_be_seen(ran):
    prunus.prune(make_model("llama", "gqa"), 0.2, calibration_from_tokens(random_tokens(12, 12)), progress=False)
    assert ran


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": ScoringOptions(method="random"), "compensation": CompensationOptions()}, "compensation needs"),
        ({"scoring": ScoringOptions(method="taylor")}, "method taylor needs"),
        ({"scoring": ScoringOptions(method="adaptive", adaptive=AdaptiveOptions(("magnitude",)))}, "method adaptive"),
    ],
)
def test_what_needs_calibration_sequences(ran, options, message):
    with pytest.raises(CalibrationError, match=message):
        prunus.prune(make_model("llama", "gqa"), 0.2, **options, progress=False)
    assert not ran


def test_scores_that_are_given_need_no_sequences_but_what_the_repair_reads():
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(8, 12))
    options = ScoringOptions(method="gate_fisher")
    plain = score(model, calibration, options, progress=False)
    assert prunus.prune(model, 0.2, None, scoring=options, scored=plain, progress=False).plan
    with pytest.raises(CalibrationError, match="method gate_fisher needs"):
        prunus.prune(model, 0.2, None, scoring=options, scored=plain, rounds=2, progress=False)
    for lacking in (plain, prunus.Score(plain.table, plain.geometry, plain.about)):
        with pytest.raises(StatisticsError, match="which the given scores lack"):
            prunus.prune(model, 0.2, calibration, scoring=options, compensation=RESELECT, scored=lacking)
    with_it = score(model, calibration, options, curvature=True, progress=False)
    Recipe(options, compensation=RESELECT, rounds=2).check(0.2, sequences=8, scored=with_it)


@pytest.mark.parametrize(
    ("sequences", "rounds", "enough"), [(7, 1, False), (8, 1, True), (15, 3, False), (16, 3, True)]
)
def test_sequences_of_the_adaptive_method(sequences, rounds, enough):
    def check():
        Recipe(ScoringOptions(method="adaptive"), rounds=rounds).check(0.2, sequences=sequences)

    if enough:
        check()
    else:
        with pytest.raises(OptionError, match=f"has {7} calibration sequences"):
            check()
