"""How good and how fast a model is."""

from prunus.evaluation.perplexity import perplexity, read_text
from prunus.model.evaluation_mode import evaluation_mode
from prunus.sweep.sequence_loss import PerplexityResult

__all__ = ["PerplexityResult", "evaluation_mode", "perplexity", "read_text"]
