"""What a machine runs natively, and what it can only simulate."""

import pytest
import torch
from prepared import treatments_of
from torch import nn

from backends.hardware import TARGETS, cpu, cuda, here, state, target
from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis, PerTensor
from halfstep.scheme import Scheme, Spec


@pytest.fixture(scope="module")
def sites():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    return treatments_of(model, torch.randn(20, 8))[0]


def scheme(weights, activations):
    return Scheme(
        Spec(FORMATS[weights], PerAxis(), "minmax"),
        Spec(FORMATS[activations], PerTensor(), "minmax") if activations else None,
    )


@pytest.mark.parametrize(
    ("machine", "weights", "activations", "native"),
    [
        ("x86-avx2", "int8", "int8", False),
        ("x86-avx512-vnni", "int8", "uint8", True),
        ("x86-avx512-vnni", "int4", "int8", True),  # unpacked to eight bits
        ("x86-avx512-vnni", "fp8_e4m3", "fp8_e4m3", False),
        ("x86-avx512-vnni", "bf16", "bf16", False),
        ("x86-amx", "bf16", "bf16", True),
        ("x86-amx", "fp16", "fp16", True),
        ("arm-neoverse-v1", "int8", "int8", True),
        ("cuda-8.0", "fp8_e4m3", "fp8_e4m3", False),
        ("cuda-8.9", "fp8_e4m3", "fp8_e5m2", True),
        ("cuda-9.0", "fp8_e4m3", "int8", False),  # nobody multiplies these two
        ("x86-avx2", "int4", None, True),  # stored small, multiplied at full precision
        ("cuda-9.0", "mxfp4", "mxfp4", False),
    ],
)
def test_what_runs_natively(sites, machine, weights, activations, native):
    why = TARGETS[machine].why_simulated(scheme(weights, activations), sites)
    assert (why == "") == native
    if not native:
        assert why.startswith(f"{machine} has no ")


def test_flags_stand_for_arithmetic():
    assert cpu("x", frozenset({"avx2", "avx512_vnni"})).arithmetic == {"int8": "AVX512-VNNI"}
    assert cpu("x", frozenset({"avx512_vnni", "amx_int8"})).arithmetic == {"int8": "AMX-INT8"}
    assert cpu("x", frozenset({"avx2", "fma"})).arithmetic == {}
    assert "fp8" in cuda("h100", 90).arithmetic
    assert "fp8" not in cuda("a100", 80).arithmetic


def test_this_machine_is_described():
    found = here()
    assert target("here") == found
    assert found.name
    told = state()
    assert len(told["load"]) == 3
    assert (told["throttled"] is None) == bool(told["throttled_reason"])
