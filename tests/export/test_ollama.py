"""The Modelfile beside an exported file: its template, read as Ollama does, gives the tokenizer's own prompt."""

from __future__ import annotations

import re

import pytest
from tiny_families import make_model
from tiny_tokenizers import byte_level

from prunus.errors import OptionError
from prunus.export import export_gguf
from prunus.export.ollama import modelfile

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why {{ .Role }}?"},
]
#: Jinja would drop a newline at the very end
LOOP = "{{% for m in messages %}}{}{{{{ m.content }}}}{}{{% endfor %}}{}{{{{ '' }}}}"
#: chat templates as those of the families are written, for the special tokens that each has
TEMPLATES = {
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
        + LOOP.format("<|im_start|>{{ m.role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
    ),
    "llama3": "{{ bos_token }}"
    + LOOP.format(
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + LOOP.format(
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n",
        "<end_of_turn>\n",
        "<start_of_turn>model\n",
    ),
    "phi3": LOOP.format("<|{{ m.role }}|>\n", "<|end|>\n", "<|assistant|>\n"),
}


def go(template: str, messages: list[dict[str, str]]) -> str:
    """Ollama's template language, as far as Modelfiles of prunus use it."""
    before, each, after = re.fullmatch(r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S).groups()
    text = ""
    for message in messages:
        condition = r'\{\{ if eq \.Role "(\w+)" \}\}(\w+)\{\{ else \}\}(.*?)\{\{ end \}\}'
        part = re.sub(condition, lambda m, role=message["role"]: m[2] if role == m[1] else m[3], each)
        head, tail = part.replace("{{ .Role }}", message["role"]).split("{{ .Content }}")
        text += head + message["content"] + tail
    return before + text + after


def section(text: str, name: str) -> str | None:
    found = re.search(rf'^{name} """(.*?)"""$', text, re.S | re.M)
    return found and found[1]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_gives_the_tokenizers_own_prompt(name, add_bos):
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATES[name]
    text = modelfile("a.gguf", tokenizer, [tokenizer.eos_token_id, tokenizer.pad_token_id], add_bos)
    chat = CHAT[1:] if name == "gemma" else CHAT
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert go(section(text, "TEMPLATE"), chat) == (expected.removeprefix("<bos>") if add_bos else expected)
    assert section(text, "SYSTEM") == ("You are SmolLM." if name == "chatml" else None)
    assert text.splitlines()[1] == 'FROM "./a.gguf"'
    assert re.findall("^PARAMETER stop (.*)$", text, re.M) == ['"<eos>"', '"<pad>"']


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}", "{{ broken", TEMPLATES["phi3"] + " "])
def test_an_unknown_template_is_left_to_ollama(template):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    text = modelfile("a.gguf", tokenizer, [], True)
    assert "TEMPLATE" not in text
    assert 'PARAMETER stop "<eos>"' in text


def test_a_bos_token_that_begins_every_message_stays():
    """As in SmolLM2, whose bos token is that of ChatML's messages."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    tokenizer.chat_template = TEMPLATES["chatml"]
    text = modelfile("a.gguf", tokenizer, [], False)
    assert section(text, "TEMPLATE").startswith("{{ range .Messages }}<|im_start|>{{ .Role }}")


def test_it_lies_beside_the_file_and_replaces_nothing_of_somebody_else(saved, tmp_path):
    folder = str(saved(make_model("llama", "gqa", vocab_size=280)))
    out, beside = tmp_path / "small.gguf", tmp_path / "small.Modelfile"
    beside.write_text("FROM mine")
    with pytest.raises(OptionError, match=r"small\.Modelfile"):
        export_gguf(folder, out, overwrite=True)
    assert beside.read_text() == "FROM mine"
    assert not out.exists()
    beside.unlink()
    for _ in range(2):
        export_gguf(folder, out, overwrite=True)
        assert 'FROM "./small.gguf"' in beside.read_text()
