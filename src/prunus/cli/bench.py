"""`prunus bench`: how fast models are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunus.cli.flags import Flag, ModelName
from prunus.cli.place_flags import NO_PLACE, PlaceFlags, model_options
from prunus.cli.speed_flags import SpeedFlags
from prunus.evaluation.speed_options import SpeedOptions

if TYPE_CHECKING:
    from prunus.evaluation.speed import SpeedReport, SpeedResult, Spread

__all__ = ["bench", "speed_rows"]


def bench(
    *models: ModelName, speed: SpeedFlags = SpeedOptions(), place: PlaceFlags = NO_PLACE, json: Flag = False
) -> None:
    """Measure how fast models are, and what memory they need, on transformers, against the first one.

    All are loaded, and run in turn, A, B, B, A, A, B, …, so that a slow moment of the machine falls on all alike.
    Ratios to the first model are taken within each round. Peak memory is measured afterwards, in a fresh process for
    each model.

    Args:
        models: folders, Hub ids or `smollm2-135m`, the dense model first. One that is named twice shows the noise.
        json: print the result as JSON.
    """
    from prunus.cli.printing import print_json, print_rows
    from prunus.evaluation.speed import bench as bench_models

    report = bench_models(models, speed, model_options(place))
    if json:
        print_json(report.to_dict())
        return
    title = (
        f"{speed.prompt_tokens} + {speed.new_tokens} tokens, batch {speed.batch_size}, median of {speed.repeats} "
        f"(lowest–highest), {report.device}, {report.threads} CPU threads"
    )
    print_rows(title, ("", *(result.model for result in report.results)), speed_rows(report))


def speed_rows(report: SpeedReport) -> list[tuple[str, ...]]:
    """Speed and memory, one column per model."""

    def spread(values: Spread, scale: float = 1.0) -> str:
        return f"{values.median * scale:,.1f} ({values.low * scale:,.1f}–{values.high * scale:,.1f})"

    def ratio(values: Spread) -> str:
        return f"× {values.median:.2f} ({values.low:.2f}–{values.high:.2f})"

    def mebibytes(number: int | None) -> str:
        return "not known" if number is None else f"{number / 2**20:,.1f}"

    def memory(result: SpeedResult) -> dict[str, str]:
        if result.memory is None:
            return {}
        return {
            "peak memory, MiB": mebibytes(result.memory.peak_bytes),
            "… before loading": mebibytes(result.memory.before_bytes),
        }

    columns = [
        {
            "parameters": f"{result.parameters:,}",
            "dtype": result.dtype,
            "prefill, tokens/s": spread(result.prefill_tokens_per_second),
            "against the first": ratio(result.prefill_ratio),
            "decode, tokens/s": spread(result.decode_tokens_per_second),
            "against the first ": ratio(result.decode_ratio),
            "first token, ms": spread(result.first_token_seconds, 1000),
            **memory(result),
            "KV cache, bytes/token": f"{result.kv_cache_bytes_per_token:,}",
            "… of this run, MiB": mebibytes(result.kv_cache_bytes),
            "… of one full context, MiB": mebibytes(result.kv_cache_bytes_full),
        }
        for result in report.results
    ]
    return [(name, *(column[name] for column in columns)) for name in columns[0]]
