"""Speed and memory: the runs are those of `generate`, the bytes those of a real cache, and models take turns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_families import CASES, ONE_UNLIKE, case_id, count_parameters, make_model, random_tokens, shared_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from prunus.cli import main
from prunus.errors import CheckpointError, NonFiniteError, OptionError
from prunus.evaluation.greedy import greedy_run
from prunus.evaluation.kv_cache import kv_cache_bytes
from prunus.evaluation.memory import PeakMemory, peak_memory
from prunus.evaluation.speed import Spread, Timing, _result, bench, time_in_turn
from prunus.evaluation.speed_options import SpeedOptions
from prunus.model.geometry import Geometry
from prunus.selection.plan import KeptGroups, Plan
from prunus.surgery import apply_plan
from prunus.sweep.engine import ModelOptions

NEW = 9
#: what else is known of a model, besides its timings
FIGURES = ("parameters", "dtype", "kv_cache_bytes_per_token", "kv_cache_bytes", "kv_cache_bytes_full")
SMALL = {"prompt_tokens": 6, "new_tokens": 3}


def cut(model, heads, channels=(8, 20)):
    """The model with so many key/value heads and channels in each layer."""
    kept = [KeptGroups(tuple(range(h)), tuple(range(c))) for h, c in zip(heads, channels, strict=True)]
    return apply_plan(model, Plan("llama", Geometry.of(model).widths, tuple(kept)))


def ragged():
    return cut(make_model("llama", "gqa"), (1, 3))


def attention_free():
    return cut(make_model("llama", "gqa"), (0, 2))


def nowhere_attention():
    return cut(make_model("llama", "gqa"), (0, 0))


PRUNED = {"ragged": ragged, "attention-free first layer": attention_free, "no attention": nowhere_attention}


def generated(model, input_ids, new_tokens):
    """The new tokens of transformers' own loop, which is told of no end-of-text token."""
    model.generation_config.eos_token_id = None
    whole = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=new_tokens, do_sample=False
    )
    return whole[:, input_ids.shape[1] :]


def bytes_held(cache):
    """Bytes of the tensors in a cache, counted one by one."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_same_tokens_as_generate(case):
    model, prompt = make_model(*case), random_tokens()
    tokens = greedy_run(model, prompt, NEW).tokens
    assert tokens.shape == (2, NEW)
    assert torch.equal(tokens, generated(model, prompt, NEW))


@pytest.mark.parametrize("make", PRUNED.values(), ids=PRUNED)
def test_the_same_tokens_as_generate_from_a_pruned_model(make):
    model, prompt = make(), random_tokens()
    assert torch.equal(greedy_run(model, prompt, NEW).tokens, generated(model, prompt, NEW))


def test_no_stop_at_the_end_of_text():
    model, prompt = make_model("llama", "gqa"), random_tokens(batch=1)
    expected = greedy_run(model, prompt, NEW).tokens
    model.generation_config.eos_token_id = int(expected[0, 1])
    stopped = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
    assert stopped.shape[1] < prompt.shape[1] + NEW, "generate must stop for this to be a test"
    assert torch.equal(greedy_run(model, prompt, NEW).tokens, expected)


@pytest.mark.parametrize("case", ONE_UNLIKE, ids=case_id)
def test_prompts_padded_on_the_left_go_on_as_each_alone(case):
    model = make_model(*case)
    prompts = [random_tokens(1, length, seed=length) for length in (9, 2, 5)]
    ids = torch.cat([torch.nn.functional.pad(prompt, (9 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(9) >= 9 - prompt.shape[1] for prompt in prompts]).long()
    found = greedy_run(model, ids, 12, mask).tokens
    for row, prompt in zip(found, prompts, strict=True):
        assert row.tolist() == greedy_run(model, prompt, 12).tokens[0].tolist()


def test_one_prefill_then_single_tokens():
    model, lengths = make_model("llama", "gqa"), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(length(args, kwargs)), with_kwargs=True
    )
    run = greedy_run(model, random_tokens(), 4)
    assert lengths == [12, 1, 1, 1]
    assert run.prefill_seconds > 0
    assert run.decode_seconds > 0
    assert not run.tokens.requires_grad


def length(args, kwargs):
    return (args[0] if args else kwargs["input_ids"]).shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", PRUNED.values(), ids=PRUNED)
def test_bytes_of_a_pruned_models_cache(make, dtype):
    model = make().to(dtype)
    run = greedy_run(model, random_tokens(), NEW)
    assert kv_cache_bytes(model, 12 + NEW - 1, batch_size=2) == bytes_held(run.cache)


# Some of them with sliding windows of 6 tokens: in all layers, in every second, or in the last.
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bytes_of_a_cache(case):
    model = shared_model(*case)
    run = greedy_run(model, random_tokens(), NEW)
    assert kv_cache_bytes(model, 12 + NEW - 1, batch_size=2) == bytes_held(run.cache)


def test_bytes_before_a_window_is_full():
    model = shared_model("mistral", "mqa-window")
    assert kv_cache_bytes(model, 4) == bytes_held(greedy_run(model, random_tokens(1, 2), 3).cache)


def test_models_take_turns():
    first, second = make_model("llama", "gqa"), ragged()
    order = []
    for name, model in (("A", first), ("B", second)):
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: order.append(name) if length(args, kwargs) > 1 else None,
            with_kwargs=True,
        )
    options = SpeedOptions(**SMALL, repeats=3, warm_up=2)
    timings = time_in_turn([first, second], random_tokens(1, 6), options, progress=False)
    assert "".join(order) == "ABBAABBAAB"
    assert [len(kept) for kept in timings] == [3, 3]


def test_training_mode_is_put_back():
    model = make_model("llama", "gqa").train()
    time_in_turn([model], random_tokens(1, 6), SpeedOptions(**SMALL, repeats=1), progress=False)
    assert model.training


def test_spread():
    assert Spread.of([3.0, 1.0, 8.0, 4.0]) == Spread(3.5, 1.0, 8.0)


@pytest.mark.parametrize(
    ("field", "value"), [("prompt_tokens", 0), ("new_tokens", 1), ("batch_size", 0), ("repeats", 0), ("warm_up", -1)]
)
def test_bad_options(field, value):
    with pytest.raises(OptionError, match=f"`{field}` is {value}"):
        SpeedOptions(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("device", "abacus"), ("dtype", "int3")])
def test_bad_device_and_dtype(field, value):
    with pytest.raises(OptionError, match=value):
        bench(["nowhere"], model_options=ModelOptions(**{field: value}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A dense model and a pruned one, as folders."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    for name, model in (("dense", make_model("llama", "gqa")), ("pruned", attention_free())):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root / "dense", root / "pruned"


def test_no_model():
    with pytest.raises(OptionError, match="no model"):
        bench([])


def test_longer_than_the_context(folders, tmp_path):
    # The first model has weights that no load would pass: the check of the second comes before them.
    damaged, short = tmp_path / "damaged", tmp_path / "short"
    for path in (damaged, short):
        shutil.copytree(folders[0], path)
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    models = [str(damaged), str(short)]
    with pytest.raises(OptionError, match=r"33 tokens.*context of short, 32"):
        bench(models, SpeedOptions(prompt_tokens=28, new_tokens=5))
    with pytest.raises(NonFiniteError, match=r"model\.norm"):
        bench(models, SpeedOptions(prompt_tokens=27, new_tokens=5))


def test_memory_that_could_not_be_measured_is_not_known(tmp_path, caplog, monkeypatch):
    # A process that dies as it starts, for a reason that it tells: Python runs this file first of all.
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('no memory left')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    memory = peak_memory(tmp_path, prompt_tokens=2, new_tokens=2, batch_size=1, device="cpu", dtype="auto")
    assert memory == PeakMemory(None, None)
    assert f"the peak memory of {tmp_path} is not known" in caplog.text
    assert "no memory left" in caplog.text


def test_a_missing_model_is_named_before_anything_runs(folders, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        bench([str(folders[0]), str(tmp_path / "nowhere")], SpeedOptions(**SMALL))


def test_the_table(folders, capsys, monkeypatch):
    monkeypatch.setattr("prunus.cli.printing.out_console", Console(width=200))
    words = ["--prompt-tokens", "6", "--new-tokens", "3", "--repeats", "2", "--device", "cpu", "--no-memory"]
    assert main(["bench", str(folders[1]), *words]) == 0
    table = capsys.readouterr().out
    assert "6 + 3 tokens, batch 1, median of 2" in table
    assert f"{count_parameters(attention_free()):,}" in table
    assert "× 1.00 (1.00–1.00)" in table
    assert "peak memory" not in table


def bench_json(capsys, *words):
    assert main(["bench", *map(str, words), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_two_models(folders, capsys):
    words = ["--prompt-tokens", "60", "--new-tokens", "4", "--batch-size", "2", "--repeats", "3", "--no-memory"]
    report = bench_json(capsys, *folders, *words)
    assert report["options"]["repeats"] == 3
    assert report["device"] == "cpu"
    first, second = report["results"]
    assert [first["model"], second["model"]] == ["dense", "pruned"]
    assert [first["parameters"], second["parameters"]] == [
        count_parameters(make_model("llama", "gqa")),
        count_parameters(attention_free()),
    ]
    assert first["prefill_ratio"] == first["decode_ratio"] == {"median": 1, "low": 1, "high": 1}
    # Two layers of three heads of eight numbers, keys and values, four bytes each; then two heads and one tick.
    assert first["kv_cache_bytes_per_token"] == 2 * 2 * 3 * 8 * 4
    assert second["kv_cache_bytes_per_token"] == (2 * 2 * 8 + 2) * 4
    for result in (first, second):
        per_token = result["kv_cache_bytes_per_token"]
        assert result["kv_cache_bytes"] == per_token * 63 * 2
        assert result["kv_cache_bytes_full"] == per_token * 64
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "first_token_seconds", "prefill_ratio"):
            spread = result[name]
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        prefill, wait = result["prefill_tokens_per_second"]["median"], result["first_token_seconds"]["median"]
        assert prefill * wait == pytest.approx(2 * 60)
        assert result["memory"] is None


def test_ratios_are_taken_within_a_round():
    timings = [
        [Timing(2.0, 4.0), Timing(30.0, 9.0), Timing(3.0, 1.0)],
        [Timing(1.0, 8.0), Timing(10.0, 3.0), Timing(3.0, 1.0)],
    ]
    slow, fast = ({"timings": kept, **dict.fromkeys(FIGURES, 0)} for kept in timings)
    result = _result("fast", fast, slow["timings"], None, SpeedOptions(**SMALL, repeats=3))
    assert result.prefill_ratio == Spread(2.0, 1.0, 3.0)
    assert result.decode_ratio == Spread(1.0, 0.5, 3.0)


def test_a_model_named_twice_shows_the_noise(folders, capsys, monkeypatch):
    monkeypatch.chdir(folders[1])  # a folder is called by its own name, however it is written
    report = bench_json(capsys, ".", folders[1], "--prompt-tokens", 6, "--new-tokens", 3, "--no-memory")
    first, second = report["results"]
    assert first["model"] == second["model"] == "pruned"
    assert first["parameters"] == second["parameters"]
    assert second["prefill_ratio"]["low"] < second["prefill_ratio"]["high"], "two runs are never equally long"


@pytest.mark.slow
def test_with_the_process_that_measures_memory(folders, capsys):
    report = bench_json(capsys, folders[1], "--prompt-tokens", 6, "--new-tokens", 3, "--repeats", 1)
    memory = report["results"][0]["memory"]
    assert memory["peak_bytes"] > memory["before_bytes"] > 0
