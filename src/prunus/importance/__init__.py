"""What each method says a group is worth. A method is a pure function of one layer's statistics and weights.

`METHODS` is the registry; each file of this package registers the method it is named after.
"""

from prunus.importance import (  # noqa: F401 (each registers itself)
    frequency,
    gate_fisher,
    magnitude,
    random,
    reap,
    taylor,
    taylor_2nd,
    wanda,
)
from prunus.importance.registry import (
    COMPOSITES,
    METHODS,
    LayerEvidence,
    Method,
    MethodOptions,
    get_method,
    score_groups,
)

__all__ = ["COMPOSITES", "METHODS", "LayerEvidence", "Method", "MethodOptions", "get_method", "score_groups"]
