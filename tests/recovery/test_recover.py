"""Recovery from end to end, as a user types it."""

from __future__ import annotations

import html
import json
import math
import re
from functools import cache

import pytest
import torch
from accelerate.state import AcceleratorState
from forked import together
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_families import ONE_EACH, case_id, logits, make_model, random_tokens
from tiny_mixtures import MIXED_CASES, make_mixture
from tiny_recovery import ALONE, SHORT, chat_tokenizer, cut
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus
from prunus.cli import main
from prunus.recovery.student import Student, add_adapters, merge_adapters_
from prunus.results.result_folder import read_result
from prunus.sweep.sequence_loss import perplexity_of_windows

FAST = ["--learning-rate", "5e-3", "--max-steps", "24", "--set", "recovery.checkpoints=4"]


@cache
def measured(folder):
    """The loss of a saved folder on the last sequences of the text, and their hash."""
    model, tokenizer = prunus.load_model(folder)
    how = {"samples": 2**14 + 16, "seq_len": 32, "reading": prunus.Reading(fewer=True)}
    held_out = prunus.load_calibration("default", tokenizer, **how).split(16)[1]
    return perplexity_of_windows(model, held_out.input_ids, progress=False).nll, held_out.provenance.sha256


def held_out_loss(folder, facts):
    loss, sha256 = measured(folder)
    assert sha256 == facts["held_out"]["sha256"]
    return loss


@pytest.mark.parametrize("train", ["layers", "lora", "full"])
def test_distillation_wins_back_what_pruning_lost(recover, pruned, dense, tmp_path, train):
    facts = recover(pruned, "--out", tmp_path / "out", *SHORT, *FAST, "--train", train)
    loss = facts["held_out_loss"]
    assert loss["dense"] < loss["before"], "pruning did harm"
    assert loss["after"] < loss["before"] - 0.4 * (loss["before"] - loss["dense"])
    assert facts["gap_closed"] == pytest.approx((loss["before"] - loss["after"]) / (loss["before"] - loss["dense"]))
    # What the record says is what the folders do.
    assert held_out_loss(tmp_path / "out", facts) == pytest.approx(loss["after"], rel=1e-6)
    assert held_out_loss(pruned, facts) == pytest.approx(loss["before"], rel=1e-6)
    assert held_out_loss(dense, facts) == pytest.approx(loss["dense"], rel=1e-6)
    assert loss["after"] == pytest.approx(min(entry["held_out_loss"] for entry in facts["history"]), rel=1e-5)
    assert [entry["step"] for entry in facts["history"]] == [6, 12, 18, 24]
    assert facts["teacher"] == "dense", "found beside the pruned folder"
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "out"))
    still = {name for name in before if torch.equal(before[name], after[name])}
    embeddings = {name for name in before if name in ("model.embed_tokens.weight", "lm_head.weight")}
    assert still & embeddings == (set() if train == "full" else embeddings)


def test_the_result_is_a_folder_of_the_same_kind(recover, pruned, tmp_path):
    out = tmp_path / "out"
    facts = recover(pruned, "--out", out, *SHORT, *FAST, "--max-steps", 8)
    assert not (tmp_path / "out.work").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    before = {path.relative_to(pruned).as_posix() for path in pruned.rglob("*") if path.is_file()}
    after = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    # What the pruned model wrote and what its report says is not the recovered one's.
    assert after == before - {"prunus/samples.json", "report.html"} | {"prunus/recovery.json", "prunus/recovery.yaml"}
    for name in ("plan.json", "groups.csv", "score.json"):
        assert (out / "prunus" / name).read_bytes() == (pruned / "prunus" / name).read_bytes()
    own, old = (json.loads((folder / "prunus" / "metrics.json").read_text()) for folder in (out, pruned))
    assert own.pop("before_recovery") == {name: old[name] for name in old if name.startswith("perplexity")}
    assert own["perplexity_after"] == pytest.approx(math.exp(facts["held_out_loss"]["after"]))
    assert own["perplexity_before"] == pytest.approx(math.exp(facts["held_out_loss"]["dense"]))
    assert {n: own[n] for n in own if "perplexity" not in n} == {n: old[n] for n in old if "perplexity" not in n}
    assert json.loads((out / "prunus" / "recovery.json").read_text()) == facts
    assert (out / "config.json").read_text() == (pruned / "config.json").read_text()
    card = (out / "README.md").read_text()
    assert "\n# out\n" in card
    assert 'from_pretrained("out"' in card
    assert "pruned" not in card.split("## Recovery")[0].split("from_pretrained")[1]
    assert f"{math.exp(facts['held_out_loss']['after']):.2f}" in card.split("## Recovery")[1]
    assert facts["text"]["sha256"] in card
    (result,) = [r for r in ModelCard(card).data.eval_results if r.metric_name == "perplexity"]
    assert result.metric_value == pytest.approx(math.exp(facts["held_out_loss"]["after"]))
    assert read_result(out).metrics["perplexity_after"] == own["perplexity_after"]
    assert main(["report", str(out)]) == 0
    assert main(["export", str(out), "--to", "dense", "--out", str(tmp_path / "filled")]) == 0
    ids = random_tokens()
    recovered = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "filled"), ids),
        logits(recovered, ids),
        rtol=1e-4,
        atol=1e-4,
    )
    # Recovering once more keeps what was done before.
    again = recover(out, "--out", tmp_path / "again", *SHORT, "--max-steps", 2, "--teacher", pruned.with_name("dense"))
    assert [each["history"] for each in again["earlier"]] == [facts["history"]]
    card = (tmp_path / "again" / "README.md").read_text()
    assert re.findall("^## Recov.*", card, flags=re.MULTILINE) == ["## Recovery", "## Recovery 2"]
    assert "It was trained again." in card.split("## Recovery 2")[1]
    assert [point["tokens"] for point in again["curve"]][-1] == facts["tokens"] + again["tokens"]
    assert main(["report", str(tmp_path / "again")]) == 0
    page = html.unescape((tmp_path / "again" / "report.html").read_text())
    for number, each in enumerate((facts, again), start=1):
        assert f"round {number}: {each['held_out_loss']['before']:.4f} before" in page
        assert each["command"] in page
    # What is held out of the text does not depend on the number of steps, or it might have been trained on before.
    assert again["held_out"] == facts["held_out"]
    assert again["held_out_loss"]["before"] == pytest.approx(facts["held_out_loss"]["after"], rel=1e-6)
    metrics = json.loads((tmp_path / "again" / "prunus" / "metrics.json").read_text())
    assert metrics["before_recovery"]["perplexity_after"] == old["perplexity_after"], "of the model before any training"


def test_adapters_merged_and_saved_compute_what_they_computed_before(tmp_path):
    dense = make_model("qwen2", "gqa-tied", num_hidden_layers=4, vocab_size=260)
    _, smaller = cut(dense)
    untouched = logits(smaller, torch.arange(40).view(2, 20))
    adapted = add_adapters(smaller, rank=5, alpha=10.0, seed=0)
    assert torch.equal(logits(smaller, torch.arange(40).view(2, 20)), untouched), "adapters begin as no change"
    for name, parameter in smaller.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    before = logits(smaller, torch.arange(40).view(2, 20))
    assert (before - untouched).abs().max() > 0.1
    merge_adapters_(adapted)
    prunus.save_checkpoint(smaller, chat_tokenizer(), tmp_path / "out", card="", extras={})
    loaded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.arange(40).view(2, 20))
    torch.testing.assert_close(loaded, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [*ONE_EACH, *MIXED_CASES], ids=case_id)
def test_adapters_of_every_family(case):
    """Every projection that is left has one, and nothing else is trained: no expert, whose weights are one tensor."""
    smaller = make_mixture(*case) if case in MIXED_CASES else cut(make_model(*case, num_hidden_layers=4))[1]
    plain = {name for name, _ in smaller.named_parameters()}
    linear = {name for name, m in smaller.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    projections = {name for name in linear if name.endswith("_proj")}
    adapted = add_adapters(smaller, rank=2, alpha=4.0, seed=0)
    trained = {name for name, p in smaller.model.layers.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{side}.default.weight" for name in projections for side in "AB"}
    assert all(p.dtype == torch.float32 for p in smaller.parameters() if p.requires_grad)
    for parameter in smaller.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    before = logits(smaller, random_tokens())
    merge_adapters_(adapted)
    assert {name for name, _ in smaller.named_parameters()} == plain
    torch.testing.assert_close(logits(smaller, random_tokens()), before, rtol=1e-3, atol=1e-4)


def test_merging_into_half_precision_rounds_once():
    model = make_model("llama", "gqa").to(torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    adapted = add_adapters(model, rank=3, alpha=6.0, seed=0)
    adapter = model.model.layers[0].mlp.up_proj
    adapter.lora_B["default"].weight.data.normal_(std=0.05)
    product = 2.0 * adapter.lora_B["default"].weight.double() @ adapter.lora_A["default"].weight.double()
    merge_adapters_(adapted)
    merged = model.model.layers[0].mlp.up_proj.weight
    assert merged.dtype == torch.bfloat16
    once = (weight.double() + product).to(torch.bfloat16)
    twice = (weight + product.to(torch.bfloat16)).to(torch.bfloat16)
    # The sum in float32 may fall on the other side of the middle between two numbers now and then.
    assert (merged == once).double().mean() > 0.999
    assert (twice == once).double().mean() < 0.99, "rounding the product first would be seen"


def test_the_best_checkpoint_is_kept_and_not_the_last(recover, pruned, tmp_path):
    """Many steps on few sequences: they are learned by heart, and the held-out loss turns around."""
    learn = [*ALONE, "--train", "full", "--set", "recovery.decay=constant", "--learning-rate", "3e-3"]
    facts = recover(pruned, "--out", tmp_path / "out", *SHORT, *learn, "--samples", 16, "--max-steps", 20)
    losses = {entry["step"]: entry["held_out_loss"] for entry in facts["history"]}
    best = min(losses, key=losses.get)
    assert best < 20
    assert losses[20] > losses[best] + 0.01
    assert facts["best_step"] == best > 0
    assert held_out_loss(tmp_path / "out", facts) == pytest.approx(losses[best], rel=1e-5)
    assert facts["held_out_loss"]["dense"] is None, "no teacher was needed"


def test_a_model_that_training_only_harms_comes_out_as_it_was(recover, pruned, tmp_path, caplog):
    facts = recover(pruned, "--out", tmp_path / "out", *SHORT, "--max-steps", 3, "--learning-rate", 2.0)
    assert facts["best_step"] == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "the result is the model as it was" in caplog.text


def test_an_absurd_learning_rate_stops_with_the_step(refused, pruned, tmp_path):
    options = ["--max-steps", 20, "--train", "full", "--learning-rate", "1e38", "--set", "recovery.max_grad_norm=1e30"]
    message = refused(pruned, "--out", tmp_path / "out", *SHORT, *options)
    assert "of step 2 is not finite" in message or "of step 1 is not finite" in message
    assert "lower --learning-rate" in message
    assert not (tmp_path / "out").exists()


def test_a_training_that_changes_nothing_is_told(recover, pruned, tmp_path, caplog):
    """Losses of checkpoints are Trainer's and round in another way; what is saved is compared in its own."""
    facts = recover(pruned, "--out", tmp_path / "out", *SHORT, "--max-steps", 4, "--learning-rate", 1e-12)
    loss = facts["held_out_loss"]
    assert loss["after"] == loss["before"]
    assert facts["best_step"] == 0
    assert caplog.text.count("the result is the model as it was") == 1
    # A report says what came out, and not what the last checkpoint had.
    facts = recover(pruned, "--out", tmp_path / "worse", *SHORT, "--max-steps", 4, "--learning-rate", 2.0)
    assert facts["history"][-1]["held_out_loss"] > facts["held_out_loss"]["after"] == loss["before"]
    assert main(["report", str(tmp_path / "worse")]) == 0
    page = (tmp_path / "worse" / "report.html").read_text()
    assert facts["command"] in html.unescape(page)
    assert f"round 1: {loss['before']:.4f} before, {loss['before']:.4f} after" in page


def test_the_clock_ends_a_run(recover, pruned, tmp_path):
    facts = recover(pruned, "--out", tmp_path / "out", *SHORT, "--max-minutes", 0.03, "--set", "recovery.checkpoints=2")
    assert 0 < facts["seconds"] <= 1.8
    assert facts["history"][-1]["step"] == facts["steps"] > 1


def test_one_pass_over_the_text_without_limits(recover, pruned, tmp_path):
    facts = recover(pruned, "--out", tmp_path / "out", *SHORT, "--samples", 22)
    assert facts["steps"] == 5
    assert facts["tokens"] == 5 * 4 * 32


def test_bfloat16_and_gradient_checkpointing(recover, pruned, tmp_path):
    changed = ("precision=bfloat16", "gradient_checkpointing=true")
    options = [word for setting in changed for word in ("--set", f"recovery.{setting}")]
    facts = recover(pruned, "--out", tmp_path / "out", *SHORT, *FAST, "--max-steps", 8, *options)
    assert facts["held_out_loss"]["after"] < facts["held_out_loss"]["before"]
    assert facts["options"]["precision"] == "bfloat16"
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_losses_of_a_model_in_half_precision_are_all_measured_in_it(recover, pruned, dense, tmp_path):
    """Trained in float32, and measured as the result is: of one that came out as it was, no gap is closed."""
    for folder in (pruned, dense):
        model, tokenizer = prunus.load_model(folder, dtype="bfloat16")
        prunus.save_checkpoint(model, tokenizer, tmp_path / folder.name, card="", extras={})
    words = [tmp_path / "pruned", "--teacher", tmp_path / "dense", "--out", tmp_path / "out", *SHORT, "--max-steps", 3]
    for precision in ("auto", "float32"):
        options = ["--set", f"recovery.precision={precision}", "--learning-rate", 2.0, "--overwrite"]
        facts = recover(*words, *options)
        assert "bfloat16 model" in facts["protocol"]
        loss = facts["held_out_loss"]
        assert held_out_loss(tmp_path / "pruned", facts) == loss["before"] == loss["after"]
        assert held_out_loss(tmp_path / "dense", facts) == loss["dense"]
        assert facts["gap_closed"] == 0


def test_gradient_checkpointing_changes_memory_and_not_the_result(recover, pruned, tmp_path):
    steps = [*SHORT, "--max-steps", 3]
    facts = [
        recover(pruned, "--out", tmp_path / name, *steps, *options)
        for name, options in (("plain", []), ("checkpointed", ["--set", "recovery.gradient_checkpointing=true"]))
    ]
    assert facts[0]["training_losses"] == facts[1]["training_losses"]


def test_micro_batches_add_up_to_the_batch(recover, pruned, tmp_path):
    losses = []
    for size in (1, 4):
        words = [*SHORT, "--set", f"recovery.micro_batch={size}", "--max-steps", 3, "--learning-rate", 1e-3]
        facts = recover(pruned, "--out", tmp_path / str(size), *words)
        losses.append([entry["loss"] for entry in facts["training_losses"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_every_step_takes_a_whole_batch(recover, pruned, tmp_path, monkeypatch):
    """Where passes over the text do not end with a step: what is left of one is left out, others each time."""
    seen, real = [], Student.forward

    def forward(self, input_ids, labels=None):
        seen.extend(map(tuple, input_ids.tolist() if self.training else ()))
        return real(self, input_ids, labels)

    monkeypatch.setattr(Student, "forward", forward)
    words = [*SHORT, "--samples", 11, "--max-steps", 6, "--set", "recovery.micro_batch=1"]
    facts = recover(pruned, "--out", tmp_path / "out", *words)
    assert facts["tokens"] == len(seen) * 32 == 6 * 4 * 32
    passes = [set(seen[start : start + 8]) for start in (0, 8, 16)]
    assert [len(each) for each in passes] == [8, 8, 8], "none twice in a pass"
    assert len(set.union(*passes)) > 8


def test_conversations(recover, pruned, tmp_path):
    path = tmp_path / "chat.jsonl"
    records = [
        {"messages": [{"role": "user", "content": f"What is {n} + {n}?"}, {"role": "assistant", "content": str(2 * n)}]}
        for n in range(200)
    ]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    words = [str(path) if word == "default" else word for word in SHORT]
    facts = recover(pruned, "--out", tmp_path / "out", *words, "--chat-column", "messages", "--max-steps", 10)
    assert (facts["text"]["source"], facts["text"]["kind"]) == ("chat.jsonl", "chat")
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    reading = prunus.Reading(chat_column="messages")
    drawn = prunus.load_calibration(str(path), tokenizer, samples=56, seq_len=32, reading=reading)
    assert facts["text"]["sha256"] == drawn.split(16)[0].provenance.sha256
    whole = {f"[user] What is {n} + {n}?\n[assistant] {2 * n}" for n in range(200)}
    found = re.findall(r"\[user\][^\[]*\[assistant\] \d+(?=\n)", tokenizer.decode(drawn.input_ids.flatten()))
    assert len(found) > 20
    assert set(found) <= whole


@pytest.mark.slow
def test_two_processes(recover, pruned, tmp_path):
    """As torchrun starts them, with gloo: the same batches in other hands."""
    options = [*SHORT, "--set", "recovery.micro_batch=2", "--set", "recovery.checkpoints=2"]
    # Held-out sequences that two cannot share.
    options += ["--max-steps", "6", "--learning-rate", "1e-3", "--set", "text.held_out=15", "--json"]

    def work():
        AcceleratorState._reset_state(reset_partial_state=True)  # what this process has trained before
        return main(["recover", str(pruned), "--out", str(tmp_path / "two"), *options])

    ended = together(2, work)
    assert ended.status == 0, ended.err
    two = json.loads(ended.out)
    one = recover(pruned, "--out", tmp_path / "one", *options[:-1])
    assert two["processes"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    assert two["held_out_loss"]["after"] < two["held_out_loss"]["before"]
    assert [entry["step"] for entry in two["history"]] == [3, 6]
    assert two["history"][-1]["held_out_loss"] == pytest.approx(two["held_out_loss"]["after"], rel=1e-5)
    assert two["held_out_loss"]["after"] == pytest.approx(one["held_out_loss"]["after"], abs=0.02)
