"""The model card says what was done, and is valid for the Hub whatever is in the strings."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hostile_text import UNSEEN, hostile_text
from huggingface_hub import EvalResult, ModelCard, metadata_load
from hypothesis import given, settings
from markdown_it import MarkdownIt

from prunus.errors import CheckpointError
from prunus.escaping import printable
from prunus.model.widths import LayerWidths
from prunus.results.card import (
    CalibrationFacts,
    CardFacts,
    MeasuredFacts,
    OriginalFacts,
    license_of,
    model_card,
    updated_card,
)

DENSE = LayerWidths(3, 100)
FACTS = CardFacts(
    name="llama-taylor-0.2",
    base_model="someone/llama",
    method="taylor",
    ratio=0.2,
    parameters_before=1_000_000,
    parameters_after=801_234,
    base_widths=(DENSE,) * 4,
    widths=(DENSE, LayerWidths(0, 0), LayerWidths(1, 64), LayerWidths(0, 7)),
    num_key_value_groups=4,
    model_type="prunus_llama",
    ragged=True,
    command="prunus prune someone/llama --ratio 0.2 --out out",
    version="0.1.0",
    on_hub=True,
    license={"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
    calibration=CalibrationFacts("c4", 128, 512, 7, "ab" * 32),
    measured=(
        MeasuredFacts("wikitext-2", "wikitext-2", "perplexity", "perplexity", "windows of 2048", 21.784, 40.55),
        MeasuredFacts("ptb", "ptb", "perplexity", "perplexity", "p", None, 9.0),
    ),
    details={"normalisation": "layer_sum"},
)


def card(**changes) -> str:
    return model_card(dataclasses.replace(FACTS, **changes))


def rows(text: str, start: str) -> list[list[str]]:
    """Cells of the table rows that begin with `start`."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(start)
    ]


def test_front_matter():
    metadata = ModelCard(card()).data.to_dict()
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["prunus", "pruned"],
        "base_model": "someone/llama",
        "license": "other",
        "license_name": "llama3",
        "license_link": "LICENSE",
        "metrics": ["perplexity"],
        "model-index": metadata["model-index"],
    }
    assert ModelCard(card()).data.eval_results == [
        result("wikitext-2", "perplexity", 40.55, "windows of 2048"),
        result("wikitext-2", "perplexity of the base model", 21.784, "windows of 2048"),
        result("ptb", "perplexity", 9.0, "p"),
    ]


def result(dataset: str, metric_name: str, value: float, protocol: str, metric: str = "perplexity") -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type=metric,
        metric_name=metric_name,
        metric_value=value,
        metric_args={"protocol": protocol},
    )


def test_only_changed_weights_make_a_finetune():
    assert "base_model_relation" not in ModelCard(card()).data.to_dict()
    assert ModelCard(card(repaired=True)).data.to_dict()["base_model_relation"] == "finetune"
    assert "base_model_relation" not in ModelCard(card(repaired=True, on_hub=False)).data.to_dict()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_no_number_is_no_result(value):
    measured = (MeasuredFacts("t", "t", "perplexity", "perplexity", "p", 2.0, value),)
    results = ModelCard(card(measured=measured)).data.eval_results
    assert [(r.metric_name, r.metric_value) for r in results] == [("perplexity of the base model", 2.0)]


MORE = (
    MeasuredFacts("piqa", "ybisk/piqa", "accuracy", "acc_norm", "zero-shot", 0.7, 0.65),
    MeasuredFacts("wikitext-2", "wikitext-2", "perplexity", "perplexity", "windows of 512", 25.0, 44.0),
)


def test_an_evaluation_changes_its_own_figures_alone():
    by_hand = (
        card()
        .replace("# llama-taylor-0.2", "# My model\n\nWritten by hand: | \\ <b>.")
        .replace("library_name: transformers", "library_name: transformers\nwidget:\n- text: Hello")
    )
    text = updated_card(by_hand, "other", MORE, ["Decode is fast."])
    before, after = ModelCard(by_hand), ModelCard(text)
    assert after.data.model_name == "llama-taylor-0.2"
    assert after.data.to_dict()["widget"] == [{"text": "Hello"}]
    assert after.data.metrics == ["accuracy", "perplexity"]
    assert [(r.dataset_name, r.metric_name, r.metric_value) for r in after.data.eval_results] == [
        ("ptb", "perplexity", 9.0),
        ("piqa", "acc_norm", 0.65),
        ("piqa", "acc_norm of the base model", 0.7),
        ("wikitext-2", "perplexity", 44.0),
        ("wikitext-2", "perplexity of the base model", 25.0),
    ]
    assert ["piqa", "acc\\_norm", "70.0%", "65.0%", "zero-shot"] in rows(text, "| piqa")
    assert "Decode is fast." in text
    # Around the section every character is what it was.
    for part, side in (("<!-- evaluation by prunus -->", 0), ("<!-- end of evaluation by prunus -->", 1)):
        assert before.text.split(part)[side] == after.text.split(part)[side]
    assert updated_card(text, "other", MORE, ["Decode is fast."]) == text


def test_an_evaluation_of_a_card_without_one():
    bare = card(measured=())
    assert "## Evaluation" not in bare
    text = updated_card(bare, "name", MORE)
    assert ModelCard(text).data.model_name == "name"
    assert text.count("## Evaluation") == 1
    assert ModelCard(updated_card("", "name", MORE)).data.eval_results[0].metric_value == 0.65
    with pytest.raises(CheckpointError, match="front matter of the model card cannot be read"):
        updated_card("---\nlicense: [unclosed\n---\n", "name", MORE)


def test_a_local_base_is_named_without_its_path():
    text = card(base_model="/home/somebody/models/my-llama", on_hub=False, license={})
    assert "/home/somebody" not in text
    assert "my-llama" in text
    metadata = ModelCard(text).data.to_dict()
    assert "base_model" not in metadata
    assert "license" not in metadata


def test_a_base_that_was_cut_before_is_no_original():
    text = card(base_model="llama-10", on_hub=False, original=OriginalFacts("someone/llama", 2_000_000, True))
    assert ModelCard(text).data.to_dict()["base_model"] == "someone/llama"
    assert "without 59.9% of its parameters" in text
    assert "the base of this one was llama-10, with 1,000,000 parameters left" in text
    assert ["parameters", "2,000,000", "801,234"] in rows(text, "| parameters")
    assert ["original model", "[someone/llama](https://huggingface.co/someone/llama)"] in rows(text, "| original model")
    assert "layer of the original" in text
    local = card(original=OriginalFacts("llama", 2_000_000, False))
    assert "base_model" not in ModelCard(local).data.to_dict(), "no model of the Hub may pass for the original"


def test_facts_are_told():
    text = card()
    assert ["parameters", "1,000,000", "801,234"] in rows(text, "| parameters")
    assert ["decoder layers", "4", "3"] in rows(text, "| decoder")
    assert "19.9%" in text
    assert ["wikitext-2", "perplexity", "21.78", "40.55", "windows of 2048"] in rows(text, "| wikitext")
    assert ["ptb", "perplexity", "", "9.00", "p"] in rows(text, "| ptb")
    for part in ("`taylor`", "0.2 of all", "128 sequences of 512 tokens, seed 7", "ab" * 32, "layer\\_sum", "0.1.0"):
        assert part in text
    assert "```sh\nprunus prune someone/llama --ratio 0.2 --out out\n```" in text


def test_widths_of_every_layer():
    table = rows(card().split("## Widths")[1], "| ")[1:]
    assert table == [
        ["0", "12", "3", "100"],
        ["1", "removed", "removed", "removed"],
        ["2", "4 of 12", "1 of 3", "64 of 100"],
        ["3", "0 of 12", "0 of 3", "7 of 100"],
    ]


def test_loading_instructions():
    ragged = card()
    assert "import prunus\nfrom transformers" in ragged
    assert ragged.count("trust_remote_code=True") == 1
    stock = card(ragged=False, model_type="mistral")
    assert "trust_remote_code" not in stock
    assert "import prunus" not in stock
    assert "`mistral`" in stock
    for text in (ragged, stock):
        for block in text.split("```python\n")[1:]:
            compile(block.split("```")[0], "card", "exec")


def test_methods_without_calibration():
    text = card(calibration=None, measured=())
    assert "| calibration text | none |" in text
    assert "## Evaluation" not in text


@settings(deadline=None, max_examples=60)
@given(hostile_text)
def test_any_string_leaves_the_card_whole(text):
    metadata = ModelCard(card(license={"license": text, "license_link": text})).data.to_dict()
    assert metadata["license"] == printable(text)
    assert metadata["license_link"] == printable(text)
    plain = card(original=OriginalFacts("a", 2_000_000, False), on_hub=False)
    facts = {
        "original": OriginalFacts(text, 2_000_000, False),
        "name": text,
        "base_model": text,
        "on_hub": False,
        "method": text,
        "command": text,
        "version": text,
        "calibration": CalibrationFacts(text, 1, 2, 3, text),
        "measured": (MeasuredFacts(text, text, text, text, text, 1.0, 2.0), FACTS.measured[1]),
        "details": {text: text},
    }
    changed = card(**facts)
    changed.encode("utf-8")
    assert UNSEEN.search(changed) is None
    data = ModelCard(changed).data
    assert data.tags == ["prunus", "pruned"]
    # The name alone is one that the Hub's library shows; an empty one it leaves out.
    assert (data.model_name or "", data.eval_results[0].dataset_name) == (printable(text), printable(text))
    again = updated_card(changed, text, facts["measured"], [text if text.split() else "x"])
    assert ModelCard(again).data.eval_results == data.eval_results
    assert structure(again) == structure(updated_card(plain, "name", FACTS.measured, ["x"]))
    assert structure(changed) == structure(plain)


def structure(card: str) -> list[str]:
    """Everything that a renderer makes of a card but text and inline code, in its order."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(card).text)
    kinds = [each.type for token in tokens for each in (token, *(token.children or ()))]
    return [kind for kind in kinds if kind not in ("text", "text_special", "code_inline", "inline")]


@given(hostile_text, hostile_text)
def test_only_what_can_be_a_model_of_the_hub_is_linked(one, other):
    name = f"{one}/{other}"
    text = card(base_model=name, original=OriginalFacts(name, 2_000_000, True))
    links = [
        child.attrs["href"]
        for token in MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
        for child in token.children or ()
        if child.type == "link_open"
    ]
    linked = "base_model" in ModelCard(text).data.to_dict()
    assert linked == bool(links)
    assert set(links) <= {f"https://huggingface.co/{name}"}
    assert not linked or re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII)


def test_the_marks_of_an_evaluation_are_lines_of_their_own():
    """A file name may hold the mark; the section is then still found where it is."""
    text = card(command="prunus eval --text '<!-- evaluation by prunus -->'")
    before, after = (each.split("## Widths")[0] for each in (text, updated_card(text, "name", MORE)))
    assert "--text '<!-- evaluation by prunus -->'\n```" in after
    assert after.count("## Evaluation") == before.count("## Evaluation") == 1


def test_license_is_read_off_the_base_models_card(tmp_path):
    assert license_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    assert license_of(tmp_path) == {"license": "apache-2.0"}
    (tmp_path / "README.md").write_text("# No front matter\n")
    assert license_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert license_of(tmp_path) == {}
    (tmp_path / "README.md").write_text(card())
    assert license_of(tmp_path) == dict(FACTS.license)
    assert metadata_load(tmp_path / "README.md")["base_model"] == "someone/llama"
