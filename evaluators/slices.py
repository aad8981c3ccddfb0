"""Slices: the parts of a split that a criterion has to hold in one by one."""

from __future__ import annotations

import numpy as np

from evaluators.metric import SLICE, Outcomes


def slices(outcomes: Outcomes, column: str, fewest: int = 1) -> dict[str, np.ndarray]:
    """Which examples have each value of a column, in order of the values; values with fewer
    examples than ``fewest`` are left out."""
    values, which = np.unique(outcomes[SLICE + column], return_inverse=True)
    found = {str(value): np.flatnonzero(which == i) for i, value in enumerate(values)}
    return {value: members for value, members in found.items() if len(members) >= fewest}
