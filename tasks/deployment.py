"""Deployment: every cell that a backend runs, beside its simulation, the reference and the clock.

Simulation says what a scheme does to the outputs; the artefact says whether that is so, and what it
buys. Both are compared example by example, and site by site where the backend shows its codes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from audit import encode, spool
from audit.spool import Record
from audit.store import SweepFolder
from backends import Deployed, NodeRun, backend, hardware
from evaluators.metric import Outcomes
from evaluators.stopping import EXAMPLE
from halfstep.activations import StaticQuantizer
from halfstep.apply import Treatment
from halfstep.batches import Batch, first
from halfstep.formats import Uniform
from halfstep.interval import Interval
from halfstep.scheme import Scheme
from halfstep.treatments import CERTIFIED_EXAMPLES, Treatments
from tasks import timing
from tasks.decide import Evaluations
from tasks.deployed import artefact, opened
from tasks.evaluated import Evaluated
from tasks.load import Loaded
from tasks.plan import Task
from tasks.timing import REFERENCE, Contender

Cells = Sequence[tuple[Scheme, Evaluations]]
GAP = "simulation_gap"
COUNTED_OTHERWISE = ("resident_bytes", "peak_activation_bytes")
"""A backend's are read of a process, torch's counted: no ratio of the two says anything."""


def run_deployment(
    loaded: Loaded,
    treatments: Treatments,
    cells: Cells,
    folder: SweepFolder,
    progress: Callable[[str], None] = lambda what: None,
    times: Mapping[str, Any] | None = None,
) -> tuple[Record, Path]:
    """Compares and times every deployed cell, and commits the record.

    Args:
        times: what timing came to before, where a sweep is reproduced: a clock is not.
    """
    schemes = [scheme for scheme, _ in cells if scheme.deployed]
    assert loaded.plan.deployment is not None
    key = loaded.key(
        kind="deployment",
        schemes=[[s.to_json(), backend(s.backend).version()] for s in schemes],
        deployment=loaded.plan.deployment.to_json(),
        sweep=folder.sweep_id,
    )
    place = folder.place("deployment", key)
    record = spool.recall(place)
    if record is not None:
        return record, place
    started = time.time()
    by_scheme = dict(cells)
    found, sites, nodes = {}, [], []
    contenders = [Contender(REFERENCE, loaded.subject.model)]
    for scheme in schemes:
        progress(f"comparing {scheme.name}")
        if any(done.outcomes is None for done in by_scheme[scheme].values()):
            continue  # it failed: its record says why
        model = opened(loaded, treatments, scheme, loaded.plan.deployment.threads)
        own_sites, own_nodes = _look_inside(loaded, treatments, scheme, model)
        made = artefact(loaded, treatments, scheme)
        contenders.append(Contender(scheme.name, model, scheme, made))
        agreement = {
            task: _agreement(loaded.task(task), done, by_scheme[scheme.simulation][task])
            for task, done in by_scheme[scheme].items()
        }
        treated = treatments.for_scheme(scheme)
        found[scheme.name] = {
            "backend": scheme.backend,
            "version": backend(scheme.backend).version(),
            "artefact": {"digest": made.digest, "bytes": made.bytes, "files": sorted(made.files)},
            "why_simulated": hardware.target(loaded.plan.deployment.target).why_simulated(
                scheme, loaded.sites
            ),
            "agreement": agreement,
            "sites": _sites_summary(own_sites),
            "nodes": _nodes_summary(own_nodes),
            "causes": _causes(
                backend(scheme.backend).full_precision, treated, own_sites, own_nodes, agreement
            ),
        }
        sites += [{"cell": scheme.name, **row} for row in own_sites]
        nodes += [{"cell": scheme.name, **node.to_json()} for node in own_nodes]
    columns: dict[str, np.ndarray] = {}
    if times is None:
        taken = timing.take_times(loaded, contenders, progress)
        times, columns = taken.detail, taken.columns
    detail = {"schemes": found, "timing": dict(times)}
    files = {
        "sites.csv": encode.csv_bytes(sites),
        "nodes.csv": encode.csv_bytes(nodes),
        "latency.csv": encode.csv_bytes(_latency_rows(times)),
        **{
            f"times/{i:02d}.parquet": encode.parquet_bytes({"seconds": values})
            for i, values in enumerate(columns.values())
        },
        "times.json": encode.json_bytes({f"{i:02d}": name for i, name in enumerate(columns)}),
    }
    record = Record(
        "deployment",
        key,
        "deployment",
        metrics=_metrics(times),
        detail=detail,
        started=started,
    )
    return spool.commit(place, record, {n: data for n, data in files.items() if data}), place


def with_measured(detail: Mapping[str, Any], scheme: Scheme, done: Evaluations) -> Evaluations:
    """A scheme's cells with what was measured of it."""
    told = detail["timing"]["contenders"].get(scheme.name)
    if not scheme.deployed or told is None:
        return done
    own = timing.measured(told)
    agreement = detail["schemes"][scheme.name]["agreement"]
    gaps = {
        task: {GAP: Interval.exact(found["gap"])}
        for task, found in agreement.items()
        if found["gap"] is not None
    }
    return {task: replace(one, measured=own | gaps.get(task, {})) for task, one in done.items()}


def reference_measured(detail: Mapping[str, Any], done: Evaluations) -> Evaluations:
    """The reference with what was measured of it: not its memory, which was counted otherwise."""
    own = timing.measured(detail["timing"]["contenders"][REFERENCE])
    own = {name: found for name, found in own.items() if name not in COUNTED_OTHERWISE}
    return {task: replace(one, measured=own) for task, one in done.items()}


def _agreement(task: Task, done: Evaluated, simulated: Evaluated) -> dict[str, Any]:
    """The real kernels' outcomes beside the simulated ones, example by example."""
    ours, theirs = done.outcomes, simulated.outcomes
    if ours is None or theirs is None:
        return {"examples": 0, "differing": None, "gap": None}
    if EXAMPLE in theirs:  # the simulation stopped once its verdict was certain
        ours = ours.take(theirs[EXAMPLE])
    metrics = task.evaluator.metrics
    headline, closeness = metrics[task.evaluator.headline], metrics[task.evaluator.closeness]
    best = 1.0 if closeness.higher_is_better else 0.0
    return {
        "examples": len(ours),
        "differing": _differing(ours, theirs) / max(len(ours), 1),
        "closeness": closeness.name,
        "gap": _number(abs(closeness.loss(closeness.value(ours, theirs), best))),
        "metric": headline.name,
        "headline": _number(headline.value(ours, ours)),
        "simulated": _number(headline.value(theirs, theirs)),
    }


def _number(value: float) -> float | None:
    """None where a metric has no value on these examples: JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def _differing(ours: Outcomes, theirs: Outcomes) -> int:
    """Examples of which any number differs in any bit."""
    differs = np.zeros(len(ours), bool)
    for name, values in ours.columns.items():
        if name not in theirs or values.dtype.kind not in "fiub":
            continue
        other = theirs[name]
        if values.shape != other.shape:
            return len(ours)
        same = values == other
        if values.dtype.kind == "f":
            same |= np.isnan(values) & np.isnan(other)
        differs |= ~same.reshape(len(values), -1).all(axis=1)
    return int(differs.sum())


def _look_inside(
    loaded: Loaded, treatments: Treatments, scheme: Scheme, model: Deployed
) -> tuple[list[dict[str, Any]], list[NodeRun]]:
    """Codes of both at every site, and the kernels that ran, on a few calibration examples."""
    batch: Batch = first(loaded.calibration.sample(CERTIFIED_EXAMPLES), CERTIFIED_EXAMPLES)
    theirs = model.codes(batch)
    rows = []
    if theirs:
        treated = treatments.for_scheme(scheme)
        ours = treatments.integers.codes(loaded.model, treated, batch)
        for site, codes in ours.items():
            if site in theirs:
                rows.append(_site_row(site, treated, codes, theirs[site]))
    return rows, model.nodes(batch)


def _site_row(site: str, treated: Treatment, ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    quantizer = treated.activations[site].quantizer
    assert isinstance(quantizer, StaticQuantizer)
    steps = (theirs.int() - quantizer.unsigned_shift - ours).abs()
    return {
        "site": site,
        "codes": steps.numel(),
        "differing": int((steps > 0).sum()),
        "largest_steps": int(steps.max()),
    }


def _sites_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not rows:
        return {"compared": 0, "reason": "the backend does not show the codes between its kernels"}
    differing = [row for row in rows if row["differing"]]
    return {
        "compared": len(rows),
        "codes": sum(row["codes"] for row in rows),
        "differing": sum(row["differing"] for row in rows),
        "largest_steps": max(row["largest_steps"] for row in rows),
        "first_differing": differing[0]["site"] if differing else None,
    }


def _nodes_summary(nodes: Sequence[NodeRun]) -> dict[str, Any]:
    products = [node for node in nodes if node.precision != "other"]
    low = [node for node in products if node.precision == "int8"]
    total = sum(node.microseconds for node in nodes)
    return {
        "products": len(products),
        "int8": len(low),
        "full_precision": [node.name for node in products if node.precision != "int8"],
        "int8_share_of_time": sum(n.microseconds for n in low) / total if total else None,
        "kinds": sorted({f"{node.kind} {node.precision}" for node in products}),
    }


def _causes(
    because: str,
    treated: Treatment,
    sites: Sequence[Mapping[str, Any]],
    nodes: Sequence[NodeRun],
    agreement: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Why the deployed cell may differ from its simulation, from what was seen of it."""
    if not any(found["differing"] for found in agreement.values()):
        return []
    causes = []
    full = [node.name for node in nodes if node.precision == "fp32"]
    products = sum(node.precision != "other" for node in nodes)
    if full:
        causes.append(
            f"{len(full)} of {products} products ran at full precision, by the session's own "
            f"profile ({', '.join(full[:6])}{' …' if len(full) > 6 else ''}; {because}), and add "
            "up floats in an order of their own, where the simulation adds integers exactly"
        )
    if len(full) < products and hardware.INT8 not in hardware.here().arithmetic:
        causes.append(
            "this processor has no 8-bit dot products: kernels of unsigned by signed codes may "
            "saturate at 16 bits"
        )
    restricted = [
        site
        for site, found in treated.activations.items()
        if isinstance(found.quantizer, StaticQuantizer)
        and isinstance(fmt := found.quantizer.qparams.format, Uniform)
        and fmt.symmetric
        and fmt.quant_min == -(2 ** (fmt.bits - 1)) + 1
    ]
    if restricted:
        causes.append(
            f"{len(restricted)} activation(s) use codes down to -127; the kernel's go one further, "
            "so values beyond the range may come out one step lower"
        )
    first_site = next((row for row in sites if row["differing"]), None)
    if not causes and first_site is None:
        causes.append(
            "float operations between the products (norms, activation functions, sums) round in "
            "another order"
        )
    if first_site is not None:
        causes.append(
            f"the first site whose codes differ is {first_site['site']}: "
            f"{first_site['differing']:,} of {first_site['codes']:,}, by at most "
            f"{first_site['largest_steps']} step(s); what enters it was rounded otherwise by the "
            "float operations before it, and each difference moves what comes after"
        )
    return causes


def _latency_rows(times: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "contender": name,
            "batch_size": batch["batch_size"],
            "queries": batch["queries"],
            "warm_up": batch["warm_up"],
            **{
                f"{q}_{bound}_ms": batch["percentiles"].get(q, {}).get(bound, "")
                for q in told["batches"][0]["percentiles"]
                for bound in ("value", "low", "high")
            },
            **{f"throughput_{b}": batch["throughput"][b] for b in ("value", "low", "high")},
            **{f"speed_up_{b}": batch["speed_up"][b] for b in ("value", "low", "high")},
        }
        for name, told in times["contenders"].items()
        for batch in told["batches"]
    ]


def _metrics(times: Mapping[str, Any]) -> dict[str, float]:
    """Of the reference: each cell's own stand on its run."""
    told = timing.measured(times["contenders"][REFERENCE])
    return {f"reference_{name}": interval.value for name, interval in told.items()}
