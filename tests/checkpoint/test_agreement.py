"""The weights say what a model is, and every engine and command reads the same model or refuses it by name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import HIDDEN, count_parameters, logits, make_model, plan_keeping, random_tokens
from tiny_folder import SIZES, byte_tokenizer, fails, run, save_tiny_folder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prunus.checkpoint import load_model, open_model, read_config, save_checkpoint
from prunus.errors import CheckpointError, PrunusError, UnsupportedModelError
from prunus.model.families import AXES
from prunus.model.geometry import Geometry
from prunus.pipeline.inspection import inspect
from prunus.selection.plan import Plan
from prunus.surgery import apply_plan
from prunus.sweep.sequence_loss import perplexity_of_windows

WEIGHTS = "model.safetensors"
ENGINES = {"resident": load_model, "opened": open_model}


def edit(folder: Path, **fields: object) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps(config))
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    return folder


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def commands(folder: Path, tmp_path: Path) -> dict[str, list[object]]:
    """One call of every command that takes a model, and would write to `tmp_path / "out"`."""
    text, plan, out = tmp_path / "text.txt", tmp_path / "plan.json", ["--out", tmp_path / "out"]
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    if not plan.exists():
        Plan.keep_all(Geometry.of(make_model("llama", num_hidden_layers=3, vocab_size=260))).save(plan)
    calibration = ["--calibration", text, *SIZES]
    return {
        "prune": ["prune", folder, "--ratio", "0.2", *calibration, *out],
        "prune streamed": ["prune", folder, "--ratio", "0.2", "--set", "run.engine=streamed", *calibration, *out],
        "score": ["score", folder, *calibration, *out],
        "compare": ["compare", folder, "--recipes", "original", "--ratios", "0.2", *calibration, *out],
        "eval": ["eval", folder, "--text", text, "--seq-len", "24", "--windows", "1"],
        "bench": ["bench", folder, "--prompt-tokens", "4", "--new-tokens", "2"],
        "gguf": ["export", folder, "--to", "gguf", *out],
        "dense": ["export", folder, "--to", "dense", *out],
        "recover": ["recover", folder, "--text", text, "--seq-len", "24", *out],
        "apply": ["apply", folder, plan, *out],
        "inspect": ["inspect", folder],
        "profile": ["profile", folder, *out],
    }


COMMANDS = [
    *("prune", "prune streamed", "score", "compare", "eval", "bench"),
    *("gguf", "dense", "recover", "apply", "inspect", "profile"),
]


# --- a head of its own under a config that ties it to the embeddings ---


@pytest.fixture(params=["llama", "gemma2"])
def untied(request, tmp_path) -> Path:
    """An untied fine-tune whose config still says tied."""
    variant = {"llama": "mha-tied", "gemma2": "gqa-tied"}[request.param]
    folder = save_tiny_folder(tmp_path / "untied", request.param, variant)
    head = torch.randn(260, HIDDEN, generator=torch.Generator().manual_seed(3)) * 0.3
    return edit_weights(folder, lambda weights: weights.update({"lm_head.weight": head}))


def test_a_head_of_its_own_is_the_same_model_everywhere(untied, tmp_path):
    stock = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32).eval()
    expected, parameters = logits(stock, random_tokens()), count_parameters(stock)
    assert parameters == sum(tensor.numel() for tensor in load_file(untied / WEIGHTS).values())
    assert inspect(str(untied))["parameters"] == parameters
    assert read_config(untied).tie_word_embeddings is False
    for name, load in ENGINES.items():
        model, tokenizer = load(untied)
        assert Geometry.of(model).total_parameters == parameters
        smaller = apply_plan(model, Plan.keep_all(Geometry.of(model)))
        for one in (model, smaller):
            assert one.config.tie_word_embeddings is False
            torch.testing.assert_close(logits(one, random_tokens()), expected, rtol=0, atol=1e-5)
        out = save_checkpoint(smaller, tokenizer, tmp_path / name, card="", extras={})
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        assert count_parameters(saved) == parameters
        torch.testing.assert_close(logits(saved, random_tokens()), expected, rtol=0, atol=1e-5)


def test_measured_and_exported_with_the_head(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    folder = save_tiny_folder(tmp_path / "untied", "llama", "mha-tied")
    head = torch.randn(260, HIDDEN, generator=torch.Generator().manual_seed(3)) * 0.3
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": head}))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = random_tokens(batch=3)
    expected = nn.functional.cross_entropy(logits(stock, windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    for load in ENGINES.values():
        measured = perplexity_of_windows(load(folder)[0], windows, progress=False).nll
        assert measured == pytest.approx(expected.item(), rel=1e-5)
    run(capsys, "export", folder, "--to", "gguf", "--type", "f32", "--out", tmp_path / "a.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert torch.equal(torch.tensor(tensors["output.weight"]), head)
    # A cut to unequal widths, filled up again.
    model, tokenizer = load_model(folder)
    kept = [{axis: range(i + 1) for axis in AXES} for i in range(2)]
    smaller = apply_plan(model, plan_keeping(Geometry.of(model), kept))
    ragged = save_checkpoint(smaller, tokenizer, tmp_path / "ragged", card="", extras={})
    run(capsys, "export", ragged, "--to", "dense", "--out", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(dense, random_tokens()), logits(smaller, random_tokens()), rtol=1e-5, atol=1e-5)
    assert torch.equal(dense.lm_head.weight, head)


def test_live_models_are_cut_and_saved_as_their_weights_are(tmp_path):
    """Given to the Python functions by hand: tied in the config alone, or in the weights alone."""
    tied = make_model("llama", "mha-tied")
    tied.lm_head.weight = nn.Parameter(torch.randn_like(tied.lm_head.weight))
    untied = make_model("llama", "gqa")
    untied.lm_head.weight = untied.model.embed_tokens.weight
    for number, (model, says) in enumerate(((tied, False), (untied, True))):
        before = model.config.tie_word_embeddings
        smaller = apply_plan(model, Plan.keep_all(Geometry.of(model)))
        assert smaller.config.tie_word_embeddings is says
        assert smaller.num_parameters() == Geometry.of(model).total_parameters == count_parameters(model)
        assert torch.equal(logits(smaller, random_tokens()), logits(model, random_tokens()))
        out = save_checkpoint(model, byte_tokenizer(), tmp_path / str(number), card="", extras={})
        assert model.config.tie_word_embeddings is before, "the model that was given stays as it is"
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is says
        for load in ENGINES.values():
            torch.testing.assert_close(logits(load(out)[0], random_tokens()), logits(model, random_tokens()))


def test_a_stored_copy_of_the_embeddings_is_no_head_of_its_own(tmp_path):
    folder = save_tiny_folder(tmp_path / "model", "llama", "mha-tied")
    edit_weights(
        folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    )
    assert {load(folder)[0].config.tie_word_embeddings for load in ENGINES.values()} == {True}
    counts = {Geometry.of(load(folder)[0]).total_parameters for load in ENGINES.values()}
    assert counts == {count_parameters(make_model("llama", "mha-tied", vocab_size=260))}


def test_tied_weights_stored_under_the_heads_name(tmp_path):
    """transformers ties them whichever of the two is there."""
    folder = save_tiny_folder(tmp_path / "model", "llama", "mha-tied")
    expected = logits(load_model(folder)[0], random_tokens())
    edit_weights(folder, lambda weights: weights.update({"lm_head.weight": weights.pop("model.embed_tokens.weight")}))
    for load in ENGINES.values():
        assert torch.equal(logits(load(folder)[0], random_tokens()), expected)


# --- what contradicts the weights otherwise ---


def biased(weights: dict[str, Tensor]) -> None:
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.ones(6 * 8)


def with_bias_of_the_mlp(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.mlp.down_proj.bias"] = torch.ones(HIDDEN)


def with_norms_of_queries(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)


def with_a_norm_of_gemma(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.pre_feedforward_layernorm.weight"] = torch.ones(HIDDEN)


def with_bias_of_the_head(weights: dict[str, Tensor]) -> None:
    weights["lm_head.bias"] = torch.ones(260)


def with_more_rows(weights: dict[str, Tensor]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(4, HIDDEN)])


def with_more_layers(weights: dict[str, Tensor]) -> None:
    weights |= {name.replace("s.2.", "s.3."): w.clone() for name, w in weights.items() if ".2." in name}


def as_integers(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.update({name: torch.ones_like(weights[name], dtype=torch.int32)})


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Tensor]], object] | None, dict[str, object], str]] = {
    "a bias that the config switches off": (biased, {}, r"layers\.1\.self_attn\.q_proj\.bias"),
    "one of the MLP": (with_bias_of_the_mlp, {}, r"mlp\.down_proj\.bias.*mlp_bias"),
    "one of the head": (with_bias_of_the_head, {}, r"lm_head\.bias"),
    "a bias that is not there": (None, {"attention_bias": True}, r"lacks 12 tensors.*self_attn\.[kqvo]_proj\.bias"),
    "norms of another family": (with_norms_of_queries, {}, r"self_attn\.q_norm"),
    "a norm of another family": (with_a_norm_of_gemma, {}, "pre_feedforward_layernorm"),
    "norms that are not there": (None, {"model_type": "qwen3"}, r"lacks 6 tensors.*[qk]_norm|is a LlamaForCausalLM"),
    "more embedding rows": (with_more_rows, {}, r"embed_tokens\.weight' has shape \(264, 48\).*\(260, 48\)"),
    "a smaller vocabulary": (None, {"vocab_size": 100}, r"has shape \(260, 48\).*\(100, 48\)"),
    "more layers": (with_more_layers, {}, "describes 3 decoder layers.*in 4 layers"),
    "fewer layers": (None, {"num_hidden_layers": 2}, "describes 2 decoder layers.*in 3 layers"),
    "norms of integers": (as_integers("model.layers.1.input_layernorm.weight"), {}, "input_layernorm.*dtype I32"),
    "a final norm of integers": (as_integers("model.norm.weight"), {}, r"model\.norm\.weight.*dtype I32"),
    "embeddings of integers": (as_integers("model.embed_tokens.weight"), {}, "embed_tokens.*dtype I32"),
    "a dtype of integers": (None, {"dtype": "int8"}, "int8"),
    "weights of another name": (None, {"transformers_weights": "other.safetensors"}, "transformers_weights"),
    "a head_dim beyond memory": (None, {"head_dim": 3 * 10**9}, "head_dim is 3,000,000,000.*no tensor.*260"),
    "10⁹ layers": (None, {"num_hidden_layers": 10**9}, "1,000,000,000 decoder layers.*30 tensors in 3 layers"),
    "channels beyond memory": (None, {"intermediate_size": 10**12}, "intermediate_size is 1,000,000,000,000"),
    "heads beyond memory": (None, {"num_attention_heads": 6 * 10**9}, "num_attention_heads is 6,000,000,000"),
    "no layers": (None, {"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number from 1 on"),
    "negative": (None, {"hidden_size": -48}, "hidden_size is -48"),
    "a fraction": (None, {"intermediate_size": 20.0}, r"intermediate_size is 20\.0"),
    "a truth": (None, {"num_key_value_heads": True}, "num_key_value_heads is True"),
    "a word": (None, {"vocab_size": "260"}, "vocab_size is '260'"),
    "a list": (None, {"head_dim": [8]}, r"head_dim is \[8\]"),
    "no positions": (None, {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    "widths in a stock config": (None, {"layer_widths": []}, "layer_widths.*'llama' does not know"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused_alike(name, folder, tmp_path):
    change, fields, message = CONTRADICTIONS[name]
    broken = edit(copied(folder, tmp_path), **fields)
    if change is not None:
        edit_weights(broken, change)
    for load in ENGINES.values():
        with pytest.raises(PrunusError, match=message):
            load(broken)
    if "lacks" not in message:  # what is missing, transformers may know under another name
        with pytest.raises(PrunusError, match=message):
            inspect(str(broken))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"intermediate_size": 10**12}, r"layer_widths\[1\]\.intermediate_size is 1,000,000,000,000"),
        ({"num_key_value_heads": -1}, r"layer_widths\[1\]\.num_key_value_heads is -1"),
        ({"intermediate_size": 10.9}, r"layer_widths\[1\]\.intermediate_size is 10\.9"),
        ({"num_attention_heads": "6"}, r"layer_widths\[1\]\.num_attention_heads is '6'"),
        (None, r"layer_widths\[1\] is None"),
    ],
)
def test_widths_of_ragged_models(widths, message, folder, tmp_path):
    model, tokenizer = load_model(folder)
    kept = [{axis: range(i + 1) for axis in AXES} for i in range(3)]
    smaller = apply_plan(model, plan_keeping(Geometry.of(model), kept))
    out = save_checkpoint(smaller, tokenizer, tmp_path / "out", card="", extras={})
    by_layer = json.loads((out / "config.json").read_text())["layer_widths"]
    by_layer[1] = widths and {**by_layer[1], **widths}
    edit(out, layer_widths=by_layer)
    for load in (*ENGINES.values(), inspect):
        with pytest.raises(CheckpointError, match=message):
            load(str(out))


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        (
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 3e9}},
            "share",
        ),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}}, "holds Infinity"),
        ("llama", {"rms_norm_eps": float("nan")}, "holds NaN"),
        ("llama", {"eos_token_id": [10**400]}, "eos_token_id is 1000"),
        ("gemma2", {"query_pre_attn_scalar": -16}, "query_pre_attn_scalar is -16"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0"),
        ("llama", {"rms_norm_eps": -0.999999}, "rms_norm_eps is -0.999999"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": -1e4}}, "rope_theta is -10000"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("gemma2", {"sliding_window": 0}, "sliding_window is 0"),
        ("gemma2", {"layer_types": ["sideways", "full_attention"]}, "sideways|layer_types"),
        ("gemma3_text", {"initializer_range": -1.5}, "std >= 0"),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads|has shape"),
    ],
)
def test_other_numbers_that_no_model_can_have(model_type, fields, message, tmp_path):
    broken = edit(save_tiny_folder(tmp_path / "model", model_type), **fields)
    for load in (*ENGINES.values(), inspect):
        with pytest.raises(PrunusError, match=message):
            load(str(broken))


def test_sizes_of_tensors_without_elements_prove_nothing(folder, tmp_path):
    """A header may claim any dimension where another one is zero."""
    broken = edit(copied(folder, tmp_path), head_dim=3 * 10**9)
    edit_weights(broken, lambda weights: weights.update({"claim": torch.zeros(3 * 10**9, 0)}))
    with pytest.raises(CheckpointError, match="head_dim is 3,000,000,000"):
        load_model(broken)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_impossible_sizes(command, folder, tmp_path, capsys):
    broken = edit(copied(folder, tmp_path), head_dim=3 * 10**9)
    before = sorted(path.name for path in tmp_path.iterdir())
    words = commands(broken, tmp_path)[command]
    assert "head_dim is 3,000,000,000" in fails(capsys, *words)
    assert sorted({path.name for path in tmp_path.iterdir()} - {"text.txt", "plan.json"}) == before


# --- what both engines name, and what neither does ---


def test_tensors_without_use_are_named_in_the_same_words(folder, tmp_path, caplog):
    extra = {
        "value_head.weight": torch.zeros(3),
        "model.layers.0.extra.weight": torch.zeros(3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.rotary_emb.inv_freq": torch.zeros(4),
    }
    changed = edit_weights(copied(folder, tmp_path), lambda weights: weights.update(extra))
    said = []
    for load in ENGINES.values():
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="prunus"):
            load(changed)
        said.append([record.getMessage() for record in caplog.records])
    assert said[0] == said[1]
    assert len(said[0]) == 1
    assert "2 tensors that its model does not use: 'model.layers.0.extra.weight', 'value_head.weight'" in said[0][0]


def test_a_model_without_a_word_on_its_dtype_has_that_of_its_weights(tmp_path):
    folder = save_tiny_folder(tmp_path / "model", "llama")
    edit_weights(folder, lambda weights: weights.update({n: w.bfloat16() for n, w in weights.items()}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({n: v for n, v in config.items() if "dtype" not in n}))
    assert {load(folder)[0].dtype for load in ENGINES.values()} == {torch.bfloat16}
    assert read_config(folder).dtype == torch.bfloat16


# --- adapters ---


@pytest.mark.parametrize("alone", [False, True], ids=["beside a model", "alone"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_adapter(command, alone, folder, tmp_path, capsys):
    model = copied(folder, tmp_path)
    if alone:
        (model / "config.json").unlink()
        (model / WEIGHTS).unlink()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    before = sorted(path.name for path in tmp_path.iterdir())
    message = fails(capsys, *commands(model, tmp_path)[command])
    assert "merge_and_unload" in message
    assert "adapter_config.json" in message
    assert sorted({path.name for path in tmp_path.iterdir()} - {"text.txt", "plan.json"}) == before


def test_adapters_in_python(folder, tmp_path):
    model = copied(folder, tmp_path)
    (model / "adapter_config.json").write_text("{}")
    for load in (*ENGINES.values(), inspect):
        with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
            load(str(model))
