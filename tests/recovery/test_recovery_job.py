"""Recovery by files and keys: round trips, the record of a result, and the memory that may be used."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import make_model
from tiny_recovery import SHORT, chat_tokenizer

from prunus.cli import main
from prunus.errors import OptionError
from prunus.machine.byte_sizes import parse_bytes
from prunus.recovery import PlaceOptions, RecoveryJob, RecoveryOptions, TextOptions
from prunus.recovery.job import RECOVERY, WorkOptions
from prunus.recovery.memory import training_bytes

names = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)
#: without a weight behind it
sources = names.filter(lambda name: ":" not in name)
jobs = st.builds(
    RecoveryJob,
    names,
    st.none() | names,
    st.builds(
        TextOptions,
        st.lists(sources, min_size=1, max_size=3, unique=True).map(tuple),
        st.none() | st.integers(1, 999),
        st.integers(2, 999),
        st.integers(1, 99),
    ),
    st.builds(
        RecoveryOptions,
        max_steps=st.none() | st.integers(1, 10**6),
        max_minutes=st.none() | st.floats(0.01, 1e4),
        train=st.sampled_from(["layers", "lora", "full"]),
        learning_rate=st.none() | st.floats(1e-9, 1),
        kl_weight=st.floats(0.1, 9),
        decay=st.sampled_from(["cosine", "linear", "constant"]),
        gradient_checkpointing=st.booleans(),
    ),
    st.builds(PlaceOptions, names, st.none() | st.just("8GB")),
    st.builds(WorkOptions, st.none() | names),
)


@given(job=jobs)
def test_a_job_is_the_same_after_a_file(job, tmp_path_factory):
    path = tmp_path_factory.mktemp("jobs") / "job.yaml"
    path.write_text(RECOVERY.text(job, {"prunus": "1"}), encoding="utf-8")
    again = RECOVERY.read(str(path), [], {})
    assert dataclasses.replace(again, made_by={}) == job
    assert again.made_by == {"prunus": "1"}


def test_every_field_of_every_option_class_is_a_key_with_a_meaning():
    classes = {"text.": TextOptions, "recovery.": RecoveryOptions, "run.": PlaceOptions, "output.": WorkOptions}
    expected = {"model", "teacher"}
    expected |= {prefix + field.name for prefix, cls in classes.items() for field in dataclasses.fields(cls)}
    assert set(RECOVERY.keys) == expected
    assert all(key.meaning and key.allowed != "a value" for key in RECOVERY.keys.values())


def test_a_result_can_be_made_again_from_its_own_record(recover, pruned, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    more = ["--set", "recovery.lora_rank=3", "--learning-rate", "5e-3", "--seed", "4"]
    recover(pruned, "--out", first, *SHORT, "--max-steps", 6, *more)
    record = yaml.safe_load((first / "prunus" / "recovery.yaml").read_text())
    assert (record["recovery"]["lora_rank"], record["recovery"]["precision"]) == (3, "float32")
    assert set(record["made_by"]) == {"prunus", "torch", "transformers", "text_sha256"}
    recover("--recipe", first / "prunus" / "recovery.yaml", "--out", again)
    for name in ("model.safetensors", "config.json", "prunus/recovery.yaml", "prunus/plan.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--out", "o", "--text", "default"], "MODEL is missing"),
        (["m", "--out", "o"], "--text is missing"),
        (["m", "--text", "default"], "--out"),
        (["m", "--out", "o", "--text", "default", "--kl-weight", "0"], "given as --set KEY=VALUE"),
    ],
)
def test_wrong_usage(capsys, words, named):
    assert main(["recover", *words]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--set", "recovery.lora_ranks=3"], "did you mean recovery.lora_rank? `prunus recipe --command recover`"),
        (["--train", "ful"], "--train is 'ful'; it must be one of layers, lora, full"),
        (["--max-memory", "lots"], "--max-memory is 'lots'; write a size"),
        (["--max-memory", "1MB"], "the smallest --max-memory that would do is"),
    ],
)
def test_values_that_cannot_be(refused, pruned, tmp_path, words, named):
    message = refused(pruned, "--out", tmp_path / "out", *SHORT, "--max-steps", "2", *words)
    assert named in message
    assert "None" not in message
    assert not list(tmp_path.iterdir())


def test_the_smallest_limit_that_is_named_would_do(refused, recover, pruned, tmp_path):
    words = [pruned, "--out", tmp_path / "out", *SHORT, "--max-steps", "1"]
    message = refused(*words, "--max-memory", "1MB")
    smallest = re.search(r"would do is ([\d.]+[kMG]?B)", message)[1]
    # The process itself may have grown by then.
    enough = f"{parse_bytes(smallest) // 10**6 + 300}MB"
    assert recover(*words, "--max-memory", enough)["steps"] == 1


def test_what_training_takes_is_counted(tmp_path, monkeypatch):
    """Against the formula written out, for a model whose parameters are counted by hand."""
    monkeypatch.setattr("prunus.recovery.memory.resident_set", lambda: 0)
    for constant in ("FIRST_USE", "LIBRARIES"):
        monkeypatch.setattr(f"prunus.recovery.memory.{constant}", 0)
    model = make_model("llama", "gqa", num_hidden_layers=3, vocab_size=260)
    model.save_pretrained(tmp_path / "m")
    chat_tokenizer().save_pretrained(tmp_path / "m")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    linear = [module.weight.shape for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    config, tokens = model.config, 2 * 32
    hidden, query = config.hidden_size, config.num_attention_heads * config.head_dim
    key_value, channels = config.num_key_value_heads * config.head_dim, config.intermediate_size
    embeddings = sum(weight.numel() for weight in {model.lm_head.weight, model.model.embed_tokens.weight})
    for train, w in (("lora", 4), ("lora", 2), ("full", 4), ("full", 2), ("layers", 4), ("layers", 2)):
        job = RecoveryJob("m", None, TextOptions("t"), RecoveryOptions(train=train, lora_rank=5))
        adapters = 5 * sum(rows + columns for rows, columns in linear)
        trained = {"lora": 16 * adapters, "full": 12 * parameters, "layers": 12 * (parameters - embeddings)}[train]
        weights = parameters * (w if train == "lora" else 4 + (2 if w == 2 else 0))
        layer = w * (12 * hidden + 4 * query + 4 * key_value + 6 * channels) + 24 * hidden
        head = tokens * 260 * 32 + (4 * 260 * hidden if train == "full" else 0)
        expected = weights + parameters * w + trained + 3 * tokens * layer + head
        found = training_bytes(job, tmp_path / "m", tmp_path / "m", torch.device("cpu"), bfloat16=w == 2, tokens=tokens)
        assert found == int(expected * 1.1), (train, w)


def test_python_needs_a_text_too():
    from prunus.recovery import recover_job

    with pytest.raises(OptionError, match="no text to train on"):
        recover_job(RecoveryJob("m"), "out")
