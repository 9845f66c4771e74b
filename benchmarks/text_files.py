r"""Text of three kinds of work as JSON lines for `kinds.py`, from public sources.

    apt-get download python3.11-doc && dpkg -x python3.11-doc_*.deb python-doc
    git clone https://github.com/bernai/pytorch-rnn-lm
    git clone https://github.com/Marugannwg/ShareGPT92k_user_linguistic_mining sharegpt
    python benchmarks/text_files.py docs python-doc/usr/share/doc/python3.11/html/_sources docs.jsonl
    python benchmarks/text_files.py stories pytorch-rnn-lm/27200.txt stories.jsonl
    python benchmarks/text_files.py chat sharegpt/sampled_enriched_data chat.jsonl

docs: pages of Python's documentation; stories: Andersen's fairy tales, Project Gutenberg 27200, one tale a line; chat:
conversations of ShareGPT whose turns are all English, in the column `conversations`. The documents of each are shuffled
with a fixed seed, so that the last fifth, which `kinds.py` holds out, is like the rest.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: a tale's last line and the next one's title are this many line ends apart; scenes of one tale are closer
BETWEEN_TALES = re.compile(r"\n{5,}")


def docs(folder: Path) -> Iterator[dict[str, Any]]:
    """Every page, without the lists of changes and of legal texts."""
    for path in sorted(folder.rglob("*.rst.txt")):
        if not {"whatsnew", "license.rst.txt", "copyright.rst.txt"} & set(path.relative_to(folder).parts):
            yield {"text": path.read_text(encoding="utf-8")}


def stories(file: Path) -> Iterator[dict[str, Any]]:
    """Every tale, its paragraphs as one line each: the file breaks lines after 70 letters."""
    for tale in BETWEEN_TALES.split(file.read_text(encoding="utf-8")):
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n{2,}", tale)]
        if len(text := "\n\n".join(filter(None, paragraphs))) > 1000:  # titles and the table of contents are shorter
            yield {"text": text}


def chat(folder: Path) -> Iterator[dict[str, Any]]:
    """Every conversation in which each turn is English, as roles and contents."""
    roles = {"human": "user", "gpt": "assistant"}
    for path in sorted(folder.glob("*.json")):
        said = json.loads(path.read_text(encoding="utf-8")).get("conversations", [])  # other files lie there too
        turns = [{"role": roles.get(turn["from"]), "content": turn["value"].strip()} for turn in said]
        alternate = [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        english = all(turn.get("language", "en") == "en" and turn["value"].isascii() for turn in said)
        if turns and alternate and english and all(turn["content"] for turn in turns):
            yield {"conversations": turns}


KINDS = {"docs": docs, "stories": stories, "chat": chat}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("source", type=Path, help="folder, of stories the file")
    parser.add_argument("out", type=Path, help="the .jsonl file to write")
    options = parser.parse_args()
    rows = list(KINDS[options.kind](options.source))
    if not rows:
        raise SystemExit(f"{options.source}: no text of the kind {options.kind}")
    random.Random(0).shuffle(rows)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    options.out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(rows)} documents, {sum(map(len, lines)) / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
