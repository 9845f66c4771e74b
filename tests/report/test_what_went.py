"""Card and report say of a cut what it did: which kinds of group went, which layers, and how they were chosen."""

from __future__ import annotations

import pytest

from prunus.model.widths import LayerWidths
from prunus.results.what_went import how_chosen, what_went

DENSE = (LayerWidths(4, 100), LayerWidths(4, 100), LayerWidths(4, 100))
MIXTURE = (LayerWidths(4, 100), LayerWidths(4, 0, 8), LayerWidths(4, 0, 8))
GROUPS = "attention groups (a key/value head with the query heads that read it)"


@pytest.mark.parametrize(
    ("before", "after", "what", "how"),
    [
        (DENSE, ((3, 90), (4, 100), (2, 10)), f"whole {GROUPS} and MLP channels", "one ranking"),
        (DENSE, ((3, 90), (3, 90), (3, 90)), f"whole {GROUPS} and MLP channels", "in every layer"),
        (DENSE, ((4, 90), (4, 80), (4, 100)), "whole MLP channels", "one ranking"),
        (DENSE, ((3, 100), (0, 100), (4, 100)), f"whole {GROUPS}", "one ranking"),
        (DENSE, ((4, 100), (0, 0), (4, 100)), "whole decoder layers", "those of least importance"),
        (DENSE, ((3, 90), (0, 0), (4, 100)), f"whole {GROUPS}, MLP channels and decoder layers", "one ranking"),
        (DENSE, ((4, 100), (4, 100), (4, 100)), "nothing", "those of least importance"),
        (MIXTURE, ((4, 100), (4, 0, 6), (4, 0, 6)), "whole experts", "in every layer"),
        (MIXTURE, ((4, 100), (0, 0, 0), (4, 0, 8)), "whole decoder layers", "those of least importance"),
    ],
)
def test_what_went_and_how_it_was_chosen(before, after, what, how):
    after = [LayerWidths(*widths) for widths in after]
    assert what_went(before, after) == what
    assert how in how_chosen(before, after, by_scores=True)
    assert how_chosen(before, after, by_scores=False) == "as a given plan says"
