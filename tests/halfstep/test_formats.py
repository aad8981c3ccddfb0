"""Formats against independent implementations, at tolerance zero."""

import math

import gfloat
import numpy as np
import pytest
import torch
from gfloat import formats as gf
from scipy.stats import norm

from halfstep.calibrators import parse_calibrator
from halfstep.formats import FORMATS, Codebook, Floating, Uniform
from halfstep.observed import Exact
from halfstep.qparams import choose_qparams
from halfstep.quantize import fake_quantize

OUTSIDE = {
    "fp4_e2m1": gf.format_info_ocp_e2m1,
    "fp6_e3m2": gf.format_info_ocp_e3m2,
    "fp6_e2m3": gf.format_info_ocp_e2m3,
    "fp8_e4m3": gf.format_info_ocp_e4m3,
    "fp8_e5m2": gf.format_info_ocp_e5m2,
    "fp16": gf.format_info_binary16,
    "bf16": gf.format_info_bfloat16,
}
FLOATING = [f for f in FORMATS.values() if isinstance(f, Floating)]
UNIFORM = [f for f in FORMATS.values() if isinstance(f, Uniform)]
TABLES = [f for f in FORMATS.values() if isinstance(f, Codebook)]
SMALL = [f for f in FLOATING if f.bits <= 8]
CAST = [f for f in FLOATING if f.storage != torch.uint8]


PLAIN = [f for f in FORMATS.values() if f.block is None]


def rounded(fmt, values):
    lower, upper = fmt.limits(torch.zeros((), dtype=torch.int32))
    return fmt.round_(values.clone(), lower, upper)


@pytest.mark.parametrize("fmt", FLOATING, ids=lambda f: f.name)
def test_grid_holds_exactly_the_finite_code_points_of_gfloat(fmt):
    info = OUTSIDE[fmt.name]
    codes = (gfloat.decode_float(info, code).fval for code in range(2**fmt.bits))
    finite = sorted({v + 0.0 for v in codes if abs(v) < float("inf")})
    assert fmt.grid().tolist() == finite


@pytest.mark.parametrize("fmt", UNIFORM, ids=lambda f: f.name)
def test_uniform_grid_is_every_integer_between_its_ends(fmt):
    assert fmt.grid().tolist() == list(range(fmt.quant_min, fmt.quant_max + 1))
    assert len(fmt.grid()) <= 2**fmt.bits


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_every_code_point_is_its_own_rounding(fmt):
    grid = fmt.grid().float()
    assert torch.equal(rounded(fmt, grid), grid)


@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
def test_rounding_equals_gfloat_at_ties_neighbours_and_beyond_the_end(fmt):
    grid = fmt.grid()
    ties = ((grid[1:] + grid[:-1]) / 2).float()
    infinity = torch.tensor(float("inf"))
    values = torch.cat(
        [
            ties,
            torch.nextafter(ties, infinity),
            torch.nextafter(ties, -infinity),
            torch.tensor([1e9, -1e9, fmt.largest * 1.04, 1e-30, -1e-30]),
            torch.randn(2000, generator=torch.Generator().manual_seed(0)) * fmt.largest / 3,
        ]
    )
    info = OUTSIDE[fmt.name]
    expected = [gfloat.round_float(info, v, sat=True) for v in values.tolist()]
    ours = rounded(fmt, values)
    assert ours.tolist() == expected
    assert torch.signbit(ours).tolist() == [math.copysign(1, v) < 0 for v in expected]


@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
def test_a_negative_value_that_rounds_to_zero_keeps_its_sign(fmt):
    values = torch.tensor([-0.0, 0.0, -1e-30, 1e-30])
    assert torch.signbit(rounded(fmt, values)).tolist() == [True, False, True, False]


@pytest.mark.parametrize("fmt", [f for f in SMALL if f.bits < 8], ids=lambda f: f.name)
def test_codes_are_those_of_gfloat(fmt):
    info = OUTSIDE[fmt.name]
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    values = [gfloat.decode_float(info, int(code)).fval for code in codes]
    zero = torch.zeros((), dtype=torch.int32)
    assert fmt.decode(codes, zero).tolist() == values
    assert torch.signbit(fmt.decode(codes, zero)).tolist() == [
        math.copysign(1, v) < 0 for v in values
    ]
    assert torch.equal(fmt.encode(torch.tensor(values), zero), codes)


def test_nf4_is_the_published_table_and_a_tie_goes_down():
    """bitsandbytes' ``dQuantizeNF4`` compares with the midpoints by ``>``."""
    fmt = FORMATS["nf4"]
    grid = fmt.grid()
    assert len(grid) == 16
    assert (grid[0], grid[7], grid[15]) == (-1.0, 0.0, 1.0)
    ties = ((grid[1:] + grid[:-1]) / 2).float()
    assert torch.equal(rounded(fmt, ties), grid[:-1].float())
    above = torch.nextafter(ties, torch.tensor(2.0))
    assert torch.equal(rounded(fmt, above), grid[1:].float())
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    nearest = grid[(values.double()[:, None] - grid).abs().argmin(1)].float()
    assert torch.equal(rounded(fmt, values), nearest)


def test_nf4_levels_are_gaussian_quantiles():
    """QLoRA appendix E: averages of neighbouring quantiles, eight above zero and seven below."""
    offset = 0.9677083
    above = [norm.ppf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-norm.ppf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.array(sorted([*above, 0.0, *below]))
    table = FORMATS["nf4"].grid().numpy()
    assert np.allclose(values / values.max(), table, atol=2e-7)


def test_int1_is_a_sign_and_its_best_scale_is_the_mean_magnitude():
    """XNOR-Net, section 3.1."""
    fmt = FORMATS["int1"]
    assert fmt.grid().tolist() == [-1.0, 1.0]
    x = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    chosen = parse_calibrator("mse")(Exact(x[None]), fmt)
    scale, _ = fmt.qparams(chosen.lo, chosen.hi)
    assert float(scale) == pytest.approx(float(x.abs().mean()), rel=0.02)
    done = fake_quantize(x, choose_qparams(fmt, chosen.lo, chosen.hi))
    assert torch.equal(done.sign(), torch.where(x > 0, 1.0, -1.0))


@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS.values() if isinstance(f, Codebook)], ids=lambda f: f.name
)
def test_gap_of_a_table_is_the_interval_around_a_value(fmt):
    grid = fmt.grid().float()
    middles = (grid[1:] + grid[:-1]) / 2
    assert torch.equal(fmt.gap(middles).expand_as(middles), grid[1:] - grid[:-1])


@pytest.mark.parametrize("fmt", CAST, ids=lambda f: f.name)
def test_rounding_equals_torchs_cast_inside_the_range(fmt):
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1)) * 50
    assert torch.equal(rounded(fmt, values), values.to(fmt.storage).float())


@pytest.mark.parametrize("fmt", FLOATING, ids=lambda f: f.name)
def test_gap_is_the_distance_to_the_next_grid_point(fmt):
    grid = fmt.grid()
    positive = grid[grid >= 0]
    assert torch.equal(fmt.gap(positive[:-1].float()).double(), positive[1:] - positive[:-1])


def test_the_three_conventions_of_symmetric_int8_differ_as_documented():
    one = torch.ones(1, dtype=torch.float64)
    assert FORMATS["int8"].qparams(-one, one)[0].item() == 1 / 127
    assert FORMATS["int8_full"].qparams(-one, one)[0].item() == 1 / 127.5
    scale, zero_point = FORMATS["uint8"].qparams(0 * one, one)
    assert (scale.item(), zero_point.item()) == (1 / 255, 0)


@pytest.mark.parametrize("name", ["int8_asym", "uint8", "int4_asym"])
def test_asymmetric_formats_represent_zero_exactly(name):
    fmt = FORMATS[name]
    for lo, hi in [(-0.3, 1.7), (0.5, 2.0), (-4.0, -1.0)]:
        scale, zero_point = fmt.qparams(*(torch.tensor([v], dtype=torch.float64) for v in (lo, hi)))
        assert fmt.quant_min <= zero_point.item() <= fmt.quant_max
        assert (zero_point - zero_point).item() * scale.item() == 0.0
