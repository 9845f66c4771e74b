"""Beginnings of many kinds of text, filled with words of the tokenizer's own vocabulary, for a model to continue.

A model that continues random first tokens writes mostly what such tokens stand in: web text. Given the beginning of a
letter, of a function or of a chapter, it writes that. Words are drawn from the whole vocabulary, so that no two texts
are about the same things, and none of them was chosen by anybody.

Languages are those that the model knows (`prunus.calibration.languages`); what has no language, a heading or a line of
code, is filled with words of any of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from prunus.calibration.words import Words

__all__ = ["ANY_LANGUAGE", "LANGUAGES", "SCRIPTS", "VERSION", "fill", "kinds_of"]

#: changes with every change of the texts below, so that text written from older ones is not taken for new
VERSION = 1

#: {w} is a word, {W} the same with a capital, {n} a small number, {y} a year
ANY_LANGUAGE: Mapping[str, str] = {
    "heading": " \n = {W} {W} = \n \n",
    "outline": "# {W} {w}\n\n## ",
    "function": 'def {w}_{w}({w}, {w}=None):\n    """',
    "class": "class {W}{W}:\n    def __init__(self, {w}, {w}):\n        ",
    "words": "{W} {w} {w}",
}
LANGUAGES: Mapping[str, Mapping[str, str]] = {
    "en": {
        "biography": "{W} {W} (born {y} in {W}) is a",
        "encyclopedia": "The {w} {w} is a {w} that",
        "history": "The history of {w} and {w} began",
        "news": "{W}, Tuesday – The {w} {w} said that",
        "chapter": "Chapter {n}\n\nThe {W} {W}\n\n",
        "story": "Once upon a time there was a {w} who",
        "dialogue": "“{W}?” said the {w}. “I thought the {w}",
        "instructions": "How to {w} a {w} {w}\n\n1. ",
        "question": "Question: What is the {w} of {w}?\nAnswer:",
        "abstract": "Abstract. In this paper we study the {w} of {w}",
        "letter": "Dear {W},\n\nthank you for the {w}.",
        "review": "I bought this {w} {w} last month and",
        "chat": "Can you tell me about {w} and {w}?",
    },
    "de": {
        "biography": "{W} {W} (* {y} in {W}) ist",
        "encyclopedia": "Als {W} {w} bezeichnet man",
        "history": "Die Geschichte von {W} und {W} begann",
        "news": "{W}, Dienstag – Die {W} {W} teilte mit, dass",
        "chapter": "Kapitel {n}\n\nDas {W} {w}\n\n",
        "story": "Es war einmal ein {W}, der",
        "dialogue": "„{W}?“, sagte die {W}. „Ich dachte, das {W}",
        "instructions": "Anleitung: {W} {w} {w}\n\n1. ",
        "question": "Frage: Was ist {W} {w}?\nAntwort:",
        "abstract": "Zusammenfassung. In dieser Arbeit untersuchen wir {W} {w}",
        "letter": "Liebe {W},\n\nvielen Dank für {W}.",
        "review": "Ich habe mir {W} {w} letzten Monat gekauft und",
        "chat": "Kannst du mir etwas über {W} und {W} erzählen?",
    },
    "fr": {
        "biography": "{W} {W}, né en {y} à {W}, est",
        "encyclopedia": "Le {w} {w} est un {w} qui",
        "history": "L’histoire de {w} et de {w} commence",
        "news": "{W}, mardi – Le {w} {w} a annoncé que",
        "chapter": "Chapitre {n}\n\nLe {w} {w}\n\n",
        "story": "Il était une fois un {w} qui",
        "dialogue": "— {W} ? dit le {w}. Je croyais que le {w}",
        "instructions": "Comment {w} un {w}\n\n1. ",
        "question": "Question : Qu’est-ce que le {w} {w} ?\nRéponse :",
        "abstract": "Résumé. Dans cet article, nous étudions le {w} de {w}",
        "letter": "Chère {W},\n\nmerci beaucoup pour {w}.",
        "review": "J’ai acheté ce {w} {w} le mois dernier et",
        "chat": "Peux-tu me parler de {w} et de {w} ?",
    },
    "es": {
        "biography": "{W} {W} ({W}, {y}) es",
        "encyclopedia": "El {w} {w} es un {w} que",
        "history": "La historia de {w} y {w} comenzó",
        "news": "{W}, martes – El {w} {w} anunció que",
        "chapter": "Capítulo {n}\n\nEl {w} {w}\n\n",
        "story": "Érase una vez un {w} que",
        "dialogue": "—¿{W}? —dijo el {w}—. Creía que el {w}",
        "instructions": "Cómo {w} un {w}\n\n1. ",
        "question": "Pregunta: ¿Qué es el {w} {w}?\nRespuesta:",
        "abstract": "Resumen. En este artículo estudiamos el {w} de {w}",
        "letter": "Querida {W}:\n\nMuchas gracias por {w}.",
        "review": "Compré este {w} {w} el mes pasado y",
        "chat": "¿Puedes hablarme de {w} y {w}?",
    },
    "pt": {
        "biography": "{W} {W} ({W}, {y}) é",
        "encyclopedia": "O {w} {w} é um {w} que",
        "history": "A história de {w} e {w} começou",
        "news": "{W}, terça-feira – O {w} {w} anunciou que",
        "chapter": "Capítulo {n}\n\nO {w} {w}\n\n",
        "story": "Era uma vez um {w} que",
        "dialogue": "— {W}? — disse o {w}. — Pensei que o {w}",
        "instructions": "Como {w} um {w}\n\n1. ",
        "question": "Pergunta: O que é o {w} {w}?\nResposta:",
        "abstract": "Resumo. Neste artigo estudamos o {w} de {w}",
        "letter": "Querida {W},\n\nmuito obrigado por {w}.",
        "review": "Comprei este {w} {w} no mês passado e",
        "chat": "Pode me falar sobre {w} e {w}?",
    },
    "ru": {
        "biography": "{W} {W} (род. {y}) —",
        "encyclopedia": "{W} {w} — это {w}, который",
        "history": "История {w} и {w} началась",
        "news": "{W}, вторник — {W} {w} сообщил, что",
        "chapter": "Глава {n}\n\n{W} {w}\n\n",
        "story": "Жил-был {w}, который",
        "dialogue": "— {W}? — сказал {w}. — Я думал, что {w}",
        "instructions": "Как {w} {w}\n\n1. ",
        "question": "Вопрос: Что такое {w} {w}?\nОтвет:",
        "abstract": "Аннотация. В этой статье мы изучаем {w} {w}",
        "letter": "Дорогая {W}!\n\nБольшое спасибо за {w}.",
        "review": "Я купил этот {w} {w} в прошлом месяце и",
        "chat": "Расскажи мне, пожалуйста, о {w} и {w}.",
    },
    "zh": {
        "biography": "{w}{w}（{y}年出生于{w}）是",
        "encyclopedia": "{w}{w}是一种{w}，它",
        "history": "{w}和{w}的历史始于",
        "news": "{w}，星期二——{w}{w}表示，",
        "chapter": "第{n}章\n\n{w}{w}\n\n",
        "story": "从前有一个{w}，",
        "dialogue": "“{w}？”{w}说，“我以为{w}",
        "instructions": "如何{w}{w}\n\n1. ",
        "question": "问：什么是{w}{w}？\n答：",
        "abstract": "摘要：本文研究了{w}的{w}，",
        "letter": "亲爱的{w}：\n\n谢谢你的{w}。",
        "review": "我上个月买了这个{w}{w}，",
        "chat": "你能给我讲讲{w}和{w}吗？",
    },
    "ja": {
        "biography": "{w}{w}（{y}年生まれ）は、",
        "encyclopedia": "{w}{w}とは、{w}の一種で、",
        "history": "{w}と{w}の歴史は、",
        "news": "{w}、火曜日 ― {w}{w}は、",
        "chapter": "第{n}章\n\n{w}{w}\n\n",
        "story": "むかしむかし、あるところに{w}が",
        "dialogue": "「{w}？」と{w}は言った。「{w}だと思っていたのに",
        "instructions": "{w}{w}のやり方\n\n1. ",
        "question": "質問：{w}{w}とは何ですか。\n回答：",
        "abstract": "要旨：本論文では、{w}の{w}を研究し、",
        "letter": "{w}様\n\n{w}をありがとうございました。",
        "review": "先月この{w}{w}を買いました。",
        "chat": "{w}と{w}について教えてください。",
    },
}
#: scripts that the words of a language are written in
SCRIPTS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("en", "de", "fr", "es", "pt"), ("LATIN",)),
    "ru": ("CYRILLIC",),
    "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
}


def kinds_of(chat: bool) -> list[str]:
    """The kinds of text that prompts are made for; turns of a chat only where there is a template for them."""
    kinds = [*ANY_LANGUAGE, *next(iter(LANGUAGES.values()))]
    return [kind for kind in kinds if chat or kind != "chat"]


def fill(kind: str, language: str, words: Words, generator: torch.Generator) -> str:
    """A prompt of a kind, with words drawn anew.

    Args:
        kind: of `kinds_of`.
        language: of `LANGUAGES`.
        words: of the vocabulary.
        generator: of the draws.
    """

    def number(below: int) -> int:
        return int(torch.randint(below, (1,), generator=generator))

    def drawn(match: re.Match[str]) -> str:
        field = match[1]
        if field in "ny":
            return str(1 + number(30)) if field == "n" else str(1800 + number(200))
        known = words.of(SCRIPTS[language])
        word = known[number(len(known))]
        return word[:1].upper() + word[1:] if field == "W" else word

    template = ANY_LANGUAGE.get(kind) or LANGUAGES[language][kind]
    return re.sub(r"\{(\w)\}", drawn, template)
