"""How good and how fast a model is."""

from prunus.evaluation.perplexity import PerplexityResult, perplexity, read_text

__all__ = ["PerplexityResult", "perplexity", "read_text"]
