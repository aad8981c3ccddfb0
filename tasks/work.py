"""Work: one piece of a sweep that any worker can do, named so that doing it twice changes nothing.

A piece holds digests, names and a scheme; what is large lies in the depot. Its outcome lies there
too, under the piece's key: whoever is asked again, on whichever machine, finds it done.
"""

from __future__ import annotations

import os
import platform
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from audit.protocol import implementation
from audit.store import SweepFolder
from backends import backend
from halfstep.errors import UserError
from halfstep.observe import Part, canonical, observe_part
from halfstep.scheme import Scheme
from halfstep.treatments import Treatments, WeightKey
from tasks.calibrate import calibrated_sites
from tasks.cell import identity, run_cell
from tasks.depot import Depot
from tasks.evaluated import Evaluated
from tasks.load import Loaded, set_up
from tasks.reference import measure_reference
from tasks.stopwatch import Stopwatch


class Refused(UserError):
    """This worker would not come to the bits of the sweep's own machine."""


LOADED_AT_ONCE = 2
"""Subjects that a worker keeps in memory."""
_ONE_AT_A_TIME = threading.Lock()
"""Passes over one model in two threads would see each other's hooks."""


@dataclass(frozen=True)
class Kit:
    """What all pieces of one sweep share, by digest."""

    depot: str
    loaded: str
    treatments: str = ""
    """Made once calibration is done; then it holds the references too."""


@dataclass(frozen=True)
class ReferenceWork:
    """The full-precision subject on one split of one task."""

    kit: Kit
    key: str
    task: str
    split: str

    @property
    def name(self) -> str:
        return f"reference · {self.task} · {self.split}"


@dataclass(frozen=True)
class CalibrationWork:
    """A part of the calibration pass."""

    kit: Kit
    key: str
    part: Part
    positions: bool

    @property
    def name(self) -> str:
        return f"calibrate · batches {self.part.batches.start} to {self.part.batches.stop - 1}"


@dataclass(frozen=True)
class WeightsWork:
    """Quantized weights that several cells need."""

    kit: Kit
    key: str
    scheme: str
    weights: tuple[WeightKey, ...]

    @property
    def name(self) -> str:
        return f"weights · {self.scheme}"


@dataclass(frozen=True)
class CellWork:
    """One scheme on one split of one task."""

    kit: Kit
    key: str
    scheme: Scheme
    task: str
    split: str
    weights: tuple[str, ...]
    """Keys of the pieces that quantize its weights."""

    @property
    def name(self) -> str:
        return f"{self.scheme.name} · {self.task} · {self.split}"


Work = ReferenceWork | CalibrationWork | WeightsWork | CellWork


@dataclass(frozen=True)
class Done:
    """What a piece cost. What it came to lies in the depot."""

    worker: str
    seconds: float
    """Of useful work; 0 where it was done before."""
    started: float
    """Seconds since the epoch, by the worker's clock."""
    bytes_read: int
    bytes_written: int


def perform(work: Work) -> Done:
    """Does a piece, unless it is done, and leaves the outcome in the depot.

    Raises:
        Refused: this worker runs other code, or on another kind of machine.
        UserError: the piece is at fault: full precision gives NaN, say.
    """
    with _ONE_AT_A_TIME:
        return _perform(work)


def _perform(work: Work) -> Done:
    depot, timer = _depot(work.kit.depot), Stopwatch()
    before = depot.traffic.bytes_read, depot.traffic.bytes_written
    seconds = 0.0
    if not is_done(work, depot):
        loaded = _loaded(work.kit)
        set_up(loaded.plan.compute)
        seconds = _PERFORM[type(work)](work, loaded, depot)
    read, written = depot.traffic.bytes_read, depot.traffic.bytes_written
    return Done(
        f"{platform.node()}:{os.getpid()}",
        seconds,
        timer.started,
        read - before[0],
        written - before[1],
    )


def is_done(work: Work, depot: Depot) -> bool:
    if isinstance(work, ReferenceWork | CellWork):
        return depot.record(work.key) is not None
    return depot.made(work.key) is not None


def _reference(work: ReferenceWork, loaded: Loaded, depot: Depot) -> float:
    return _recorded(
        work.key,
        depot,
        lambda folder: measure_reference(loaded, work.task, work.split, folder, _unheard),
    )


def _calibration(work: CalibrationWork, loaded: Loaded, depot: Depot) -> float:
    timer, inputs = Stopwatch(), loaded.calibration
    rows = canonical(inputs)[work.part.batches]
    tallies = observe_part(
        loaded.model,
        calibrated_sites(loaded),
        (inputs.batch(which) for which in rows),
        work.part,
        examples=len(inputs),
        positions=work.positions,
    )
    kept = {name: tally.tensors() for name, tally in tallies.items()}
    depot.keep_digest(work.key, depot.pack(kept))
    return timer.elapsed


def _weights(work: WeightsWork, loaded: Loaded, depot: Depot) -> float:
    timer = Stopwatch()
    treatments, _ = _treatments(work.kit)
    depot.keep_digest(work.key, depot.pack(treatments.quantize(work.weights)))
    return timer.elapsed


def _cell(work: CellWork, loaded: Loaded, depot: Depot) -> float:
    if work.scheme.deployed and identity(loaded, work.scheme, work.task, work.split)[1] != work.key:
        raise Refused(
            f"worker {platform.node()} has {work.scheme.backend} "
            f"{backend(work.scheme.backend).version()}, the sweep's own machine another version"
        )
    treatments, references = _treatments(work.kit)
    for key in work.weights:
        treatments.adopt(depot.unpack_made(key))
    reference = references[work.split][work.task]
    return _recorded(
        work.key,
        depot,
        lambda folder: run_cell(
            loaded, treatments, work.scheme, work.task, work.split, reference, folder, _unheard
        ),
    )


_PERFORM = {
    ReferenceWork: _reference,
    CalibrationWork: _calibration,
    WeightsWork: _weights,
    CellWork: _cell,
}


def _recorded(key: str, depot: Depot, evaluate: Callable[[SweepFolder], Evaluated]) -> float:
    """Evaluates into a folder of this worker's own, and keeps the record in the depot."""
    with tempfile.TemporaryDirectory(prefix="halfstep-work-") as folder:
        done = evaluate(SweepFolder(Path(folder, "work")))
        depot.keep_record(key, done.folder)
        return done.seconds


def _unheard(examples: int) -> None:
    """Nobody watches the single batches of a worker."""


@lru_cache(maxsize=4)
def _depot(address: str) -> Depot:
    return Depot(address)


@lru_cache(maxsize=LOADED_AT_ONCE)
def _loaded(kit_of: Kit) -> Loaded:
    loaded: Loaded = _depot(kit_of.depot).unpack(kit_of.loaded)
    here, there = implementation(loaded.plan.plugins), loaded.implementation
    differing = [f"{name} {here[name]} here, {there[name]} there"
                 for name in there if here[name] != there[name]]  # fmt: skip
    if differing:
        raise Refused(
            f"worker {platform.node()} would not compute what the sweep's own machine does: "
            + "; ".join(differing)
        )
    return loaded


@lru_cache(maxsize=LOADED_AT_ONCE)
def _treatments(kit: Kit) -> tuple[Treatments, dict[str, dict[str, Evaluated]]]:
    found: tuple[Treatments, dict[str, dict[str, Evaluated]]] = _depot(kit.depot).unpack(
        kit.treatments
    )
    return found
