"""The command line: `halfstep COMMAND …`."""

from __future__ import annotations

import atexit
import errno
import gc
import signal
import sys
from typing import Annotated, NoReturn

import typer

from audit.termination import Stopped, listen
from flows import governing, keeping
from flows.options import (
    BAD_INPUT,
    BY_SIGNAL,
    DEFAULT_STORE,
    NOT_ACCEPTED,
    NOT_COMPARABLE,
    TAMPERED,
    Address,
    Author,
    Config,
    DepotOption,
    Json,
    Key,
    RunnerOption,
    StoreOption,
    Workers,
    emit,
    existing,
)
from halfstep.errors import NotComparable, Tampered, UserError

LISTED = 50
_STORAGE_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EACCES)

app = typer.Typer(
    name="halfstep",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"halfstep {version('halfstep')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Shows the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Post-training quantization as an auditable process."""


@app.command()
def plan(config: Config, store: StoreOption = DEFAULT_STORE, as_json: Json = False) -> None:
    """Shows cells, sites, coverage and estimated cost; writes nothing."""
    from audit.store import Store
    from flows.config import read_plan
    from flows.forecast import forecast
    from flows.show import print_forecast

    found = forecast(read_plan(config), Store(store))
    emit(found, as_json, print_forecast)


@app.command()
def sweep(
    config: Config,
    store: StoreOption = DEFAULT_STORE,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run anew; reuse nothing.")] = False,
    require_accept: Annotated[
        bool, typer.Option("--require-accept", help="Exit with 3 when no cell was accepted.")
    ] = False,
    runner: RunnerOption = "local",
    address: Address = "",
    workers: Workers = 2,
    depot: DepotOption = "",
    author: Author = "",
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Runs the matrix, decides, records everything. Run it again to take up where it stopped."""
    from audit.store import Store
    from flows.launch import Launch, launch
    from flows.runners import Runner
    from flows.show import print_sweep, progress_bar

    by = Runner(runner, address, workers, depot)
    with progress_bar():
        result = launch(Launch(config, store, fresh, author, key, by))
    emit(result, as_json, lambda found: print_sweep(found, Store(store)))
    if require_accept and result["decision"]["verdict"] != "accept":
        raise typer.Exit(NOT_ACCEPTED)


@app.command()
def sensitivity(
    config: Config,
    cell: Annotated[
        str, typer.Option(help="Name of a cell, or a part of one; by default the first.")
    ] = "",
    examples: Annotated[int, typer.Option(help="Calibration examples to probe on.", min=8)] = 128,
    author: Author = "",
    key: Key = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Shows what each site of a cell costs alone, and what giving it back would gain."""
    from audit.issuer import issuer
    from audit.store import Store
    from flows.config import read_plan
    from flows.sensitivity import sensitivity as analyse
    from flows.show import print_sensitivity, progress_bar

    with progress_bar():
        found = analyse(read_plan(config), Store(store), cell, examples, issuer(author, key))
    emit(found, as_json, lambda result: print_sensitivity(result, Store(store)))


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="Run id, sweep id or its start.")] = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Shows a recorded sweep, or one of its cells; without an argument the newest sweep."""
    from audit.lookup import find
    from flows.show import print_cell, print_sweep

    held = existing(store)
    found = find(held, run)
    if "cells" in found:
        emit(found, as_json, lambda result: print_sweep(result, held))
    else:
        emit(found, as_json, print_cell)


@app.command(name="list")
def list_(
    every: Annotated[
        bool, typer.Option("--all", help=f"All of them, not the newest {LISTED} only.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Lists recorded sweeps, newest first."""
    from audit.lookup import sweeps
    from flows.show import print_list

    found = sweeps(existing(store), None if every else LISTED)
    emit(found, as_json, print_list)
    if not every and len(found["sweeps"]) == LISTED:
        sys.stderr.write(f"the newest {LISTED}; --all lists the others too\n")


@app.command()
def watch(
    config: Config,
    interval: Annotated[
        float, typer.Option(help="Seconds between two looks at the registry.", min=0.1)
    ] = 60.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look once, sweep what is new, end.")
    ] = False,
    since: Annotated[
        int | None,
        typer.Option(help="First version to sweep when the watch begins; else the newest.", min=1),
    ] = None,
    listen: Annotated[
        str, typer.Option(help="HOST:PORT to be told on by MLflow; see HALFSTEP_WEBHOOK_SECRET.")
    ] = "",
    announce: Annotated[
        str, typer.Option(help="The https address under which MLflow's server reaches --listen.")
    ] = "",
    store: StoreOption = DEFAULT_STORE,
    runner: RunnerOption = "local",
    address: Address = "",
    workers: Workers = 2,
    depot: DepotOption = "",
    author: Author = "",
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Sweeps each new version of the config's registered model, once, and says what became of the
    scheme that was decided for before."""
    from flows.launch import Launch
    from flows.runners import Runner
    from flows.show import progress_bar
    from flows.show_watch import event_printer
    from flows.watch import Watcher, receiving

    by = Launch(config, store, False, author, key, Runner(runner, address, workers, depot))
    by.runner.check()
    watcher = Watcher(by, since=since, told=event_printer(as_json))
    with progress_bar(), receiving(watcher, listen, announce):
        watcher.run(interval, once)


@app.command()
def schedule(
    config: Config,
    cron: Annotated[
        str, typer.Option(help="When: a cron line, as in '0 3 * * *': at three every night.")
    ] = "",
    timezone: Annotated[str, typer.Option(help="Of the cron line.")] = "UTC",
    name: Annotated[str, typer.Option(help="Of the deployment; the config's by default.")] = "",
    store: StoreOption = DEFAULT_STORE,
    runner: RunnerOption = "local",
    address: Address = "",
    workers: Workers = 2,
    depot: DepotOption = "",
    author: Author = "",
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Serves the sweep by the clock, one run at a time; without --cron, shows how that stands."""
    from flows.launch import Launch
    from flows.runners import Runner
    from flows.schedule import Scheduled, serve, standing, tell_missed
    from flows.show_watch import print_standing

    started = Launch(config, store, False, author, key, Runner(runner, address, workers, depot))
    wanted = Scheduled(started, cron or "0 0 * * *", timezone, name)
    wanted.check()
    if not cron:
        emit(standing(wanted.deployment), as_json, print_standing)
        return
    try:
        found = standing(wanted.deployment)
    except UserError:
        pass  # served for the first time
    else:
        emit(found, as_json, print_standing)
        tell_missed(found)
    sys.stderr.write(
        f"serving {wanted.deployment!r} at {cron!r} ({timezone}) until it is stopped; how it "
        f"stands: halfstep schedule {config}\n"
    )
    serve(wanted)


@app.command()
def work(
    depot: Annotated[str, typer.Argument(help="The depot of the sweeps to work for.")],
    idle: Annotated[
        float, typer.Option(help="Seconds without work after which to end; 0: never.")
    ] = 0.0,
) -> None:
    """Takes pieces of sweeps that run with `--runner queue`, until it is stopped."""
    from flows.show import progress_bar
    from flows.work import serve

    with progress_bar():
        print(f"{serve(depot, idle)} piece(s) done")


@app.command()
def ui(
    store: StoreOption = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 5000,
) -> None:
    """Opens the MLflow UI on what was recorded; stop it with Ctrl-C."""
    from audit.ui import serve

    serve(existing(store), host, port)


@app.command()
def doctor(store: StoreOption = DEFAULT_STORE, as_json: Json = False) -> None:
    """What this machine can do, and what is wrong with it."""
    from audit.store import Store
    from flows.doctor import examine
    from flows.show import print_checks

    checks = examine(Store(store))
    emit(checks, as_json, print_checks)
    if any(check["status"] == "fail" for check in checks["checks"]):
        raise typer.Exit(BAD_INPUT)


for command in (
    governing.verify,
    governing.compare,
    governing.reproduce,
    governing.review,
    governing.rollback,
    governing.export,
    governing.keygen,
    keeping.backup,
    keeping.prune,
):
    app.command()(command)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"halfstep: {message}\n")
    sys.exit(code)


def collect_seldom() -> None:
    """What MLflow and torch bring stays until the end. By default the collector looks through it
    again and again while it is imported, and once more at the exit: a third of `halfstep list`."""
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)


def main() -> None:
    """Entry point: user errors end with one message and exit code 2."""
    collect_seldom()
    listen()
    try:
        app()
    except Tampered as error:
        _fail(str(error), TAMPERED)
    except NotComparable as error:
        _fail(str(error), NOT_COMPARABLE)
    except UserError as error:
        _fail(str(error), BAD_INPUT)
    except OSError as error:
        if error.errno in _STORAGE_ERRORS:
            _fail(
                f"{error.strerror}: {error.filename or 'the store'}. What was finished is kept; "
                "make room (or write access) and run the same command again",
                BAD_INPUT,
            )
        raise
    except Stopped as error:
        how = "interrupted" if error.number == signal.SIGINT else "terminated"
        _fail(
            f"{how}; finished cells are kept, run the same command to go on",
            BY_SIGNAL + error.number,
        )


if __name__ == "__main__":
    main()
