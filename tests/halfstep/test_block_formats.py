"""Block formats against two independent implementations, and the published figures."""

import math
import warnings

import gfloat
import numpy as np
import pytest
import torch
from gfloat import formats as gf
from hypothesis import given
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

from halfstep.certificate import certify
from halfstep.formats import FORMATS, SCALE_RULES, Microscaling
from halfstep.granularity import PerAxis
from halfstep.qparams import choose_qparams
from halfstep.quantize import dequantize, fake_quantize, quantize
from halfstep.scheme import Spec
from halfstep.weights import packed_bits, quantize_weight

MX = [f for f in FORMATS.values() if isinstance(f, Microscaling)]
SPECIFIED = {
    "mxfp8_e4m3": gf.format_info_mxfp8_e4m3,
    "mxfp8_e5m2": gf.format_info_mxfp8_e5m2,
    "mxfp6_e3m2": gf.format_info_mxfp6_e3m2,
    "mxfp6_e2m3": gf.format_info_mxfp6_e2m3,
    "mxfp4": gf.format_info_mxfp4_e2m1,
    "mxint8": gf.format_info_mxint8,
}
ELEMENT = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp4": torch.float4_e2m1fn_x2,
}


def blocks(n, size, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(torch.randn(n, 1, generator=generator) * spread)
    return torch.randn(n, size, generator=generator) * scale


def qparams_of(fmt, x):
    return choose_qparams(fmt, x.amin(1, keepdim=True), x.amax(1, keepdim=True))


@pytest.mark.parametrize("name", SPECIFIED)
def test_the_floor_rule_equals_gfloats_blocks(name):
    """The specification's own example rule, element by element."""
    info, fmt = SPECIFIED[name], FORMATS[name]
    for row in blocks(60, 32):
        ours = fake_quantize(row[None], qparams_of(fmt, row[None]))[0]
        values = row.double().numpy()
        scale = gfloat.compute_scale_amax(info.etype.emax, values)
        scale = gfloat.round_float(info.stype, scale)
        theirs = [
            scale * gfloat.round_float(info.etype, float(v / scale), sat=True) for v in values
        ]
        assert ours.double().tolist() == theirs


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("name", ELEMENT)
def test_every_scale_rule_equals_torchaos(name, rule):
    fmt = FORMATS[name if rule == "floor" else f"{name}_{rule}"]
    edges = torch.tensor([1.0, 1.5, 1.75, 1.9375, 1.96875, 1.99, 6.0, 5.9999995, 7.0, 448.0, 480.0])
    special = torch.zeros(len(edges), 32)
    special[:, 3] = edges
    x = torch.cat([blocks(200, 32), special, -special * 2.0**-20])
    scale, _ = to_mx(x, ELEMENT[name], 32, ScaleCalculationMode[rule.upper()])
    theirs = torch.exp2(scale.view(torch.uint8).float() - 127)
    assert torch.equal(qparams_of(fmt, x).scale, theirs.reshape(-1, 1))


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2"])
def test_elements_equal_torchaos(name):
    x = blocks(200, 32)
    _, data = to_mx(x, ELEMENT[name], 32, ScaleCalculationMode.FLOOR)
    ours = quantize(x, qparams_of(FORMATS[name], x))
    assert torch.equal(ours.view(torch.uint8), data.view(torch.uint8))


def test_nvfp4_equals_torchaos():
    fmt = FORMATS["nvfp4"]
    x = blocks(500, 16, spread=1.0)
    whole = fmt.tensor_scale(x.abs().max())
    scale, data = nvfp4_quantize(x.reshape(1, -1), 16, whole.float())
    theirs = scale.float().reshape(-1, 1) * whole.float()
    qparams = qparams_of(fmt, x)
    assert torch.equal(qparams.scale, theirs)
    packed = quantize(x, qparams).reshape(-1, 2)
    assert torch.equal(packed[:, 0] | (packed[:, 1] << 4), data.flatten())


@pytest.mark.parametrize(
    ("name", "size", "decibels"),
    [
        ("fp8_e4m3", None, 31.55), ("fp8_e5m2", None, 25.57), ("bf16", None, 55.59),
        ("fp16", None, 73.66), ("mxfp4", 32, 18.79), ("mxfp4_even", 32, 19.02),
        ("mxfp4_ceil", 32, 16.82), ("mxfp4_rceil", 32, 18.74), ("mxfp8_e4m3", 32, 30.66),
        ("mxfp8_e4m3_rceil", 32, 31.52), ("nvfp4", 16, 20.44), ("nf4", 64, 20.73),
        ("int4", 128, 18.60), ("int4_full", 128, 19.09), ("int4_asym", 128, 19.93),
    ],
)  # fmt: skip
def test_sqnr_of_a_gaussian(name, size, decibels):
    x = torch.randn(2**21, generator=torch.Generator().manual_seed(0))
    x = x.reshape(-1, size or x.numel())
    error = (fake_quantize(x, qparams_of(FORMATS[name], x)) - x).double().square().sum()
    assert 10 * math.log10(x.double().square().sum() / error) == pytest.approx(decibels, abs=0.03)


@pytest.mark.parametrize("fmt", [*MX, FORMATS["nvfp4"]], ids=lambda f: f.name)
def test_codes_and_scales_rebuild_the_values(fmt):
    x = blocks(50, fmt.block)
    qparams = qparams_of(fmt, x)
    assert torch.equal(dequantize(quantize(x, qparams), qparams), fake_quantize(x, qparams))


@pytest.mark.parametrize("fmt", [*MX, FORMATS["nvfp4"]], ids=lambda f: f.name)
def test_the_certificate_counts_what_the_scale_rule_clips(fmt):
    x = blocks(400, fmt.block)
    qparams = qparams_of(fmt, x)
    found = certify("site", "weight", x, fake_quantize(x, qparams), qparams)
    assert found.holds
    assert found.clips_by_design == fmt.clips
    if fmt.clips:
        assert found.clipped > 0
        assert found.clip_excess > 0
    else:
        assert found.clipped == 0


@given(st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=20))
def test_rceil_is_the_smallest_power_of_two_that_does_not_clip(values):
    fmt = FORMATS["mxfp4_rceil"]
    amax = torch.tensor(values, dtype=torch.float64)
    scale, _ = fmt.qparams(-amax, amax)
    assert (amax <= scale * 6).all()
    assert (amax > scale / 2 * 6).all()


@pytest.mark.parametrize(
    ("name", "bits"),
    [("mxfp4", 4.25), ("mxfp6_e2m3", 6.25), ("mxfp8_e4m3", 8.25), ("mxint8", 8.25)],
)
def test_bits_per_weight_hold_the_scales(name, bits):
    assert packed_bits((8, 320), Spec(FORMATS[name], PerAxis(), "mse")) == 8 * 320 * bits


def test_nvfp4_takes_four_and_a_half_bits_and_one_scale_for_the_tensor():
    assert packed_bits((8, 320), Spec(FORMATS["nvfp4"], PerAxis(), "mse")) == 8 * 320 * 4.5 + 32


def test_a_block_that_does_not_divide_the_row_is_shorter_and_named():
    weight = torch.randn(4, 80, generator=torch.Generator().manual_seed(0))
    done = quantize_weight(weight, Spec(FORMATS["mxfp4"], PerAxis(), "mse"))
    assert done.qparams.scale.shape == (4, 3)
    assert "last group of each row holds 16 of 32 values" in done.notes
    tail = weight[:, 64:]
    assert torch.equal(done.values[:, 64:], fake_quantize(tail, qparams_of(FORMATS["mxfp4"], tail)))


def test_scales_saturate_at_the_ends_of_e8m0():
    fmt = FORMATS["mxfp8_e5m2"]
    huge = torch.tensor([2.0**127], dtype=torch.float64)
    assert float(fmt.qparams(-huge, huge)[0]) == 2.0**112
    tiny = torch.tensor([2.0**-149], dtype=torch.float64)
    assert float(fmt.qparams(-tiny, tiny)[0]) == 2.0**-127
    assert np.log2(float(choose_qparams(fmt, -tiny, tiny).scale)) == -126
