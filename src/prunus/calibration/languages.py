"""Which languages a model knows, measured: what the same few sentences cost it in each.

A translation says the same, so a model that knows two languages alike needs about as many nats for both; one that
knows a language badly needs many more, whatever its tokenizer makes of it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

import torch

from prunus.calibration.begin_token import begin_with
from prunus.calibration.prompts import SCRIPTS
from prunus.calibration.words import Words
from prunus.errors import NonFiniteError
from prunus.model.evaluation_mode import evaluation_mode
from prunus.model.families import family_of
from prunus.model.loss import chunked_cross_entropy, head_function, next_token_labels
from prunus.model.modules import submodule
from prunus.model.tokens import check_token_ids, longest_context, token_ids

__all__ = ["SENTENCES", "language_costs", "language_shares"]

SENTENCES: Mapping[str, str] = {
    "en": "Yesterday evening we walked along the river until it grew dark. My sister told me that she has found a new "
    "job in the city and will move there next month with her two children. She asked whether I would help her look for "
    "a flat, and I promised to come on Saturday.",
    "de": "Gestern Abend sind wir am Fluss entlanggegangen, bis es dunkel wurde. Meine Schwester hat mir erzählt, dass "
    "sie eine neue Stelle in der Stadt gefunden hat und nächsten Monat mit ihren zwei Kindern dorthin ziehen wird. Sie "
    "hat gefragt, ob ich ihr bei der Suche nach einer Wohnung helfe, und ich habe versprochen, am Samstag zu kommen.",
    "fr": "Hier soir, nous avons marché le long de la rivière jusqu’à la tombée de la nuit. Ma sœur m’a dit qu’elle a "
    "trouvé un nouveau travail en ville et qu’elle y déménagera le mois prochain avec ses deux enfants. Elle m’a "
    "demandé si je pouvais l’aider à chercher un appartement, et j’ai promis de venir samedi.",
    "es": "Ayer por la tarde caminamos junto al río hasta que se hizo de noche. Mi hermana me contó que ha encontrado "
    "un nuevo trabajo en la ciudad y que se mudará allí el mes que viene con sus dos hijos. Me preguntó si la ayudaría "
    "a buscar un piso, y le prometí ir el sábado.",
    "pt": "Ontem à noite caminhamos ao longo do rio até escurecer. Minha irmã me contou que encontrou um novo emprego "
    "na cidade e que vai se mudar para lá no próximo mês com seus dois filhos. Ela perguntou se eu a ajudaria a "
    "procurar um apartamento, e prometi ir no sábado.",
    "ru": "Вчера вечером мы гуляли вдоль реки, пока не стемнело. Моя сестра рассказала мне, что она нашла новую работу "
    "в городе и переедет туда в следующем месяце со своими двумя детьми. Она спросила, помогу ли я ей найти квартиру, "
    "и я обещал приехать в субботу.",
    "zh": "昨天傍晚，我们沿着河边散步，一直走到天黑。我姐姐告诉我，她在城里找到了一份新工作，下个月会带着两个孩子搬到"
    "那里去。她问我能不能帮她找一套房子，我答应星期六过去。",
    "ja": "昨日の夕方、私たちは暗くなるまで川沿いを歩きました。姉は、町で新しい仕事を見つけたので、"
    "来月二人の子供を連れてそこへ引っ越すと話してくれました。アパートを探すのを手伝ってくれないかと聞かれ、土曜日に行くと約束しました。",
}
#: a language that costs this much more than the cheapest gets half of its share
HALF = 0.1
#: a smaller share is nothing
SMALLEST = 0.05


def language_shares(costs: Mapping[str, float], words: Words) -> dict[str, float]:
    """How much of what a model writes should be in each language.

    Shares halve with every tenth that the sentences cost more than in the cheapest language; the smallest go, and
    languages that the vocabulary has no words of.

    Args:
        costs: from `language_costs`.
        words: of the vocabulary.

    Returns:
        Language → share, in the order of `SENTENCES`; they add up to 1.
    """
    known = {language: cost for language, cost in costs.items() if words.knows(SCRIPTS[language])} or dict(costs)
    least = min(known.values()) or 1.0
    shares = {language: 0.5 ** ((cost / least - 1) / HALF) for language, cost in known.items()}
    total = sum(shares.values())
    shares = {language: share for language, share in shares.items() if share / total >= SMALLEST}
    total = sum(shares.values())
    return {language: share / total for language, share in shares.items()}


@torch.no_grad()
def language_costs(model: Any, tokenizer: Any, begin: int | None = None) -> dict[str, float]:
    """Nats that the sentences of each language cost a model.

    Only of languages whose letters the tokenizer writes: where it leaves them out, or has one token for all, a sentence
    costs next to nothing. English is there in any case.

    Args:
        model: a causal language model, in memory or opened.
        tokenizer: its tokenizer.
        begin: token that sentences begin with.

    Raises:
        OptionError: the tokenizer makes tokens that the model does not embed.
        NonFiniteError: a loss is NaN or infinite.
    """
    each = dict(zip(SENTENCES, token_ids(tokenizer, list(SENTENCES.values())), strict=True))
    written = [name for name, ids in each.items() if _letters(tokenizer.decode(ids)) == _letters(SENTENCES[name])]
    written = written or ["en"]
    encoded = [begin_with(begin, each[name][None])[0][: longest_context(model.config)] for name in written]
    if not (length := max(map(len, encoded))):
        return dict.fromkeys(written, 0.0)
    ids = torch.zeros(len(encoded), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    decoder = submodule(model, family_of(model.config).layers.rpartition(".")[0])
    check_token_ids(model.config, ids)
    device = model.device
    with evaluation_mode(model):
        hidden = decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        losses = chunked_cross_entropy(hidden, head_function(model), next_token_labels(ids, mask).to(device))
    if not losses.isfinite().all():
        raise NonFiniteError("the model's loss is not finite: check its weights for NaN")
    return dict(zip(written, losses.tolist(), strict=True))


def _letters(text: str) -> str:
    return "".join(filter(str.isalpha, unicodedata.normalize("NFKC", text).casefold()))
