"""Whatever cannot work is refused before long work, with the value and what to do."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_blocks import make_stored
from tiny_families import make_model
from tiny_folder import fails
from tiny_recovery import ALONE, SHORT, chat_tokenizer
from transformers import AutoModelForCausalLM

from prunus.cli import main


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--max-steps", "0"], "--max-steps is 0"),
        (["--max-minutes", "-1"], "--max-minutes is -1.0"),
        (["--learning-rate", "nan"], "--learning-rate is .nan; it must be a number"),
        (["--set", "recovery.temperature=0"], "temperature is 0.0"),
        (["--set", "recovery.kl_weight=-0.5"], "--set recovery.kl_weight is -0.5"),
        (["--set", "recovery.kl_weight=0", "--set", "recovery.ce_weight=0"], "nothing to learn from"),
        (["--set", "recovery.warmup=1"], "--set recovery.warmup is 1.0"),
        (["--train", "full", "--set", "recovery.lora_alpha=3"], "--set recovery.lora_alpha goes with --train lora"),
        (["--set", "recovery.micro_batch=3"], "--set recovery.micro_batch is 3; it must divide --batch-size, 4"),
        (["--set", "text.held_out=0"], "--set text.held_out is 0"),
        (["--samples", "0"], "--samples is 0"),
        (["--seq-len", "1"], "--seq-len is 1"),
        (["--seq-len", "65"], "knows only 64 positions"),
        (["--text", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["--text", "nowhere.jsonl", "--chat-column", "messages"], "'nowhere.jsonl' does not exist"),
        (["--device", "gpu"], "device 'gpu'"),
        (["--teacher", "nowhere/at/all"], "no model folder 'nowhere/at/all'"),
    ],
)
def test_options(refused, pruned, tmp_path, options, named):
    assert named in refused(pruned, "--out", tmp_path / "out", *SHORT, "--max-steps", "2", *options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_in_use(refused, pruned, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty" in refused(pruned, "--out", tmp_path, *SHORT)


def test_neither_model_is_replaced_by_the_result(refused, pruned, dense):
    for folder in (pruned, dense):
        message = refused(pruned, "--out", folder, *SHORT, "--max-steps", "2", "--overwrite")
        assert "is the folder of the model" in message
        assert (folder / "model.safetensors").is_file()


def test_nor_is_the_model_that_only_writes_the_text(refused, pruned, dense, tmp_path):
    """Without distillation the dense model is still read."""
    for folder in (pruned, dense):
        shutil.copytree(folder, tmp_path / folder.name)
    kept = (tmp_path / "dense" / "model.safetensors").read_bytes()
    words = [tmp_path / "pruned", *SHORT, "--text", "self", *ALONE, "--max-steps", "1", "--overwrite"]
    for more in ([], ["--dry-run"]):
        assert "is the folder of the model" in refused(*words, "--out", tmp_path / "dense", *more)
    assert (tmp_path / "dense" / "model.safetensors").read_bytes() == kept


def test_how_to_train_without_a_dense_model_can_be_typed(refused, recover, pruned, tmp_path):
    shutil.copytree(pruned, tmp_path / "alone")
    words = [tmp_path / "alone", "--out", tmp_path / "out", *SHORT, "--max-steps", "1"]
    advice = "train without one: --set recovery.kl_weight=0"
    assert advice in refused(*words)
    recover(*words, *advice.partition(": ")[2].split())


def test_checkpoints_of_somebody_else_are_left_alone(refused, pruned, tmp_path):
    (tmp_path / "runs" / "checkpoint-500").mkdir(parents=True)
    words = [pruned, "--out", tmp_path / "out", *SHORT, "--set", f"output.work={tmp_path / 'runs'}", "--overwrite"]
    assert "checkpoints that are not of a recovery run" in refused(*words)
    assert (tmp_path / "runs" / "checkpoint-500").is_dir()


def test_a_text_that_is_too_short_says_how_long_it_is(refused, pruned, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("word " * 100)
    words = [str(path) if word == "default" else word for word in SHORT]
    message = refused(pruned, "--out", tmp_path / "out", *words)
    assert "holds 15 sequences of 32 tokens, and 20 are needed, of which 16 are held out" in message
    path.write_text("word")
    message = refused(pruned, "--out", tmp_path / "out", *words)
    assert "holds 4 tokens, and 1 sample with 32 of them each need 32" in message


@pytest.mark.parametrize("card", [b"---\nlicense: [\n---\n# x\n", b"# caf\xe9\n"])
def test_a_card_that_cannot_be_read_stops_before_training(refused, pruned, tmp_path, card):
    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    (copy / "README.md").write_bytes(card)
    options = [*SHORT, "--max-steps", "2", *ALONE, "--set", f"output.work={tmp_path / 'work'}"]
    assert "card of the pruned model" in refused(copy, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "work").exists()


def test_tokens_beyond_the_embedding_stop_before_training(refused, pruned, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    chat_tokenizer(" the", "x1", "x2").save_pretrained(copy)
    (tmp_path / "text.txt").write_text("a word x2 of many, " * 300)
    words = [tmp_path / "text.txt" if word == "default" else word for word in SHORT]
    options = [*words, "--max-steps", "2", *ALONE]
    assert "makes token id 260" in refused(copy, "--out", tmp_path / "out", *options)


def test_teachers(refused, pruned, dense, tmp_path):
    small = tmp_path / "small"
    make_model("llama", "gqa", vocab_size=261).save_pretrained(small)
    chat_tokenizer().save_pretrained(small)
    options = ["--out", tmp_path / "out", *SHORT, "--max-steps", "2"]
    assert "logits for 261 tokens, the pruned model for 260" in refused(pruned, *options, "--teacher", small)
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    chat_tokenizer("<other>").save_pretrained(other)
    message = refused(pruned, *options, "--teacher", other)
    assert "1 tokens differ, first '<other>'" in message


def test_weights_in_blocks_are_neither_trained_nor_learned_from(refused, pruned, tmp_path, capsys):
    """And what is said after such a model was cut does not lead there."""
    make_stored("fp8", tmp_path / "fp8")
    options = ["--out", tmp_path / "out", *SHORT, "--max-steps", "2"]
    assert "stored in FP8" in refused(tmp_path / "fp8", *options, *ALONE)
    assert "stored in FP8" in refused(tmp_path / "fp8", *options, *ALONE, "--dry-run")
    assert "stored in FP8" in refused(pruned, *options, "--teacher", tmp_path / "fp8")
    cut = ["prune", tmp_path / "fp8", "--ratio", "0.2", "--calibration", "default", "--samples", "8", "--seq-len", "32"]
    cut += ["--set", "evaluation.held_out=0", "--set", "repair=null", "--rounds", "1", "--out", tmp_path / "cut"]
    assert "prune that, and train what is left" in fails(capsys, *cut, "--set", "recovery.tokens=512")
    assert not (tmp_path / "cut").exists()
    assert main([*map(str, cut)]) == 0
    assert "prunus recover" not in capsys.readouterr().out


def test_a_base_model_that_is_not_here(refused, recover, pruned, tmp_path):
    moved = tmp_path / "elsewhere" / "pruned"
    shutil.copytree(pruned, moved)
    message = refused(moved, "--out", tmp_path / "out", *SHORT, "--max-steps", "2")
    assert "was cut from 'dense'" in message
    assert "--teacher" in message
    (moved / "prunus" / "metrics.json").unlink()
    message = refused(moved, "--out", tmp_path / "out", *SHORT, "--max-steps", "2")
    assert "it is not known which model" in message
    # What the message advises works.
    facts = recover(moved, "--out", tmp_path / "out", *SHORT, "--max-steps", "2", *ALONE)
    assert facts["teacher"] is None


@pytest.mark.parametrize("name", ["dense", "smaller"])
def test_a_pruned_folder_of_the_base_model_s_name_is_not_it(refused, recover, pruned, dense, tmp_path, name):
    """The folder itself, or another cut of the same model beside it."""
    for each in {"dense", name}:
        shutil.copytree(pruned, tmp_path / "cut" / each)
    options = ["--out", tmp_path / "out", *SHORT, "--max-steps", "2"]
    assert "was cut from 'dense', which is neither beside it" in refused(tmp_path / "cut" / name, *options)
    facts = recover(tmp_path / "cut" / name, *options, "--teacher", dense)
    assert facts["held_out_loss"]["dense"] < facts["held_out_loss"]["before"]


def test_the_teacher_of_a_model_that_was_cut_twice_is_the_first_of_all(
    recover, pruned, dense, tmp_path, monkeypatch, caplog, capsys
):
    """Where it is not here, the model between teaches, which is said; prune itself advises a command that works."""
    sizes = ["--calibration", "default", "--samples", "8", "--seq-len", "32", "--set", "evaluation.held_out=0"]
    sizes += ["--method", "taylor", "--set", "repair=null", "--rounds", "1", "--ratio", "0.1"]
    twice = tmp_path / "twice"
    assert main(["prune", str(pruned), "--out", str(twice), *sizes]) == 0
    said = capsys.readouterr().out
    assert f"--out {twice}-recovered --teacher {pruned}" in " ".join(said.split())
    options = ["--out", tmp_path / "out", *SHORT, "--max-steps", "2", "--overwrite"]
    (tmp_path / "pruned").symlink_to(pruned)
    assert recover(twice, *options)["teacher"] == "pruned"
    assert "was first cut from dense, which is not here" in caplog.text
    (tmp_path / "dense").symlink_to(dense)
    assert recover(twice, *options)["teacher"] == "dense"


def test_conversations_that_are_none(refused, pruned, tmp_path):
    path = tmp_path / "chat.jsonl"
    words = [str(path) if word == "default" else word for word in SHORT]
    given = [pruned, "--out", tmp_path / "out", *words, "--chat-column", "messages"]
    for record, named in (
        ({"text": "no"}, "line 1 has no column 'messages'. Columns: text"),
        ({"messages": "hello"}, "line 1: column 'messages' holds text, and the row has no text in column 'output'"),
        ({"messages": [{"role": "user"}]}, "line 1: column 'messages' has message 1, dict ({'role': 'user'})"),
    ):
        path.write_text(json.dumps(record))
        assert named in refused(*given)
    path.write_text("{")
    assert "line 1 is not JSON" in refused(*given)
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(pruned).save_pretrained(bare)
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    assert "no chat template" in refused(bare, *given[1:], *ALONE)


def test_other_commands_still_refuse_many_processes(monkeypatch, capsys, pruned, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["prune", str(pruned), "--out", str(tmp_path / "out")]) == 1
    assert "only `prunus score` shares its work out" in capsys.readouterr().err
