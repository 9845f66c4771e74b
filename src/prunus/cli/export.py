"""`prunus export`: the same model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from prunus.cli.flags import Flag, ModelName
from prunus.errors import OptionError

__all__ = ["export"]

_GGUF = Group("GGUF", sort_key=7)


def export(
    model: ModelName,
    /,
    *,
    to: Literal["gguf", "dense"],
    out: Path,
    type: Annotated[Literal["f32", "f16", "bf16", "q8_0"], Parameter(group=_GGUF)] = "f16",
    mlp_multiple: Annotated[int, Parameter(group=_GGUF)] = 1,
    max_memory: str | None = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Write a pruned model in a form that other programs load.

    `gguf` is one file for llama.cpp, Ollama, LM Studio and others; needs the package gguf. `dense` is a
    model folder of a stock class, its layers filled up with zeros to the width of the widest, for loaders that need
    equal layers.

    Args:
        model: folder, Hub id or `smollm2-135m`, pruned or not.
        to: the form.
        out: the file (gguf) or folder (dense) to write; it appears when it is complete.
        type: of the matrices: f32, f16, bf16 or q8_0; norms and biases are f32 in each.
        mlp_multiple: fill MLP widths up to multiples of this with zeros, 256 for llama.cpp's K-quants.
        max_memory: memory that may be used, e.g. 8GB. Models estimated to need more are rejected, naming the smallest
            sufficient limit.
        overwrite: replace an earlier result.
        json: print what was written as JSON.
    """
    from prunus.cli.printing import print_json, print_rows, short

    if to == "gguf":
        from prunus.export import export_gguf

        facts = export_gguf(
            model, out, type=type, mlp_multiple=mlp_multiple, max_memory=max_memory, overwrite=overwrite
        )
    else:
        from prunus.export import export_dense

        for name, typed in (("type", type != "f16"), ("mlp_multiple", mlp_multiple != 1)):
            if typed:
                raise OptionError(f"`{name}` is one of GGUF files, and not of a folder; leave it out, or say `to=gguf`")
        facts = export_dense(model, out, max_memory=max_memory, overwrite=overwrite)
    if json:
        print_json(facts)
        return
    rows = [(name, short(value)) for name, value in facts.items() if not isinstance(value, list)]
    print_rows(f"{model} → {out}", ("", ""), rows)
