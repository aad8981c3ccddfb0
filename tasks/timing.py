"""Timing: the reference and every deployed cell, in turns, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backends import Artefact, energy, footprint, hardware, latency
from backends.cost import MILLION, cost
from backends.latency import Timed, queries_needed, timed
from halfstep.batches import Batch, forward
from halfstep.examples import Inputs
from halfstep.interval import Interval
from halfstep.resources import reference_bytes
from halfstep.scheme import Scheme
from tasks.load import Loaded
from tasks.plan import Deployment

REFERENCE = "reference"
FEWEST_QUERIES = queries_needed(0.9)
BATCHES = 8
"""Different inputs that queries go through."""


@dataclass(frozen=True, eq=False)
class Contender:
    """What is timed: the reference, or a deployed cell with its artefact."""

    name: str
    model: nn.Module
    scheme: Scheme | None = None
    artefact: Artefact | None = None


@dataclass(frozen=True, eq=False)
class Times:
    """What timing came to: a record of it, and every single time."""

    detail: dict[str, Any]
    columns: dict[str, np.ndarray]


def take_times(
    loaded: Loaded, contenders: Sequence[Contender], progress: Callable[[str], None]
) -> Times:
    """Times every batch size, the contenders in turns; then memory, energy and cost of each."""
    assert loaded.plan.deployment is not None
    settings = loaded.plan.deployment
    inputs = loaded.split(loaded.plan.tasks[0].name, "selection").inputs
    before, columns = hardware.state(), {}
    found: dict[str, list[Timed]] = {one.name: [] for one in contenders}
    joules: dict[str, energy.Reading] = {}
    with _bound(settings), torch.inference_mode():
        for size in settings.batch_sizes:
            queries = max(settings.queries // size, FEWEST_QUERIES)
            batches = _batches(inputs, size)
            progress(f"timing batches of {size}")
            asked = {one.name: partial(_ask, one.model, batches) for one in contenders}
            seconds = latency.time_steadily(asked, queries)
            for name, times in timed(seconds, size).items():
                found[name].append(times)
                columns[f"{name} · batch {size}"] = times.seconds
        progress("energy and memory")
        largest = settings.batch_sizes[-1]
        for one in contenders:
            start, batch = energy.read(), _batches(inputs, largest)[0]
            for _ in range(FEWEST_QUERIES if start.joules is not None else 0):
                forward(one.model, batch)
            joules[one.name] = energy.between(start, energy.read())
        memory = {
            one.name: _memory(loaded, one, _batches(inputs, largest)[0]) for one in contenders
        }
    after = hardware.state()
    detail = {
        "protocol": {
            **settings.to_json(),
            "scenarios": "single stream: one query after the other; offline: batches of each size",
            "warm_up": "MSER-5",
            "steady_state": "Pettitt's change-point test at 1 %",
            "bounds": "95 %, one-sided: order statistics of percentiles, batch means of throughput",
            "affinity": sorted(os.sched_getaffinity(0)),
            "inputs": f"{loaded.plan.tasks[0].name} · selection",
        },
        "machine": hardware.here().to_json(),
        "before": before,
        "after": after,
        "contenders": {
            one.name: _told(found[one.name], found[REFERENCE], settings, memory[one.name],
                            joules[one.name], largest)
            for one in contenders
        },
        "notes": latency.notes(found, settings.queries),
    }  # fmt: skip
    return Times(detail, columns)


def _ask(model: nn.Module, batches: Sequence[Batch], query: int) -> object:
    return forward(model, batches[query % len(batches)])


def measured(told: Mapping[str, Any]) -> dict[str, Interval]:
    """What criteria and the objective may name, of one contender."""
    found = {
        f"latency_{name}_ms": Interval.from_json(value)
        for name, value in told["batches"][0]["percentiles"].items()
    }
    best = max(told["batches"], key=lambda b: b["throughput"]["low"])["throughput"]
    found["seconds_per_example"] = Interval(1 / best["value"], 1 / best["high"], 1 / best["low"])
    for name in ("artefact_bytes", "resident_bytes", "peak_activation_bytes"):
        if told["memory"].get(name) is not None:
            found[name] = Interval.exact(told["memory"][name])
    if told["cost"] is not None:
        found["cost_per_million"] = Interval.from_json(told["cost"])
    if told["energy"]["joules_per_million"] is not None:
        found["joules_per_million"] = Interval.exact(told["energy"]["joules_per_million"])
    return found


def _told(
    found: Sequence[Timed],
    reference: Sequence[Timed],
    settings: Deployment,
    memory: Mapping[str, Any],
    joules: energy.Reading,
    largest: int,
) -> dict[str, Any]:
    price = cost(found, settings.prices, settings.latency_ms) if settings.prices else None
    spent = joules.joules
    if spent is not None:
        spent = spent / (FEWEST_QUERIES * largest) * MILLION
    return {
        "batches": [
            {
                "batch_size": own.batch_size,
                "queries": len(own.seconds),
                "warm_up": own.dropped,
                "percentiles": {name: i.to_json() for name, i in own.percentiles().items()},
                "throughput": own.throughput.to_json(),
                "speed_up": latency.ratio_interval(own.steady, base.steady).to_json(),
                "shift": own.shift.to_json() if own.shift else None,
            }
            for own, base in zip(found, reference, strict=True)
        ],
        "memory": dict(memory),
        "cost": price.to_json() if price else None,
        "cost_reason": _why_no_cost(settings, price is None),
        "energy": {"joules_per_million": spent, "reason": joules.reason},
    }


def _why_no_cost(settings: Deployment, missing: bool) -> str:
    if settings.prices is None:
        return "no price list is declared (deployment.prices)"
    return f"no batch size stays within {settings.latency_ms:g} ms" if missing else ""


def _batches(inputs: Inputs, size: int) -> list[Batch]:
    """Real batches of just so many rows, of lengths as they are spread over the rows."""
    if inputs.lengths is None:
        if len(inputs) <= size:
            return [inputs.sample(size)]
        starts = np.linspace(0, len(inputs) - size, BATCHES).astype(int)
        return [inputs.batch(slice(start, start + size)) for start in starts.tolist()]
    _, group, counts = np.unique(inputs.lengths, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    usable = np.sort(group[counts[group] >= size])
    if not len(usable):
        return [inputs.sample(size)]
    picked = usable[np.linspace(0, len(usable) - 1, BATCHES).astype(int)]
    return [inputs.batch(np.flatnonzero(group == one)[:size]) for one in picked.tolist()]


@contextmanager
def _bound(settings: Deployment) -> Iterator[None]:
    """Threads and processors as declared, and back."""
    threads, cpus = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(settings.threads)
    try:
        if settings.cpus is not None:
            os.sched_setaffinity(0, settings.cpus)
        yield
    finally:
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(threads)


def _memory(loaded: Loaded, one: Contender, batch: Batch) -> dict[str, Any]:
    """Bytes on disk, resident and at the peak of a batch; null with the reason where unknown."""
    if one.artefact is None or one.scheme is None:
        size = reference_bytes(one.model)
        peak = torch_peak(one.model, batch)
        return {
            "artefact_bytes": size,
            "resident_bytes": size,
            "peak_activation_bytes": peak,
            "reason": "",
            "how": "parameters and buffers; results of operators that are alive at once",
        }
    made = {"artefact_bytes": one.artefact.bytes, "resident_bytes": None,
            "peak_activation_bytes": None}  # fmt: skip
    if one.scheme.backend not in footprint.BACKENDS:
        return made | {"reason": f"{one.scheme.backend} runs inside this process", "how": ""}
    assert loaded.plan.deployment is not None
    with tempfile.TemporaryDirectory() as folder:
        for name, data in one.artefact.files.items():
            Path(folder, name).write_bytes(data)
        given = {"input": batch} if isinstance(batch, torch.Tensor) else dict(batch)
        np.savez(Path(folder, "inputs.npz"), **{n: t.numpy() for n, t in given.items()})
        done = subprocess.run(
            [sys.executable, footprint.__file__, one.scheme.backend, folder,
             str(loaded.plan.deployment.threads), str(Path(folder, "inputs.npz"))],
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return made | {"reason": f"the measuring process failed: {lines[-1]}", "how": ""}
    told = json.loads(done.stdout)
    return made | {
        "resident_bytes": told["resident"],
        "peak_activation_bytes": told["peak"],
        "reason": "",
        "how": "growth and high-water mark of a process of its own, the runtime's buffers included",
    }


class _Alive(TorchDispatchMode):
    """Counts the bytes of storages that operators make, until nothing holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs))
                 if isinstance(t, torch.Tensor)}  # fmt: skip
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = id(storage), storage.nbytes()
                if key not in self._known and key not in given:
                    self._known.add(key)
                    self.held += size
                    self.most = max(self.most, self.held)
                    weakref.finalize(storage, self._gone, key, size)
        return made

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def torch_peak(model: nn.Module, batch: Batch) -> int:
    """The most bytes that the results of a forward pass's operators hold at once, beside parameters
    and inputs."""
    with torch.no_grad(), _Alive() as alive:
        forward(model, batch)
    return alive.most
