"""Who evaluates: this process by itself, or workers who share what they need through a depot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from audit.store import SweepFolder
from flows.clock import Clock
from flows.progress import Reporter
from halfstep.errors import UserError, first_line
from halfstep.observation import Observation
from halfstep.observe import FEWEST_PARTS, SEGMENTS, Part, canonical, merged, parts_of
from halfstep.scheme import Scheme
from halfstep.sites import ActivationSite
from halfstep.tally import Tally
from halfstep.treatments import Treatments, WeightKey
from tasks import cell, reference
from tasks.calibrate import Calibrated, run_calibration
from tasks.depot import Depot
from tasks.evaluated import Evaluated, reuse
from tasks.load import Loaded
from tasks.steps import Steps
from tasks.work import CalibrationWork, CellWork, Done, Kit, ReferenceWork, WeightsWork, Work

References = Mapping[str, Mapping[str, Evaluated]]
"""By split, then by task."""
Job = tuple[Scheme, str, str]
"""Scheme, task and split of a cell."""
Submit = Callable[[Work], Callable[[], Done]]
"""Hands a piece of work to some worker; what it returns waits for it."""
ATTEMPTS = 3
STAGES = {CalibrationWork: "calibrate", WeightsWork: "weights"}


class Crew(Protocol):
    """Evaluations come back in the order they were asked for."""

    lanes: int
    """How many workers took part so far."""

    def book(self, clock: Clock, stage: str, seconds: float) -> None:
        """Books seconds of useful work."""

    def references(
        self,
        loaded: Loaded,
        wanted: Sequence[tuple[str, str]],
        folder: SweepFolder,
        report: Reporter,
    ) -> Iterator[Evaluated]:
        """``wanted``: task and split of each."""

    def calibrate(
        self,
        loaded: Loaded,
        references: Mapping[str, Evaluated],
        folder: SweepFolder,
        report: Reporter,
    ) -> Calibrated: ...

    def cells(
        self,
        loaded: Loaded,
        treatments: Treatments,
        jobs: Sequence[Job],
        references: References,
        folder: SweepFolder,
        report: Reporter,
    ) -> Iterator[Evaluated]: ...


class Alone:
    """One piece after the other, in this process."""

    lanes = 1

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def book(self, clock: Clock, stage: str, seconds: float) -> None:
        clock.add_work(stage, seconds)

    def references(
        self,
        loaded: Loaded,
        wanted: Sequence[tuple[str, str]],
        folder: SweepFolder,
        report: Reporter,
    ) -> Iterator[Evaluated]:
        for task, split in wanted:
            yield self._steps.reference(loaded, task, split, folder, report.advance)

    def calibrate(
        self,
        loaded: Loaded,
        references: Mapping[str, Evaluated],
        folder: SweepFolder,
        report: Reporter,
    ) -> Calibrated:
        return self._steps.calibrate(loaded, references, folder, report.advance)

    def cells(
        self,
        loaded: Loaded,
        treatments: Treatments,
        jobs: Sequence[Job],
        references: References,
        folder: SweepFolder,
        report: Reporter,
    ) -> Iterator[Evaluated]:
        for number, (scheme, task, split) in enumerate(jobs, 1):
            report.say(f"{number}/{len(jobs)} {loaded.plan.label(scheme.name, task)}")
            yield self._steps.cell(
                loaded, treatments, scheme, task, split, references[split][task], folder,
                report.advance,
            )  # fmt: skip


class Team:
    """Workers elsewhere. What they finish lies in the depot, so that neither a worker's death nor
    this process's own loses it; the record is committed here as if it had been made here."""

    def __init__(self, depot: Depot, submit: Submit, workers: int) -> None:
        """``workers``: how many there are expected to be; calibration is divided by it."""
        self._depot = depot
        self._submit = submit
        self._expected = workers
        self._kit: Kit | None = None
        self._seen: dict[str, Done] = {}
        self.done: list[tuple[Work, Done]] = []
        self._booked = 0
        self._made_by: dict[WeightKey, str] = {}
        """The key of the piece that quantized each weight."""

    @property
    def lanes(self) -> int:
        return max(1, len(self._seen))

    def book(self, clock: Clock, stage: str, seconds: float) -> None:
        """Every piece that came back since the last time, at what its worker took for it."""
        new, self._booked = self.done[self._booked :], len(self.done)
        for work, done in new:
            clock.add_elsewhere(STAGES.get(type(work), stage), done.seconds)

    def references(
        self,
        loaded: Loaded,
        wanted: Sequence[tuple[str, str]],
        folder: SweepFolder,
        report: Reporter,
    ) -> Iterator[Evaluated]:
        asked = []
        for task, split in wanted:
            key = reference.identity(loaded, task, split)
            found = reuse(folder, "reference", key)
            asked.append(found or self._ask(ReferenceWork(self._shared(loaded), key, task, split)))
        for (task, split), one in zip(wanted, asked, strict=True):
            yield self._collected(one, "reference", folder)
            report.advance(len(loaded.split(task, split).inputs))

    def calibrate(
        self,
        loaded: Loaded,
        references: Mapping[str, Evaluated],
        folder: SweepFolder,
        report: Reporter,
    ) -> Calibrated:
        def observe(sites: Sequence[ActivationSite], positions: bool) -> Mapping[str, Observation]:
            return self._observe(loaded, [site.name for site in sites], positions, report)

        return run_calibration(loaded, references, folder, report.advance, observe)

    def _observe(
        self, loaded: Loaded, sites: list[str], positions: bool, report: Reporter
    ) -> Mapping[str, Observation]:
        sizes = [len(rows) for rows in canonical(loaded.calibration)]
        count = FEWEST_PARTS
        while count < min(self._expected, SEGMENTS):
            count *= 2
        asked = []
        for part in parts_of(sizes, count):
            key = loaded.key(
                kind="tallies", sites=sites, positions=positions,
                batches=[part.batches.start, part.batches.stop],
            )  # fmt: skip
            work = CalibrationWork(self._shared(loaded), key, part, positions)
            asked.append((part, self._ask(work)))

        def tallies() -> Iterator[tuple[Part, dict[str, Tally]]]:
            for part, wait in asked:
                work = wait()
                kept = self._depot.unpack_made(work.key)
                report.advance(sum(sizes[part.batches]))
                yield part, {name: Tally.from_tensors(t) for name, t in kept.items()}

        return merged(tallies(), sizes)

    def cells(
        self,
        loaded: Loaded,
        treatments: Treatments,
        jobs: Sequence[Job],
        references: References,
        folder: SweepFolder,
        report: Reporter,
    ) -> Iterator[Evaluated]:
        identities = [cell.identity(loaded, *job) for job in jobs]
        found = [reuse(folder, kind, key) for kind, key in identities]
        left = [job for job, one in zip(jobs, found, strict=True) if one is None]
        asked: list[Evaluated | Callable[[], Work]] = []
        if left:
            kit = self._with_treatments(loaded, treatments, [job[0] for job in left], references)
            weights = self._weights(loaded, kit, treatments, [job[0] for job in left])
        for job, (_, key), one in zip(jobs, identities, found, strict=True):
            if one is None:
                scheme, task, split = job
                needed = tuple(dict.fromkeys(weights[w] for w in treatments.weight_keys(scheme)))
                asked.append(self._ask(CellWork(kit, key, scheme, task, split, needed)))
            else:
                asked.append(one)
        for number, ((scheme, task, split), (kind, _), one) in enumerate(
            zip(jobs, identities, asked, strict=True), 1
        ):
            yield self._collected(one, kind, folder)
            report.say(f"{number}/{len(jobs)} {loaded.plan.label(scheme.name, task)}")
            report.advance(len(loaded.split(task, split).inputs))

    def _weights(
        self, loaded: Loaded, kit: Kit, treatments: Treatments, schemes: Sequence[Scheme]
    ) -> dict[WeightKey, str]:
        """Has every weight quantized once; the key of the piece that did, by weight."""
        made_by, asked = self._made_by, []
        for scheme in dict.fromkeys(schemes):
            new = tuple(w for w in treatments.weight_keys(scheme) if w not in made_by)
            if not new:
                continue
            named = [[site, spec.to_json(), [c.to_json() for c in corrections]]
                     for site, spec, corrections in new]  # fmt: skip
            # What corrections read of the data differs with the calibration of the sweep.
            key = loaded.key(kind="weights", weights=named)
            made_by |= dict.fromkeys(new, key)
            asked.append(self._ask(WeightsWork(kit, key, scheme.name, new)))
        for wait in asked:
            wait()
        return made_by

    def _shared(self, loaded: Loaded) -> Kit:
        if self._kit is None:
            self._kit = Kit(self._depot.address, self._depot.pack(loaded))
        return self._kit

    def _with_treatments(
        self,
        loaded: Loaded,
        treatments: Treatments,
        schemes: Sequence[Scheme],
        references: References,
    ) -> Kit:
        kit = self._shared(loaded)
        treatments.gather(schemes)
        parts = {id(getattr(loaded, name)): (kit.loaded, name) for name in ("model", "sites")}
        value = treatments, {split: dict(found) for split, found in references.items()}
        return replace(kit, treatments=self._depot.pack(value, parts))

    def _ask(self, work: Work) -> Callable[[], Work]:
        """Submits a piece; what it returns waits, and submits it again where its worker died."""
        first = self._submit(work)

        def wait() -> Work:
            waiting = first
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    done = waiting()
                except UserError:
                    raise
                except Exception as error:  # whatever the runner's own libraries raise
                    if attempt == ATTEMPTS:
                        raise UserError(
                            f"{work.name} failed {ATTEMPTS} times on the workers, last with "
                            f"{type(error).__name__}: {first_line(error)}. What was finished is "
                            "kept; run the same command to go on"
                        ) from error
                    waiting = self._submit(work)
                else:
                    self._seen[done.worker] = done
                    self.done.append((work, done))
                    return work
            raise AssertionError("unreachable")

        return wait

    def _collected(
        self, one: Evaluated | Callable[[], Work], kind: str, folder: SweepFolder
    ) -> Evaluated:
        if isinstance(one, Evaluated):
            return one
        work = one()
        place: Path = folder.place(kind, work.key)
        self._depot.fetch_record(work.key, place)
        found = reuse(folder, kind, work.key)
        if found is None:
            raise UserError(f"{work.name}: depot {self._depot.shown} has lost its record")
        return replace(found, reused=False, seconds=self.done[-1][1].seconds)
