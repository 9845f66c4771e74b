"""What `prunus eval` measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunus.errors import OptionError
from prunus.option_values import check_utf8, check_whole

__all__ = ["EvalOptions"]


@dataclass(frozen=True)
class EvalOptions:
    """What is measured.

    Attributes:
        text: UTF-8 text files for perplexity, each read as one string. Where nothing at all is asked for, perplexity is
            measured on the text that ships with Python.
        seq_len: tokens per window of a text; windows do not overlap. By default 2048, or as many as the model has
            positions for if those are fewer.
        windows: at most this many windows of each text.
        begin_token: where the tokenizer puts a token before every text, as for Llama 3 and Gemma, begin each window
            with it. GPTQ and the tools after it do not.
        tasks: zero-shot tasks: JSON-lines files named after a task, as in arc_easy_test.jsonl, or folders of them.
        items: at most this many items of each task, also of the harness's tasks.
        harness: tasks by lm-evaluation-harness itself; needs the package lm-eval.
        harness_path: folders of task files (YAML) for the harness, besides its own.
        generate: continue a few prompts greedily.
        prompt: prompts to continue instead.
        speed: measure speed and memory, as `prunus bench` does.
    """

    text: tuple[str, ...] = ()
    seq_len: int | None = None
    windows: int | None = None
    begin_token: bool = True
    tasks: tuple[str, ...] = ()
    items: int | None = None
    harness: tuple[str, ...] = ()
    harness_path: tuple[str, ...] = ()
    generate: bool = False
    prompt: tuple[str, ...] = ()
    speed: bool = False

    def __post_init__(self) -> None:
        for name in ("windows", "items"):
            if (value := getattr(self, name)) is not None:
                check_whole(f"evaluation.{name}", value, why=f"leave it out for all {name}")
        if self.seq_len is not None:
            why = "a window needs at least 2 tokens to predict one"
            check_whole("evaluation.seq_len", self.seq_len, smallest=2, why=why)
        for path in self.text:
            check_utf8("evaluation.text", str(path))
        names = [Path(path).name for path in self.text]
        if twice := {name for name in names if names.count(name) > 1}:
            raise OptionError(f"two texts are called {min(twice)}, and results go by the file's name; rename one")

    @property
    def measures_text_of_python(self) -> bool:
        """Whether nothing at all is asked for."""
        return not (self.text or self.tasks or self.harness or self.prompt or self.generate or self.speed)
