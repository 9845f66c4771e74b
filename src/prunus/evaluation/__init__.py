"""How good and how fast a model is."""

from prunus.evaluation.mode import evaluation_mode
from prunus.evaluation.perplexity import PerplexityResult, perplexity, read_text

__all__ = ["PerplexityResult", "evaluation_mode", "perplexity", "read_text"]
