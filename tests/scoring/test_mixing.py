"""Importances of several sources: by hand, and that no source decides by the size of its gradients."""

from __future__ import annotations

import pytest
import torch
from plain import plain_scoring
from tiny_families import make_model, random_tokens

from prunus.calibration import calibration_from_tokens
from prunus.calibration.sources import mixed
from prunus.model.families import AXES
from prunus.scoring.mixing import mix_sources
from prunus.scoring.score import score


def importances(seed: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {axis: scale * torch.rand(3 + 4 * (axis == "mlp"), generator=generator, dtype=torch.float64) for axis in AXES}
        for _ in range(2)
    ]


def test_by_hand():
    one, other = importances(0), importances(1, scale=50)
    found = mix_sources([one, other], [3, 1])
    totals = [sum(float(value) for layer in each for axis in AXES for value in layer[axis]) for each in (one, other)]
    mean = 0.75 * totals[0] + 0.25 * totals[1]
    for layer, first, second in zip(found, one, other, strict=True):
        for axis in AXES:
            for index, value in enumerate(layer[axis]):
                parts = float(first[axis][index]) / totals[0], float(second[axis][index]) / totals[1]
                assert float(value) == pytest.approx(mean * (0.75 * parts[0] + 0.25 * parts[1]), rel=1e-12)


def test_the_size_of_a_source_changes_no_order():
    one, other = importances(0), importances(1)
    larger = [{axis: 1000 * layer[axis] for axis in AXES} for layer in other]

    def ranked(found):
        return torch.cat([layer[axis] for layer in found for axis in AXES]).argsort().tolist()

    assert ranked(mix_sources([one, larger], [1, 1])) == ranked(mix_sources([one, other], [1, 1]))
    assert ranked(mix_sources([one, other], [1, 1])) != ranked(mix_sources([one, other], [9, 1]))


def test_one_source_stays_as_it_is_and_an_empty_one_has_no_part():
    one = importances(0)
    for layer, before in zip(mix_sources([one], [5]), one, strict=True):
        assert all(layer[axis] is before[axis] for axis in AXES)
    silent = [{axis: 0 * layer[axis] for axis in AXES} for layer in one]
    for layer, before in zip(mix_sources([one, silent], [1, 1]), one, strict=True):
        assert all(torch.allclose(layer[axis], before[axis] / 4) for axis in AXES)


def test_scores_of_a_mixture_are_mixed_scores_of_its_sources(tmp_path):
    model = make_model("llama", "gqa")
    sources = [calibration_from_tokens(random_tokens(number, 12, seed=number)) for number in (6, 3)]
    for method in ("gate_fisher", "taylor", "wanda"):
        options = plain_scoring(method=method, noise=0.3, random_seed=2)
        mixture = score(model, mixed(sources), options, batch_size=2, progress=False)
        alone = [score(model, source, options, progress=False) for source in sources]
        by_source = [each.table.set_index(["layer_idx", "group_type", "group_idx"])["importance"] for each in alone]
        totals = [each.sum() for each in by_source]
        expected = sum(number / 9 * each / total for number, each, total in zip((6, 3), by_source, totals, strict=True))
        found = mixture.table.set_index(["layer_idx", "group_type", "group_idx"])["importance"]
        found = found.loc[expected.index]
        assert torch.allclose(
            torch.tensor(found.to_numpy() / found.sum()), torch.tensor(expected.to_numpy()), rtol=1e-4
        )
        assert [each.sequences for each in mixture.statistics] == [6, 3]
        assert [each["samples"] for each in mixture.about["calibration"]["sources"]] == [6, 3]
    streamed = score(model, mixed(sources), options, engine="streamed", work=tmp_path / "work", progress=False)
    table = streamed.table.set_index(["layer_idx", "group_type", "group_idx"])["importance"].loc[found.index]
    assert torch.allclose(torch.tensor(table.to_numpy()), torch.tensor(found.to_numpy()), rtol=1e-4)
    assert len(list((tmp_path / "work").glob("statistics-0/source-*"))) == 2
    mixture.save(tmp_path / "scores")
    assert {path.name for path in (tmp_path / "scores").glob("statistics*")} == {
        "statistics.safetensors",
        "statistics-2.safetensors",
    }
