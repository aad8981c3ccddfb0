"""Criteria: what is good enough, declared before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

from evaluators.contrast import ALONE, DIFFERENCE, RELATIVE

COUNTED = ("weight_bytes", "bit_operations")
"""Resources that follow from shapes, and so are known of every cell."""
MEASURED = ("latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "latency_p99.9_ms",
            "seconds_per_example", "artefact_bytes", "resident_bytes", "peak_activation_bytes",
            "cost_per_million", "joules_per_million", "simulation_gap")  # fmt: skip
"""Resources of cells that a backend runs, measured between bounds."""
RESOURCES = (*COUNTED, *MEASURED)
"""What a criterion or the objective may name beside metrics: less is better, for each."""

MAX_RATIO = "max_ratio"
KINDS = {
    "max_drop": DIFFERENCE,
    "max_increase": DIFFERENCE,
    "max_relative_drop": RELATIVE,
    "max_relative_increase": RELATIVE,
    "floor": ALONE,
    "ceiling": ALONE,
}
"""What each limit of a metric compares."""
FOR_HIGHER = ("max_drop", "max_relative_drop", "floor")
FOR_LOWER = ("max_increase", "max_relative_increase", "ceiling")
FOR_RESOURCES = (MAX_RATIO, "ceiling")
LIMITS = (*KINDS, MAX_RATIO)

PRESETS = {"mlperf-99": 0.01, "mlperf-99.9": 0.001}
"""The share of the reference that may be lost, as in MLPerf's closed division; on full sets."""

FEWEST_IN_A_SLICE = 30


@dataclass(frozen=True)
class Criterion:
    """One acceptance rule: a metric keeps a limit, shown with a confidence; or a resource does."""

    metric: str
    limit: str
    """One of `LIMITS`. Which of them a metric takes follows from its direction."""
    margin: float
    confidence: float = 0.95
    slice: str | None = None
    """A column: the rule holds in every slice, a slice for each of its values."""
    min_examples: int = FEWEST_IN_A_SLICE
    """Slices with fewer are named and not judged."""
    preset: str | None = None
    """One of `PRESETS`, where the rule was written as that."""

    @property
    def counted(self) -> bool:
        """True for a limit of a resource, which no test over examples decides."""
        return self.metric in RESOURCES

    @property
    def measured(self) -> bool:
        """True where only a deployed cell can keep it."""
        return self.metric in MEASURED

    @property
    def kind(self) -> str:
        """Of the contrast that is tested."""
        return KINDS[self.limit]

    @property
    def largest_loss(self) -> float:
        """What a tested loss must stay below; a floor or ceiling is part of the loss itself."""
        return 0.0 if self.kind == ALONE else self.margin

    @property
    def level(self) -> float:
        return 1 - self.confidence

    @property
    def label(self) -> str:
        """The metric, what is limited of it where that is not plain, and the column whose slices it
        is taken in."""
        kinds = {RELATIVE: "relative", ALONE: self.limit}
        extra = "" if self.counted else kinds.get(self.kind, "")
        return " ".join(
            filter(None, [self.metric, extra, f"by {self.slice}" if self.slice else ""])
        )

    def to_json(self) -> dict[str, object]:
        rule: dict[str, object] = {"metric": self.metric, self.limit: self.margin}
        if self.counted:
            return rule
        rule["confidence"] = self.confidence
        if self.slice is not None:
            rule |= {"slice": self.slice, "min_examples": self.min_examples}
        if self.preset is not None:
            rule["preset"] = self.preset
        return rule
