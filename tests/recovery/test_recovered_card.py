"""The card of a recovered model: under its new name, whatever the old one was and whatever is in the strings."""

from __future__ import annotations

import pytest
from hostile_text import UNSEEN, hostile_text
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from markdown_it import MarkdownIt

from prunus.model.widths import LayerWidths
from prunus.recovery.card import card_with_recovery
from prunus.results.card import CardFacts, MeasuredFacts, model_card

FACTS = {
    "options": {
        "kl_weight": 1.0,
        "ce_weight": 0.0,
        "train": "lora",
        "lora_rank": 8,
        "batch_size": 4,
        "learning_rate": 1e-4,
    },
    "text": {"source": "text.txt", "samples": 8, "seq_len": 32, "seed": 0, "sha256": "ab" * 32},
    "held_out": {"source": "text.txt"},
    "held_out_loss": {"dense": 1.0, "before": 3.0, "after": 2.0},
    "protocol": "windows",
    "teacher": "dense",
    "best_step": 3,
    "steps": 4,
    "seconds": 5.0,
    "prunus": "0.1.0",
}


def write_card(folder, name: str) -> None:
    widths = (LayerWidths(2, 8),)
    measured = [MeasuredFacts("t", "t", "perplexity", "perplexity", "p", 2.0, 3.0)]
    facts = CardFacts(
        name=name,
        base_model="dense",
        method="taylor",
        ratio=0.2,
        parameters_before=100,
        parameters_after=80,
        base_widths=widths,
        widths=widths,
        num_key_value_groups=1,
        model_type="llama",
        ragged=True,
        command="prunus prune",
        version="0.1.0",
        measured=measured,
    )
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")


def title(card: str) -> str:
    tokens = MarkdownIt("commonmark").parse(ModelCard(card).text)
    return "".join(child.content for child in tokens[1].children)


def test_a_loss_beyond_measure_is_a_perplexity_beyond_measure(tmp_path):
    """As of a model that overflowed: the run is over, and its figures are written down all the same."""
    write_card(tmp_path / "small", "small")
    facts = {**FACTS, "held_out_loss": {"dense": 1e300, "before": 1e6, "after": 2.0}}
    card = ModelCard(card_with_recovery(tmp_path / "small", "new", facts, "prunus recover"))
    assert card.data.eval_results[0].metric_value == pytest.approx(7.389, abs=1e-3)
    assert "(teacher: 8218407461554972" in card.text


@pytest.mark.parametrize(("teacher", "figures"), [("dense", 2), ("other", 1)])
def test_a_teacher_that_is_not_the_base_is_not_called_so(tmp_path, teacher, figures):
    write_card(tmp_path / "small", "small")
    (tmp_path / "small" / "prunus").mkdir()
    (tmp_path / "small" / "prunus" / "metrics.json").write_text('{"base_model": "dense"}')
    facts = {**FACTS, "teacher": teacher}
    card = ModelCard(card_with_recovery(tmp_path / "small", "new", facts, "prunus recover"))
    assert len(card.data.eval_results) == figures
    assert "(teacher: 2.72)" in card.text
    assert ("| 2.72 |" in card.text) == (teacher == "dense")


@pytest.mark.parametrize("old", ["small", "small_20", "a*b", "[x](y)", "c++", "1. x", "é"])
def test_the_old_name_goes(tmp_path, old):
    folder = tmp_path / old
    write_card(folder, old)
    card = card_with_recovery(folder, "new_name", FACTS, "prunus recover")
    assert title(card) == "new_name"
    assert card.count('from_pretrained("new_name"') == 4
    assert ModelCard(card).data.model_name == "new_name"
    # The folder may have another name by now.
    renamed = folder.rename(tmp_path / "renamed")
    again = card_with_recovery(renamed, "new_name", FACTS, "prunus recover")
    assert title(again) == "new_name"
    assert again.count('from_pretrained("new_name"') == 4


def test_a_title_typed_by_hand_stays(tmp_path):
    write_card(tmp_path / "small_20", "small_20")
    path = tmp_path / "small_20" / "README.md"
    path.write_text(path.read_text().replace("# small\\_20", "# My model"))
    assert title(card_with_recovery(path.parent, "new", FACTS, "c")) == "My model"
    path.write_text(path.read_text().replace("# My model", "# small_20"))
    assert title(card_with_recovery(path.parent, "new", FACTS, "c")) == "new"


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile_text)
def test_any_string_leaves_the_card_whole(tmp_path, text):
    def structure(card: str) -> list[str]:
        tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)
        kinds = [each.type for token in tokens for each in (token, *(token.children or ()))]
        return [kind for kind in kinds if kind not in ("text", "text_special", "inline")]

    write_card(tmp_path / "small", "small")
    facts = {
        **FACTS,
        "teacher": text,
        "protocol": text,
        "prunus": text,
        "text": {**FACTS["text"], "source": text, "sha256": text},
        "held_out": {"source": text},
    }
    card = card_with_recovery(tmp_path / "small", text, facts, text)
    assert UNSEEN.search(card) is None
    assert structure(card) == structure(card_with_recovery(tmp_path / "small", "new", FACTS, "c"))
