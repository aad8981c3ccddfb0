"""What people read: tables and colours on a terminal, plain tab-separated lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from audit.deployment import contenders, missing, natively, truth
from audit.note import criterion_text, determinism_notes, site_text
from audit.store import Store
from flows.logs import as_json, log, to_standard_error
from flows.progress import Reporter, reporting

COLOURS = {"accept": "green", "reject": "red", "inconclusive": "yellow",
           "ok": "green", "warn": "yellow", "fail": "red"}  # fmt: skip


@contextmanager
def progress_bar() -> Iterator[None]:
    """A bar with the time left on a terminal; a line a step elsewhere; with ``HALFSTEP_LOG=json``
    a JSON document an event. On standard error."""
    if as_json():
        to_standard_error()
        with reporting(Reporter(warn=lambda text: log("warning", text=text))):
            yield
        return
    if not sys.stderr.isatty():

        def line(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        with reporting(Reporter(say=line, warn=line)):
            yield
        return
    columns = (BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        to = Reporter(
            expect=lambda examples: bar.update(task, total=examples),
            advance=lambda examples: bar.advance(task, examples),
            say=lambda text: bar.update(task, description=escape(text)),
            warn=lambda text: bar.console.print(escape(text)),
        )
        with reporting(to):
            yield


def print_sweep(result: Mapping[str, Any], store: Store) -> None:
    """Cells, decision, and where to look."""
    say(f"{result['name']} · sweep {result['sweep_id']}")
    for task in result["tasks"]:
        headline = task["headline"]
        say(
            f"{task['name']}: reference {headline} "
            f"{task['reference']['selection']['metrics'][headline]:.4f} on "
            f"{task['splits']['selection']['examples']} examples"
        )
    for override in result["overrides"]:
        say(f"override: {override}")
    for pattern in result["skipped"]:
        say(f"skipped: {pattern}")
    if len(result["tasks"]) == 1:
        _print_cells(result)
    else:
        _print_schemes(result)
    _print_deployment(result)
    _notes(result)
    decision = result["decision"]
    say("")
    say(f"{decision['verdict'].upper()}: {decision['summary']}", style=COLOURS[decision["verdict"]])
    several = len(result["tasks"]) > 1
    for cell in result["confirmation"]:
        for finding in cell["findings"]:
            where = f"{cell['task']}: " if several else ""
            say(f"  {finding['verdict']}: {where}{finding['reason']}")
    say("")
    if result.get("reused"):
        say("Recorded before with the same digests; nothing was run. Use --fresh to run anew.")
    elif result.get("cells_reused"):
        say(f"{result['cells_reused']} cell(s) were recorded before and not run again.")
    seconds = result["seconds"]
    say(
        f"{seconds['total']:.1f} s, of which orchestration and recording "
        f"{seconds['overhead_share']:.0%}"
    )
    say(f"run {result['run_id']} · decision {decision['digest'][:16]}")
    _where(result, store)


def _where(result: Mapping[str, Any], store: Store) -> None:
    """The run's page in the MLflow UI."""
    if store.embedded:
        say(f"look: halfstep ui --store {store.path}, then")
    say(page_of(result, store))
    if "cells" in result:
        runs = _runs_page(result, store)
        say(f"all cells in a table: {runs}?workflowType=machine_learning&viewStateShareKey=audit")


def page_of(result: Mapping[str, Any], store: Store) -> str:
    """The address of the run's page in the MLflow UI."""
    return f"{_runs_page(result, store)}/{result['run_id']}?workflowType=machine_learning"


def _runs_page(result: Mapping[str, Any], store: Store) -> str:
    server = "http://127.0.0.1:5000" if store.embedded else store.shown_uri.rstrip("/")
    return f"{server}/#/experiments/{result['experiment_id']}/runs"


def _print_cells(result: Mapping[str, Any]) -> None:
    """One row a cell: for sweeps of one task."""
    headline = result["tasks"][0]["headline"]
    base = result["reference"]["selection"]["metrics"]["weight_bytes"]
    rows = [
        [
            cell["name"],
            cell["verdict"] if cell["status"] == "finished" else cell["status"],
            f"{cell['metrics'][headline]:.4f}" if headline in cell["metrics"] else "-",
            _ratio(cell, base),
            _first(cell["reasons"]),
        ]
        for cell in result["cells"]
    ]
    table(["cell", "verdict", headline, "size", "why"], rows)


def _print_deployment(result: Mapping[str, Any]) -> None:
    """What real kernels took beside the reference, and whether the simulation was right."""
    found = result["stages"].get("deployment")
    if found is None:
        return
    rows = contenders(found)
    names = list(rows[0]["percentiles"])
    say("")
    say(
        f"on {found['timing']['machine']['name']} ({natively(found['timing']['machine'])}), "
        f"{found['timing']['protocol']['threads']} thread(s), in turns:"
    )
    lines = [
        [
            row["name"],
            *(f"{row['percentiles'][n]['value']:.3g}" if n in row["percentiles"] else "-"
              for n in names),
            f"{row['speed_up']['value']:.2f}×",
            f"{row['throughput']['value']:,.0f} ({row['best_batch']})",
            f"{row['offline_speed_up']['value']:.2f}×",
            f"{row['memory']['artefact_bytes']:,}",
        ]
        for row in rows
    ]  # fmt: skip
    headers = ["contender", *(f"{n} ms" for n in names), "single", "examples/s (batch)", "offline",
         "bytes"]  # fmt: skip
    table(headers, lines)
    for row in rows[1:]:
        say(row["name"])
        for text in truth(row):
            say(f"  {text}")
    for text in [*found["timing"]["notes"], *missing(rows)]:
        say(f"note: {text}")


def _print_schemes(result: Mapping[str, Any]) -> None:
    """One row a scheme, a column a task; then why each cell fell as it did."""
    base = result["reference"]["selection"]["metrics"]["weight_bytes"]
    cells = {(cell["name"], cell["task"]): cell for cell in result["cells"]}
    rows = []
    for scheme in result["schemes"]:
        own = [(task, cells[scheme["name"], task["name"]]) for task in result["tasks"]]
        rows.append(
            [
                scheme["name"],
                scheme["verdict"],
                _ratio(own[0][1], base),
                *(_outcome(task, cell) for task, cell in own),
            ]
        )
    heads = [f"{task['name']} ({task['headline']})" for task in result["tasks"]]
    table(["cell", "verdict", "size", *heads], rows)
    say("")
    for cell in result["cells"]:
        if cell["verdict"] != "accept":
            say(f"{cell['verdict']}: {cell['name']} · {cell['task']}: {_first(cell['reasons'])}")


def _outcome(task: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    if cell["status"] != "finished":
        return str(cell["status"])
    value = cell["metrics"].get(task["headline"])
    return f"{cell['verdict']} {value:.4f}" if value is not None else str(cell["verdict"])


def _first(reasons: Sequence[str]) -> str:
    return reasons[0] if reasons else ""


def _ratio(cell: Mapping[str, Any], base: float) -> str:
    return f"{cell['weight_bytes'] / base:.3f}" if cell["weight_bytes"] else "-"


def _notes(result: Mapping[str, Any]) -> None:
    """What was named on the way, once each."""
    counted: dict[str, int] = {}
    for cell in result["cells"]:
        for note in cell["notes"]:
            counted[note] = counted.get(note, 0) + 1
    notes = [*result["notes"], *determinism_notes(result)]
    notes += [*result["calibration"]["notes"], *result["batch_norm"]["notes"]]
    notes += [f"{note} ({n} cells)" for note, n in counted.items()]
    for note in notes[:12]:
        say(f"note: {note}")
    if len(notes) > 12:
        say(f"note: and {len(notes) - 12} more; see certificate.csv of the cells")


def print_sensitivity(found: Mapping[str, Any], store: Store) -> None:
    """Every site, the most costly first."""
    say(
        f"{found['scheme']}: output error {found['output_error']:.3g} of the output's power "
        f"(its sites add up to {found['sum_of_errors']:.3g}), {found['metric']} loss "
        f"{found['metric_loss']:+.4f}{_interval(found, 'metric_loss')} on {found['examples']} "
        f"calibration examples of {found['task']}"
    )
    table(
        ["rank", "site", "treated as", "error alone", "gone without it",
         f"{found['metric']} loss alone"],
        [[f"{row['rank']} ({row['rank_low']}-{row['rank_high']})", site_text(row), row["spec"],
          f"{row['output_error']:.3g}", f"{row['error_gained_back']:.0%}",
          f"{row['metric_loss']:+.4f}{_interval(row, 'metric_loss')}"]
         for row in found["sites"]],
    )  # fmt: skip
    if not found["reused_passes"]:
        say("note: this model's code could not be taken up half way; every pass was run whole")
    say(f"intervals hold 90 %; run {found['run_id']}: sensitivity.png, sensitivity.csv")
    _where(found, store)


def _interval(found: Mapping[str, Any], name: str) -> str:
    low, high = found[f"{name}_low"], found[f"{name}_high"]
    return "" if low is None else f" [{low:+.4f}, {high:+.4f}]"


def print_cell(found: Mapping[str, Any]) -> None:
    """One recorded run that is not a sweep."""
    say(f"{found['name']} · {found['kind']} of sweep {found['sweep_id']} · {found['status']}")
    for line in found["note"].splitlines():
        say(line)
    table(["metric", "value"], [[k, f"{v:.6g}"] for k, v in sorted(found["metrics"].items())])


def print_list(found: Mapping[str, Any]) -> None:
    """All sweeps."""
    rows = [
        [
            line["sweep_id"],
            line["name"],
            time.strftime("%Y-%m-%d %H:%M", time.localtime(line["started"] / 1000)),
            line["verdict"] or line["status"],
            line["cell"] or "-",
            line["signed_off"] or "-",
            (line["subject_digest"] or "")[:12],
        ]
        for line in found["sweeps"]
    ]
    table(["sweep", "name", "started", "verdict", "cell", "signed off", "subject"], rows)


def print_forecast(found: Mapping[str, Any]) -> None:
    """What a sweep would do."""
    say(
        f"{found['name']}: {len(found['cells'])} cells, {len(found['sites']['weights'])} weights "
        f"and {len(found['sites']['activations'])} activations to quantize, "
        f"{found['calibration_rows']} calibration rows"
    )
    for task in found["tasks"]:
        say(
            f"{task['name']} ({task['evaluator']}): "
            + ", ".join(f"{name} {n}" for name, n in task["splits"].items())
            + " examples"
        )
        for criterion in task["criteria"]:
            say(f"criterion: {criterion_text(criterion)}")
            for outlook in task["outlook"]:
                if outlook["criterion"] == criterion:
                    style = None if outlook["decidable"] else COLOURS["reject"]
                    say(f"  on {outlook['split']}: {outlook['text']}", style=style)
    if found["duplicates"]:
        say(f"note: {found['duplicates']} combination(s) spell a scheme that is there already")
    for note in found["notes"]:
        say(f"note: {note}")
    for label in found["mixed"]:
        say(f"to be found: {label}")
    if found["evaluation"] == "early":
        say("cells stop once their verdict is certain; the cost below is without that")
    if found["deployment"]:
        settings = found["deployment"]
        sizes = ", ".join(map(str, settings["batch_sizes"]))
        say(
            f"deployment for {settings['target']}: {settings['queries']} single queries of each "
            f"contender, batches of {sizes}, {settings['threads']} thread(s)"
        )
    if found["sensitivity"]:
        say(f"sensitivity of the chosen cell on {found['sensitivity']} calibration examples")
    for override in found["overrides"]:
        say(f"override: {override}")
    for pattern in found["skipped"]:
        say(f"skipped: {pattern}")
    rows = [
        [c["name"], f"{c['weight_bytes']:,}", f"{c['weight_ratio']:.3f}",
         f"{c['bits_per_weight']:.2f}", f"{c['bit_operations_ratio']:.3f}"]
        for c in found["cells"]
    ]  # fmt: skip
    table(["cell", "weight bytes", "size", "bits/weight", "bit operations"], rows)
    parameters = sum(p["parameters"] for p in found["coverage"]) or 1
    macs = sum(p["macs"] for p in found["coverage"]) or 1
    say(f"sites, as {found['cells'][0]['name']} treats them:")
    table(
        ["place", "kind", "parameters", "MACs", "weights", "activations"],
        [
            [p["place"], p["kind"], f"{p['parameters'] / parameters:.1%}",
             f"{p['macs'] / macs:.1%}", p["weights"] or "-", p["activations"] or "-"]
            for p in found["coverage"] if p["quantized"]
        ],
    )  # fmt: skip
    left = [p for p in found["coverage"] if not p["quantized"]]
    if left:
        say("at full precision:")
    table(
        ["place", "kind", "parameters", "MACs", "because"],
        [
            [p["place"], p["kind"], f"{p['parameters'] / parameters:.1%}",
             f"{p['macs'] / macs:.1%}", p["reason"]]
            for p in left
        ],
    )  # fmt: skip
    total = sum(found["examples_to_run"].values())
    seconds = max(1, round(found["estimated_seconds"]))
    say(
        f"cost: {total:,} rows to run, about {seconds} s at full precision's speed, training "
        "not counted; nothing was written"
    )


def print_checks(found: Mapping[str, Any]) -> None:
    """The doctor's findings."""
    table(
        ["check", "status", "found"],
        [[c["check"], c["status"], c["found"]] for c in found["checks"]],
    )


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    _console().print(escape(text), style=style)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not sys.stdout.isatty():
        print("\t".join(headers))
        for row in rows:
            print("\t".join(row))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*[_coloured(value) for value in row])
    Console(highlight=False).print(table)


def _coloured(value: str) -> str:
    colour = COLOURS.get(value.split(" ")[0])
    return f"[{colour}]{value}[/]" if colour else escape(value)
