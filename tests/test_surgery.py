"""Surgery on live models: what is kept of them besides the weights, and cutting tensor by tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import plans
from tiny_families import ONE_UNLIKE, case_id, count_parameters, logits, make_model, random_tokens, shared_model, zeroed

from prunus.checkpoint import is_ragged
from prunus.errors import PlanError, UnsupportedModelError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan, cut_tensors

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def plan(geometry):
    """Narrow, without attention, gone, whole."""
    return Plan.from_kept(
        geometry,
        [
            {"attention": [0, 2], "mlp": range(3, 15)},
            {"attention": [], "mlp": [0, 19]},
            {"attention": [], "mlp": []},
            {"attention": range(3), "mlp": range(20)},
        ],
    )


@settings(max_examples=12)
@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
@given(data=st.data())
def test_any_plan(case, data):
    """The cut model is the whole one without the cut groups, whatever the plan."""
    model = shared_model(*case)
    geometry = Geometry.of(model)
    plan = data.draw(plans(geometry.widths, case[0]))
    pruned = apply_plan(model, plan)
    ids = random_tokens()
    torch.testing.assert_close(logits(pruned, ids), logits(zeroed(model, plan.layers), ids), **CLOSE)
    assert count_parameters(pruned) == geometry.parameters_left(plan.kept_widths)


def test_the_model_stays_as_it_is(llama, plan, tokens):
    before = copy.deepcopy(llama.state_dict())
    config = copy.deepcopy(llama.config.to_dict())
    pruned = apply_plan(llama, plan)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert llama.config.to_dict() == config
    assert len(llama.model.layers) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_dtype_is_kept(tiny_model, dtype, tied, tokens):
    model = tiny_model("llama", "gqa", tie_word_embeddings=tied)
    for parameter in model.parameters():  # and not the rotary frequencies, as from_pretrained does it
        parameter.data = parameter.data.to(dtype)
    geometry = Geometry.of(model)
    plan = Plan.from_kept(geometry, [{"attention": [0], "mlp": range(9)}, {"attention": [], "mlp": [1, 2]}])
    pruned = apply_plan(model, plan)
    assert pruned.dtype == dtype
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert torch.equal(pruned.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert (pruned.lm_head.weight is pruned.model.embed_tokens.weight) == tied
    if dtype != torch.float64:  # whose activations meet float32 in transformers' own norms
        assert torch.isfinite(logits(pruned, tokens)).all()
        assert torch.equal(logits(apply_plan(model, Plan.keep_all(geometry)), tokens), logits(model, tokens))


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(llama, plan, training):
    llama.train(training)
    assert apply_plan(llama, plan).training == training
    assert llama.training == training


def test_generation_settings_are_kept(llama, plan):
    llama.generation_config.temperature = 0.6
    llama.generation_config.eos_token_id = [2, 9]
    pruned = apply_plan(llama, plan)
    assert pruned.generation_config.to_dict() == llama.generation_config.to_dict()
    pruned.generation_config.temperature = 1.0
    assert llama.generation_config.temperature == 0.6


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_is_kept(llama, plan, implementation):
    llama.set_attn_implementation(implementation)
    assert apply_plan(llama, plan).config._attn_implementation == implementation


def test_frozen_weights_thaw(llama, plan):
    """What comes out can be trained; what went in stays frozen."""
    llama.requires_grad_(False)
    pruned = apply_plan(llama, plan)
    assert all(p.requires_grad for p in pruned.parameters())
    assert not any(p.requires_grad for p in llama.parameters())
    pruned(random_tokens(), labels=random_tokens()).loss.backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_equal_widths_are_the_stock_class(llama, geometry, tokens):
    kept = [{"attention": [i % 3, 2] if i % 3 < 2 else [0, 1], "mlp": range(i, i + 8)} for i in range(4)]
    plan = Plan.from_kept(geometry, kept)
    pruned = apply_plan(llama, plan)
    assert type(pruned) is type(llama)
    assert not is_ragged(pruned.config)
    torch.testing.assert_close(logits(pruned, tokens), logits(zeroed(llama, plan.layers), tokens), **CLOSE)


def test_a_ragged_model_is_cut_again(llama, plan, tokens):
    """And back to the stock class, once its layers are alike."""
    once = apply_plan(llama, plan)
    assert is_ragged(once.config)
    later = Plan.from_kept(
        Geometry.of(once),
        [
            {"attention": [1], "mlp": range(12)},
            {"attention": [], "mlp": []},
            {"attention": [2], "mlp": range(12)},
        ],
    )
    twice = apply_plan(once, later)
    assert type(twice) is type(llama)
    torch.testing.assert_close(logits(twice, tokens), logits(zeroed(once, later.layers), tokens), **CLOSE)
    both = plan.compose(later)
    torch.testing.assert_close(logits(twice, tokens), logits(zeroed(llama, both.layers), tokens), **CLOSE)
    same = apply_plan(once, Plan.keep_all(Geometry.of(once)))
    assert torch.equal(logits(same, tokens), logits(once, tokens))


def test_plans_for_other_models(llama, plan, tiny_model):
    for other in (tiny_model("mistral", "gqa-tied", num_hidden_layers=4), tiny_model("llama", "gqa")):
        with pytest.raises(PlanError, match="the plan is for"):
            apply_plan(other, plan)
    llama.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.extra"):
        apply_plan(llama, plan)


# --- tensor by tensor ---


def test_keeping_everything_passes_every_tensor_through(llama, geometry):
    state = llama.state_dict()
    cut = dict(cut_tensors(state.items(), geometry, Plan.keep_all(geometry)))
    assert list(cut) == list(state)
    assert all(cut[name] is tensor for name, tensor in state.items())


def test_names_and_shapes(llama, geometry, plan):
    cut = dict(cut_tensors(llama.state_dict().items(), geometry, plan))
    expected = apply_plan(llama, plan).state_dict()
    assert cut.keys() == expected.keys()
    assert all(torch.equal(cut[name], tensor) for name, tensor in expected.items())
    assert all(tensor.is_contiguous() for tensor in cut.values())
    assert cut["model.layers.0.self_attn.o_proj.weight"].shape == (48, 2 * 16)
    assert cut["model.layers.0.mlp.down_proj.weight"].shape == (48, 12)
    assert not any(name.startswith("model.layers.1.self_attn") for name in cut)
    assert "model.layers.1.input_layernorm.weight" not in cut
    assert torch.equal(cut["model.layers.2.input_layernorm.weight"], llama.model.layers[3].input_layernorm.weight)
    assert not any(name.startswith("model.layers.3") for name in cut)


def test_one_tensor_at_a_time(llama, geometry, plan):
    """Nothing is read ahead: a model may be larger than memory."""
    read = []

    def stream():
        for name, tensor in llama.state_dict().items():
            read.append(name)
            yield name, tensor

    for count, (name, _) in enumerate(cut_tensors(stream(), geometry, plan)):
        assert len(read) >= count + 1
        assert read[-1].rpartition(".")[2] == name.rpartition(".")[2]
        if "layers" not in name:
            assert read[-1] == name


@given(data=st.data())
def test_in_any_order(data):
    model = shared_model(*ONE_UNLIKE[0])
    geometry = Geometry.of(model)
    plan = data.draw(plans(geometry.widths, "llama"))
    items = list(model.state_dict().items())
    shuffled = dict(cut_tensors(data.draw(st.permutations(items)), geometry, plan))
    ordered = dict(cut_tensors(items, geometry, plan))
    assert shuffled.keys() == ordered.keys()
    assert all(torch.equal(shuffled[name], tensor) for name, tensor in ordered.items())
    assert {name.split(".")[2] for name in ordered if "layers" in name} == {
        str(i) for i in range(len(plan.surviving_layers))
    }
    assert all(len(plan.layers[i][axis]) <= geometry.widths[i][axis] for i in range(2) for axis in AXES)


def test_output_biases_stay_whole():
    """An output bias belongs to no group: it stays, complete, as long as the block is there."""
    model = make_model("llama", "gqa-biases")
    plan = Plan.from_kept(Geometry.of(model), [{"attention": [1], "mlp": [5]}, {"attention": [], "mlp": []}])
    pruned = apply_plan(model, plan)
    before, after = model.model.layers[0], pruned.model.layers[0]
    assert torch.equal(after.self_attn.o_proj.bias, before.self_attn.o_proj.bias)
    assert torch.equal(after.mlp.down_proj.bias, before.mlp.down_proj.bias)
    assert torch.equal(after.self_attn.q_proj.bias, before.self_attn.q_proj.bias[16:32])
    assert torch.equal(after.self_attn.v_proj.bias, before.self_attn.v_proj.bias[8:16])
    assert torch.equal(after.mlp.up_proj.bias, before.mlp.up_proj.bias[5:6])
