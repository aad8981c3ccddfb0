"""Power: whether a margin can be decided with so many examples, said before anything is run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from evaluators.contrast import ALONE, RELATIVE, Contrast
from evaluators.criterion import Criterion
from evaluators.metric import Metric
from evaluators.paired import Binary, EachGroup, Pairs, decisive

POWER = 0.9
"""With which a cell as good as the reference shall be accepted."""
FLIPS = (0.01, 0.02, 0.05)
"""Shares of examples on which cell and reference may differ, one way or the other."""


@dataclass(frozen=True)
class Outlook:
    """What one criterion can decide with the examples at hand."""

    criterion: Criterion
    examples: int
    """Of the smallest slice, where it is taken in slices."""
    level: float
    """What Holm's correction leaves of the error level in the worst case."""
    decidable: bool
    """Whether a cell as good as the reference could be accepted at all; where the differences are
    of unknown size, whether examples enough for any are there."""
    text: str

    def to_json(self) -> dict[str, object]:
        return {
            "criterion": self.criterion.to_json(),
            "examples": self.examples,
            "level": self.level,
            "decidable": self.decidable,
            "text": self.text,
        }


def outlook(
    rule: Criterion,
    metric: Metric,
    examples: int,
    cells: float,
    *,
    smallest: int | None = None,
    clustered: bool = False,
) -> Outlook:
    """Of one criterion.

    Args:
        examples: that will be there; clusters, where they come in such.
        cells: how many verdicts are corrected for together.
        smallest: examples in the smallest slice or class that has to pass by itself.
    """
    n, level = smallest or examples, rule.level / cells
    contrast = metric.contrast(rule.kind, rule.margin)
    part = f"the smallest slice by {rule.slice}" if rule.slice else "the rarest class"
    have = f"{n:,} {'clusters' if clustered else 'examples'}" + (f" in {part}" if smallest else "")
    if clustered or not isinstance(metric.test, Binary | EachGroup):
        return Outlook(rule, n, level, True, f"{have} {_spread_text(rule, n, level)}")
    least = decisive(lambda factor: _without_error(factor, contrast), level)
    if least is None or least > n:
        takes = f"{math.ceil(least):,}" if least else "more than a million"
        best = "every answer right" if rule.kind == ALONE else "no flip at all"
        text = f"{have} cannot show {rule.margin:g}, even with {best}: that takes {takes}"
        return Outlook(rule, n, level, False, text)
    if rule.kind == ALONE:
        inside = _scores(level) * math.sqrt(rule.margin * (1 - rule.margin) / n)
        text = f"show it with {POWER:.0%} power for values {inside:.3f} or more inside of it"
        return Outlook(rule, n, level, True, f"{have} {text}")
    most = flips_decidable(n, contrast, level)
    takes = ", ".join(
        f"{max(math.ceil(least), examples_for(f, contrast, level)):,} at {f:.0%}" for f in FLIPS
    )
    text = (
        f"show it with {POWER:.0%} power where up to {most:.1%} of answers flip; it takes {takes}"
    )
    if rule.kind == RELATIVE:
        text += " (of a reference near 1)"
    return Outlook(rule, n, level, True, f"{have} {text}")


def flips_decidable(n: float, contrast: Contrast, level: float) -> float:
    """The largest share of flips, as many to the better as to the worse, with which a cell as good
    as the reference is accepted with probability `POWER`; 0 where that is none."""
    most = 0.999
    if _takes(most, contrast, level) <= n:
        return most
    least = 1e-6
    if _takes(least, contrast, level) > n:
        return 0.0
    return float(brentq(lambda f: _takes(f, contrast, level) - n, least, most))


def examples_for(flips: float, contrast: Contrast, level: float) -> int:
    """How many examples such a share of flips takes."""
    return math.ceil(_takes(flips, contrast, level))


def _takes(flips: float, contrast: Contrast, level: float) -> float:
    """``((z_a sqrt(v0) + z_b sqrt(v1)) / margin)**2``, with the variance of a pair's difference as
    the score test has it under its hypothesis, and as it is (J. M. Lachin, "Power and sample size
    evaluation for the McNemar test", Statistics in Medicine 11 (1992) 1239-1251)."""
    n = contrast.margin**-2
    pairs = Pairs((1 - flips) * n, flips / 2 * n, flips / 2 * n, n)
    under = n * contrast.margin**2 / float(norm.isf(pairs.p_values(contrast)[0])) ** 2
    root = float(norm.isf(level)) * math.sqrt(under) + float(norm.ppf(POWER)) * math.sqrt(flips)
    return (root / contrast.margin) ** 2


def _scores(level: float) -> float:
    return float(norm.isf(level)) + float(norm.ppf(POWER))


def _without_error(n: float, contrast: Contrast) -> float:
    """The p-value of a cell that does on ``n`` examples as well as a cell can."""
    perfect = n if contrast.higher_is_better or contrast.kind != ALONE else 0.0
    return Pairs(perfect, 0, 0, n).p_values(contrast)[0]


def _spread_text(rule: Criterion, n: int, level: float) -> str:
    """Of outcomes whose spread is not known beforehand."""
    if rule.kind == ALONE:
        return (
            f"show it with {POWER:.0%} power for values inside of it by "
            f"{_scores(level) / math.sqrt(n):.2g} standard deviations of an example's value"
        )
    spread = rule.margin * math.sqrt(n) / _scores(level)
    of = " of the reference's value" if rule.kind == RELATIVE else ""
    return (
        f"show it with {POWER:.0%} power where an example's loss scatters by less than {spread:.2g}"
        f"{of} (standard deviation); twice that takes {4 * n:,}"
    )


def smallest_part(
    rule: Criterion, metric: Metric, columns: Mapping[str, np.ndarray], targets: np.ndarray | None
) -> int | None:
    """Examples in the smallest slice that is judged, or of the rarest class where each class has to
    pass; None where the criterion is over all examples."""
    values: Sequence[object] | np.ndarray | None = None
    if rule.slice is not None:
        values = columns[rule.slice]
    elif isinstance(metric.test, EachGroup):
        values = targets
    if values is None:
        return None
    counts = np.unique(np.asarray(values).astype(str), return_counts=True)[1]
    judged = counts[counts >= rule.min_examples] if rule.slice else counts
    return int(judged.min()) if len(judged) else None
