"""Classifiers on a ragged decoder, as transformers has them on the stock one."""

from __future__ import annotations

import pytest
import torch
from tiny_families import ONE_EACH, case_id, plan_keeping, random_tokens, shared_model, zeroed
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from prunus.checkpoint import is_ragged
from prunus.model.families import FAMILIES
from prunus.model.geometry import Geometry
from prunus.surgery import apply_plan

CLASSES = 3


@pytest.mark.parametrize("case", ONE_EACH, ids=case_id)
def test_classifier_of_a_ragged_folder(case, tmp_path):
    dense = shared_model(*case)
    geometry = Geometry.of(dense)
    kept = [{"attention": [], "mlp": [0, 2, 5]}, {"attention": [0], "mlp": range(geometry.widths[1]["mlp"])}]
    plan = plan_keeping(geometry, kept)
    ragged = apply_plan(dense, plan)
    assert is_ragged(ragged.config)
    ragged.save_pretrained(tmp_path / "language-model")
    input_ids = random_tokens()
    input_ids[1, 9:] = dense.config.pad_token_id
    with torch.no_grad():
        decoder = zeroed(dense, plan.layers).get_submodule(FAMILIES[case[0]].layers.rpartition(".")[0])
        hidden = decoder(input_ids).last_hidden_state
    for auto_class, select in (
        (AutoModelForSequenceClassification, lambda states: states[[0, 1], [input_ids.shape[1] - 1, 8]]),
        (AutoModelForTokenClassification, lambda states: states),
    ):
        made = auto_class.from_pretrained(tmp_path / "language-model", num_labels=CLASSES)
        made.save_pretrained(tmp_path / "classifier")
        classifier = auto_class.from_pretrained(tmp_path / "classifier").eval()
        assert torch.equal(classifier.score.weight, made.score.weight), "the head comes back with the folder"
        with torch.no_grad():
            torch.testing.assert_close(
                classifier(input_ids).logits, classifier.score(select(hidden)), rtol=1e-4, atol=1e-4
            )
            loss = classifier(input_ids, labels=torch.zeros_like(classifier(input_ids).logits[..., 0], dtype=int)).loss
        assert loss.isfinite()
