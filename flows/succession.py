"""Does the scheme that the previous version was decided for still stand for the new one?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluators.acceptance import ACCEPT, REJECT

STANDS, UNDECIDED, REGRESSION, UNKNOWN = "stands", "undecided", "regression", "unknown"
OUTCOMES = (STANDS, UNDECIDED, REGRESSION, UNKNOWN)


def succession(previous: Mapping[str, Any] | None, found: Mapping[str, Any]) -> dict[str, Any]:
    """What became of the previous version's scheme, and why.

    Args:
        previous, found: results of sweeps (see `flows.result`); None where there was none before.
    """
    outcome, why = _judged(previous, found)
    return {
        "outcome": outcome,
        "why": why,
        "scheme": previous["decision"]["cell"] if previous else None,
        "verdict": found["decision"]["verdict"],
        "cell": found["decision"]["cell"],
    }


def _judged(previous: Mapping[str, Any] | None, found: Mapping[str, Any]) -> tuple[str, str]:
    decision = found["decision"]
    if previous is None:
        return UNKNOWN, "no version was swept before"
    scheme = previous["decision"]["cell"]
    if scheme is None:
        return UNKNOWN, "no scheme was decided for the version before"
    if _protocols(previous) != _protocols(found):
        return UNKNOWN, "the protocol is another: the two sweeps do not compare"
    verdicts = {one["name"]: one["verdict"] for one in found["schemes"]}
    if scheme not in verdicts:
        return UNKNOWN, f"{scheme} is not in the matrix any more"
    if decision["cell"] == scheme:
        return STANDS, f"{scheme} is decided for again: {decision['summary']}"
    if decision["verdict"] != ACCEPT and any(
        one["name"] == scheme for one in found["confirmation"]
    ):
        # It was chosen, and its confirmation went another way.
        outcome = REGRESSION if decision["verdict"] == REJECT else UNDECIDED
        return outcome, decision["summary"]
    if verdicts[scheme] == ACCEPT:
        instead = f"; {decision['cell']} is decided for" if decision["cell"] else ""
        return STANDS, f"{scheme} is accepted on selection{instead}"
    reasons = [
        reason
        for cell in found["cells"]
        if cell["name"] == scheme and cell["verdict"] == verdicts[scheme]
        for reason in cell["reasons"][:1]
    ]
    outcome = REGRESSION if verdicts[scheme] == REJECT else UNDECIDED
    return outcome, f"{scheme}: {'; '.join(reasons) or verdicts[scheme]}"


def _protocols(result: Mapping[str, Any]) -> dict[str, str]:
    return {task["name"]: task["protocol_digest"] for task in result["tasks"]}
