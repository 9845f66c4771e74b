"""The Modelfile of an exported model, from which `ollama create` makes a model that can chat.

Ollama does not run the chat template of a GGUF file; it has templates of its own, in Go's language. So the template is
recognised: a format is taken where it gives the text of the tokenizer's own template, character by character.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from prunus.escaping import printable

__all__ = ["MODELFILE_MARK", "modelfile"]

#: the first line of every Modelfile written here
MODELFILE_MARK = b"# written by prunus export"
_QUOTE = '"""'
_CHAT = (
    {"role": "system", "content": "Rule 1."},
    {"role": "user", "content": "Ask 2?"},
    {"role": "assistant", "content": "Answer 3."},
    {"role": "user", "content": "Ask 4?"},
)


@dataclass(frozen=True)
class _Format:
    """How a chat becomes a text: every message between a head and a tail.

    Attributes:
        head: before the content; `{}` stands for the role.
        tail: after it.
        roles: role of a message → what it is called here, where that is another word.
    """

    head: str
    tail: str
    roles: Mapping[str, str] = field(default_factory=dict)

    def text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a chat, up to where the assistant answers."""
        parts = [self._head(message["role"]) + message["content"] + self.tail for message in messages]
        return "".join(parts) + self._head("assistant")

    def _head(self, role: str) -> str:
        return self.head.replace("{}", self.roles.get(role, role))

    def in_go(self) -> str:
        """The same in the language of Ollama's templates."""
        role = "{{ .Role }}"
        for name, called in self.roles.items():
            role = f'{{{{ if eq .Role "{name}" }}}}{called}{{{{ else }}}}{role}{{{{ end }}}}'
        message = f"{self.head.replace('{}', role)}{{{{ .Content }}}}{self.tail}"
        return f"{{{{ range .Messages }}}}{message}{{{{ end }}}}{self._head('assistant')}"


_FORMATS = (
    _Format("<|im_start|>{}\n", "<|im_end|>\n"),  # ChatML: SmolLM2, Qwen
    _Format("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),  # Llama 3
    _Format("<start_of_turn>{}\n", "<end_of_turn>\n", {"assistant": "model"}),  # Gemma
    _Format("<|{}|>\n", "<|end|>\n"),  # Phi 3
    _Format("<|start_of_role|>{}<|end_of_role|>", "<|end_of_text|>\n"),  # Granite 3
)


def modelfile(file_name: str, tokenizer: Any, ends: Sequence[int], add_bos: bool) -> str:
    """The Modelfile of a GGUF file in the same folder.

    Args:
        file_name: of the GGUF file.
        tokenizer: of the model.
        ends: ids of tokens that end an answer, beside the eos token.
        add_bos: whether the file says that a text starts with the bos token, which Ollama then puts there.
    """
    lines = [f"{MODELFILE_MARK.decode()}: ollama create NAME -f THIS_FILE", f'FROM "./{printable(file_name)}"']
    known = _recognised(tokenizer, add_bos)
    if known is None:
        lines.append("# The chat template is none of those that prunus can write for Ollama; it may know it by itself.")
    else:
        found, start, system = known
        lines.append(f"TEMPLATE {_QUOTE}{start}{found.in_go()}{_QUOTE}")
        if system is not None:
            lines.append(f"SYSTEM {_QUOTE}{system}{_QUOTE}")
    ids = dict.fromkeys(token_id for token_id in (tokenizer.eos_token_id, *ends) if token_id is not None)
    stops = tokenizer.convert_ids_to_tokens(list(ids))
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop and stop.isprintable() and '"' not in stop]
    return "\n".join(lines) + "\n"


def _recognised(tokenizer: Any, add_bos: bool) -> tuple[_Format, str, str | None] | None:
    """Format of a tokenizer's chats, what they begin with, and the system message of a chat that brings none."""
    bos = tokenizer.bos_token or ""
    for chat in (_CHAT, _CHAT[1:]):  # some templates take no system message
        given = _rendered(tokenizer, chat, bos if add_bos else "")
        for known in _FORMATS:
            for start in ("", bos):
                if given == start + known.text(chat):
                    without = _rendered(tokenizer, _CHAT[1:], bos if add_bos else "")
                    return known, start, _own_system(without or "", start, known)
    return None


def _own_system(given: str, start: str, known: _Format) -> str | None:
    """The system message that a template puts before a chat without one."""
    plain = known.text(_CHAT[1:])
    before, after = known.text([{"role": "system", "content": "\0"}]).removesuffix(known.text([])).split("\0")
    before, after = start + before, after + plain
    if given == start + plain or not (given.startswith(before) and given.endswith(after)):
        return None
    system = given[len(before) : -len(after)]
    return None if _QUOTE in system else system


def _rendered(tokenizer: Any, chat: Sequence[Mapping[str, str]], added: str) -> str | None:
    """What a tokenizer makes of a chat, without what Ollama puts before it by itself; None if it cannot."""
    try:
        text = tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return str(text).removeprefix(added)
