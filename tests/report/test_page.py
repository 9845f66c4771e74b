"""The page is valid HTML, says what the files say, needs nothing from elsewhere, and takes every string as text."""

from __future__ import annotations

import json
import shutil

import html5lib
import numpy as np
import pandas as pd
import pytest
import torch
import vl_convert
from hostile import HOSTILE
from plain import plain_recipe
from tiny_families import make_model, random_tokens

import prunus
from prunus.calibration import calibration_from_tokens
from prunus.cli import main
from prunus.errors import CheckpointError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.report import write_report
from prunus.report.charts import score_charts
from prunus.selection.plan import Plan
from prunus.selection.table import build_table

#: parts of the page about a result that has everything but an evaluation
SECTIONS = ["kept", "scores", "removed", "measured", "samples", "calibration", "settings", "commands"]


def parse(path):
    """The document; html5lib in its strict mode refuses whatever is not HTML."""
    text = path.read_text(encoding="utf-8")
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)


def text_of(element) -> str:
    return " ".join("".join(element.itertext()).split())


def tables(document) -> dict[str, list[list[str]]]:
    """Rows of cells by caption."""
    return {
        text_of(table.find("caption")): [[text_of(cell) for cell in row] for row in table.iter("tr")]
        for table in document.iter("table")
    }


def names(document) -> list[str]:
    return [section.get("id") for section in document.iter("section")]


def test_the_page_that_prune_writes(pruned):
    document = parse(pruned / "report.html")
    assert names(document) == SECTIONS
    metrics = json.loads((pruned / "prunus" / "metrics.json").read_text())
    figures = [text_of(dd) for dd in document.iter("dd")]
    assert any(f"{metrics['parameters_after']:,}" in figure for figure in figures)
    found = tables(document)
    quality = found["Quality"][1]
    assert quality[1:4] == ["perplexity", *(f"{metrics[f'perplexity_{when}']:.2f}" for when in ("before", "after"))]
    plan = Plan.load(pruned / "prunus" / "plan.json")
    for layer_idx, (before, kept) in enumerate(zip(plan.widths, plan.layers, strict=True)):
        expected = [str(layer_idx), *(f"{len(kept[axis])} of {before[axis]}" for axis in ("attention", "mlp"))]
        assert found["What stays of each layer"][1 + layer_idx] == expected
    # Parameters removed on both axes are all that are missing, but for the norms before blocks that are gone.
    removed = sum(int(row[-1].replace(",", "")) for row in found["Groups over all layers"][1:])
    norms = 48 * sum(not kept[axis] for kept in plan.layers for axis in ("attention", "mlp"))
    assert removed + norms == metrics["parameters_before"] - metrics["parameters_after"]
    assert ["sha256", metrics["calibration"]["sha256"]] in found["The text that importance was measured on"]
    samples = json.loads((pruned / "prunus" / "samples.json").read_text())
    written = ["".join(p.itertext()) for p in document.iter("p") if p.get("class") == "written"]
    texts = [sample[side] for sample in samples for side in ("dense", "pruned")]
    assert [readable(text) for text in written] == [readable(text) or "(endshere)" for text in texts]
    assert any(readable(text) != "".join(text.split()) for text in texts)  # random bytes, control characters among them


def readable(text: str) -> str:
    """A text without what a page cannot hold as it is."""
    return "".join(letter for letter in text if letter.isprintable() and letter not in " \ufffd")


def test_nothing_is_loaded_from_elsewhere(pruned, comparison):
    for folder in (pruned, comparison):
        document = parse(folder / "report.html")
        for element in document.iter():
            if not isinstance(element.tag, str):
                continue
            assert element.tag not in ("img", "iframe", "object", "embed", "base")
            assert not any(name.startswith("on") for name in element.keys())  # noqa: SIM118
            for name in ("src", "href", "action", "data"):
                assert (element.get(name) or "#").startswith(("#", "data:,"))
        (policy,) = [m.get("content") for m in document.iter("meta") if m.get("http-equiv")]
        assert policy.startswith("default-src 'none'")
        assert (folder / "report.html").stat().st_size < 1.5e6


def test_strings_are_text(pruned):
    document = parse(pruned / "report.html")
    assert HOSTILE in "".join(document.find(".//title").itertext())
    assert HOSTILE in "".join(document.find(".//h1").itertext())
    commands = ["".join(code.itertext()) for code in document.iter("code")]
    assert commands[0] == "prunus prune </code><script>alert(2)</script>"
    assert "49" not in "".join(document.find(".//h1").itertext())
    # Data, library and page script: no other script came out of a string.
    kinds = [script.get("type") for script in document.iter("script")]
    assert kinds == ["application/json"] * 3 + [None, None]


def test_charts_hold_the_figures_of_the_files(pruned):
    document = parse(pruned / "report.html")
    specs = {
        script.get("id"): json.loads(script.text)
        for script in document.iter("script")
        if script.get("type") == "application/json"
    }
    assert list(specs) == ["spec-keep", "spec-spread", "spec-layers"]
    for spec in specs.values():
        assert vl_convert.vegalite_to_vega(spec)["marks"]
    plan = Plan.load(pruned / "prunus" / "plan.json")
    shares = {(value["layer"], value["axis"]): value["share"] for value in specs["spec-keep"]["data"]["values"]}
    assert shares == {
        (layer_idx, title): len(plan.layers[layer_idx][axis]) / plan.widths[layer_idx][axis]
        for layer_idx in range(len(plan.layers))
        for axis, title in (("attention", "attention groups"), ("mlp", "MLP channels"))
    }
    table = pd.read_csv(pruned / "prunus" / "groups.csv")
    check_histogram(specs["spec-spread"], table, plan)


def check_histogram(spec, table, plan) -> None:
    """Every group stands in one bar of each quantity, by its state, between the edges of the bar."""
    bins = pd.DataFrame(spec["data"]["values"])
    assert bins["groups"].sum() == 2 * len(table)
    for axis, title in (("attention", "attention groups"), ("mlp", "MLP channels")):
        of_axis = table[table["group_type"] == axis]
        stays = [
            group in plan.layers[layer][axis]
            for layer, group in zip(of_axis["layer_idx"], of_axis["group_idx"], strict=True)
        ]
        for measure in ("score", "importance"):
            part = bins[(bins["axis"] == title) & (bins["measure"] == measure)]
            for state, of_state in (("kept", of_axis[stays]), ("removed", of_axis[[not stay for stay in stays]])):
                bars = part[part["state"] == state]
                assert bars["groups"].sum() == len(of_state)
                assert bars.loc[bars["low"].isna(), "groups"].sum() == (of_state[measure] <= 0).sum()
                # The edges in the page are rounded.
                for bar in bars[bars["low"].notna()].itertuples():
                    between = [
                        of_state[measure].between(bar.low * (1 + e), bar.high * (1 - e)).sum() for e in (1e-3, -1e-3)
                    ]
                    assert between[0] <= bar.groups <= between[1]
            assert (part["top"] - part["bottom"] == part["groups"]).all()
            assert part.loc[part["state"] == "kept", "place"].is_unique


def a_cut(scores_of_layer_0):
    """A table of two layers in which the first has these scores, and a plan that removes its three lowest channels."""
    geometry = Geometry.of(make_model("llama", "gqa"))
    table = build_table(geometry, [{axis: torch.ones(widths[axis]) for axis in AXES} for widths in geometry.widths])
    here = (table["layer_idx"] == 0) & (table["group_type"] == "mlp")
    table.loc[here, "score"] = scores_of_layer_0
    plan = Plan.from_kept(
        geometry, [{"attention": range(3), "mlp": range(3, 20)}, {"attention": [0], "mlp": range(20)}]
    )
    return table, plan


@pytest.mark.parametrize(
    "scores",
    [
        [-2.0, -1.0, 0.0, *range(1, 18)],  # as after several rounds
        [-1.0] * 20,
        [0.0] * 20,
        [1e-300] * 19 + [1e300],
        [1 + n * 1e-9 for n in range(20)],  # bars closer than the digits that are shown
    ],
)
def test_all_groups_have_a_place_in_the_charts(scores):
    table, plan = a_cut(scores)
    spread, by_layer = score_charts(table, plan)
    check_histogram(spread.spec, table, plan)
    layers = pd.DataFrame(by_layer.spec["data"]["values"])
    found = layers[(layers.layer == 0) & (layers.axis == "MLP channels") & (layers.measure == "score")].iloc[0]
    for name, quantile in (("q5", 0.05), ("q25", 0.25), ("q50", 0.5), ("q75", 0.75), ("q95", 0.95)):
        expected = float(np.quantile(scores, quantile))
        assert found[name] == pytest.approx(expected, rel=1e-3)
        assert found[f"y{name}"] > 0, "a logarithmic scale can draw it"
        assert expected <= 0 or found[f"y{name}"] == found[name]
    lowest = min(score for score in layers[[f"q{q}" for q in (5, 25, 50, 75, 95)]].to_numpy().flatten() if score > 0)
    assert all(found[f"y{name}"] < lowest for name in ("q5", "q25") if found[name] <= 0)
    for chart in (spread, by_layer):
        assert "<svg" in vl_convert.vegalite_to_svg({**chart.spec, "width": 400})


def test_two_rounds_in_the_charts():
    """The groups of the first round stand below all scores, and are counted."""
    model, calibration = make_model("llama", "gqa"), calibration_from_tokens(random_tokens(4, 12))
    result = prunus.prune(model, 0.3, calibration, plain_recipe(rounds=2), progress=False)
    spread, _ = score_charts(result.score.table, result.plan)
    assert (result.score.table["score"] <= 0).any()
    check_histogram(spread.spec, result.score.table, result.plan)


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        (["groups.csv"], {"scores"}),
        (["samples.json"], {"samples"}),
        (["groups.csv", "samples.json", "score.json"], {"scores", "samples"}),
    ],
)
def test_what_is_not_there_is_left_out(tmp_path, pruned, gone, missing):
    folder = tmp_path / "copy"
    shutil.copytree(pruned, folder)
    for name in gone:
        (folder / "prunus" / name).unlink()
    document = parse(write_report(folder))
    assert names(document) == [name for name in SECTIONS if name not in missing]


def test_a_result_with_the_least_metrics(tmp_path, pruned):
    folder = tmp_path / "least"
    (folder / "prunus").mkdir(parents=True)
    shutil.copy(pruned / "prunus" / "plan.json", folder / "prunus")
    facts = {"base_model": "base", "parameters_before": 10, "parameters_after": 5}
    (folder / "prunus" / "metrics.json").write_text(json.dumps(facts))
    document = parse(write_report(folder))
    assert names(document) == ["kept", "removed", "commands"]
    assert text_of(document.find(".//h1")) == "least: base without 50.0% of its parameters"


def test_the_page_about_a_comparison(comparison):
    document = parse(comparison / "report.html")
    assert names(document) == ["comparison", "kept", "cost", "settings"]  # no method here needs text
    rows = pd.read_csv(comparison / "comparison.csv")
    shown = tables(document)["Perplexity by recipe and share removed"][1:]
    assert [row[0] for row in shown] == list(rows["recipe"])
    assert [row[3] for row in shown] == [f"{figure:,.2f}" for figure in rows["perplexity"]]
    kept = tables(document)["What stays of each layer"]
    assert kept[0][0] == "plan"
    assert {row[0] for row in kept[1:]} == {
        f"{name}-{ratio}-seed0" for name in ("magnitude", "random") for ratio in (0.1, 0.3)
    }


def test_a_comparison_in_which_something_diverged(tmp_path, comparison):
    folder = tmp_path / "diverged"
    shutil.copytree(comparison, folder)
    facts = json.loads((folder / "comparison.json").read_text())
    facts["rows"][-1]["perplexity"] = facts["rows"][-1]["relative"] = None  # how pandas writes infinity
    (folder / "comparison.json").write_text(json.dumps(facts))
    shown = tables(parse(write_report(folder)))["Perplexity by recipe and share removed"]
    assert shown[-1][3:] == ["infinite", "infinite"]


def test_folders_of_others(capsys, tmp_path, sources):
    with pytest.raises(CheckpointError, match="is no folder that prunus wrote: a report needs"):
        write_report(sources[0])
    assert main(["report", str(tmp_path / "missing")]) == 1
    assert "missing is no folder that prunus wrote" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}"])
def test_damaged_metrics(tmp_path, pruned, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(pruned, folder)
    (folder / "prunus" / "metrics.json").write_text(damage)
    before = (folder / "report.html").read_bytes()
    with pytest.raises(CheckpointError, match=r"metrics\.json"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before


def test_the_command(capsys, tmp_path, pruned):
    out = tmp_path / "elsewhere.html"
    assert main(["report", str(pruned), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(out), "bytes": out.stat().st_size}
    assert names(parse(out)) == SECTIONS
