"""Pruned folders load quantised, without bitsandbytes: int8 and int4 weights by torchao."""

from __future__ import annotations

import copy

import pytest
import torch
from shaped_models import HARDEST
from tiny_families import logits, random_tokens
from transformers import AutoModelForCausalLM, TorchAoConfig

quantization = pytest.importorskip("torchao.quantization")
PerAxis = pytest.importorskip("torchao.quantization.granularity").PerAxis

#: configuration, and the largest integer of a symmetric range
KINDS = {
    "int8": (quantization.Int8WeightOnlyConfig(), 127),
    "int4": (quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)), 7),
}


@pytest.mark.parametrize("shaped", [HARDEST[0], HARDEST[6]], ids=str)
@pytest.mark.parametrize(("config", "largest"), KINDS.values(), ids=KINDS)
def test_loaded_quantised(shaped, config, largest, folder_of, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder_of(shaped), quantization_config=TorchAoConfig(config))
    rounded = copy.deepcopy(shaped.pruned)
    projections = [n for n, m in rounded.model.layers.named_modules() if isinstance(m, torch.nn.Linear)]
    for name in projections:
        weight, packed = (m.model.layers.get_submodule(name).weight for m in (rounded, model))
        assert type(packed) not in (torch.Tensor, torch.nn.Parameter), f"{name} is not quantised"
        step = weight.detach().abs().amax(dim=1, keepdim=True) / largest
        values = packed.dequantize()
        assert ((values - weight).abs() <= 0.6 * step).all(), "each weight is rounded to the next of its row's steps"
        weight.data.copy_(values)
    actual = logits(model, random_tokens())
    torch.testing.assert_close(actual, logits(rounded, random_tokens()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(actual, logits(shaped.pruned, random_tokens()), atol=1e-3)
    model.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    assert torch.equal(logits(again, random_tokens()), actual)
    prompt = random_tokens()
    tokens = again.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    cacheless = again.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, use_cache=False
    )
    assert torch.equal(tokens, cacheless)
