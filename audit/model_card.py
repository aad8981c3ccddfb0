"""The model card of a chosen variant: what is known from the evidence, and what a person must add.

Sections after Mitchell et al., "Model Cards for Model Reporting" (2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from audit.note import criterion_text, environment_text, named

TO_ADD = "*To be filled in: the evidence does not say.*"


def model_card(
    result: Mapping[str, Any],
    decided: Mapping[str, Any],
    subject: Mapping[str, Any],
    signed_off: Sequence[str],
) -> str:
    """Markdown. ``decided`` is decision.json, ``subject`` subject.json."""
    several = len(result["tasks"]) > 1
    name = decided["cell"] or "no variant"
    origin = ", ".join(f"{k} {v}" for k, v in subject["origin"].items() if not isinstance(v, dict))
    lines = [
        f"# {result['name']}: {name}",
        "",
        "## Model details",
        "",
        f"- Subject: `{result['subject_digest']}` ({origin})",
        f"- Scheme: {name}",
        f"- Decision: {decided['summary']}; issued {decided['issued']['at']}, holds until "
        f"{decided['issued']['expires']}",
        f"- Declared author: {decided['issued']['author']}",
        *[f"- Reviewed: {text}" for text in signed_off or ["nobody yet"]],
        "",
        "## Intended use",
        "",
        TO_ADD,
        "",
        "## Factors",
        "",
        *_factors(result),
        "",
        "## Metrics and margins",
        "",
        *[f"- {named(t['name'], several)}{criterion_text(c)}"
          for t in result["tasks"] for c in t["criteria"]],
        "",
        "## Evaluation data",
        "",
        *[f"- {named(t['name'], several)}{split}: {found['examples']} examples, SHA-256 "
          f"`{found['sha256']}`" for t in result["tasks"] for split, found in t["splits"].items()
          if split != "calibration"],
        "",
        "## Calibration data",
        "",
        f"- {result['calibration']['rows']} rows; they take the place of training data: "
        "quantization fits its ranges to them and nothing else",
        "",
        "## Quantitative analysis",
        "",
        *_analysis(result, several),
        "",
        "## Ethical considerations",
        "",
        TO_ADD,
        "",
        "## Caveats",
        "",
        *[f"- {text}" for text in (*decided["assumptions"], *decided["limits"])],
        f"- Environment: {environment_text(result['environment'])}",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _factors(result: Mapping[str, Any]) -> list[str]:
    slices = [c["slice"] for t in result["tasks"] for c in t["criteria"] if "slice" in c]
    if slices:
        return [f"Looked at apart, by column: {', '.join(dict.fromkeys(slices))}."]
    return ["No criterion looks at groups of examples apart. " + TO_ADD]


def _analysis(result: Mapping[str, Any], several: bool) -> list[str]:
    if not result["confirmation"]:
        return ["Nothing went to confirmation."]
    return [
        f"- {named(cell['task'], several)}{finding['verdict']}: {finding['reason']}"
        for cell in result["confirmation"]
        for finding in cell["findings"]
    ]
