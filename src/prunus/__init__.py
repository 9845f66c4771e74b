"""prunus makes Hugging Face language models smaller by global structured pruning.

>>> import prunus, transformers
>>> model = transformers.AutoModelForCausalLM.from_pretrained(folder)
>>> tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
>>> calibration = prunus.load_calibration("c4-sample.jsonl", tokenizer, samples=128, seq_len=512)
>>> result = prunus.prune(model, 0.2, calibration)
>>> result.model.generate(...)

Importing prunus registers its checkpoints' classes with transformers: `AutoModelForCausalLM.from_pretrained` then loads
a pruned folder without further flags.
"""

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from prunus import errors
from prunus.version import __version__

if TYPE_CHECKING:
    from prunus.calibration import (
        Calibration,
        Reading,
        calibration_from_texts,
        calibration_from_tokens,
        load_calibration,
    )
    from prunus.checkpoint import load_model, open_model, save_checkpoint
    from prunus.errors import PrunusError
    from prunus.evaluation.perplexity import perplexity
    from prunus.evaluation.profiling import profile
    from prunus.export import export_dense, export_gguf
    from prunus.importance import METHODS, MethodOptions
    from prunus.model.geometry import Geometry
    from prunus.pipeline.apply import apply_checkpoint
    from prunus.pipeline.compare import compare
    from prunus.pipeline.job import Job, OutputOptions
    from prunus.pipeline.options import CalibrationOptions, EvaluationOptions
    from prunus.pipeline.prune import PruneResult, prune, prune_checkpoint, prune_job
    from prunus.pipeline.recipe import Recipe
    from prunus.repair.block_repair import RepairOptions, repair_
    from prunus.scoring.score import Score, ScoringOptions, score
    from prunus.selection.latency_profile import LatencyProfile
    from prunus.selection.plan import Plan
    from prunus.selection.select import Constraints, select
    from prunus.selection.targets import TargetOptions
    from prunus.surgery import apply_plan
    from prunus.sweep.engine import ModelOptions
    from prunus.sweep.sequence_loss import PerplexityResult, perplexity_of_windows

__all__ = [
    "METHODS",
    "Calibration",
    "CalibrationOptions",
    "Constraints",
    "EvaluationOptions",
    "Geometry",
    "Job",
    "LatencyProfile",
    "MethodOptions",
    "ModelOptions",
    "OutputOptions",
    "PerplexityResult",
    "Plan",
    "PruneResult",
    "PrunusError",
    "Reading",
    "Recipe",
    "RepairOptions",
    "Score",
    "ScoringOptions",
    "TargetOptions",
    "__version__",
    "apply_checkpoint",
    "apply_plan",
    "calibration_from_texts",
    "calibration_from_tokens",
    "compare",
    "errors",
    "export_dense",
    "export_gguf",
    "load_calibration",
    "load_model",
    "open_model",
    "perplexity",
    "perplexity_of_windows",
    "profile",
    "prune",
    "prune_checkpoint",
    "prune_job",
    "repair_",
    "save_checkpoint",
    "score",
    "select",
]

#: module → what comes from there, when it is first asked for: a command's --help needs none of them
_HOMES = {
    "prunus.calibration": (
        "Calibration",
        "Reading",
        "calibration_from_texts",
        "calibration_from_tokens",
        "load_calibration",
    ),
    "prunus.checkpoint": (
        "load_model",
        "open_model",
        "save_checkpoint",
    ),
    "prunus.errors": ("PrunusError",),
    "prunus.evaluation.perplexity": ("perplexity",),
    "prunus.evaluation.profiling": ("profile",),
    "prunus.export": (
        "export_dense",
        "export_gguf",
    ),
    "prunus.importance": (
        "METHODS",
        "MethodOptions",
    ),
    "prunus.model.geometry": ("Geometry",),
    "prunus.pipeline.apply": ("apply_checkpoint",),
    "prunus.pipeline.compare": ("compare",),
    "prunus.pipeline.options": (
        "CalibrationOptions",
        "EvaluationOptions",
    ),
    "prunus.pipeline.job": (
        "Job",
        "OutputOptions",
    ),
    "prunus.pipeline.prune": (
        "PruneResult",
        "prune",
        "prune_checkpoint",
        "prune_job",
    ),
    "prunus.pipeline.recipe": ("Recipe",),
    "prunus.repair.block_repair": (
        "RepairOptions",
        "repair_",
    ),
    "prunus.scoring.score": (
        "Score",
        "ScoringOptions",
        "score",
    ),
    "prunus.selection.latency_profile": ("LatencyProfile",),
    "prunus.selection.plan": ("Plan",),
    "prunus.selection.select": (
        "Constraints",
        "select",
    ),
    "prunus.selection.targets": ("TargetOptions",),
    "prunus.surgery": ("apply_plan",),
    "prunus.sweep.engine": ("ModelOptions",),
    "prunus.sweep.sequence_loss": (
        "PerplexityResult",
        "perplexity_of_windows",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_the_command() -> bool:
    """Whether this process is `prunus` or `python -m prunus`, which imports what the typed command needs."""
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":
        return sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["prunus"]
    return PurePath(started).stem == "prunus"


if not _is_the_command():
    import_module("prunus.auto_classes").register_when_asked()
