"""`prunus recipe`: a recipe, or what every setting means."""

from __future__ import annotations

from prunus.cli.flags import Flag

__all__ = ["recipe"]


def recipe(name: str | None = None, /, *, json: Flag = False) -> None:
    """List every setting with its meaning and default, or write a recipe out.

    Args:
        name: default, original, fast, or a YAML file: print it with all its settings, ready to be edited and given to
            `prunus prune --recipe`.
        json: print the settings as JSON.
    """
    from prunus.cli.printing import print_json
    from prunus.pipeline.job_file import job_keys, job_text, read_job

    if name is not None:
        print(job_text(read_job(name, (), {})), end="")
    elif json:
        print_json(
            [
                {"key": key.path, "default": key.shown_default, "allowed": key.allowed, "meaning": key.meaning}
                for key in job_keys().values()
            ]
        )
    else:
        for key in job_keys().values():
            print(f"{key.path} = {key.shown_default}\n    {key.meaning} ({key.allowed})")
