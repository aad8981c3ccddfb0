"""Where the pieces of a sweep run: here, on Dask, on Ray, or on whoever takes them from a depot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from audit.store import Store
from flows.crew import Crew, Submit, Team
from flows.progress import reporter
from halfstep.errors import UserError, allowed, first_line
from tasks.depot import DEPOT, Depot
from tasks.work import Done, Work

LOCAL = "local"
CONNECT_SECONDS = 20


@dataclass(frozen=True)
class Runner:
    """Who evaluates.

    Args:
        kind: ``local``, or one of `KINDS`.
        address: of a Dask scheduler or a Ray cluster; a cluster on this machine where empty.
        workers: how many; of a cluster at an address, how many it is expected to have.
        depot: what all workers reach: a folder, or an address such as ``s3://bucket/halfstep``;
            a folder of the store where empty.
    """

    kind: str = LOCAL
    address: str = ""
    workers: int = 2
    depot: str = ""

    def check(self) -> None:
        """Raises UserError where this cannot be."""
        if self.kind != LOCAL and self.kind not in KINDS:
            raise UserError(f"--runner: {allowed(self.kind, [LOCAL, *KINDS])}")
        if self.address and self.kind not in ("dask", "ray"):
            raise UserError(f"--address {self.address}: runner {self.kind!r} has none")
        if self.workers < 1:
            raise UserError(f"--workers {self.workers} is not allowed: at least 1")

    @property
    def needs_prefect(self) -> bool:
        return self.kind in ("dask", "ray", "prefect")

    def reach(self) -> str:
        """How many workers the cluster at the address has.

        Raises:
            UserError: nothing answers there.
        """
        return _dask_workers(self.address) if self.kind == "dask" else _ray_workers(self.address)

    @contextmanager
    def crew(self, store: Store) -> Iterator[Crew | None]:
        """Opens what is needed; None where this process works alone."""
        if self.kind == LOCAL:
            yield None
            return
        depot = Depot(self.depot or str(store.path.absolute() / DEPOT), reporter().say)
        depot.check()
        with KINDS[self.kind](self, depot) as submit:
            yield Team(depot, submit, self.workers)


def _dask_workers(address: str) -> str:
    try:
        from distributed import Client
    except ImportError as error:
        raise _missing("dask", error) from error
    try:
        with Client(address, timeout=CONNECT_SECONDS, set_as_default=False) as client:
            return f"{len(client.scheduler_info(n_workers=-1)['workers'])} worker(s)"
    except (OSError, ValueError) as error:
        raise _unreachable("Dask scheduler", address, error) from error


def _ray_workers(address: str) -> str:
    try:
        import ray
    except ImportError as error:
        raise _missing("ray", error) from error
    try:
        ray.init(address, namespace="prefect", logging_level="ERROR", log_to_driver=False)
        return f"{ray.cluster_resources().get('CPU', 0):g} CPU(s)"
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise _unreachable("Ray cluster", address, error) from error
    finally:
        ray.shutdown()


@contextmanager
def _dask(runner: Runner, depot: Depot) -> Iterator[Submit]:
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise _missing("dask", error) from error
    if runner.address:
        _dask_workers(runner.address)
        made = DaskTaskRunner(address=runner.address)
    else:
        cluster = {"n_workers": runner.workers, "threads_per_worker": 1, "dashboard_address": None}
        made = DaskTaskRunner(cluster_kwargs=cluster)
    with _through(made) as submit:
        yield submit


@contextmanager
def _ray(runner: Runner, depot: Depot) -> Iterator[Submit]:
    try:
        import ray
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise _missing("ray", error) from error
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if runner.address:
            ray.init(runner.address, namespace="prefect", **quiet)
        else:
            ray.init(num_cpus=runner.workers, include_dashboard=False, namespace="prefect", **quiet)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise _unreachable("Ray cluster", runner.address or "on this machine", error) from error
    try:
        with _through(RayTaskRunner()) as submit:
            yield submit
    finally:
        ray.shutdown()


@contextmanager
def _queue(runner: Runner, depot: Depot) -> Iterator[Submit]:
    yield _publishing(depot)


def _publishing(depot: Depot, attend: Callable[[], None] = lambda: None) -> Submit:
    """Pieces by the depot's queue."""
    from tasks.queue import publish

    numbers = iter(range(10**8))

    def submit(work: Work) -> Callable[[], Done]:
        wait = publish(depot, next(numbers), work, attend)
        return lambda: wait(reporter().say)

    return submit


@contextmanager
def _prefect(runner: Runner, depot: Depot) -> Iterator[Submit]:
    """The queue, with runs of the deployment `DEPLOYMENT` to serve it."""
    from flows.served import Served

    served = Served(depot.address, runner.workers)
    submit = _publishing(depot, served.attend)

    def submit_and_count(work: Work) -> Callable[[], Done]:
        wait = submit(work)

        def waited() -> Done:
            done = wait()
            served.progressed()
            return done

        return waited

    yield submit_and_count


KINDS: dict[str, Callable[[Runner, Depot], AbstractContextManager[Submit]]] = {
    "dask": _dask,
    "ray": _ray,
    "prefect": _prefect,
    "queue": _queue,
}


@contextmanager
def _through(task_runner: Any) -> Iterator[Submit]:
    """Pieces as Prefect tasks on a task runner."""
    from tasks.orchestrated import PIECE

    def submit(work: Work) -> Callable[[], Done]:
        future = opened.submit(PIECE, {"work": work})
        return lambda: future.result()

    with task_runner as opened:
        yield submit


def _missing(extra: str, error: ImportError) -> UserError:
    return UserError(
        f"--runner {extra}: {error.name} is not installed; pip install 'halfstep[{extra}]'"
    )


def _unreachable(what: str, address: str, error: Exception) -> UserError:
    return UserError(f"no {what} answers at {address}: {first_line(error)}")
