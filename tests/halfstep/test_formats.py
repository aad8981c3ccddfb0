"""Formats against independent implementations, at tolerance zero."""

import gfloat
import pytest
import torch
from gfloat import formats as gf

from halfstep.formats import FORMATS, Floating, Uniform

OUTSIDE = {
    "fp8_e4m3": gf.format_info_ocp_e4m3,
    "fp8_e5m2": gf.format_info_ocp_e5m2,
    "fp16": gf.format_info_binary16,
    "bf16": gf.format_info_bfloat16,
}
FLOATING = [f for f in FORMATS.values() if isinstance(f, Floating)]
UNIFORM = [f for f in FORMATS.values() if isinstance(f, Uniform)]
SMALL = [f for f in FLOATING if f.bits == 8]


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
    assert rounded(fmt, values).tolist() == expected


@pytest.mark.parametrize("fmt", FLOATING, ids=lambda f: f.name)
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
