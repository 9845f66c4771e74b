"""What `--dry-run` prints."""

from __future__ import annotations

from prunus.cli.printing import print_json, print_rows
from prunus.cli.terminal import say
from prunus.machine.stages import show_seconds
from prunus.pipeline.forecast import Forecast

__all__ = ["show_forecast"]


def show_forecast(forecast: Forecast, json: bool) -> None:
    """What a job would remove, and what it would take, on stdout."""
    if json:
        print_json(forecast.to_dict())
        return
    for line in forecast.lines()[:-1]:
        say(line)
    for removal in forecast.removals:
        say(f"these options allow at most {removal.most / removal.before if removal.before else 0:.1%}")
    stages = [(name, show_seconds(seconds)) for name, seconds in forecast.stages.items()]
    print_rows("time, by a short measurement", ("stage", "about"), [*stages, ("all", show_seconds(forecast.seconds))])
