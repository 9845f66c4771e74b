"""What a user may give as a model in Python: harmless wrappers are taken off, all else is refused by every function."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_families import ONE_EACH, case_id, make_model, random_tokens, shared_model
from tiny_folder import byte_tokenizer, save_tiny_folder
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
)

import prunus
from prunus.checkpoint import save_checkpoint
from prunus.errors import UnsupportedModelError
from prunus.model.geometry import Geometry
from prunus.model.live import live_model
from prunus.sweep import sweep

RATIO = 0.2
BY_MAGNITUDE = prunus.Recipe(rounds=1, scoring=prunus.ScoringOptions(method="magnitude"), repair=None)


@pytest.fixture(scope="module")
def calibration():
    return prunus.calibration_from_tokens(random_tokens(4, 10))


@pytest.fixture(scope="module")
def plan():
    return prunus.prune(shared_model("llama", "gqa"), RATIO, recipe=BY_MAGNITUDE).plan


def dense():
    return copy.deepcopy(shared_model("llama", "gqa"))


@pytest.fixture
def distributed(tmp_path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {"compiled": torch.compile, "DataParallel": DataParallel, "DistributedDataParallel": DistributedDataParallel}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_taken_off(wrap, calibration, plan, distributed, tmp_path):
    model = dense()
    wrapped = wrap(model)
    assert live_model(wrapped) is model
    assert live_model(DataParallel(wrapped)) is model
    assert Geometry.of(wrapped) == Geometry.of(model)
    options = prunus.ScoringOptions(method="gate_fisher")
    recipe = prunus.Recipe(rounds=1, scoring=options, repair=None)
    expected = prunus.prune(model, RATIO, calibration, recipe)
    assert prunus.prune(wrapped, RATIO, calibration, recipe).plan == expected.plan
    scored = prunus.score(wrapped, calibration, options)
    assert scored.table.equals(prunus.score(model, calibration, options).table)
    smaller = prunus.apply_plan(wrapped, plan)
    assert type(smaller).__module__.startswith("prunus.")
    repairs = prunus.repair_(wrap(smaller), wrapped, plan, list(calibration.batches(2)))
    other = prunus.apply_plan(model, plan)
    assert len(repairs) == len(prunus.repair_(other, model, plan, list(calibration.batches(2))))
    for ours, theirs in zip(smaller.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ids = calibration.input_ids
    assert prunus.perplexity_of_windows(wrapped, ids) == prunus.perplexity_of_windows(model, ids)
    save_checkpoint(wrapped, None, tmp_path / "out", card="", extras={})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Custom(LlamaForCausalLM):
    """With a forward of its own."""


class WithValueHead(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.v_head = nn.Linear(config.hidden_size, 1)


WithValueHead.__name__ = "LlamaForCausalLM"


def with_bidirectional_layer():
    model = dense()
    model.model.layers[1].self_attn.is_causal = False
    return model


def with_bidirectional_config():
    return make_model("gemma3_text", use_bidirectional_attention=True)


def compiled_in_place():
    model = dense()
    model.compile()
    return model


def compiled_by_layer():
    model = dense()
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def with_adapter():
    model = dense()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    return model


def config():
    return shared_model("llama", "gqa").config


REFUSED = {
    "sequence classifier": (
        lambda: AutoModelForSequenceClassification.from_config(config()),
        "a LlamaForSequenceClassification, a classifier of sequences",
    ),
    "token classifier": (lambda: AutoModelForTokenClassification.from_config(config()), "a classifier of tokens"),
    "decoder": (lambda: LlamaModel(config()), "a LlamaModel, a decoder without an output head"),
    "class of one's own": (lambda: Custom(config()), "is a Custom"),
    "value head": (lambda: WithValueHead(config()), "holds 'v_head'"),
    "PeftModel": (lambda: get_peft_model(dense(), LoraConfig(target_modules=["q_proj"])), "merge_and_unload"),
    "adapters inside": (with_adapter, "a LlamaForCausalLM, has adapters.*merge_and_unload"),
    "bidirectional config": (with_bidirectional_config, "use_bidirectional_attention = True"),
    "bidirectional layer": (with_bidirectional_layer, r"layers\.1\.self_attn has is_causal = False"),
    "no weights": (lambda: dense().to("meta"), "no values in memory.*without device_map"),
    "compiled in place": (compiled_in_place, "compiled in place"),
    "compiled by layer": (compiled_by_layer, "compiled in place"),
    "another family": (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=99)), "'gpt2'"),
    "no model of transformers": (lambda: nn.Linear(2, 2), "a Linear, no causal language model of transformers"),
    "a path": (lambda: "some/folder", "a str, no causal language model of transformers"),
}
FUNCTIONS = {
    "Geometry.of": lambda model, calibration, plan, out: Geometry.of(model),
    "prune": lambda model, calibration, plan, out: prunus.prune(model, RATIO, calibration),
    "score": lambda model, calibration, plan, out: prunus.score(model, calibration),
    "sweep": lambda model, calibration, plan, out: sweep(model, list(calibration.batches(2)), []),
    "apply_plan": lambda model, calibration, plan, out: prunus.apply_plan(model, plan),
    "repair_": lambda model, calibration, plan, out: prunus.repair_(
        model, shared_model("llama", "gqa"), plan, list(calibration.batches(2))
    ),
    "repair_, dense": lambda model, calibration, plan, out: prunus.repair_(
        prunus.apply_plan(shared_model("llama", "gqa"), plan), model, plan, list(calibration.batches(2))
    ),
    "perplexity": lambda model, calibration, plan, out: prunus.perplexity(model, byte_tokenizer(), "text", seq_len=4),
    "perplexity_of_windows": lambda model, calibration, plan, out: prunus.perplexity_of_windows(
        model, calibration.input_ids
    ),
    "load_calibration": lambda model, calibration, plan, out: prunus.load_calibration(
        "self", byte_tokenizer(), samples=1, seq_len=4, model=model
    ),
    "save_checkpoint": lambda model, calibration, plan, out: save_checkpoint(model, None, out, card="", extras={}),
}


def refused(message: str):
    return pytest.raises(UnsupportedModelError, match=message)


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_every_function(make, message, calibration, plan, tmp_path):
    model = make()
    for name, function in FUNCTIONS.items():
        if name == "Geometry.of" and message.startswith("no values"):
            Geometry.of(model)  # needs none
            continue
        with refused(message):
            function(model, calibration, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_on_disk(tmp_path, calibration):
    """As accelerate's device_map leaves them; prunus' own way to keep layers on disk is none of that."""
    save_tiny_folder(tmp_path / "model", "llama")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    with refused(r"model\.layers\.1\.\S+ has no values in memory.*open_model"):
        prunus.prune(offloaded, RATIO, calibration)
    opened, _ = prunus.open_model(tmp_path / "model")
    assert live_model(opened) is opened


def test_layers_on_several_devices():
    """A device that this machine may not have; the weights there have a place and no values."""
    spread = dense()
    with FakeTensorMode(allow_non_fake_inputs=True):
        spread.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.empty(4, 4, device="cuda:0"))
    with refused(r"spread over cpu, cuda:0 \(device_map\).*open_model"):
        live_model(spread)


@pytest.mark.parametrize("case", ONE_EACH, ids=case_id)
def test_language_models_of_every_family(case, calibration):
    model = shared_model(*case)
    assert live_model(model) is model
    assert prunus.perplexity_of_windows(model, calibration.input_ids).perplexity > 1
