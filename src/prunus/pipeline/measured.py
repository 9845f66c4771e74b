"""What settings were measured to do: shown in docs/recipe.md and by `prunus recipe`, beside their meaning.

Perplexity of SmolLM2-135M, as multiples of the dense model's, with 128 sequences of 512 tokens of C4 unless something
else is said. The tables that the figures are from, with commands and machines, are in benchmarks/RESULTS.md and
benchmarks/LOG.md.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["MEASURED"]

#: key → effect
MEASURED: Mapping[str, str] = {
    "rounds": "WikiText-2, 20 and 40 % removed: two rounds 1.71 and 3.50, three 1.71 and 3.58, one 1.69 and 3.69.",
    "scoring.method": (
        "WikiText-2, 40 % removed, one round, repaired: gate_fisher 3.69, adaptive 3.98, hybrid of gate_fisher and "
        "taylor 4.00, taylor_2nd 4.56, taylor 4.58, wanda with layer_sum 11.0, random 24.1, magnitude 36.9."
    ),
    "scoring.hessian": (
        "WikiText-2, 40 % removed, repaired: taylor_2nd 4.56, with empirical_fisher 4.10, with sampled_fisher 4.11; "
        "gate_fisher 3.69, with sampled_fisher 4.44."
    ),
    "scoring.normalize": "WikiText-2, 40 % removed, repaired: wanda 11.0 with layer_sum, 238 with none.",
    "scoring.attention_weight": (
        "held-out C4, 40 % removed, repaired on 64 sequences: 3.27 with 1, 3.04 with 1.5, 3.07 with 2, 4.41 with 0.5; "
        "at 20 % no difference."
    ),
    "scoring.noise": (
        "40 % removed, half of the sequences from `self`: the geometric mean over six kinds of text is 4 % lower than "
        "without."
    ),
    "repair.damping": "held-out C4, 40 % removed: 2.76 with 0.03, 2.68 with 0.1, 2.70 with 0.3.",
    "repair.residual": "held-out C4, 40 % removed: 2.67 with 0.7, 2.68 with 1.",
    "repair.noise": (
        "40 % removed, half of the sequences from `self`: the geometric mean over six kinds of text is 6 % lower than "
        "without."
    ),
    "repair.fit_logits": "40 % removed, three rounds: held-out C4 2.75 without, 2.66 with.",
    "repair.experts": (
        "perplexity of a small mixture of 16 experts, half of them removed by gate_fisher: 71.3 with least_squares, "
        "73.4 with none; 68.6 before."
    ),
    "calibration.source": (
        "40 % removed, 48 sequences of 256 tokens, geometric mean of six kinds of text: C4 alone 5.32, with `self` for "
        "half of the sequences 4.64, `self` and the manual of Python 4.62, the manual alone 5.18."
    ),
}
