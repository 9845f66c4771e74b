"""What `prunus prune` prints of a result."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.checkpoint.block_formats import format_in
from prunus.cli.printing import parameter_rows, print_rows
from prunus.cli.terminal import say
from prunus.errors import CheckpointError
from prunus.machine.stages import show_seconds
from prunus.recovery.teacher import find_teacher

__all__ = ["show_result"]


def show_result(metrics: Mapping[str, Any], out: Path, model: str) -> None:
    """Sizes and perplexity before and after, what each stage took, and what people do next, on stdout.

    Args:
        metrics: as they are in prunus/metrics.json.
        out: the result's folder.
        model: what it was made from, as it was typed.
    """
    print_rows(
        f"{metrics['base_model']} → {out}",
        ("", "before", "after"),
        [
            *parameter_rows(metrics),
            *_target_row(metrics["target"]),
            ("removed", f"{metrics['ratio']:.1%} asked", f"{metrics['achieved_ratio']:.1%}"),
            *_perplexity_row(metrics),
        ],
    )
    print_rows("time and peak memory", ("stage", "", "MiB"), _stage_rows(metrics.get("stages", ())))
    report = out / "report.html"
    if report.is_file():
        say(f"report: {report}")
    if format_in(out) is not None:
        return  # what is stored in blocks is neither trained nor exported
    following = [_recovering(out, model), ["prunus", "export", str(out), "--to", "gguf", "--out", f"{out}.gguf"]]
    say("next: " + "\n  or: ".join(map(shlex.join, following)))


def _recovering(out: Path, model: str) -> list[str]:
    """The command that trains a result; it finds the dense model, or is told where that is."""
    words = ["prunus", "recover", str(out), "--text", "FILE", "--out", f"{out}-recovered"]
    try:
        find_teacher(out)
    except CheckpointError:
        words += ["--teacher", model]
    return words


def _stage_rows(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    return [
        (
            stage["stage"],
            show_seconds(stage["seconds"]),
            "" if stage["peak_bytes"] is None else f"{stage['peak_bytes'] / 2**20:,.0f}",
        )
        for stage in stages
    ]


def _target_row(target: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if target["target"] == "params":
        return []
    return [(target["quantity"], f"{target['before']:,.0f}", f"{target['after']:,.0f}")]


def _perplexity_row(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if metrics["perplexity_after"] is None:
        return []
    before, after = metrics["perplexity_before"], metrics["perplexity_after"]
    rows = [(f"perplexity, {metrics['perplexity_text']}", before, after)]
    rows += [(f"  {each['source']}", each["before"], each["after"]) for each in metrics.get("perplexity_by_source", ())]
    return [(name, f"{before:.2f}", f"{after:.2f} ({after / before:.2f} ×)") for name, before, after in rows]
