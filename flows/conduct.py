"""The sweep itself, as a plain function over steps: it runs with and without Prefect."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from audit import environment, spool
from audit.environment import private
from audit.issuer import NOBODY, Issuer
from audit.recorder import Recorder
from audit.store import SWEEP_ID, Store, SweepFolder
from audit.termination import finishing
from flows.clock import Clock
from flows.closing import close, shown_cell
from flows.crew import Alone, Crew, References
from flows.logs import bound, log
from flows.opening import open_sweep
from flows.progress import reporter
from halfstep.errors import first_line
from halfstep.scheme import Scheme
from tasks.data import Data
from tasks.deployment import reference_measured, with_measured
from tasks.evaluated import Evaluated
from tasks.load import Loaded
from tasks.plan import Plan
from tasks.steps import PLAIN, Steps

RESUME = "What was finished is kept: run the same command to go on."


def conduct(
    plan: Plan,
    config_text: str,
    store: Store,
    *,
    fresh: bool = False,
    steps: Steps = PLAIN,
    crew: Crew | None = None,
    issuer: Issuer = NOBODY,
    registry: Store | None = None,
    times: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs a sweep, or what is left of it, and returns its result (see `flows.result`).

    Args:
        crew: who evaluates; this process by itself where nobody is named.
        issuer: who answers for the decision, and the key that signs it.
        registry: the tracking store that a subject may come from; ``store`` by default.
        times: what timing came to in a sweep that is reproduced.

    Raises:
        UserError: config, model, data or store are at fault.
    """
    clock = Clock()
    store.check_writable()
    _check_answers(store)
    with ThreadPoolExecutor(1) as beside, clock.work("load"):
        environ = beside.submit(environment.capture)
        reporter().say("loading data and subject")
        loaded = steps.load(plan, store, registry)
    with store.writing(f"sweep of {plan.name!r}"):
        folder = store.sweep(loaded.sweep_key, fresh, _taken(store, loaded.sweep_key, fresh))
        finished = _finished(folder, store)
        if finished is not None:
            log("sweep.reused", sweep=folder.sweep_id, run_id=finished["run_id"])
            return finished | {"reused": True}
        spool.sweep_unfinished(folder.path)
        recorder = Recorder(store, plan.name, folder.sweep_id, issuer, reporter().warn)
        with bound(sweep=folder.sweep_id, experiment=plan.name):
            try:
                elsewhere = None if store.embedded else recorder.decided()
                if elsewhere is not None:
                    log("sweep.reused")
                    spool.keep(folder.result, elsewhere)
                    return json.loads(elsewhere) | {"reused": True}
                log("sweep.started", subject=loaded.subject.digest, cells=plan.cells)
                result = _sweep(
                    loaded, config_text, environ, folder, recorder, steps, crew or Alone(steps),
                    clock, times,
                )  # fmt: skip
                log_end(result)
                return result
            except BaseException as error:
                log("sweep.stopped", level=logging.ERROR, reason=why(error))
                with finishing():
                    recorder.suspend(f"Stopped before its end ({why(error)}). {RESUME}")
                raise
            finally:
                recorder.close()


def _sweep(
    loaded: Loaded,
    config_text: str,
    environ: Future[dict[str, Any]],
    folder: SweepFolder,
    recorder: Recorder,
    steps: Steps,
    crew: Crew,
    clock: Clock,
    times: Mapping[str, Any] | None,
) -> dict[str, Any]:
    plan, report = loaded.plan, reporter()
    report.expect(planned_examples(loaded))
    with clock.overhead("record"):
        parent = open_sweep(loaded, config_text, environ.result(), folder, recorder)

    names = [task.name for task in plan.tasks]

    def recorded(done: Iterable[Evaluated], stage: str) -> Iterator[Evaluated]:
        for one in done:
            crew.book(clock, stage, one.seconds)
            recorder.child(one.record, one.folder)
            log_piece(one)
            recorder.check()
            yield one

    report.say("reference")
    wanted = [(task, split) for split in ("selection", "confirmation") for task in names]
    found = recorded(crew.references(loaded, wanted, folder, report), "reference")
    measured = dict(zip(wanted, found, strict=True))
    references: References = {
        split: {task: measured[task, split] for task in names}
        for split in ("selection", "confirmation")
    }
    report.say("calibrating")
    calibrated = crew.calibrate(loaded, references["selection"], folder, report)
    crew.book(clock, "calibrate", calibrated.seconds)
    if calibrated.record is not None:
        recorder.child(calibrated.record, calibrated.folder)

    def run(schemes: Sequence[Scheme], split: str, stage: str) -> list[dict[str, Evaluated]]:
        jobs = [(scheme, task, split) for scheme in schemes for task in names]
        done = recorded(
            crew.cells(loaded, calibrated.treatments, jobs, references, folder, report), stage
        )
        return [dict(zip(names, islice(done, len(names)), strict=True)) for _ in schemes]

    schemes, extra = list(plan.schemes), []
    if plan.mixed is not None:
        report.say("mixed precision: measuring every choice")
        with clock.work("mixed"):
            found, record, place = steps.mix(loaded, calibrated.treatments, folder)
        recorder.child(record, place)
        extra.append(record)
        schemes += [scheme for scheme in found if scheme not in schemes]
    cells = list(zip(schemes, run(schemes, "selection", "cells"), strict=True))
    deployed = None
    if plan.deploys:
        with clock.work("deployment"):
            deployed, place = steps.deploy(
                loaded, calibrated.treatments, cells, folder, report.say, times
            )
        recorder.child(deployed, place)
        extra.append(deployed)
        detail = deployed.detail
        cells = [(scheme, with_measured(detail, scheme, done)) for scheme, done in cells]
        references = {s: reference_measured(detail, done) for s, done in references.items()}
    report.say("judging")
    with clock.work("decide"):
        judgements, chosen = steps.select(loaded, references["selection"], cells)
    confirmed: dict[str, Evaluated] = {}
    if chosen is not None:
        report.say(f"confirming {chosen.name}")
        (confirmed,) = run([chosen], "confirmation", "confirm")
        if deployed is not None:
            confirmed = dict(with_measured(deployed.detail, chosen, confirmed))
    with clock.work("decide"):
        decision = steps.conclude(loaded, judgements, chosen, references["confirmation"], confirmed)
    variant = None
    if chosen is not None:
        report.say("writing the variant")
        with clock.overhead("record"):
            variant = steps.variant(loaded, calibrated.treatments, chosen, folder)
    if plan.sensitivity is not None:
        scheme, _ = shown_cell(loaded, decision, cells)
        report.say(f"sensitivity of {scheme.name}")
        with clock.work("sensitivity"):
            record, place = steps.probe(
                loaded, calibrated.treatments, scheme, plan.sensitivity, folder
            )
        recorder.child(record, place)
        extra.append(record)
    report.say("recording")
    clock.lanes = crew.lanes
    result: dict[str, Any] = steps.record(
        close,
        loaded,
        decision,
        references,
        calibrated.record,
        extra,
        cells,
        confirmed,
        variant,
        parent,
        folder,
        recorder,
        clock,
        dict(calibrated.shelf.taken) if calibrated.shelf else {},
    )
    return result


def log_piece(one: Evaluated) -> None:
    """An evaluation that is done."""
    record = one.record
    log(
        f"{record.kind}.{record.status}",
        cell=record.name,
        key=record.key,
        task=record.tags["task"],
        split=record.tags["split"],
        seconds=round(one.seconds, 3),
        reused=one.reused,
        reused_from=record.tags.get("reused_from"),
    )


def log_end(result: Mapping[str, Any]) -> None:
    """The decision, and the seconds of every stage."""
    decision = result["decision"]
    log(
        "sweep.finished",
        run_id=result["run_id"],
        verdict=decision["verdict"],
        cell=decision["cell"],
        decision=decision["digest"],
        seconds=result["seconds"],
    )


def why(error: BaseException) -> str:
    """Why a sweep stops, in a word."""
    if not isinstance(error, Exception):
        return "somebody ended it"
    return private(first_line(error))


def planned_examples(loaded: Loaded) -> int:
    """Rows that all passes of a sweep see, for the progress bar."""
    return sum(passes_of(loaded.plan, loaded.data).values())


def passes_of(plan: Plan, data: Data) -> dict[str, int]:
    """Rows that each kind of pass runs the model on."""
    rows = {
        split: sum(len(found.splits[split].inputs) for found in data.tasks.values())
        for split in ("selection", "confirmation")
    }
    return {
        "calibration": calibration_passes(plan.treated) * len(data.calibration),
        "reference": 2 * rows["selection"] + rows["confirmation"],
        "cells": plan.cells // len(plan.tasks) * rows["selection"],
        "confirmation": rows["confirmation"],
    }


def calibration_passes(schemes: Sequence[Scheme]) -> int:
    """Passes over the calibration data: one for all static ranges, one where corrections need to
    know more of the inputs, one for each model that corrections rewrite."""
    static = any(scheme.needs_sketches for scheme in schemes)
    moments = any(scheme.corrections for scheme in schemes)
    rewrites = {
        tuple(c for c in scheme.corrections if c.stage == "rewrite")
        for scheme in schemes
        if scheme.needs_sketches
    } - {()}
    return static + moments + len(rewrites)


def _check_answers(store: Store) -> None:
    """Raises UserError where a tracking server does not answer: better now than after an hour."""
    if not store.embedded:
        from audit.lookup import reachable

        reachable(store)


def _taken(store: Store, key: str, fresh: bool) -> int:
    """The highest number that another machine gave to this sweep; asked where a new one is due."""
    if store.embedded or not fresh:
        return 0
    from audit.lookup import highest_number

    return highest_number(store, key[:SWEEP_ID])


def _finished(folder: SweepFolder, store: Store) -> dict[str, Any] | None:
    """The result of a sweep that is complete, here and in the tracking store."""
    if not folder.result.exists():
        return None
    from audit.trail import has_run

    result: dict[str, Any] = json.loads(folder.result.read_bytes())
    return result if has_run(store, result["run_id"]) else None
