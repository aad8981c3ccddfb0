"""The environment of a run, as auditors ask for it. What cannot be read is null with the reason."""

from __future__ import annotations

import importlib.metadata
import json
import locale
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halfstep.digest import digest_bytes

ALLOWED_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTHONHASHSEED",
    "TZ",
    "LANG",
    "LC_ALL",
    "CI",
)
"""Environment variables that may reach the trail. No other does."""


def fact(read: Callable[[], Any]) -> dict[str, Any]:
    """``{"value": …}``, or ``{"value": None, "reason": …}`` where it cannot be read."""
    try:
        value = read()
    except Exception as error:  # any failure to read is itself what is recorded
        first = str(error).strip().splitlines()
        return {"value": None, "reason": private(first[0]) if first else type(error).__name__}
    if value is None or value == "":
        return {"value": None, "reason": "not reported by this system"}
    return {"value": value}


def capture() -> dict[str, dict[str, Any]]:
    """Host, accelerator, software, determinism and provenance; each entry a `fact`."""
    readers: dict[str, dict[str, Callable[[], Any]]] = {
        "host": {
            "cpu": lambda: _cpuinfo("model name"),
            "cpu_flags": lambda: _cpuinfo("flags"),
            "microcode": lambda: _cpuinfo("microcode"),
            "logical_cpus": os.cpu_count,
            "affinity": lambda: len(os.sched_getaffinity(0)),
            "caches": _caches,
            "numa_nodes": lambda: len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
            "governor": lambda: _first("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            "turbo_disabled": lambda: _first("/sys/devices/system/cpu/intel_pstate/no_turbo"),
            "cgroup_cpu_max": lambda: _first("/sys/fs/cgroup/cpu.max"),
            "cgroup_memory_max": lambda: _first("/sys/fs/cgroup/memory.max"),
            "memory_bytes": lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "hypervisor": lambda: "yes" if "hypervisor" in _cpuinfo("flags").split() else "none",
            "kernel": lambda: f"{platform.system()} {platform.release()}",
            "libc": lambda: " ".join(platform.libc_ver()),
            "load_average": lambda: list(os.getloadavg()),
        },
        "accelerator": {"gpus": _gpus},
        "software": {
            "python": lambda: sys.version,
            "distributions": _distributions,
            "torch_build": lambda: _torch().__config__.show(),
            "torch_parallel": lambda: _torch().__config__.parallel_info(),
            "cpu_capability": lambda: _torch().backends.cpu.get_cpu_capability(),
            "blas": _blas,
        },
        "determinism": {
            "torch_threads": lambda: _torch().get_num_threads(),
            "deterministic_algorithms": lambda: _torch().are_deterministic_algorithms_enabled(),
            "tf32_matmul": lambda: _torch().backends.cuda.matmul.allow_tf32,
            "hash_seed": lambda: os.environ.get("PYTHONHASHSEED", "random"),
        },
        "provenance": {
            "commit": lambda: _git("rev-parse", "HEAD"),
            "dirty_diff_sha256": lambda: digest_bytes(_git("diff", "HEAD").encode()),
            "untracked_files": lambda: len(_git("ls-files", "-o", "--exclude-standard").split()),
            "remote": lambda: without_credentials(_git("config", "--get", "remote.origin.url")),
            "arguments": lambda: [private(a) for a in [Path(sys.argv[0]).name, *sys.argv[1:]]],
            "started": lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "timezone": lambda: list(time.tzname),
            "locale": lambda: ".".join(filter(None, locale.getlocale())),
            "variables": lambda: {k: os.environ[k] for k in ALLOWED_VARIABLES if k in os.environ},
        },
    }
    return {
        group: {name: fact(read) for name, read in entries.items()}
        for group, entries in readers.items()
    }


def summary(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The few facts of an environment that a reader asks for first."""

    def value(group: str, name: str) -> Any:
        return found.get(group, {}).get(name, {}).get("value")

    python = value("software", "python")
    gpus = value("accelerator", "gpus") or []
    return {
        "CPU": value("host", "cpu"),
        "cores": value("host", "affinity"),
        "GPU": ", ".join(gpu["name"] for gpu in gpus) or None,
        "kernel": value("host", "kernel"),
        "Python": python.split()[0] if python else None,
        "torch": (value("software", "distributions") or {}).get("torch"),
        "kernels": value("software", "cpu_capability"),
        "commit": (value("provenance", "commit") or "")[:12] or None,
    }


def without_credentials(url: str) -> str:
    """A text with any ``user:password@`` of a URL taken out."""
    return re.sub(r"(?<=//)[^/@\s]*@", "", url.strip())


def private(text: str) -> str:
    """Text with the home folder replaced by ``~``: no home path reaches the trail."""
    home = str(Path.home())
    return text.replace(home, "~") if home not in ("", "/") else text


def _torch() -> Any:
    import torch

    return torch


def _first(path: str) -> str:
    return Path(path).read_text().strip()


def _cpuinfo(field: str) -> str:
    match = re.search(rf"^{field}\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if match is None:
        raise LookupError(f"/proc/cpuinfo has no {field!r}")
    return match[1]


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = _first(f"{index}/level"), _first(f"{index}/type")
        found[f"L{level} {kind}"] = _first(f"{index}/size")
    return found


def _gpus() -> list[dict[str, Any]]:
    torch = _torch()
    if not torch.cuda.is_available():
        raise RuntimeError("torch reports no CUDA device")
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": d.name,
            "memory_bytes": d.total_memory,
            "capability": f"{d.major}.{d.minor}",
            "uuid": str(d.uuid),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        for d in devices
    ]


def _distributions() -> dict[str, str]:
    """Name to version, with the origin of those that did not come from an index (PEP 610)."""
    found = {}
    for dist in importlib.metadata.distributions():
        name, version = dist.metadata["Name"], dist.version
        direct = dist.read_text("direct_url.json")
        if direct:
            origin = json.loads(direct)
            editable = origin.get("dir_info", {}).get("editable", False)
            commit = origin.get("vcs_info", {}).get("commit_id")
            version += " (editable)" if editable else f" (direct {commit or 'file'})"
        found[name] = version
    return dict(sorted(found.items()))


def _blas() -> list[dict[str, Any]]:
    from threadpoolctl import threadpool_info

    keys = ("user_api", "internal_api", "version", "num_threads", "architecture")
    pools = [{key: pool.get(key) for key in keys} for pool in threadpool_info()]
    # In the order of their names: that of loading differs from run to run.
    return sorted(pools, key=lambda pool: [str(pool[key]) for key in keys])


def _git(*arguments: str) -> str:
    """Output of git about the checkout that holds this code."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(private(done.stderr.strip() or "git knows none"))
    return done.stdout.strip() if arguments[0] != "diff" else done.stdout
