"""Energy: what the machine's own counters say, or why they say nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Reading:
    """Joules since some moment, or the reason why there are none."""

    joules: float | None
    reason: str = ""


def read() -> Reading:
    """The sum over processor packages of Intel's RAPL counters (AMD's processors show them there
    too)."""
    packages = sorted(RAPL.glob("intel-rapl:[0-9]*"))
    packages = [p for p in packages if p.name.count(":") == 1]
    if not packages:
        return Reading(None, "no RAPL counters: the kernel shows none, as in most virtual machines")
    try:
        return Reading(sum(int((p / "energy_uj").read_text()) for p in packages) / 1e6)
    except OSError as error:
        return Reading(None, f"RAPL counters cannot be read: {error.strerror}")


def between(before: Reading, after: Reading) -> Reading:
    """What was spent in between."""
    if before.joules is None or after.joules is None:
        return Reading(None, before.reason or after.reason)
    spent = after.joules - before.joules
    return Reading(spent) if spent >= 0 else Reading(None, "the RAPL counter wrapped around")
