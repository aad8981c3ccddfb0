"""What the evidence answers of three frameworks, and what it does not: gaps are shown, not hidden.

Sources: Regulation (EU) 2024/1689, Annex IV point 2 (g); NIST AI 100-1 (AI RMF 1.0), MEASURE;
supervisory guidance SR 11-7 / OCC 2011-12 on model risk, as a checklist. A mapping is an aid to a
reader, not a statement of conformity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COVERED, PARTLY, GAP = "covered", "partly", "gap"
SHOWN = {COVERED: "covered", PARTLY: "partly", GAP: "**GAP**"}
EU, NIST, RISK = "EU AI Act, Annex IV (2)(g)", "NIST AI RMF, MEASURE", "Model risk (SR 11-7)"


@dataclass(frozen=True)
class Facts:
    """What of a sweep decides whether a point is answered."""

    result: Mapping[str, Any]
    reviews: Sequence[Mapping[str, Any]]
    signed: bool
    """Whether the decision's entry in the ledger carries a signature."""
    reproductions: Sequence[Mapping[str, Any]]

    @property
    def sliced(self) -> bool:
        """Whether a criterion looks at groups of examples apart."""
        return any("slice" in c for task in self.result["tasks"] for c in task["criteria"])

    @property
    def approved(self) -> bool:
        return bool(self.reviews) and self.reviews[-1]["outcome"] != "refuse"

    @property
    def reproduced(self) -> bool:
        return any(r["status"] in ("identical", "same outcomes") for r in self.reproductions)


@dataclass(frozen=True)
class Point:
    """One thing that a framework asks for."""

    framework: str
    clause: str
    asks: str
    state: Callable[[Facts], str]
    files: tuple[str, ...]
    note: str

    def to_json(self, facts: Facts) -> dict[str, Any]:
        return {
            "framework": self.framework,
            "clause": self.clause,
            "asks": self.asks,
            "state": self.state(facts),
            "evidence": list(self.files),
            "note": self.note,
        }


def _always(state: str) -> Callable[[Facts], str]:
    return lambda facts: state


def _if(holds: Callable[[Facts], bool], otherwise: str = GAP) -> Callable[[Facts], str]:
    return lambda facts: COVERED if holds(facts) else otherwise


_SIGNED = _if(lambda f: f.signed and f.approved, PARTLY)
_SLICED = _if(lambda f: f.sliced)
_APPROVED = _if(lambda f: f.approved)

POINTS = (
    Point(EU, "procedures", "validation and testing procedures used", _always(COVERED),
          ("decision.md", "config/plan.json", "config/protocol.json"),
          "criteria, splits, tests and corrections, declared before the first cell ran"),
    Point(EU, "data", "information about the validation and testing data and their main "
          "characteristics", _always(PARTLY),
          ("config/protocol.json", "run.json: inputs", "report.html: representativeness"),
          "digests, sizes, sources and representativeness are here; provenance, collection and "
          "labelling are the data owner's to add"),
    Point(EU, "metrics", "metrics used to measure accuracy and robustness", _always(PARTLY),
          ("cells.csv", "metrics.json", "report.html"),
          "accuracy against full precision with confidence; robustness against attack or drift is "
          "not tested"),
    Point(EU, "discrimination", "potentially discriminatory impacts", _SLICED,
          ("decision.json: findings by slice",),
          "criteria by slice answer it for the columns that the data hold; none means not looked "
          "at"),
    Point(EU, "test logs", "test logs and all test reports", _always(COVERED),
          ("runs/", "report.html", "ledger/"), "every cell, rejected and failed ones too"),
    Point(EU, "dated and signed", "dated and signed by the responsible persons", _SIGNED,
          ("ledger/*/entry.json", "ledger/*/attestation.dsse.json"),
          "dated always; signed where a key was used; persons as declared"),
    Point(NIST, "1.1", "metrics chosen for the most significant risks; what is not measured is "
          "documented", _always(PARTLY), ("decision.json: criteria, limits",),
          "the choice of metrics is the team's; limits say what was not measured"),
    Point(NIST, "1.2", "appropriateness of metrics is regularly assessed", _always(PARTLY),
          ("decision.json: issued.expires",), "decisions expire; the assessment is the team's"),
    Point(NIST, "1.3", "experts who did not develop the system take part", _APPROVED,
          ("ledger/*/entry.json",), "the author cannot approve, by declared name"),
    Point(NIST, "2.1", "test sets, metrics and tools are documented", _always(COVERED),
          ("config/protocol.json", "environment.json", "evidence.json"), ""),
    Point(NIST, "2.2", "evaluations with human subjects are representative", _always(GAP), (),
          "halfstep evaluates models; no human subjects take part"),
    Point(NIST, "2.3", "performance is measured for conditions like the deployment's",
          _always(PARTLY), ("decision.md", "report.html"),
          "simulated numerics; the deployed kernel may order sums differently"),
    Point(NIST, "2.4", "behaviour is monitored in production", _always(GAP), (),
          "outside halfstep"),
    Point(NIST, "2.5", "shown to be valid and reliable; limits of generalization documented",
          _always(COVERED), ("decision.json: confirmation, assumptions, limits",), ""),
    Point(NIST, "2.6 and 2.7", "safety, security and resilience are evaluated", _always(GAP), (),
          "not tested"),
    Point(NIST, "2.8", "transparency and accountability", _APPROVED,
          ("ledger/", "evidence.json"), "who decided what, when, on which evidence"),
    Point(NIST, "2.9", "the model is explained", _always(PARTLY),
          ("certificate.csv", "coverage.csv", "report.html: sensitivity"),
          "what quantization did at each site; not why the model answers as it does"),
    Point(NIST, "2.10", "privacy risk", _always(GAP), (), "not examined"),
    Point(NIST, "2.11", "fairness and bias", _SLICED, ("decision.json: findings by slice",),
          "by slices of columns in the data"),
    Point(NIST, "2.12", "environmental impact", _always(PARTLY), ("cells.csv: bit_operations",),
          "arithmetic saved is counted; energy is not measured"),
    Point(NIST, "2.13", "effectiveness of the testing itself", _always(PARTLY),
          ("decision.json: assumptions",), "error rates of the statistics are simulated and "
          "published with halfstep"),
    Point(NIST, "3 and 4", "risks tracked over time, feedback from the field", _always(GAP), (),
          "outside halfstep"),
    Point(RISK, "conceptual soundness", "theory, assumptions and limits are stated",
          _always(COVERED), ("decision.json: assumptions, limits", "certificate.csv"), ""),
    Point(RISK, "data", "data are suitable and documented", _always(PARTLY),
          ("config/protocol.json", "report.html: representativeness"),
          "identity and representativeness; suitability is the owner's judgement"),
    Point(RISK, "outcomes analysis", "results are compared with a benchmark", _always(COVERED),
          ("decision.json", "outcomes-*.parquet"),
          "paired with full precision, example by example"),
    Point(RISK, "independent validation", "somebody other than the developer reviews", _APPROVED,
          ("ledger/*/entry.json",), "by declared name"),
    Point(RISK, "reproducibility", "results can be produced again", _if(lambda f: f.reproduced,
          PARTLY), ("config/config.yaml", "environment.json", "ledger/"),
          "`halfstep reproduce --record` enters the outcome in the ledger"),
    Point(RISK, "change control", "versions, approvals and roll-back are kept", _APPROVED,
          ("ledger/",), ""),
    Point(RISK, "ongoing monitoring", "performance in use is followed", _always(GAP), (),
          "outside halfstep; the decision expires"),
    Point(RISK, "inventory", "the model is registered with an owner and a use", _always(PARTLY),
          ("model-card.md",), "version and author are here; owner and use are to be filled in"),
)  # fmt: skip


def mapping(facts: Facts) -> list[dict[str, Any]]:
    """Every point with its state."""
    return [point.to_json(facts) for point in POINTS]


def mapping_markdown(points: Sequence[Mapping[str, Any]]) -> str:
    """The mapping for people, the gaps as visible as the rest."""
    counts = {state: sum(p["state"] == state for p in points) for state in (COVERED, PARTLY, GAP)}
    lines = [
        "# What this evidence answers, and what it does not",
        "",
        ", ".join(f"{n} {state}" for state, n in counts.items())
        + ". An aid to a reader, not a statement of conformity.",
    ]
    for framework in dict.fromkeys(p["framework"] for p in points):
        lines += ["", f"## {framework}", "", "| point | asks for | state | evidence | note |",
                  "| --- | --- | --- | --- | --- |"]  # fmt: skip
        lines += [
            f"| {p['clause']} | {p['asks']} | {SHOWN[p['state']]} "
            f"| {', '.join(f'`{e}`' for e in p['evidence']) or '–'} | {p['note']} |"
            for p in points
            if p["framework"] == framework
        ]
    return "\n".join(lines) + "\n"
