"""Calibrate: one instrumented pass for every static calibrator, granularity and format."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from audit import encode, spool
from audit.spool import Record
from audit.store import SweepFolder
from halfstep.observe import calibrate
from halfstep.sketch import Sketch
from halfstep.treatments import Treatments
from tasks.evaluated import Progress, recorded
from tasks.load import Loaded

SKETCHES = "sketches.safetensors"


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What calibration leaves: treatments for every cell, and the record of the sketches."""

    treatments: Treatments
    record: Record | None
    """None where no scheme of the matrix needs a sketch, so that no pass was run."""
    folder: Path
    seconds: float


def run_calibration(loaded: Loaded, sweep: SweepFolder, progress: Progress) -> Calibrated:
    """The one instrumented pass; recorded sketches are read back instead of made again."""
    started = time.time()
    key = loaded.key(kind="calibration")
    folder = sweep.place("calibration", key)
    record, sketches = None, {}
    if any(scheme.needs_sketches for scheme in loaded.plan.schemes):
        record = recorded(sweep, "calibration", key)
        if record is None:
            sketches = _observe(loaded, progress)
            files = {SKETCHES: encode.safetensors_bytes(_sketch_tensors(sketches))}
            base = Record("calibration", key, "calibration", started=started)
            record = spool.commit(folder, base, files)
        else:
            sketches = _read_sketches(folder / spool.FILES / SKETCHES)
    probe = loaded.splits["selection"].inputs
    treatments = Treatments(loaded.model, loaded.sites, sketches, probe)
    return Calibrated(treatments, record, folder, time.time() - started)


def _observe(loaded: Loaded, progress: Progress) -> dict[str, Sketch]:
    def batches() -> Iterator[Tensor]:
        for batch in loaded.splits["calibration"].inputs.split(loaded.plan.compute.batch_size):
            yield batch
            progress(len(batch))

    return calibrate(loaded.model, loaded.sites, batches())


def _sketch_tensors(sketches: Mapping[str, Sketch]) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor
        for name, sketch in sketches.items()
        for part, tensor in sketch.tensors().items()
    }


def _read_sketches(path: Path) -> dict[str, Sketch]:
    tensors = load_file(path)
    names = [name.removesuffix(".range") for name in tensors if name.endswith(".range")]
    return {
        name: Sketch.from_tensors({p: tensors[f"{name}.{p}"] for p in ("bins", "counts", "range")})
        for name in names
    }
