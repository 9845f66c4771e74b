"""A recipe that cannot work is refused before any pass over the model, by every door."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_families import make_model, random_tokens
from tiny_folder import TEXT, save_tiny_folder

import prunus
from prunus.calibration import calibration_from_tokens
from prunus.errors import CalibrationError, OptionError
from prunus.model.families import AXES
from prunus.pipeline.compare import compare
from prunus.pipeline.job import Job
from prunus.pipeline.recipe import Recipe
from prunus.scoring.adaptive import AdaptiveOptions
from prunus.scoring.score import ScoringOptions
from prunus.selection.select import Constraints

#: what is wrong, with 12 calibration sequences: changes to the recipe, and the ratio
REFUSED = {
    "ratio": ({}, 1.5, "`ratio` is 1.5"),
    "adaptive in rounds": (
        {"scoring": ScoringOptions(method="adaptive")},
        0.2,
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
    change, ratio, message = REFUSED[name]
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(12, 12))
    with pytest.raises(OptionError, match=message):
        prunus.prune(model, ratio, calibration, Recipe(**change), progress=False)
    assert not ran


@BY_NAME
@pytest.mark.parametrize("compares", [False, True], ids=["prune_checkpoint", "compare"])
def test_commands(name, compares, ran, paths, tmp_path):
    change, ratio, message = REFUSED[name]
    folder, text = paths
    recipe, calibration = Recipe(**change), prunus.CalibrationOptions(str(text), samples=12, seq_len=24)
    if compares:
        recipes, job = {"plain": Recipe.original(), "wrong": recipe}, Job(str(folder), calibration=calibration)
        run = partial(compare, job, recipes, [0.1, ratio], tmp_path / "out")
    else:
        run = partial(prunus.prune_checkpoint, str(folder), tmp_path / "out", ratio, recipe, calibration=calibration)
    with pytest.raises(OptionError, match=message):
        run(progress=False)
    assert not ran
    assert not (tmp_path / "out").exists()


def test_the_pass_that_is_counted_would_be_seen(ran):
    prunus.prune(make_model("llama", "gqa"), 0.2, calibration_from_tokens(random_tokens(12, 12)), progress=False)
    assert ran


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(), "repair needs"),
        (Recipe.original(), "method taylor needs"),
        (
            Recipe(1, ScoringOptions(method="adaptive", adaptive=AdaptiveOptions(("magnitude",))), repair=None),
            "adaptive",
        ),
    ],
)
def test_what_needs_calibration_sequences(ran, recipe, message):
    with pytest.raises(CalibrationError, match=message):
        prunus.prune(make_model("llama", "gqa"), 0.2, recipe=recipe, progress=False)
    assert not ran


def test_rounds():
    with pytest.raises(OptionError, match="`rounds` is 0"):
        Recipe(rounds=0)
    assert [step.share for step in Recipe(rounds=4).steps(0.2)] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert [step.share for step in Recipe(selection=Constraints(shape="uniform")).steps(0.2)] == [0.2]


def test_the_original_recipe_is_plain_slicing_by_first_order_taylor():
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(6, 12))
    geometry = prunus.Geometry.of(model)
    gradients = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for ids in calibration.input_ids:
        model.zero_grad()
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        for total, parameter in zip(gradients, model.parameters(), strict=True):
            total += parameter.grad / len(calibration)
    value = {
        name: (parameter * gradient).abs().detach()
        for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True)
    }
    model.zero_grad()
    score = {}
    for layer_idx, widths in enumerate(geometry.widths):
        mlp = f"model.layers.{layer_idx}.mlp"
        for channel in range(widths.intermediate_size):
            parts = [value[f"{mlp}.{name}.weight"][channel] for name in ("gate_proj", "up_proj")]
            parts.append(value[f"{mlp}.down_proj.weight"][:, channel])
            score[layer_idx, "mlp", channel] = sum(float(part.sum()) for part in parts) / (3 * 48)
        attention = f"model.layers.{layer_idx}.self_attn"
        ratio = geometry.num_key_value_groups
        for group in range(widths.num_key_value_heads):
            keys, queries = (slice(group * 8 * n, (group + 1) * 8 * n) for n in (1, ratio))
            parts = [value[f"{attention}.{name}.weight"][keys] for name in ("k_proj", "v_proj")]
            parts += [value[f"{attention}.q_proj.weight"][queries], value[f"{attention}.o_proj.weight"][:, queries]]
            cost = sum(part.numel() for part in parts)
            score[layer_idx, "attention", group] = sum(float(part.sum()) for part in parts) / cost
    result = prunus.prune(model, 0.2, calibration, Recipe.original(), progress=False)
    cut = {
        (i, axis, group)
        for i, (widths, kept) in enumerate(zip(geometry.widths, result.plan.layers, strict=True))
        for axis in AXES
        for group in set(range(widths[axis])) - set(kept[axis])
    }
    assert cut == set(sorted(score, key=score.get)[: len(cut)])
    assert not result.repairs


@pytest.mark.parametrize(
    ("sequences", "rounds", "enough"), [(7, 1, False), (8, 1, True), (15, 3, False), (16, 3, True)]
)
def test_sequences_of_the_adaptive_method(sequences, rounds, enough):
    def check():
        Recipe(rounds, ScoringOptions(method="adaptive")).check(0.2, sequences=sequences)

    if enough:
        check()
    else:
        with pytest.raises(OptionError, match=f"has {7} calibration sequences"):
            check()
