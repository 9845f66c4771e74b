"""The language model of a multimodal folder is cut, and all around it is as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import count_parameters
from tiny_multimodal import CONFIGS, LAYERS, logits_of, masked, multimodal, plan_of, prompt
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

import prunus
from prunus.checkpoint import is_ragged, load_model, open_model, save_checkpoint
from prunus.errors import CheckpointError, OptionError, PlanError, UnsupportedModelError
from prunus.export import export_dense
from prunus.model.families import FAMILIES, MULTIMODAL
from prunus.model.geometry import Geometry
from prunus.model.whole import attach_whole_, whole_of
from prunus.pipeline.inspection import inspect
from prunus.pipeline.job import Job, OutputOptions
from prunus.pipeline.multimodal import recipe_inside
from prunus.pipeline.options import EvaluationOptions
from prunus.pipeline.prune import prune_job
from prunus.surgery import apply_plan

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
#: needs no text
PLAIN = prunus.Recipe(
    rounds=1,
    repair=None,
    scoring=prunus.ScoringOptions(method="magnitude", normalize="layer_sum", noise=0.0),
)
PLAIN_MLP = prunus.Recipe(rounds=1, repair=None, scoring=PLAIN.scoring, selection=prunus.Constraints(axes=("mlp",)))
PROCESSOR = {"preprocessor_config.json": '{"image_processor_type": "X"}', "chat_template.jinja": "{{ messages }}"}

WITHOUT_PRUNUS = """
import sys
sys.modules["prunus"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

place, *names = sys.argv[1:]
answers = {}
for name in names:
    model = AutoModelForImageTextToText.from_pretrained(f"{place}/{name}", trust_remote_code=True, dtype="auto")
    inputs = load_file(f"{place}/{name}.safetensors")
    with torch.no_grad():
        answers[f"{name}.logits"] = model(**inputs).logits
    answers[f"{name}.tokens"] = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
save_file(answers, f"{place}/answers.safetensors")
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, "word": 3}, unk_token="word"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module", params=CONFIGS)
def model_type(request) -> str:
    return request.param


def saved(model_type: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """A multimodal folder as people have it."""
    multimodal(model_type).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, content in PROCESSOR.items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture(scope="module")
def folder(model_type, tokenizer, tmp_path_factory) -> Path:
    return saved(model_type, tokenizer, tmp_path_factory.mktemp(model_type))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def test_every_kind_has_a_tiny_model():
    assert CONFIGS.keys() == MULTIMODAL.keys()
    assert {part for kind in MULTIMODAL.values() for part in kind.parts.values()} <= FAMILIES.keys()


def test_the_language_model_is_taken_out(model_type, folder):
    whole, (language, _) = multimodal(model_type), load_model(folder)
    input_ids = torch.tensor([[1, 5, 7, 8, 9, 3]])
    assert torch.equal(logits_of(language, {"input_ids": input_ids}), logits_of(whole, {"input_ids": input_ids}))
    around = whole_of(language)
    assert Geometry.of(language).total_parameters == count_parameters(language)
    assert Geometry.of(language).total_parameters + around.parameters == count_parameters(whole)
    facts = inspect(str(folder))
    assert facts["parameters"] == count_parameters(language)
    assert facts["parameters_in_all"] == count_parameters(whole)
    assert all(parameter.requires_grad for parameter in language.parameters())


@pytest.mark.parametrize("shape", ["everything", "uniform", "ragged"])
def test_cut_inside_the_whole(model_type, folder, tokenizer, shape, tmp_path):
    whole, (language, _) = multimodal(model_type), load_model(folder)
    plan = plan_of(language, shape)
    smaller = apply_plan(language, plan)
    save_checkpoint(smaller, tokenizer, tmp_path / "out", card="", extras={})
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(loaded).__name__ == ("Prunus" if shape == "ragged" else "") + type(whole).__name__
    inputs = prompt(model_type)
    dense = logits_of(whole, inputs)
    if shape == "everything":
        assert torch.equal(logits_of(loaded, inputs), dense)
    else:
        expected = logits_of(masked(whole, plan.layers), inputs)
        torch.testing.assert_close(logits_of(loaded, inputs), expected, **CLOSE)
        assert not torch.allclose(dense, expected, atol=1e-2), "the cut must matter"
    assert count_parameters(loaded) == count_parameters(smaller) + whole_of(smaller).parameters
    before, after = whole.state_dict(), tensors(tmp_path / "out")
    around = [name for name in after if "language_model" not in name and "lm_head" not in name]
    assert around
    assert all(torch.equal(before[name], after[name]) for name in around)
    assert all((tmp_path / "out" / name).read_text() == content for name, content in PROCESSOR.items())
    again, _ = load_model(tmp_path / "out")
    assert Geometry.of(again) == Geometry.of(smaller)
    assert is_ragged(again.config) == (shape == "ragged")


@pytest.mark.slow
def test_without_the_package(tokenizer, tmp_path):
    """One other process for all: ragged folders with the code they bring, an image in the prompt, generation."""
    for model_type in CONFIGS:
        language, _ = load_model(saved(model_type, tokenizer, tmp_path / f"dense-{model_type}"))
        smaller = apply_plan(language, plan_of(language, "ragged"))
        save_checkpoint(smaller, tokenizer, tmp_path / model_type, card="", extras={})
        save_file(prompt(model_type), tmp_path / f"{model_type}.safetensors")
    child = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_PRUNUS, str(tmp_path), *CONFIGS],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    answers = load_file(tmp_path / "answers.safetensors")
    for model_type in CONFIGS:
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / model_type, dtype="auto")
        inputs = prompt(model_type)
        torch.testing.assert_close(answers[f"{model_type}.logits"], logits_of(model, inputs), rtol=1e-6, atol=1e-6)
        tokens = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(answers[f"{model_type}.tokens"], tokens)


def test_layer_by_layer(model_type, folder, tokenizer, tmp_path):
    """What the streamed engine reads, cuts and writes is the same, byte for byte."""
    language, _ = load_model(folder)
    opened, _ = open_model(folder)
    for model, name in ((language, "resident"), (opened, "streamed")):
        save_checkpoint(apply_plan(model, plan_of(model, "ragged")), tokenizer, tmp_path / name, card="", extras={})
    one, other = tensors(tmp_path / "resident"), tensors(tmp_path / "streamed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("text_only", [False, True], ids=["whole", "text-only"])
def test_a_job(model_type, folder, text_only, tmp_path):
    out = tmp_path / "out"
    job = Job(
        str(folder),
        0.2,
        PLAIN if text_only or model_type != "qwen2_5_vl" else PLAIN_MLP,
        evaluation=EvaluationOptions(held_out=0),
        output=OutputOptions(report=False, text_only=text_only),
    )
    metrics = prune_job(job, out, progress=False)
    card = (out / "README.md").read_text()
    if text_only:
        assert "whole" not in metrics
        saved = AutoModelForCausalLM.from_pretrained(out)
        assert count_parameters(saved) == metrics["parameters_after"]
        assert not (out / "preprocessor_config.json").exists()
        assert "text-generation" in card
        return
    saved = AutoModelForImageTextToText.from_pretrained(out)
    assert count_parameters(saved) == metrics["whole"]["parameters_after"]
    assert metrics["whole"]["parameters_before"] == count_parameters(multimodal(model_type))
    assert metrics["achieved_ratio"] == pytest.approx(0.2, abs=0.05)
    assert 1 - metrics["parameters_after"] / metrics["parameters_before"] == metrics["achieved_ratio"], "its own share"
    assert "AutoModelForImageTextToText" in card
    assert f"{metrics['whole']['parameters_after']:,}" in card
    assert "image-text-to-text" in card
    facts = export_dense(out, tmp_path / "dense")
    card = (tmp_path / "dense" / "README.md").read_text()
    around = metrics["whole"]["parameters_after"] - metrics["parameters_after"]
    assert (
        f"| parameters in all | {metrics['whole']['parameters_after']:,} | {facts['parameters_after'] + around:,} |"
        in card
    )
    assert "pipeline_tag: image-text-to-text" in card
    filled = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense")
    assert type(filled) is type(multimodal(model_type))
    inputs = prompt(model_type)
    torch.testing.assert_close(logits_of(filled, inputs), logits_of(saved, inputs), **CLOSE)


def test_layers_that_take_in_image_features_stay(tokenizer, tmp_path):
    language, _ = load_model(saved("qwen3_vl", tokenizer, tmp_path))
    assert recipe_inside(PLAIN, language).selection.layer_start == 2
    kept = [range(3), range(20)]
    without = [
        {"attention": kept[0], "mlp": kept[1]} if i != 1 else {"attention": [], "mlp": []} for i in range(LAYERS)
    ]
    plan = prunus.Plan.from_kept(Geometry.of(language), without)
    with pytest.raises(PlanError, match=r"removes decoder layer 1.*first 2 layers of Qwen3-VL.*layer_start"):
        apply_plan(language, plan)
    attach_whole_(language, None)
    assert recipe_inside(PLAIN, language).selection.layer_start == 0
    assert len(apply_plan(language, plan).model.layers) == LAYERS - 1


def test_heads_that_no_class_has_room_for(tokenizer, tmp_path):
    saved("qwen2_5_vl", tokenizer, tmp_path)
    with pytest.raises(OptionError, match=r"inside Qwen2.5-VL .* `selection.axes` to \[mlp\].*text_only"):
        prune_job(Job(str(tmp_path), 0.2, PLAIN, evaluation=EvaluationOptions(held_out=0)), tmp_path / "out")


#: names of tensors in the folders of the Hub, which transformers translates when it loads them
OLDER_NAMES = {
    "gemma3": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "mistral3": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}


@pytest.mark.parametrize("model_type", OLDER_NAMES)
def test_older_names_of_tensors(model_type, tokenizer, tmp_path):
    whole = multimodal(model_type)
    saved(model_type, tokenizer, tmp_path / "old")
    renamed = {}
    for name, tensor in tensors(tmp_path / "old").items():
        changes = (pair for pair in OLDER_NAMES[model_type].items() if name.startswith(pair[0]))
        new, old = next(changes, ("", ""))
        renamed[old + name.removeprefix(new)] = tensor
    save_file(renamed, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    language, _ = load_model(tmp_path / "old")
    save_checkpoint(apply_plan(language, plan_of(language, "uniform")), tokenizer, tmp_path / "new", card="", extras={})
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "new", dtype="auto")
    expected = logits_of(masked(whole, plan_of(language, "uniform").layers), prompt(model_type))
    torch.testing.assert_close(logits_of(loaded, prompt(model_type)), expected, **CLOSE)


def test_a_language_model_of_another_kind_is_refused(tokenizer, tmp_path):
    saved("mistral3", tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = "mixtral"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"mistral3 model is of type 'mixtral'.*ministral3"):
        load_model(tmp_path)


def test_a_tower_of_impossible_depth_is_refused(tokenizer, tmp_path):
    saved("qwen3_vl", tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["depth"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"vision_config.depth is 1000000000"):
        load_model(tmp_path)


def test_a_live_multimodal_model_is_refused_with_what_to_do():
    with pytest.raises(UnsupportedModelError, match=r"load_model"):
        prunus.prune(multimodal("gemma3"), 0.2, recipe=PLAIN)
