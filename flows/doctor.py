"""What `halfstep doctor` looks at: this machine, this installation, the configured addresses."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from audit.store import Store
from flows.server import configured_api
from halfstep.errors import UserError

PACKAGES = ("halfstep", "sources", "evaluators", "backends", "audit", "tasks", "flows")
HERE = Path(__file__).resolve().parent.parent


def examine(store: Store) -> dict[str, Any]:
    """Every check with ``ok``, ``warn`` or ``fail``, what was found, and what to do about it."""
    checks: list[tuple[str, Callable[[], tuple[str, str]]]] = [
        ("python", _python),
        ("torch", _torch),
        ("packages", _packages),
        ("store", lambda: _store(store)),
        ("tracking", lambda: _tracking(store)),
        ("artifacts", lambda: _artifacts(store)),
        ("prefect", _prefect),
        ("depot", _depot),
        ("runner", lambda: _runner(store)),
        ("fashion-mnist", _fashion),
        ("transformers", _transformers),
        ("accelerator", _accelerator),
        ("arithmetic", _arithmetic),
        ("integer products", _integers),
        ("backends", _backends),
    ]
    found = []
    for name, check in checks:
        try:
            status, message = check()
        except UserError as error:
            status, message = "fail", str(error)
        found.append({"check": name, "status": status, "found": message})
    return {"checks": found}


def _python() -> tuple[str, str]:
    return "ok", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} CPUs"


def _torch() -> tuple[str, str]:
    from halfstep.formats import FORMATS
    from halfstep.qparams import choose_qparams
    from halfstep.quantize import fake_quantize

    x = torch.linspace(-1, 1, 1001)
    one = torch.ones(1)
    ours = fake_quantize(x, choose_qparams(FORMATS["int8"], -one, one))
    scale = float(one / 127)
    same = torch.equal(ours, torch.fake_quantize_per_tensor_affine(x, scale, 0, -127, 127))
    capability = torch.backends.cpu.get_cpu_capability()
    if not same:
        return "fail", f"{torch.__version__}: int8 rounding differs from torch.fake_quantize"
    return "ok", f"{torch.__version__}, {capability}; int8 rounding is bit-equal to torch's own"


def _packages() -> tuple[str, str]:
    strangers = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or HERE not in origin.parents:
            strangers.append(f"{name} comes from {origin.parent if origin else 'nowhere'}")
    if strangers:
        return "fail", "another distribution shadows ours: " + "; ".join(strangers)
    return "ok", "all seven come from one installation"


def _store(store: Store) -> tuple[str, str]:
    store.check_writable()
    place = store.path if store.path.exists() else Path.cwd()
    free = shutil.disk_usage(place).free / 2**30
    state = "exists" if store.path.exists() else "will be made by the first sweep"
    return "ok", f"{store.path} {state}; {free:.1f} GiB free"


def _tracking(store: Store) -> tuple[str, str]:
    if store.embedded:
        from audit.trail import check_database

        check_database(store.database)
        return "ok", f"embedded SQLite, {store.database.name}"
    from audit.lookup import reachable

    reachable(store)
    return "ok", f"MLFLOW_TRACKING_URI answers: {store.shown_uri}"


def _artifacts(store: Store) -> tuple[str, str]:
    if store.embedded:
        return "ok", f"{store.artifacts.name}/ beside the database"
    from audit.lookup import artifacts_writable

    return "ok", f"written to and removed again: {artifacts_writable(store)}"


def _depot() -> tuple[str, str]:
    address = os.environ.get("HALFSTEP_DEPOT", "")
    if not address:
        return "ok", "HALFSTEP_DEPOT is not set: workers share a folder of the store"
    from tasks.depot import Depot

    depot = Depot(address)
    depot.check()
    return "ok", f"written and read back: {depot.shown}"


def _runner(store: Store) -> tuple[str, str]:
    from flows.runners import LOCAL, Runner

    kind = os.environ.get("HALFSTEP_RUNNER", LOCAL)
    runner = Runner(kind, os.environ.get("HALFSTEP_RUNNER_ADDRESS", ""))
    runner.check()
    if not runner.address:
        return "ok", "this process, one cell after the other" if kind == LOCAL else kind
    return "ok", f"{kind} at {runner.address}: {runner.reach()}"


def _prefect() -> tuple[str, str]:
    address = configured_api()
    return (
        "ok",
        f"server at {address}" if address else "no server configured: sweeps run by themselves",
    )


def _fashion() -> tuple[str, str]:
    from sources.idx import DEBIAN

    if DEBIAN.is_dir():
        return "ok", str(DEBIAN)
    return "warn", "not installed; configs/fashion-mnist.yaml needs dataset-fashion-mnist"


def _transformers() -> tuple[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return "ok", f"{version('transformers')}: Hugging Face models and tokenizers"
    except PackageNotFoundError:
        return "warn", "not installed; Hugging Face models need it: pip install 'halfstep[hf]'"


def _arithmetic() -> tuple[str, str]:
    from backends.hardware import BFLOAT, FP8, HALF, INT8, here

    found = here()
    native = [f"{kind} by {word}" for kind, word in found.arithmetic.items()]
    rest = [kind for kind in (INT8, FP8, HALF, BFLOAT) if kind not in found.arithmetic]
    told = f"{found.name}: natively {', '.join(native) or 'nothing below float32'}"
    return "ok", told + (f"; in simulation only: {', '.join(rest)}" if rest else "")


def _integers() -> tuple[str, str]:
    from halfstep.integer import available

    kernel = available()
    if kernel.integer:
        return "ok", f"{kernel.name}: equal to whole-number arithmetic, bit for bit"
    return "warn", f"by float products of codes, to the same bits but slower: {kernel.reason}"


def _backends() -> tuple[str, str]:
    from backends import BACKENDS, installed
    from backends.inductor import no_compiler

    missing = {name: f"not installed: halfstep[{name}]" for name in BACKENDS if not installed(name)}
    if reason := no_compiler():
        missing["inductor"] = reason
    told = ", ".join(name for name in BACKENDS if name not in missing)
    return "ok", "; ".join((told, *missing.values()))


def _accelerator() -> tuple[str, str]:
    if torch.cuda.is_available():
        return "ok", torch.cuda.get_device_name(0) + " (sweeps run on the CPU in this version)"
    return "ok", "none; sweeps run on the CPU"
