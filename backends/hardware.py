"""Hardware: which arithmetic a processor has, and so what runs natively and what only simulated."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from halfstep.formats import Floating, Uniform
from halfstep.formats.floating import BF16, FP16
from halfstep.scheme import Scheme, Spec
from halfstep.sites import Sites

INT8, FP8, HALF, BFLOAT = "int8", "fp8", "fp16", "bf16"
_FLAGS: Mapping[str, tuple[tuple[str, str], ...]] = {
    INT8: (
        ("amx_int8", "AMX-INT8"),
        ("avx512_vnni", "AVX512-VNNI"),
        ("avx_vnni", "AVX-VNNI"),
        ("i8mm", "Arm I8MM"),
        ("asimddp", "Arm dot product"),
    ),
    FP8: (("amx_fp8", "AMX-FP8"),),
    HALF: (("amx_fp16", "AMX-FP16"), ("avx512_fp16", "AVX512-FP16"), ("asimdhp", "Arm FP16")),
    BFLOAT: (("amx_bf16", "AMX-BF16"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "Arm BF16")),
}
"""Flags of /proc/cpuinfo, the best first, and what they stand for."""


@dataclass(frozen=True)
class Target:
    """A machine that a decision is for."""

    name: str
    arithmetic: Mapping[str, str]
    """Kinds of product that it has instructions for, and which."""

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "native": dict(self.arithmetic)}

    def why_simulated(self, scheme: Scheme, sites: Sites) -> str:
        """Why the target could run a scheme in simulation only; empty where it runs natively.

        Weights alone are stored small and multiplied at full precision, which every machine does.
        """
        weights = {site.name: scheme.weight_spec(site, sites) for site in sites.weights}
        wanted: dict[str, str] = {}
        for site in sites.activations:
            spec = scheme.activation_spec(site, sites)
            other = weights.get(site.weight) if site.weight else spec
            if spec is not None:
                kind = product(spec, other)
                wanted.setdefault(kind or f"{spec} by {other or 'fp32'}", site.name)
        missing = [f"{kind} products ({at})" for kind, at in wanted.items()
                   if kind not in self.arithmetic]  # fmt: skip
        return f"{self.name} has no {', '.join(missing)}" if missing else ""


def product(a: Spec, b: Spec | None) -> str:
    """The kind of product that two operands need; empty where no processor has it."""
    if b is None:
        return ""
    formats = (a.format, b.format)
    if all(isinstance(f, Uniform) and f.bits <= 8 for f in formats):
        return INT8  # fewer bits are unpacked
    if all(f is FP16 for f in formats):
        return HALF
    if all(f is BF16 for f in formats):
        return BFLOAT
    if all(isinstance(f, Floating) and f.bits == 8 for f in formats):
        return FP8
    return ""


@lru_cache(maxsize=1)
def here() -> Target:
    """This machine: the graphics processor where torch sees one, else the processor."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return cuda(f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})",
                    major * 10 + minor)  # fmt: skip
    return cpu(_model(), _flags())


def cpu(name: str, flags: frozenset[str]) -> Target:
    """A processor with these flags of /proc/cpuinfo."""
    found = {
        kind: next(word for flag, word in known if flag in flags)
        for kind, known in _FLAGS.items()
        if any(flag in flags for flag, _ in known)
    }
    return Target(name, found)


def cuda(name: str, capability: int) -> Target:
    """A graphics processor of some compute capability, ten times its number (CUDA C++ Programming
    Guide, table of arithmetic instructions)."""
    since = {HALF: 53, INT8: 61, BFLOAT: 80, FP8: 89}
    words = {INT8: "DP4A" if capability < 75 else "INT8 tensor cores", FP8: "FP8 tensor cores",
             HALF: "FP16", BFLOAT: "BF16 tensor cores"}  # fmt: skip
    return Target(name, {kind: words[kind] for kind, least in since.items() if capability >= least})


TARGETS: Mapping[str, Target] = {
    "x86-avx2": cpu("x86-avx2", frozenset()),
    "x86-avx512-vnni": cpu("x86-avx512-vnni", frozenset({"avx512_vnni"})),
    "x86-amx": cpu(
        "x86-amx", frozenset({"avx512_vnni", "amx_int8", "amx_bf16", "avx512_fp16", "avx512_bf16"})
    ),
    "arm-neoverse-v1": cpu(
        "arm-neoverse-v1", frozenset({"i8mm", "asimddp", "asimdhp", "bf16"})
    ),
    "cuda-7.5": cuda("cuda-7.5", 75),
    "cuda-8.0": cuda("cuda-8.0", 80),
    "cuda-8.9": cuda("cuda-8.9", 89),
    "cuda-9.0": cuda("cuda-9.0", 90),
}  # fmt: skip
"""Kinds of machine that a config may declare by name."""


def target(name: str) -> Target:
    """A declared kind of machine, or this one where it is ``here``."""
    return here() if name == "here" else TARGETS[name]


def _cpuinfo(*keys: str) -> str:
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _flags() -> frozenset[str]:
    return frozenset(_cpuinfo("flags", "Features").split())


def _model() -> str:
    return _cpuinfo("model name", "CPU part") or platform.processor() or platform.machine()


def state() -> dict[str, object]:
    """Load and clock, before and after something is timed; null with a reason where unreadable."""
    clock = [float(line.partition(":")[2]) for line in _lines("/proc/cpuinfo")
             if line.startswith("cpu MHz")]  # fmt: skip
    counters = sorted(Path("/sys/devices/system/cpu").glob(
        "cpu[0-9]*/thermal_throttle/core_throttle_count"))  # fmt: skip
    stolen = next((line.split() for line in _lines("/proc/stat") if line.startswith("cpu ")), [])
    return {
        "load": list(os.getloadavg()),
        "mhz": clock or None,
        "throttled": sum(int(p.read_text()) for p in counters) if counters else None,
        "throttled_reason": "" if counters else "this machine shows no throttle counters",
        "stolen_ticks": int(stolen[8]) if len(stolen) > 8 else None,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
