"""`prunus profile`: how long blocks take by their width."""

from __future__ import annotations

from pathlib import Path

from prunus.cli.flags import Flag, ModelName
from prunus.cli.place_flags import NO_KIND, KindFlags, model_options
from prunus.cli.speed_flags import ProfileFlags, ProfileRuns

__all__ = ["profile"]


def profile(
    model: ModelName,
    /,
    *,
    out: Path = Path("profile.json"),
    speed: ProfileFlags = ProfileRuns(),
    place: KindFlags = NO_KIND,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Measure on this machine how long a model's blocks take by their width, for `--target latency`.

    One model with random weights contains blocks of all widths, and runs as in `prunus bench`; give it the prompt
    length, batch size, device and dtype that will be used.

    Args:
        model: folder, Hub id or `smollm2-135m`; its weights are not read.
        out: the profile file to write.
        overwrite: replace an existing file.
        json: print the profile as JSON.
    """
    from prunus.cli.printing import print_json, print_rows, typed_command
    from prunus.evaluation.profiling import profile as profile_model
    from prunus.files.outputs import check_output_file, claimed, output_file
    from prunus.model.families import AXES
    from prunus.selection.latency_profile import MARK, PHASES, LatencyProfile

    asked = "profile", model, speed, place, overwrite
    with claimed(out, is_file=True, run=asked, command=typed_command()) as claim:
        if claim.finished:
            measured = LatencyProfile.load(claim.path)
        else:
            check_output_file(out, "profile.json", MARK, overwrite)
            measured = profile_model(model, speed, model_options(place))
            with output_file(out, "profile.json", MARK, overwrite=overwrite) as partial:
                partial.write_text(measured.to_json(), encoding="utf-8")
    if json:
        print_json(measured.to_dict())
        return
    rows = [("all else", "", *(f"{1e6 * measured.times(phase).fixed:,.1f}" for phase in PHASES))]
    for axis in AXES:
        for points in zip(*(measured.times(phase).points(axis) for phase in PHASES), strict=True):
            rows.append((axis, f"{points[0][0]:,}", *(f"{1e6 * seconds:,.1f}" for _, seconds in points)))
    title = (
        f"microseconds: {speed.prompt_tokens} prompt tokens, and each of {speed.new_tokens} after them, batch "
        f"{speed.batch_size}, {measured.dtype}, {measured.device}, {measured.threads} CPU threads → {out}"
    )
    print_rows(title, ("", "groups", *PHASES), rows)
