"""Allocation: which choice to take at each site so that one sum is least while another keeps a
limit, solved exactly as a mixed-integer linear program (`scipy.optimize.milp`, HiGHS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

ROUNDING = 1e-9
"""Of a limit, as a share: a budget given as a quotient comes back a last digit off."""
SOLVER_TOLERANCE = 1e-7


@dataclass(frozen=True, eq=False)
class Costs:
    """What choices cost together: a number for each choice of each unit, and one for each pair of
    choices of two units that meet in a product."""

    units: Sequence[np.ndarray]
    """By unit, float64 ``[choices]``."""
    pairs: Mapping[tuple[int, int], np.ndarray] = field(default_factory=dict)
    """By two units, float64 ``[choices of the first, choices of the second]``."""
    constant: float = 0.0

    def of(self, chosen: Sequence[int]) -> float:
        total = self.constant + sum(float(c[i]) for c, i in zip(self.units, chosen, strict=True))
        return total + sum(float(m[chosen[a], chosen[b]]) for (a, b), m in self.pairs.items())

    @property
    def least(self) -> float:
        """No choice costs less."""
        chosen = allocate(self, self, np.inf)
        assert chosen is not None
        return self.of(chosen)


def allocate(least: Costs, kept: Costs, limit: float) -> list[int] | None:
    """One choice a unit, with ``least`` smallest while ``kept`` is at most ``limit``; None where no
    choice keeps it."""
    slack = ROUNDING * abs(limit)
    chosen = _solve(least, kept, limit)
    step = 2 * SOLVER_TOLERANCE * abs(limit)
    asked = limit
    while chosen is not None and kept.of(chosen) > limit + slack:
        asked, step = asked - step, 2 * step  # the solver keeps limits to a tolerance of its own
        chosen = _solve(least, kept, asked)
    return chosen


def _solve(least: Costs, kept: Costs, limit: float) -> list[int] | None:
    """Pairs are made linear by a variable for each, whose sums over either unit's choices are that
    unit's own variables."""
    sizes = [len(costs) for costs in least.units]
    starts = np.cumsum([0, *sizes])
    pairs = sorted({*least.pairs, *kept.pairs})
    shapes = [(sizes[a], sizes[b]) for a, b in pairs]
    pair_starts = starts[-1] + np.cumsum([0, *(a * b for a, b in shapes)])
    count = int(pair_starts[-1])

    def row_of(costs: Costs) -> np.ndarray:
        row = np.zeros(count)
        row[: starts[-1]] = np.concatenate(costs.units)
        for pair, shape, start in zip(pairs, shapes, pair_starts, strict=False):
            row[start : start + shape[0] * shape[1]] = costs.pairs.get(
                pair, np.zeros(shape)
            ).ravel()
        return row

    rows: list[tuple[list[int], list[float], float]] = []  # columns, values, right side
    for unit, size in enumerate(sizes):
        rows.append((list(range(starts[unit], starts[unit] + size)), [1.0] * size, 1.0))
    for (a, b), (n, m), start in zip(pairs, shapes, pair_starts, strict=False):
        for i in range(n):
            columns = [int(start) + i * m + j for j in range(m)]
            rows.append(([*columns, int(starts[a]) + i], [1.0] * m + [-1.0], 0.0))
        for j in range(m):
            columns = [int(start) + i * m + j for i in range(n)]
            rows.append(([*columns, int(starts[b]) + j], [1.0] * n + [-1.0], 0.0))
    index = np.concatenate([np.full(len(columns), r) for r, (columns, _, _) in enumerate(rows)])
    matrix = coo_array(
        (
            np.concatenate([values for _, values, _ in rows]),
            (index, np.concatenate([columns for columns, _, _ in rows])),
        ),
        shape=(len(rows), count),
    ).tocsr()
    right = np.array([side for _, _, side in rows])
    constraints = [LinearConstraint(matrix, right, right)]
    if np.isfinite(limit):
        keeps = row_of(kept)
        size = max(float(np.abs(keeps).max()), 1e-300)  # the solver's tolerances are absolute
        constraints.append(
            LinearConstraint(keeps[None, :] / size, -np.inf, (limit - kept.constant) / size)
        )
    objective = row_of(least)
    whole = np.zeros(count)
    whole[: starts[-1]] = 1
    found = milp(
        objective / max(float(np.abs(objective).max()), 1e-300),
        integrality=whole,
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    return [
        int(np.argmax(found.x[start : start + size]))
        for start, size in zip(starts, sizes, strict=False)
    ]
