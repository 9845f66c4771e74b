"""The command line: a file per command, each a few calls of the package."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from prunus.cli.apply import apply
from prunus.cli.bench import bench
from prunus.cli.compare import compare
from prunus.cli.evaluate import evaluate
from prunus.cli.export import export
from prunus.cli.flags import whole_numbers
from prunus.cli.inspect import inspect
from prunus.cli.plan import plan
from prunus.cli.profile import profile
from prunus.cli.prune import prune
from prunus.cli.recipe import recipe
from prunus.cli.recover import recover
from prunus.cli.report import report
from prunus.cli.score import score
from prunus.cli.terminal import run_command
from prunus.errors import OptionError
from prunus.machine.processes import launched
from prunus.option_values import check_utf8
from prunus.version import __version__

__all__ = ["app", "main"]

HELP = """Make Hugging Face language models smaller by global structured pruning.

Every attention group (a key/value head with its query heads) and every MLP channel of the whole model goes into one
ranking by importance per parameter; the cheapest are cut until a share of all parameters is gone.

MODEL is a folder, a Hub id, or `smollm2-135m` for the packaged SmolLM2-135M-Instruct.
"""

# main() answers Ctrl-C itself.
app = App(
    name="prunus",
    help=HELP,
    version=__version__,
    help_format="markdown",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(converter=whole_numbers),
)
for command in (prune, score, plan, apply, recover, export, report, bench, profile, inspect, compare, recipe):
    app.command(command)
app.command(evaluate, name="eval")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 success, 1 an error that the message explains, 2 wrong usage, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    def work() -> object:
        for word in words:
            check_utf8("an argument", word)  # results say what was typed
        if launched() > 1 and words[:1] not in (["score"], ["recover"]):
            raise OptionError(
                f"torchrun started {launched()} processes, and only `prunus score` shares its work out (and `prunus "
                "recover`): give its table to `prunus plan` and `prunus apply`, in one process"
            )
        return app(words, exit_on_error=False, print_error=True, result_action="return_value")

    try:
        return run_command(work)
    except CycloptsError:
        return 2
