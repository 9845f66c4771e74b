"""The command line: a file per command, each a few calls of the package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache

from cyclopts import App, CycloptsError, Parameter

from prunus.cli.job_flags import SPELLING
from prunus.cli.terminal import quiet_transformers, run_command, show_error
from prunus.cli.usage import flags_of, shown_default, usage_message
from prunus.cli.values import WrongUsage, check_values
from prunus.errors import OptionError
from prunus.machine.threads import share_cores
from prunus.option_values import check_utf8
from prunus.version import __version__

__all__ = ["app", "main"]

HELP = """Make Hugging Face language models smaller by global structured pruning.

Every attention group (a key/value head with its query heads) and every MLP channel of the whole model goes into one
ranking by importance per parameter; the cheapest are cut until a share of all parameters is gone.

MODEL is a folder, a Hub id, or `smollm2-135m` for the packaged SmolLM2-135M-Instruct.
"""

#: command → its module and function, and its line in the list of commands. A command is imported when it is typed, so
#: that the others cost nothing.
COMMANDS = {
    "prune": (
        "prune:prune",
        "Prune a model and save the smaller one: score, select, cut, repair and measure in one go.",
    ),
    "score": ("score:score", "Score every group of a model: writes groups.csv and what it was made from."),
    "plan": ("plan:plan", "Choose what to cut from a table of scores; needs no model."),
    "apply": ("apply:apply", "Cut a model by a plan and save the result; nothing is measured."),
    "recover": (
        "recover:recover",
        "Train a pruned model to recover part of the lost quality; needs the packages peft and accelerate.",
    ),
    "export": ("export:export", "Write a pruned model in a form that other programs load."),
    "report": ("report:report", "Write one self-contained HTML page about a result of `prune`, `apply` or `compare`."),
    "bench": (
        "bench:bench",
        "Measure how fast models are, and what memory they need, on transformers, against the first one.",
    ),
    "profile": (
        "profile:profile",
        "Measure on this machine how long a model's blocks take by their width, for `--target latency`.",
    ),
    "inspect": (
        "inspect:inspect",
        "Show what a model consists of, what a ratio would remove, what was removed from a pruned one, or one group.",
    ),
    "compare": (
        "compare:compare",
        "Prune by several recipes at several ratios and measure each: a table and a report.",
    ),
    "recipe": ("recipe:recipe", "List every setting with its meaning and default, or write a recipe out."),
    "eval": (
        "evaluate:evaluate",
        "Measure a model, pruned or not: perplexity, zero-shot accuracy, speed and memory, and sample text.",
    ),
}

# main() answers Ctrl-C itself.
app = App(
    name="prunus",
    help=HELP,
    version=__version__,
    help_format="markdown",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(show_default=shown_default),
    config=check_values,
)
for name, (path, summary) in COMMANDS.items():
    app.command(f"prunus.cli.{path}", name=name, help=summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 success, 1 an error that the message explains, 2 wrong usage, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    share_cores()

    def work() -> object:
        for word in words:
            check_utf8("an argument", word)  # results say what was typed
        check_command(words)
        try:
            command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
            if command.__module__.startswith("prunus."):  # not --help or --version
                check_processes(words)
                quiet_transformers()
            return command(*bound.args, **bound.kwargs)
        except WrongUsage as error:
            raise CycloptsError(msg=str(error), command_chain=tuple(words[:1])) from error

    try:
        return run_command(work, cache(lambda: flags_of(app, words)))
    except CycloptsError as error:
        show_error(usage_message(error))
        return 2


def check_command(words: Sequence[str]) -> None:
    """Raise for a command that there is not; import the one that was typed."""
    if not words or words[0] in (*app.help_flags, *app.version_flags):
        return
    if words[0] in COMMANDS:
        command = app[words[0]]
        command.help = None  # by itself it explains itself in full, by its docstring
        command.help_epilogue = more_options(command)
        return
    close = get_close_matches(words[0], COMMANDS, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"There are {', '.join(COMMANDS)}."
    raise CycloptsError(msg=f"prunus has no command {words[0]!r}. {hint}")


def more_options(command: App) -> str:
    """The options that a command's help does not list, but for other spellings of those that it does."""
    arguments = command.assemble_argument_collection()
    hidden = [each for each in arguments if not each.show and each.parameter.parse is not False]
    names = [each.name for each in hidden if each.name.startswith("--") and each.parameter.help != SPELLING.help]
    return f"Also accepted: {', '.join(names)}." if names else ""


def check_processes(words: Sequence[str]) -> None:
    """Raise where torchrun started many processes of a command that is for one."""
    from prunus.machine.processes import launched

    if launched() > 1 and words[:1] not in (["score"], ["recover"]):
        raise OptionError(
            f"torchrun started {launched()} processes, and only `prunus score` shares its work out (and `prunus "
            "recover`): give its table to `prunus plan` and `prunus apply`, in one process"
        )
