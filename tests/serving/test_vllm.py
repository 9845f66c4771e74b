"""The vLLM plugin, as far as it can be checked without vLLM; `make deploy-check` runs it."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
from tiny_families import DENSE, GQA, make_model, plan_keeping

import prunus
from prunus.checkpoint.modeling_prunus import DECODERS
from prunus.errors import UnsupportedModelError
from prunus.model.geometry import Geometry
from prunus.serving.tensor_parallel import check_divides
from prunus.serving.vllm import ARCHITECTURES, SERVED, check_served


def layers(*widths: tuple[int, int, int]) -> SimpleNamespace:
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    return SimpleNamespace(layer_widths=[dict(zip(names, layer, strict=True)) for layer in widths])


def test_every_dense_family_is_served():
    assert SERVED.keys() == DENSE.keys() == set(ARCHITECTURES.values())


@pytest.mark.parametrize("family", DENSE)
def test_architectures_are_those_that_are_written(family, tmp_path):
    model = make_model(family)
    kept = [{"attention": range(3), "mlp": range(7)}, {"attention": range(3), "mlp": range(9)}]
    cut = prunus.apply_plan(model, plan_keeping(Geometry.of(model), kept))
    assert ARCHITECTURES[type(cut).__name__] == family


def test_classes_are_named_by_module():
    for served in SERVED.values():
        for name in filter(None, (served.model, served.layer)):
            assert re.fullmatch(r"[a-z0-9]+:[A-Z]\w+", name)


def test_vllm_finds_the_plugin():
    (plugin,) = (found for found in entry_points(group="vllm.general_plugins") if found.name == "prunus")
    assert plugin.value == "prunus.serving.vllm:register"


@pytest.mark.parametrize(
    ("widths", "processes"),
    [
        (((6, 3, 7), (0, 0, 5)), 1),
        (((8, 4, 512), (0, 0, 100), (4, 2, 0)), 2),
        # One key/value head is repeated for both.
        (((2, 1, 100),), 2),
        (((8, 2, 100),), 4),
    ],
)
def test_what_divides(widths, processes):
    check_divides(layers(*widths), processes)


@pytest.mark.parametrize(
    ("widths", "processes", "message"),
    [
        (((8, 4, 512), (8, 4, 511)), 2, "layer 1 has intermediate_size 511"),
        (((8, 4, 512), (0, 0, 8), (6, 3, 512)), 2, "layer 2 has num_key_value_heads 3"),
        # One head is repeated, but the query heads cannot be shared.
        (((3, 1, 512),), 2, "layer 0 has num_attention_heads 3"),
        (((12, 6, 512),), 4, "layer 0 has num_key_value_heads 6"),
    ],
)
def test_what_does_not_is_refused_by_layer(widths, processes, message):
    with pytest.raises(UnsupportedModelError, match=f"tensor_parallel_size is {processes}, and {message}"):
        check_divides(layers(*widths), processes)


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_decoders_pass_vllms_check_of_what_is_given_in_places(decoder):
    """Its decorator for torch.compile pairs what is given in places with the types of all parameters, self included."""
    for given, parameter in zip((object(),), inspect.signature(decoder.__init__).parameters.values(), strict=False):
        assert parameter.annotation is inspect.Parameter.empty or isinstance(given, parameter.annotation)


def test_layers_of_transformers_are_not_shared_among_processes():
    config = make_model("olmo2").config
    config.layer_widths = layers((6, 2, 20)).layer_widths
    with pytest.raises(UnsupportedModelError, match="no class of its own for 'olmo2'"):
        check_served(config, 2)
    check_served(config, 1)
    llama = make_model("llama", **GQA).config
    llama.layer_widths = layers((4, 2, 20)).layer_widths
    check_served(llama, 2)
