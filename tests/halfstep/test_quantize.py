"""Quantize and fake-quantize against torch's own operators, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.activations import StaticQuantizer
from halfstep.formats import FORMATS, Uniform
from halfstep.qparams import QParams, choose_qparams
from halfstep.quantize import dequantize, fake_quantize, quantize

UNIFORM = [f for f in FORMATS.values() if isinstance(f, Uniform)]
finite = st.floats(-(2.0**99), 2.0**99, width=32)


@pytest.mark.parametrize("fmt", UNIFORM, ids=lambda f: f.name)
@given(scale=st.floats(2.0**-20, 1024.0, width=32), seed=st.integers(0, 1000))
def test_fake_quantize_is_bit_equal_to_torch_per_tensor(fmt, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(257, generator=generator) * scale * 100
    zero = 0
    if not fmt.symmetric:
        zero = int(torch.randint(fmt.quant_min, fmt.quant_max + 1, (), generator=generator))
    zero_point = torch.tensor([zero], dtype=torch.int32)
    ours = fake_quantize(x, QParams(fmt, torch.tensor([scale]), zero_point))
    theirs = torch.fake_quantize_per_tensor_affine(
        x, torch.tensor(scale), zero_point[0], fmt.quant_min, fmt.quant_max
    )
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    static = StaticQuantizer(QParams(fmt, torch.tensor([[scale]]), zero_point[None]))
    assert torch.equal(static(x).view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("fmt", UNIFORM, ids=lambda f: f.name)
def test_fake_quantize_is_bit_equal_to_torch_per_channel(fmt):
    x = torch.randn(16, 50, generator=torch.Generator().manual_seed(0))
    qparams = choose_qparams(fmt, x.amin(1, keepdim=True), x.amax(1, keepdim=True))
    theirs = torch.fake_quantize_per_channel_affine(
        x, qparams.scale[:, 0], qparams.zero_point[:, 0], 0, fmt.quant_min, fmt.quant_max
    )
    ours = fake_quantize(x, qparams)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_nvidias_documented_vector():
    """pytorch-quantization's tutorial draws it with torch's generator, not with NumPy's."""
    x = torch.rand(10, generator=torch.Generator().manual_seed(12345))
    qparams = choose_qparams(FORMATS["int8"], -x.amax()[None], x.amax()[None])
    assert round(1 / qparams.scale.item(), 4) == 128.0057
    assert quantize(x, qparams).tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.scaled], ids=lambda f: f.name)
def test_dequantized_codes_are_the_fake_quantized_values(fmt):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    qparams = choose_qparams(fmt, x.amin()[None], x.amax()[None])
    assert torch.equal(dequantize(quantize(x, qparams), qparams), fake_quantize(x, qparams))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
@given(values=st.lists(finite, min_size=1, max_size=40))
def test_qparams_are_finite_and_quantizing_twice_changes_nothing(fmt, values):
    x = torch.tensor(values, dtype=torch.float32)
    qparams = choose_qparams(fmt, x.amin()[None], x.amax()[None])
    assert torch.isfinite(qparams.scale).all()
    assert (qparams.scale > 0).all()
    once = fake_quantize(x, qparams)
    assert torch.isfinite(once).all()
    assert torch.equal(fake_quantize(once, qparams), once)


def test_a_range_of_zero_width_is_counted_and_stays_exact():
    qparams = choose_qparams(FORMATS["int8"], torch.tensor([0.0, -1.0]), torch.tensor([0.0, 1.0]))
    assert qparams.degenerate == 1
    assert qparams.scale[0] == 1.0
    assert fake_quantize(torch.zeros(3, 1), qparams)[:, 0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_range_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        choose_qparams(FORMATS["int8"], torch.tensor([-1.0]), torch.tensor([bad]))


def decibel(x, approximation):
    noise = (x - approximation).double().square().sum()
    return float(10 * torch.log10(x.double().square().sum() / noise))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("fp8_e4m3", 31.55), ("fp8_e5m2", 25.57), ("bf16", 55.59), ("fp16", 73.66)],
)
def test_gaussian_sqnr_of_floating_formats(name, expected):
    x = torch.randn(2**21, generator=torch.Generator().manual_seed(0))
    qparams = choose_qparams(FORMATS[name], x.amin()[None], x.amax()[None])
    assert decibel(x, fake_quantize(x, qparams)) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_uniform_input_gives_six_decibels_a_bit(bits):
    fmt = FORMATS[f"int{bits}_full"]
    x = torch.rand(2**20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one = torch.ones(1)
    expected = 20 * np.log10(2.0**bits - 1)  # 2**b - 1 steps across the range
    quantized = fake_quantize(x, choose_qparams(fmt, -one, one))
    assert decibel(x, quantized) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("name", "expected"), [("int4", 18.60), ("int4_full", 19.09), ("int4_asym", 19.93)]
)
def test_gaussian_sqnr_of_int4_in_groups_of_128(name, expected):
    x = torch.randn(2**14, 128, generator=torch.Generator().manual_seed(0))
    qparams = choose_qparams(FORMATS[name], x.amin(1, keepdim=True), x.amax(1, keepdim=True))
    assert decibel(x, fake_quantize(x, qparams)) == pytest.approx(expected, abs=0.05)
