"""Texts, tokens and lengths: read in bounded time and memory, and refused before the work where they cannot be used."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import time

import pytest
import torch
from plain import PLAIN
from tiny_families import make_model
from tiny_folder import SIZES, TEXT, byte_tokenizer, fails, run, run_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import prunus.evaluation.evaluate as evaluate_module
import prunus.pipeline.compare as comparison_module
import prunus.pipeline.prune as pipeline_module
import prunus.sweep.engine as engine_module
from prunus.calibration import Reading, calibration_from_tokens, load_calibration
from prunus.calibration import files as calibration_files
from prunus.calibration.columns import TextColumn
from prunus.cli import main
from prunus.errors import CalibrationError, OptionError, TextTooShortError
from prunus.evaluation.evaluate import EvalOptions
from prunus.evaluation.perplexity import perplexity, window_length
from prunus.model import tokens as tokens_module
from prunus.model.tokens import token_ids
from prunus.pipeline.inputs import draw_calibration
from prunus.pipeline.options import CalibrationOptions, EvaluationOptions
from prunus.pipeline.prune import prune
from prunus.pipeline.rounds import schedule
from prunus.recovery.options import TextOptions
from prunus.scoring.score import score
from prunus.sweep.engine import ModelOptions
from prunus.sweep.estimate import Workload, estimate

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.fixture
def no_weights(monkeypatch):
    """Nothing reads a model's weights: what is tested is refused before."""

    def read(*args, **kwargs):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(engine_module, "load_model", read)
    monkeypatch.setattr(engine_module, "open_model", read)


@pytest.fixture
def no_scoring(monkeypatch):
    """Nothing is scored: what is tested is refused before."""

    def scored(*args, **kwargs):
        raise AssertionError("a pass over the model was begun")

    monkeypatch.setattr(pipeline_module, "prune", scored)
    monkeypatch.setattr(comparison_module, "score_together", scored)
    # The name of this module is that of its function as well.
    monkeypatch.setattr("prunus.pipeline.score.score", scored)


@pytest.fixture
def more_tokens(folder, tmp_path):
    """The tiny model with tokens added to its tokenizer that it has no rows for."""
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["quick", "brown", "lazy"])
    tokenizer.save_pretrained(path)
    return path


# --- tokens in pieces ----------------------------------------------------------------------------------------------


def trained_tokenizer(spaces: bool) -> PreTrainedTokenizerFast:
    """BPE with merges; with spaces, merges go across words, as nothing splits the text before."""
    tokenizer = Tokenizer(models.BPE())
    if not spaces:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([*TEXT.splitlines(), *["aa"] * 1000], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("spaces", [False, True])
@pytest.mark.parametrize(
    "text", [TEXT, "naïve 漢字 😀 e\u0301 " * 300, " " * 5000, "a" * 5000, "ab " * 2000, "0123456789" * 500]
)
def test_pieces_make_the_tokens_of_the_whole(monkeypatch, spaces, text):
    monkeypatch.setattr(tokens_module, "PIECE", 1024)
    # Odd, so that a run of "aa" is cut in its middle: pieces then agree nowhere.
    monkeypatch.setattr(tokens_module, "OVERLAP", 255)
    tokenizer = trained_tokenizer(spaces)
    whole = tokenizer([text], add_special_tokens=False)["input_ids"][0]
    assert token_ids(tokenizer, ["short", text])[1].tolist() == whole
    some = token_ids(tokenizer, [text], enough=40)[0].tolist()
    assert some == whole[: len(some)]
    assert len(some) >= min(40, len(whole))


def test_a_long_text_goes_through_the_tokenizer_in_pieces(monkeypatch):
    monkeypatch.setattr(tokens_module, "PIECE", 2048)
    given: list[int] = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, texts, **options):
            given.extend(map(len, texts))
            return super().__call__(texts, **options)

    tokenizer = Counting(tokenizer_object=byte_tokenizer().backend_tokenizer)
    monkeypatch.setattr(tokens_module, "OVERLAP", 128)
    text = TEXT * 3
    (ids,) = token_ids(tokenizer, [text])
    assert len(ids) == len(text)
    assert max(given) <= 2048
    assert sum(given) < 1.1 * len(text)


def test_the_time_for_one_line_grows_with_its_length(tmp_path, monkeypatch):
    # Small slices make the time of a quadratic reader show with a short line.
    monkeypatch.setattr(calibration_files, "_SLICE_BYTES", 32)

    def seconds(copies: int) -> float:
        path = tmp_path / f"{copies}.jsonl"
        path.write_text(json.dumps({"text": "word " * copies}) + "\n", encoding="utf-8")
        taken = []
        for _ in range(3):
            start = time.process_time()
            assert len(list(calibration_files.json_documents(path, column=TextColumn("text"), seed=0))) == 1
            taken.append(time.process_time() - start)
        return min(taken)

    assert seconds(400_000) < 8 * seconds(100_000)


# --- passages ------------------------------------------------------------------------------------------------------


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*words, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


@pytest.mark.parametrize("length", [3, 20, 90])
def test_passages_are_as_long_as_the_language_needs(tmp_path, monkeypatch, length):
    """Words of 2 × length bytes and a token each: from 7 to 180 bytes per token."""
    monkeypatch.setattr(calibration_files, "_WHOLE_TEXT_BYTES", 0)
    words = [f"{number:05d}" + "ж" * length for number in range(20_000)]
    path = tmp_path / "words.txt"
    path.write_text(" ".join(words), encoding="utf-8")
    tokenizer = word_tokenizer(words)
    found = load_calibration(str(path), tokenizer, samples=6, seq_len=256).input_ids
    for window in found:
        inside = window[1:-1]  # the first word of a passage, and the last, may be cut
        assert (inside.diff() == 1).all()
    starts = sorted(found[:, 1].tolist())
    assert all(later - earlier >= 256 for earlier, later in itertools.pairwise(starts))


def test_a_text_that_is_too_short_says_how_many_tokens_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_files, "_WHOLE_TEXT_BYTES", 0)
    words = [f"{number:05d}" + "ж" * 90 for number in range(3000)]
    path = tmp_path / "words.txt"
    path.write_text(" ".join(words), encoding="utf-8")
    with pytest.raises(TextTooShortError, match="holds 3,000 tokens, and 12 samples with 256 of them each need 3,072"):
        load_calibration(str(path), word_tokenizer(words), samples=12, seq_len=256)


# --- held out, and errors of the text ------------------------------------------------------------------------------


def write_lines(path, count):
    lines = [json.dumps({"text": f"{number:04d} " + "word " * 20}) for number in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_text_without_more_sequences_is_used_for_calibration(tmp_path, llama, caplog):
    path = write_lines(tmp_path / "lines.jsonl", 4)
    llama.config.vocab_size = 260
    options = CalibrationOptions(str(path), samples=6, seq_len=64)
    drawn, held_out = draw_calibration(llama, byte_tokenizer(), options, held_out=16, needed=True)
    assert len(drawn) == 6
    assert held_out is None
    assert "no 16 sequences beyond the 6" in caplog.text


def test_a_broken_line_is_not_taken_for_a_short_text(tmp_path, llama, caplog):
    path = write_lines(tmp_path / "lines.jsonl", 100)
    # Enough for the calibration before the broken line is met, and not for the held-out sequences.
    whole = list(calibration_files.json_documents(path, column=TextColumn("text"), seed=0))
    last = whole[-1][:4]
    path.write_text(path.read_text().replace('{"text": "' + last, '{"text: "' + last))
    options = CalibrationOptions(str(path), samples=6, seq_len=64)
    with pytest.raises(CalibrationError, match=rf"line {int(last) + 1} is not JSON") as caught:
        draw_calibration(llama, byte_tokenizer(), options, held_out=200, needed=True)
    assert not isinstance(caught.value, TextTooShortError)
    assert "no 200 sequences" not in caplog.text


# --- refused before the work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--seq-len", "65"], "--seq-len is 65, and the model knows only 64 positions"),
        (
            ["--eval-text", "TEXT", "--set", "evaluation.seq_len=65"],
            "evaluation.seq_len is 65, and the model knows only 64 positions",
        ),
        (["--method", "adaptive", "--samples", "8"], "4 calibration sequences in round 2"),
        (["--rounds", "0"], "rounds is 0; the smallest is 1"),
        (["--samples", "1" + "0" * 30], "samples is 1" + "0" * 30),
        (["--samples", "2000000000"], "tokens; the most is"),
        (["--seed", str(2**64)], "a seed has at most"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_prune_refuses_before_weights_are_read(capsys, folder, text, tmp_path, options, named):
    given = [text if word == "TEXT" else word for word in options]
    sizes = [word for name in ("--samples", "--seq-len") if name not in given for word in (name, "24")]
    message = fails(capsys, "prune", folder, "--out", tmp_path / "out", "--calibration", text, *sizes, *given)
    assert named in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--samples", "2.5"], ["--rounds", "1.5"], ["--seed", "0.5"]])
@pytest.mark.usefixtures("no_weights")
def test_fractions_are_wrong_usage(capsys, folder, text, tmp_path, options):
    words = ["prune", folder, "--out", tmp_path / "out", "--calibration", text, *options]
    assert main([str(word) for word in words]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"{options[0]} is {options[1]!r}; it takes a whole number" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["score", "compare"])
@pytest.mark.usefixtures("no_weights")
def test_others_refuse_lengths_before_weights_are_read(capsys, folder, text, tmp_path, command):
    more = ["--methods", "taylor", "--ratios", "0.2"] if command == "compare" else []
    words = [command, folder, "--out", tmp_path / "out", "--calibration", text, *more]
    assert "--seq-len is 65, and the model knows only 64" in fails(capsys, *words, "--seq-len", "65")
    assert not list(tmp_path.iterdir())
    if command == "score":
        few = [*words, "--samples", "7", "--seq-len", "24", "--method", "adaptive"]
        assert "needs at least 8" in fails(capsys, *few)


@pytest.mark.parametrize("command", ["prune", "score", "compare"])
@pytest.mark.usefixtures("no_scoring")
def test_tokens_beyond_the_embedding_are_refused_before_scoring(capsys, more_tokens, text, tmp_path, command):
    more = ["--methods", "taylor", "--ratios", "0.2"] if command == "compare" else []
    words = [command, more_tokens, "--out", tmp_path / "out", *SIZES, *more]
    message = fails(capsys, *words, "--calibration", text)
    assert "makes token id 260, and the model embeds only 260" in message
    assert not (tmp_path / "out").exists()
    if command != "score":
        calm = tmp_path / "calm.txt"
        calm.write_text("nothing that was added to it, " * 100)
        message = fails(capsys, *words, "--calibration", calm, "--eval-text", text)
        assert "makes token id 260" in message


def test_the_python_interface_refuses_tokens_and_lengths(llama):
    beyond = calibration_from_tokens(torch.full((4, 12), 96))
    below = calibration_from_tokens(torch.full((4, 12), -100))
    long = calibration_from_tokens(torch.ones(4, 65, dtype=torch.int64))
    for sequences, named in ((beyond, "token id 96"), (below, "token id -100"), (long, "only 64 positions")):
        with pytest.raises(OptionError, match=named):
            score(llama, sequences)
        with pytest.raises(OptionError, match=named):
            prune(llama, 0.2, sequences)


@pytest.mark.usefixtures("no_scoring")
def test_an_evaluation_text_of_one_token(capsys, folder, text, tmp_path):
    (tmp_path / "one.txt").write_text("x")
    words = ["prune", folder, "--out", tmp_path / "out", "--calibration", text, *SIZES]
    assert "has 1 token(s)" in fails(capsys, *words, "--eval-text", tmp_path / "one.txt")


def test_a_name_that_is_not_utf8(capsys, folder, tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text(TEXT)
    message = fails(capsys, "prune", folder, "--out", tmp_path / "out", "--calibration", tmp_path / name)
    assert "is not UTF-8" in message
    for options in (CalibrationOptions, TextOptions):
        with pytest.raises(OptionError, match="not UTF-8"):
            options(str(tmp_path / name))
    with pytest.raises(OptionError, match="not UTF-8"):
        EvaluationOptions(text=str(tmp_path / name))


@pytest.mark.parametrize("value", [2.5, 2.0, True, "2", 10**30, 0])
def test_counts_from_python_are_whole_numbers(value, llama):
    for make in (
        lambda: CalibrationOptions(samples=value),
        lambda: CalibrationOptions(seq_len=value),
        lambda: EvaluationOptions(seq_len=value),
        lambda: EvaluationOptions(windows=value),
        lambda: ModelOptions(batch_size=value),
        lambda: EvalOptions(windows=value),
        lambda: TextOptions("default", samples=value),
        lambda: schedule(0.2, value),
        lambda: load_calibration(None, byte_tokenizer(), samples=value),
        lambda: perplexity(llama, byte_tokenizer(), TEXT, seq_len=value),
        lambda: perplexity(llama, byte_tokenizer(), TEXT, batch_size=value),
    ):
        with pytest.raises(OptionError, match=r"give a whole number|the (smallest|largest) is"):
            make()


# --- eval ----------------------------------------------------------------------------------------------------------


def test_a_window_is_as_long_as_the_model_allows(llama):
    assert window_length(llama.config, None) == 64
    assert window_length(make_model("llama", "gqa", max_position_embeddings=4096).config, None) == 2048
    llama.resize_token_embeddings(260)
    result = perplexity(llama, byte_tokenizer(), TEXT[:1000])
    assert (result.seq_len, result.windows) == (64, 15)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--seq-len", "65"], "--seq-len is 65"),
        (["--prompt", "x" * 64], "has 64 tokens"),
        (["--speed", "--set", "speed.prompt_tokens=60", "--set", "speed.new_tokens=5"], "more than the context"),
        (["--text", "ONE"], "has 1 token(s)"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_eval_refuses_before_weights_are_read(capsys, folder, text, tmp_path, options, named):
    one = tmp_path / "one.txt"
    one.write_text("x")
    given = ["--text", text, *options] if "ONE" not in options else ["--text", text, one]
    assert named in fails(capsys, "eval", folder, *given)


@pytest.mark.usefixtures("no_weights")
def test_eval_refuses_tokens_of_either_model(capsys, folder, more_tokens, text):
    for words in ([folder, "--compare", more_tokens], [more_tokens, "--compare", folder]):
        assert "makes token id 260" in fails(capsys, "eval", *words, "--text", text)


def test_eval_says_what_it_will_do_before_the_memory_is_estimated(monkeypatch, capsys, folder, text):
    seen = []
    real = evaluate_module.load_or_open

    def noted(source, options, workload=None, **more):
        seen.append(workload)
        return real(source, options, workload, **more)

    monkeypatch.setattr(evaluate_module, "load_or_open", noted)
    run_json(capsys, "eval", folder, "--text", text, "--seq-len", "32", "--batch-size", "4", "--windows", "8")
    assert seen == [Workload(evaluation_tokens=8 * 32, evaluation_window=4 * 32)]


def test_evaluation_and_a_second_model_are_in_the_estimate(monkeypatch):
    for constant in ("FIRST_USE", "FIRST_SOLUTION", "GROUP_BYTES"):
        monkeypatch.setattr(f"prunus.sweep.estimate.{constant}", 0)
    monkeypatch.setattr("prunus.sweep.estimate.resident_set", lambda: 0)
    model = make_model("llama", "gqa", num_hidden_layers=4)
    layer, outside = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 20 + 2 * 48, 2 * 96 * 48 + 48
    each_token = 4 * (12 * 48 + 4 * 48 + 4 * 24 + 6 * 20) + 24 * 48
    work = Workload(evaluation_tokens=300, evaluation_window=128)
    measured = 300 * 48 * 4 + 512 * 96 * 12 + 128 * each_token
    cpu = torch.device("cpu")
    whole, held = (outside + 4 * layer) * 4, (outside + layer) * 4
    found = estimate(model, torch.float32, work, cpu)
    assert (found.resident, found.streamed) == (int((whole + measured) * 1.1), int((held + measured) * 1.1))
    cut = estimate(model, torch.float32, Workload(cuts=True), cpu)
    assert (cut.resident, cut.streamed) == (int(2 * whole * 1.1), int((held + 48 * 48 * 4) * 1.1))
    half = estimate(model, torch.float32, work, cpu, torch.float16)
    converted = held - outside * 2 + 48 * 48 * 2 + 96 * 48 * 4
    assert half.streamed == int((converted + measured) * 1.1)


def test_eval_with_speed_counts_both_models(capsys, folder, text):
    words = ["eval", folder, "--compare", folder, "--speed", "--text", text]
    words += ["--set", "speed.prompt_tokens=16", "--set", "speed.new_tokens=4"]
    message = fails(capsys, *words, "--max-memory", "10MB")
    assert "timing holds 2 models at once, which takes" in message


# --- figures on little text ----------------------------------------------------------------------------------------


def test_figures_on_little_text_come_with_a_warning(capsys, folder, text, tmp_path, caplog):
    short = tmp_path / "seven.txt"
    short.write_text("seven t")
    words = ["--calibration", text, "--samples", "1", "--seq-len", "6", *PLAIN, "--set", "output.report=false"]
    with caplog.at_level(logging.WARNING):
        run(capsys, "prune", folder, "--out", tmp_path / "out", *words, "--eval-text", short)
    assert "importance is measured on 6 tokens only" in caplog.text
    # exp(2.5 / √6) = 2.77
    assert "the mean over 6 tokens only, so that it is uncertain by a factor of about 2.8" in caplog.text


# --- conversations -------------------------------------------------------------------------------------------------


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def rows(form):
    for number in range(60):
        asked, answered = f"What is {number} squared?", f"It is {number * number}."
        if form == "messages":
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            yield {"talk": turns}
        elif form == "sharegpt":
            yield {"talk": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]}
        elif form == "alpaca":
            yield {"talk": asked, "input": "", "output": answered}
        else:
            yield {"text": f"[user] {asked}\n[assistant] {answered}\n"}


def test_all_forms_of_conversations_are_the_text_of_the_template(tmp_path):
    """Against a file of the same text, written down by hand."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    drawn = {}
    for form in ("messages", "sharegpt", "alpaca", "text"):
        path = tmp_path / f"{form}.json"
        path.write_text(json.dumps(list(rows(form))), encoding="utf-8")
        table = tmp_path / f"{form}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(list(rows(form))), table)
        how = {} if form == "text" else {"reading": Reading(chat_column="talk")}
        for source in (path, table):
            made = load_calibration(str(source), chat_tokenizer(), samples=20, seq_len=48, seed=3, **how)
            drawn[form, source.suffix] = made.input_ids
            assert made.provenance.kind == ("chat" if how else {".json": "jsonl"}.get(source.suffix, "parquet"))
    for (form, suffix), ids in drawn.items():
        assert torch.equal(ids, drawn["text", suffix]), form


@pytest.mark.parametrize("column", ["input", "system"])
def test_an_instruction_in_a_column_that_usually_stands_beside_one(tmp_path, column):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({column: "What is 2 + 2?", "output": "4"}))
    expected = "[user] What is 2 + 2?\n[assistant] 4\n"
    how = {"samples": 1, "seq_len": len(expected), "reading": Reading(chat_column=column)}
    made = load_calibration(str(path), chat_tokenizer(), **how)
    assert chat_tokenizer().decode(made.input_ids[0].tolist()) == expected


def test_instructions_with_an_input_and_a_system_prompt(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5", "system": "Be brief."}
    path.write_text(json.dumps(row))
    expected = "[system] Be brief.\n[user] Add.\n\n2 and 3\n[assistant] 5\n"
    how = {"samples": 1, "seq_len": len(expected), "reading": Reading(chat_column="instruction")}
    made = load_calibration(str(path), chat_tokenizer(), **how)
    assert chat_tokenizer().decode(made.input_ids[0].tolist()) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["input", "output", "system"])
def test_a_part_of_an_alpaca_row_is_not_taken_for_its_instruction(tmp_path, column, suffix):
    row = {"instruction": "Why is the sky blue?", "input": "In a word.", "output": "Light.", "system": "Be brief."}
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text(json.dumps(row))
    else:
        pytest.importorskip("pyarrow.parquet").write_table(
            pytest.importorskip("pyarrow").Table.from_pylist([row]), path
        )
    with pytest.raises(CalibrationError, match=f"column '{column}' holds text, and the instruction .* another column"):
        load_calibration(str(path), chat_tokenizer(), samples=1, seq_len=8, reading=Reading(chat_column=column))


def test_tokens_of_the_template_that_sequences_have_anyway(tmp_path):
    """A template that writes the begin token and ends with that of the end: neither is there twice."""
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows("messages"))))
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    how = {"samples": 20, "seq_len": 48, "reading": Reading(chat_column="talk")}
    plain = load_calibration(str(path), tokenizer, **how).input_ids
    assert (plain[:, 0] == tokenizer.bos_token_id).all()
    tokenizer.chat_template = "<s>" + CHAT + "<eos>"
    assert torch.equal(load_calibration(str(path), tokenizer, **how).input_ids, plain)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"text": "no"}, r"line 2 has no column 'talk'. Columns: text; .* by `chat_column`"),
        ({"talk": "hello"}, r"line 2: column 'talk' holds text, and the row has no text in column 'output'"),
        ({"talk": 5}, r"line 2: column 'talk' holds int \(5\).*Expected is a list of"),
        ({"talk": []}, r"line 2: column 'talk' holds an empty list"),
        ({"talk": [{"role": "user", "content": 5}]}, r"line 2: column 'talk' has message 1"),
        ({"talk": [{"from": "martian", "value": "hi"}]}, r"message 1 of column 'talk' is from 'martian'; known are"),
    ],
)
def test_rows_that_are_no_conversation(tmp_path, row, named):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in [next(rows("messages")), row]))
    with pytest.raises(CalibrationError, match=named):
        load_calibration(str(path), chat_tokenizer(), samples=20, seq_len=48, reading=Reading(chat_column="talk"))


def test_sources_and_tokenizers_without_conversations(tmp_path, text):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows("messages"))))
    with pytest.raises(OptionError, match="no chat template"):
        load_calibration(str(path), byte_tokenizer(), samples=2, seq_len=48, reading=Reading(chat_column="talk"))
    for source in (str(text), "default", "self"):
        with pytest.raises(CalibrationError, match="conversations come from"):
            load_calibration(source, chat_tokenizer(), samples=2, seq_len=48, reading=Reading(chat_column="talk"))
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"line \d+: the chat template does not take .* roles must alternate"):
        load_calibration(str(path), tokenizer, samples=2, seq_len=48, reading=Reading(chat_column="talk"))


@pytest.mark.parametrize("command", ["prune", "score", "compare"])
def test_commands_calibrate_on_conversations(capsys, folder, tmp_path, command):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    chat_tokenizer().save_pretrained(model)
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows("sharegpt"))), encoding="utf-8")
    more = {
        "prune": [*PLAIN, "--method", "wanda", "--set", "output.report=false"],
        "score": [*PLAIN, "--method", "wanda"],
        "compare": ["--recipes", "original", "--methods", "wanda", "--ratios", "0.2"],
    }[command]
    out = tmp_path / "out"
    words = [
        command,
        model,
        "--out",
        out,
        "--calibration",
        path,
        *(["--set", "calibration.chat_column=talk"] if command == "score" else ["--chat-column", "talk"]),
        *SIZES,
        *more,
    ]
    if command != "score":
        words += ["--set", "evaluation.held_out=2"]
    run(capsys, *words)
    record = {"prune": "prunus/metrics.json", "score": "score.json", "compare": "comparison.json"}[command]
    assert json.loads((out / record).read_text())["calibration"]["kind"] == "chat"
