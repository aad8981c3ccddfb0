"""Calibrate: one instrumented pass for every static calibrator, granularity and format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from audit import encode, spool
from audit.spool import Record
from audit.store import SweepFolder
from halfstep.batches import Batch
from halfstep.examples import Inputs
from halfstep.observation import Observation
from halfstep.observe import calibrate, canonical
from halfstep.representativeness import drifts, warning
from halfstep.sites import ActivationSite
from halfstep.treatments import CERTIFIED_EXAMPLES, Calibration, Treatments, needs_positions
from tasks.depot import DEPOT, Depot
from tasks.evaluated import Evaluated, Progress, recorded
from tasks.load import Loaded
from tasks.shelf import StoreShelf
from tasks.stopwatch import Stopwatch

Observe = Callable[[Sequence[ActivationSite], bool], Mapping[str, Observation]]
"""Makes the instrumented pass over these sites; also at each token position, or not."""
OBSERVATIONS = "observations.safetensors"
SELECTION = "observations-selection.safetensors"


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What calibration leaves: treatments for every cell, and the record of what was observed."""

    treatments: Treatments
    record: Record | None
    """None where no scheme of the matrix needs a sketch, so that no pass was run."""
    folder: Path
    seconds: float
    shelf: StoreShelf | None = None
    """Where corrected weights come from and go to; None where there are none, or nothing may be
    reused."""


@dataclass(frozen=True, eq=False)
class CanonicalBatches:
    """The calibration batches, made anew whenever they are asked for. Only here are they watched:
    a copy in another process tells nobody how far it is."""

    inputs: Inputs
    order: Sequence[np.ndarray]
    progress: Progress | None = None

    def __call__(self) -> Iterator[Batch]:
        for rows in self.order:
            yield self.inputs.batch(rows)
            if self.progress is not None:
                self.progress(len(rows))

    def __getstate__(self) -> dict[str, object]:
        return {"inputs": self.inputs, "order": self.order, "progress": None}


def calibrated_sites(loaded: Loaded) -> list[ActivationSite]:
    """The activation sites whose range some scheme of the matrix fixes by calibration."""
    specs = {
        site.name: [scheme.activation_spec(site, loaded.sites) for scheme in loaded.plan.treated]
        for site in loaded.sites.activations
    }
    return [
        site
        for site in loaded.sites.activations
        if any(spec is not None and spec.needs_sketch for spec in specs[site.name])
    ]


def run_calibration(
    loaded: Loaded,
    references: Mapping[str, Evaluated],
    sweep: SweepFolder,
    progress: Progress,
    observe: Observe | None = None,
) -> Calibrated:
    """The one instrumented pass; what is recorded already is read back instead of made again.

    Args:
        references: by task, on the selection split; their sketches tell whether calibration
            represents it.
        observe: who makes the pass; this process by itself where nobody is named.
    """
    timer = Stopwatch()
    sites = calibrated_sites(loaded)
    positions = needs_positions(loaded.plan.treated)
    names = [site.name for site in sites]
    key = loaded.key(kind="calibration", sites=names, positions=positions)
    folder = sweep.place("calibration", key)
    inputs = loaded.calibration
    batches = CanonicalBatches(inputs, canonical(inputs), progress)

    def here(sites: Sequence[ActivationSite], positions: bool) -> Mapping[str, Observation]:
        return calibrate(loaded.model, sites, batches(), positions=positions, examples=len(inputs))

    record, observations = None, {}
    if sites:
        record = recorded(sweep, "calibration", key)
        if record is None:
            observations = dict((observe or here)(sites, positions))
            record = _commit(folder, key, observations, references, timer.started)
        else:
            observations = _read(folder / spool.FILES / OBSERVATIONS)
    calibration = Calibration(batches, len(inputs), observations, positions)
    # Activations are certified on data that did not choose their ranges.
    probe = loaded.split(loaded.plan.tasks[0].name, "selection").inputs.sample(CERTIFIED_EXAMPLES)
    shelf = None
    if not sweep.fresh_mark.exists() and any(s.corrections for s in loaded.plan.treated):
        depot = Depot(str(sweep.store / DEPOT))
        shelf = StoreShelf(depot, loaded.implementation, sweep.sweep_id)
    treatments = Treatments(loaded.model, loaded.sites, calibration, probe, shelf)
    return Calibrated(treatments, record, folder, timer.elapsed, shelf)


def _commit(
    folder: Path,
    key: str,
    observations: Mapping[str, Observation],
    references: Mapping[str, Evaluated],
    started: float,
) -> Record:
    by_task = {
        task: drifts(observations, _read(reference.folder / spool.FILES / SELECTION))
        for task, reference in references.items()
    }
    rows = [{"task": task, **d.to_json()} for task, ds in by_task.items() for d in ds]
    if len(by_task) > 1:
        # Calibrated on a mixture of tasks, each one's own mix of values is another by design; what
        # remains to be asked is whether its values lie inside the calibrated ranges.
        by_task = {
            task: [replace(d, psi=0.0, channel_shift=0.0) for d in ds]
            for task, ds in by_task.items()
        }
    found = [drift for drifted in by_task.values() for drift in drifted]
    moved = sorted(observations, key=lambda name: -observations[name].moved)
    unsettled = {name: observations[name].moved for name in moved if not observations[name].settled}
    told = [
        text
        for task, drifted in by_task.items()
        if (text := warning(drifted, "selection" if len(by_task) == 1 else f"{task} selection"))
    ]
    worst_psi = max((d.psi for d in found), default=0.0)
    worst_outside = max((d.outside for d in found), default=0.0)
    worst_channel_shift = max((d.channel_shift for d in found), default=0.0)
    detail = {
        "representativeness": {
            "warning": told[0] if told else None,
            "shifted": [
                {"task": task, **d.to_json()}
                for task, drifted in by_task.items()
                for d in drifted
                if d.shifted
            ],
            "sites": len(observations),
            "worst_psi": worst_psi,
            "worst_outside": worst_outside,
            "worst_channel_shift": worst_channel_shift,
        },
        "unsettled": unsettled,
        "notes": told + _unsettled_note(unsettled, len(observations)),
    }
    metrics = {
        "sites": float(len(observations)),
        "sites_shifted": float(sum(d.shifted for d in found)),
        "sites_unsettled": float(len(unsettled)),
        "worst_psi": worst_psi,
        "worst_outside_share": worst_outside,
        "worst_channel_shift": worst_channel_shift,
    }
    files = {
        OBSERVATIONS: encode.safetensors_bytes(
            flat({name: o.tensors() for name, o in observations.items()})
        ),
        "convergence.csv": encode.csv_bytes(
            [
                {"site": name, "share": s.share, "examples": s.examples, "lo": s.lo, "hi": s.hi,
                 "p99.99_magnitude": s.bulk, "moved_in_second_half": o.moved, "settled": o.settled}
                for name, o in observations.items() for s in o.growth
            ]
        ),
        "representativeness.csv": encode.csv_bytes(rows),
    }  # fmt: skip
    base = Record(
        "calibration", key, "calibration", metrics=metrics, detail=detail, started=started
    )
    return spool.commit(folder, base, files)


def _unsettled_note(unsettled: Mapping[str, float], sites: int) -> list[str]:
    if not unsettled:
        return []
    worst = ", ".join(f"{name} by {moved:.0%}" for name, moved in list(unsettled.items())[:3])
    return [
        f"more calibration data would still move the range of {len(unsettled)} of {sites} sites: "
        f"the second half of it moved {worst}"
    ]


def flat(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by site and part as one mapping ``site/part``."""
    return {f"{site}/{part}": t for site, parts in tensors.items() for part, t in parts.items()}


def by_site(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `flat`."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        site, _, part = name.rpartition("/")
        found.setdefault(site, {})[part] = tensor
    return found


def _read(path: Path) -> dict[str, Observation]:
    return {name: Observation.from_tensors(t) for name, t in by_site(load_file(path)).items()}
