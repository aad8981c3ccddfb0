"""Deployment in words and tables: what real kernels did, and what they bought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

REFERENCE = "reference"
UNITS = {
    "latency_p50_ms": "ms",
    "latency_p90_ms": "ms",
    "latency_p99_ms": "ms",
    "latency_p99.9_ms": "ms",
    "seconds_per_example": "s",
    "artefact_bytes": "bytes",
    "resident_bytes": "bytes",
    "peak_activation_bytes": "bytes",
    "joules_per_million": "J",
}


def contenders(detail: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for the reference and each deployed cell: what people compare."""
    rows = []
    for name, told in detail["timing"]["contenders"].items():
        single = told["batches"][0]
        best = max(told["batches"], key=lambda b: b["throughput"]["low"])
        rows.append(
            {
                "name": name,
                "percentiles": single["percentiles"],
                "speed_up": single["speed_up"],
                "throughput": best["throughput"],
                "best_batch": best["batch_size"],
                "offline_speed_up": best["speed_up"],
                "memory": told["memory"],
                "cost": told["cost"],
                "cost_reason": told["cost_reason"],
                "energy": told["energy"],
                **detail["schemes"].get(name, {}),
            }
        )
    return rows


def deployment_note(detail: Mapping[str, Any]) -> str:
    """The deployment's run: speed and size beside the reference, then whether simulation was
    right."""
    timing, rows = detail["timing"], contenders(detail)
    names = list(timing["contenders"][REFERENCE]["batches"][0]["percentiles"])
    lines = [
        f"Timed in turns on **{timing['machine']['name']}** "
        f"({natively(timing['machine'])}), {timing['protocol']['threads']} thread(s), "
        f"{timing['contenders'][REFERENCE]['batches'][0]['queries']} single queries each.",
        "",
        f"| | {' | '.join(f'{n} ms' for n in names)} | single query, times the reference "
        "| examples a second (batch) | bytes on disk | cost of a million |",
        "| --- " * (len(names) + 5) + "|",
    ]
    for row in rows:
        told = " | ".join(
            between(row["percentiles"].get(n)) if row["percentiles"].get(n) else "–" for n in names
        )
        lines.append(
            f"| {row['name']} | {told} | {between(row['speed_up'])} | "
            f"{between(row['throughput'])} ({row['best_batch']}) | "
            f"{row['memory']['artefact_bytes']:,} | {cost_text(row)} |"
        )
    lines.append("")
    for row in rows:
        if row["name"] != REFERENCE:
            lines += [f"**{row['name']}**", "", *[f"- {text}" for text in truth(row)], ""]
    lines += [f"> {note}\n" for note in [*timing["notes"], *missing(rows)]]
    lines.append("`latency.csv`: every batch size. `sites.csv`: codes beside the simulation's. "
                 "`nodes.csv`: the kernels that ran.")  # fmt: skip
    return "\n".join(lines)


def truth(row: Mapping[str, Any]) -> list[str]:
    """Whether a deployed cell did what its simulation said, and why not."""
    said = []
    for task, found in row["agreement"].items():
        if found["differing"] is None:
            said.append(f"{task}: there is no simulation to compare with")
            continue
        said.append(
            f"{task}: {found['differing']:.2%} of {found['examples']:,} examples differ from the "
            f"simulation in any bit; {found['closeness']} to it gives a gap of "
            f"{_known(found['gap'], '.3g')}; {found['metric']} {_known(found['headline'], '.4f')}, "
            f"simulated {_known(found['simulated'], '.4f')}"
        )
    sites, nodes = row["sites"], row["nodes"]
    if sites["compared"]:
        said.append(
            f"{sites['differing']:,} of {sites['codes']:,} codes at {sites['compared']} sites "
            f"differ, by at most {sites['largest_steps']} step(s)"
        )
    else:
        said.append(f"sites were not compared: {sites['reason']}")
    said.append(
        f"{nodes['int8']} of {nodes['products']} products ran in INT8 by the backend's own profile"
    )
    if row["why_simulated"]:
        said.append(f"NOT NATIVE: {row['why_simulated']}")
    said += [f"cause: {cause}" for cause in row["causes"]]
    if row["memory"]["reason"]:
        said.append(f"memory is not known: {row['memory']['reason']}")
    return said


def missing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What could not be measured of any contender, and why."""
    reasons = {row["energy"]["reason"] for row in rows if row["energy"]["reason"]}
    reasons = {f"energy is not known: {reason}" for reason in reasons}
    reasons |= {f"no cost: {row['cost_reason']}" for row in rows if row["cost_reason"]}
    return sorted(reasons)


def natively(machine: Mapping[str, Any]) -> str:
    """What a machine has instructions for."""
    found = ", ".join(f"{kind} by {word}" for kind, word in machine["native"].items())
    return f"natively {found}" if found else "no low-precision products natively"


def between(found: Mapping[str, float] | None) -> str:
    """A value and its bounds."""
    if not found:
        return "–"
    value, low, high = (_digits(found[key]) for key in ("value", "low", "high"))
    return value if low == high else f"{value} ({low} to {high})"


def cost_text(row: Mapping[str, Any]) -> str:
    """The cost of a million inferences, or why there is none."""
    if row["cost"] is None:
        return f"– ({row['cost_reason']})"
    return f"{between(row['cost'])} {row['cost']['currency']}, batch {row['cost']['batch_size']}"


def bought_lines(bought: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was bought for what, as a table."""
    if not bought:
        return []
    lines = ["| | full precision | chosen | ratio |", "| --- | --- | --- | --- |"]
    for row in bought:
        unit = UNITS.get(row["what"], "")
        lines.append(
            f"| {row['what']} | {_digits(row['reference'], 4)} {unit} | "
            f"{_digits(row['chosen'], 4)} {unit} | {between(row['ratio'])} |"
        )
    return lines


def _known(value: float | None, how: str) -> str:
    return "no number" if value is None else format(value, how)


def _digits(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
