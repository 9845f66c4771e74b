"""Text that the model writes: prompts of all kinds, what follows them, the languages, and that it is written once."""

from __future__ import annotations

import json
import string
from collections import Counter

import pytest
import torch
from tiny_families import make_model
from tiny_folder import byte_tokenizer, save_tiny_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prunus.calibration import Reading, load_calibration, prompts, self_text
from prunus.calibration.languages import SENTENCES, language_costs, language_shares
from prunus.calibration.prompts import LANGUAGES, SCRIPTS, fill, kinds_of
from prunus.calibration.sampled import continuations
from prunus.calibration.self_text import AT_ONCE, self_written
from prunus.calibration.words import FEWEST, Words, words_of
from prunus.checkpoint import load_model, open_model
from prunus.errors import CalibrationError, NonFiniteError, OptionError
from prunus.model.loss import IGNORE_INDEX

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"


@pytest.fixture(scope="module")
def model():
    made = make_model("llama", "gqa", vocab_size=260)
    with torch.no_grad():
        made.lm_head.weight *= 20  # far from uniform
    return made


def word_tokenizer(words) -> PreTrainedTokenizerFast:
    """Tokens of bytes, and of each word with a space before it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    marked = [piece for word in words for piece, _ in encode(word)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*alphabet, *marked]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_words_are_whole_and_sorted_by_script():
    words = words_of(
        word_tokenizer([" house", " Haus", "ing", " no", " привет", " a1b", "数据", "人", " 文件", " mixеd"])
    )
    assert words.by_script == {"LATIN": ["house", "haus"], "CYRILLIC": ["привет"], "CJK": ["数据", "文件"]}
    assert set("abcxyz") <= set(words_of(byte_tokenizer()).letters)


def test_every_kind_in_every_language_is_filled():
    words = Words(
        {script: [f"{script}{number}x".lower() for number in range(FEWEST)] for script in ("LATIN", "CJK", "CYRILLIC")},
        [],
    )
    kinds = kinds_of(chat=True)
    assert {kind for language in LANGUAGES.values() for kind in language} <= set(kinds)
    assert [kind for kind in kinds if kind not in kinds_of(chat=False)] == ["chat"]
    assert set(LANGUAGES) == set(SCRIPTS) == set(SENTENCES)
    for language, templates in LANGUAGES.items():
        assert templates.keys() == LANGUAGES["en"].keys()
        for kind in kinds:
            first, other = (fill(kind, language, words, torch.Generator().manual_seed(seed)) for seed in (0, 1))
            assert "{" not in first.replace("{}", "")
            assert first != other
            script = SCRIPTS[language][0].lower()
            assert script in first.lower()


def test_a_language_costs_half_of_its_share_for_every_tenth_more():
    words = Words({"LATIN": ["word"] * FEWEST, "CJK": ["词"] * FEWEST}, [])
    costs = {"en": 100.0, "de": 110.0, "fr": 300.0, "zh": 100.0, "ru": 90.0}
    assert language_shares(costs, words) == pytest.approx({"en": 0.4, "de": 0.2, "zh": 0.4})
    # A tokenizer that has no words of any language leaves the choice to the costs.
    assert list(language_shares({"en": 200.0, "ru": 100.0}, Words({}, ["a"]))) == ["ru"]


@pytest.mark.parametrize("begin", [None, 5])
def test_costs_are_those_of_each_sentence_alone(model, begin):
    tokenizer = byte_tokenizer()
    found = language_costs(model, tokenizer, begin)
    context = model.config.max_position_embeddings
    for language in ("en", "zh"):
        ids = tokenizer(SENTENCES[language])["input_ids"]
        ids = torch.tensor([[*([] if begin is None else [begin]), *ids][:context]])
        with torch.no_grad():
            chances = model(ids).logits[0, :-1].double().log_softmax(dim=-1)
        expected = -sum(float(row[token]) for row, token in zip(chances, ids[0, 1:].tolist(), strict=True))
        assert found[language] == pytest.approx(expected, rel=1e-4)


def letter_tokenizer(letters, unknown=None) -> PreTrainedTokenizerFast:
    """A token per character; others are left out, or all have one token."""
    vocabulary = {letter: number for number, letter in enumerate([*letters, *([unknown] if unknown else [])])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token=unknown)


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_a_language_that_the_tokenizer_cannot_write_is_not_the_cheapest(model, unknown):
    tokenizer = letter_tokenizer(string.printable + "äöüßÄÖÜ", unknown)
    costs = language_costs(model, tokenizer)
    assert list(costs) == ["en", "de"], "Chinese would cost the model nothing"
    assert sum(language_shares(costs, words_of(tokenizer)).values()) == pytest.approx(1)
    assert len(load_calibration("self", tokenizer, samples=2, seq_len=16, model=model, progress=False)) == 2


def test_a_tokenizer_without_letters_is_named(model):
    with pytest.raises(CalibrationError, match=r"no token for anything in .* in place of `self`"):
        load_calibration("self", letter_tokenizer("0123"), samples=2, seq_len=16, model=model, progress=False)


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[1].content.upper() }}", "{{ 'x' "])
def test_a_chat_template_that_takes_no_question_alone(model, template, caplog):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    written = self_written(model, tokenizer, seq_len=4, progress=False)
    assert {next(written).kind for _ in range(AT_ONCE)} == set(kinds_of(chat=False))
    assert "does not take a question" in caplog.text


# --- what follows them -----------------------------------------------------------------------------------------------


def test_continuations_follow_the_model_s_probabilities(model):
    """The same draws, from the model run on each text so far alone, looking for the token one by one."""
    given = [torch.tensor([5, 6, 7, 8]), torch.tensor([9]), torch.tensor([10, 11])]
    stop = {3, 30, 31, 32, 33, 34, 35}
    found = continuations(model, given, new_tokens=12, stop=stop, generator=torch.Generator().manual_seed(4))
    generator, texts, ended = torch.Generator().manual_seed(4), [ids.tolist()[:1] for ids in given], set()
    for place in range(1, 4 + 12):
        thresholds = torch.rand(3, 1, generator=generator, dtype=torch.float64)
        for number, (prompt, text) in enumerate(zip(given, texts, strict=True)):
            with torch.no_grad():
                chances = model(torch.tensor([text])).logits[0, -1].softmax(dim=-1).double()
            token, left = 0, float(thresholds[number] * chances.sum())
            while left >= float(chances[token]) and token < len(chances) - 1:
                left -= float(chances[token])
                token += 1
            token = int(prompt[place]) if place < len(prompt) else token
            if place >= len(prompt) and token in stop:
                ended.add(number)
            if number not in ended:
                text.append(token)
    assert [ids.tolist() for ids in found] == texts
    assert len({len(text) for text in texts}) > 1  # one that ended early, one that did not


def test_a_broken_model_is_named(model):
    broken = make_model("llama", "gqa", vocab_size=260)
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        continuations(broken, [torch.tensor([4])], new_tokens=2, stop=(), generator=torch.Generator())
    with pytest.raises(OptionError, match="the model embeds only"):
        next(self_written(make_model("llama", "gqa"), byte_tokenizer(), seq_len=8, progress=False))


def test_documents_are_of_all_kinds_and_begin_with_their_prompts(model):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    written = self_written(model, tokenizer, seq_len=4, seed=2, progress=False)
    documents = [next(written) for _ in range(AT_ONCE)]
    counts = Counter(document.kind for document in documents)
    assert set(counts) == set(kinds_of(chat=True))
    assert max(counts.values()) - min(counts.values()) <= 1
    beginnings = {"heading": " \n = ", "function": "def ", "words": ""}
    for document in documents:
        text = tokenizer.decode(document.ids)
        assert text.startswith(beginnings.get(document.kind, ""))
        assert len(document.ids) <= self_text.LONGEST_PROMPT + 4 + self_text.LONGEST_PROMPT
    assert IGNORE_INDEX not in torch.cat([document.ids for document in documents])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_both_engines_write_the_same(stored, tmp_path):
    path = save_tiny_folder(tmp_path / "model", "llama", "gqa")
    load_model(path)[0].to(stored).save_pretrained(path)
    options = {"samples": 5, "seq_len": 24, "seed": 3, "progress": False}
    resident, streamed = (
        load_calibration("self", tokenizer, model=model, **options)
        for model, tokenizer in (load_model(path, dtype="float32"), open_model(path, dtype="float32"))
    )
    assert torch.equal(resident.input_ids, streamed.input_ids)
    assert resident.provenance == streamed.provenance
    assert resident.provenance.source == f"written by the model, prompts {prompts.VERSION}"


# --- written once ----------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(model, tmp_path):
    """Loads text of the model, kept in a folder."""

    def load(samples=6, seed=0, tokenizer=None, **options):
        sizes = {"samples": samples, "seq_len": 16, "seed": seed, "progress": False}
        reading = Reading(keep=tmp_path / "beside")
        return load_calibration("self", tokenizer or byte_tokenizer(), model=model, reading=reading, **sizes, **options)

    load.folder = tmp_path / "beside"
    return load


def test_text_is_kept_and_used_again(kept, monkeypatch):
    first = kept(samples=6)
    (file,) = kept.folder.iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["made_from"].keys() == {"model", "tokenizer", "prompts", "new_tokens", "seed", "begin"}
    assert len(lines) == 1 + AT_ONCE
    assert all(byte_tokenizer().decode(line["ids"]) == line["text"] for line in lines[1:])
    # A person's or another program's reading of it: JSON lines with text.
    load_calibration(str(file), byte_tokenizer(), samples=2, seq_len=16)

    calls = []
    real = self_text.continuations
    monkeypatch.setattr(self_text, "continuations", lambda *args, **options: calls.append(1) or real(*args, **options))
    assert torch.equal(kept(samples=6).input_ids, first.input_ids)
    assert torch.equal(kept(samples=3).input_ids, first.input_ids[:3])
    assert not calls
    # More is written behind it; what is written for another seed lies beside it.
    longer = kept(samples=400)
    assert torch.equal(longer.input_ids[:6], first.input_ids)
    written = len(calls)
    assert written == (len(file.read_text().splitlines()) - 1) // AT_ONCE - 1 > 0
    assert not torch.equal(kept(samples=6, seed=1).input_ids, first.input_ids)
    assert len(list(kept.folder.iterdir())) == 2
    # A chat template gives other prompts.
    chat = byte_tokenizer()
    chat.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    kept(samples=6, tokenizer=chat)
    assert len(list(kept.folder.iterdir())) == 3


def test_a_run_that_was_killed_goes_on_after_the_last_batch(kept, monkeypatch):
    expected = kept(samples=400).input_ids
    (file,) = kept.folder.iterdir()
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[: 1 + AT_ONCE]) + "\n")
    assert torch.equal(kept(samples=400).input_ids, expected)
    assert file.read_text().splitlines() == lines


@pytest.mark.parametrize("damage", ["cut", "other head", "no JSON", "no ids", "no text"])
def test_a_damaged_file_is_named(kept, damage):
    kept()
    (file,) = kept.folder.iterdir()
    lines = file.read_text().splitlines()
    if damage == "cut":
        del lines[-1]
    elif damage == "other head":
        lines[0] = lines[0].replace("prompts", "prompt")
    elif damage == "no JSON":
        lines[1] = lines[1][:-3]
    elif damage == "no ids":
        lines[1] = json.dumps({**json.loads(lines[1]), "ids": [-4]})
    file.write_bytes(b"\xff" if damage == "no text" else "\n".join(lines).encode())
    with pytest.raises(CalibrationError, match=f"{file.name}.*remove"):
        kept()


def test_words_fall_back(model):
    tokenizer = byte_tokenizer()
    assert words_of(tokenizer).of(("LATIN",)) == words_of(tokenizer).letters
