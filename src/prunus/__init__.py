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

from prunus import errors
from prunus.calibration import Calibration, calibration_from_texts, calibration_from_tokens, load_calibration
from prunus.calibration.self_text import text_for_repair
from prunus.checkpoint import load_model, open_model, save_checkpoint
from prunus.errors import PrunusError
from prunus.evaluation.perplexity import PerplexityResult, perplexity, perplexity_of_windows
from prunus.evaluation.profiling import profile
from prunus.export import export_dense, export_gguf
from prunus.importance import METHODS, MethodOptions
from prunus.model.geometry import Geometry
from prunus.pipeline.compare import compare
from prunus.pipeline.inputs import CalibrationOptions, EvaluationOptions, ModelOptions
from prunus.pipeline.job import Job, OutputOptions
from prunus.pipeline.prune import PruneResult, apply_checkpoint, prune, prune_checkpoint, prune_job
from prunus.pipeline.recipe import Recipe
from prunus.repair.block_repair import RepairOptions, repair_
from prunus.scoring.score import Score, ScoringOptions, score
from prunus.selection.latency_profile import LatencyProfile
from prunus.selection.plan import Plan
from prunus.selection.select import Constraints, select
from prunus.selection.targets import TargetOptions
from prunus.surgery import apply_plan
from prunus.version import __version__

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
    "text_for_repair",
]
