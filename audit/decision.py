"""The decision record for people: Markdown, made from the JSON that its schema describes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from audit.deployment import bought_lines
from audit.note import MARKS, criterion_text, named, reference_text

SHOWN = 40
"""Alternatives in the Markdown; the JSON has all."""


def schema_bytes() -> bytes:
    """The JSON Schema of `decision.json`."""
    return files("audit").joinpath("schemas/decision-4.json").read_bytes()


def decision_markdown(decided: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The whole record in the order in which a board reads it."""
    issued, several = decided["issued"], len(result["tasks"]) > 1
    lines = [
        f"# Decision: {MARKS[decided['verdict']]}",
        "",
        f"**{decided['summary']}.**",
        "",
        f"Issued {issued['at']} by {issued['author']} (as declared), holds until "
        f"{issued['expires']} unless the subject, the protocol or the data change before. "
        + _supersedes(issued["supersedes"]),
        "",
        "## Chosen",
        "",
        *_chosen(decided, result),
        "",
        *_bought(decided),
        "## Criteria, declared before the first cell ran",
        "",
        *[f"- {named(t['name'], several)}{criterion_text(c)}"
          for t in decided["tasks"] for c in t["criteria"]],
        "",
        *[f"{reference_text(task, several)}." for task in result["tasks"]],
        "",
        "## Margins left, on the confirmation split",
        "",
        *_margins(decided, several),
        "",
        "## What else there was",
        "",
        *_alternatives(decided),
        "",
        "## Assumptions",
        "",
        *[f"- {text}" for text in decided["assumptions"]],
        "",
        "## Limits",
        "",
        *[f"- {text}" for text in decided["limits"]],
        "",
        "## Evidence",
        "",
        f"- subject `{decided['subject_digest']}`",
        f"- protocol `{decided['protocol_digest']}`",
        f"- decision `{decided['digest']}`",
        f"- sweep `{result['sweep_id']}`",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _supersedes(earlier: Mapping[str, Any] | None) -> str:
    if earlier is None:
        return "It is the first decision in its experiment."
    return (
        f"It supersedes the decision of sweep {earlier['sweep_id']} ({earlier['verdict']}, cell: "
        f"{earlier['cell']}, digest {earlier['decision_digest'][:16]})."
    )


def _chosen(decided: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    if decided["cell"] is None:
        return ["No cell may be deployed."]
    cell = next(c for c in result["cells"] if c["name"] == decided["cell"])
    base = result["reference"]["selection"]["metrics"]
    lines = [f"{cell['name']}: the cheapest accepted cell by {decided['objective']}."]
    for name, value in cell["resources"].items():
        lines.append(f"- {name}: {value:,.0f}, {value / base[name]:.3f} of full precision's")
    for side in ("weights", "activations"):
        spec = cell["scheme"][side]
        lines.append(f"- {side}: {' '.join(spec.values()) if spec else 'full precision'}")
    if "sums" in cell["scheme"]:
        lines.append(f"- sums: {' '.join(cell['scheme']['sums'].values())}")
    for override in cell["scheme"]["overrides"]:
        sides = {k: v["format"] for k, v in override.items() if k in ("weights", "activations")}
        where = ", ".join([*override["names"], *override["kinds"], *override["positions"]])
        lines.append(f"- but {where}: " + ", ".join(f"{k} {v}" for k, v in sides.items()))
    return [lines[0], "", *lines[1:]]


def _bought(decided: Mapping[str, Any]) -> list[str]:
    """What was bought for what, and on which machine it runs."""
    if not decided["bought"]:
        return []
    target = decided["target"]
    lines = ["## What was bought for what", "", *bought_lines(decided["bought"]), ""]
    if target is not None:
        native = (
            f"not natively: {target['why_simulated']}" if target["why_simulated"] else "natively"
        )
        lines += [f"Target: {target['name']} ({target['declared']}), which runs it {native}.", ""]
    return lines


def _margins(decided: Mapping[str, Any], several: bool) -> list[str]:
    if not decided["margins_left"]:
        return ["Nothing went to confirmation."]
    lines = ["| criterion | verdict | bound | left |", "| --- | --- | --- | --- |"]
    for margin in decided["margins_left"]:
        left = "–" if margin["left"] is None else f"{margin['left']:.4g}"
        bound = "–" if margin["bound"] is None else f"{margin['bound']:.4g}"
        text = named(margin["task"], several) + criterion_text(margin["criterion"])
        lines.append(f"| {text} | {margin['verdict']} | {bound} | {left} |")
    return lines


def _alternatives(decided: Mapping[str, Any]) -> list[str]:
    found = decided["alternatives"]
    if not found:
        return ["The matrix held nothing else."]
    lines = [f"| cell | verdict | {decided['objective']} | why not |", "| --- | --- | --- | --- |"]
    for one in found[:SHOWN]:
        cost = one[decided["objective"]]
        shown = "–" if cost is None else f"{cost:,.0f}"
        why = "; ".join(one["why"]).replace("|", "/")
        lines.append(f"| {one['name']} | {one['verdict']} | {shown} | {why} |")
    if len(found) > SHOWN:
        lines.append(f"\nand {len(found) - SHOWN} more, in decision.json")
    return lines
