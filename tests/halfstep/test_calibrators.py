"""Calibrators: closed forms, published algorithms, and what must be named."""

import math

import numpy as np
import pytest
import slow_reference as reference
import torch

from halfstep.calibrators import (
    CALIBRATORS,
    entropy_candidate,
    minmax,
    mse,
    parse_calibrator,
    percentile,
)
from halfstep.errors import UserError
from halfstep.formats import FORMATS
from halfstep.observed import Exact, Sketched
from halfstep.qparams import choose_qparams
from halfstep.sketch import Sketch

GAUSS = {2: 1.224, 3: 1.952, 4: 2.474, 6: 3.270, 8: 3.921}


def gaussian(n=2**20, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def clip(chosen, fmt):
    """The clip alpha that a range stands for."""
    return float(choose_qparams(fmt, chosen.lo, chosen.hi).scale * fmt.half_width)


@pytest.mark.parametrize("observe", [lambda x: Exact(x[None]), lambda x: Sketched(Sketch.of(x))])
@pytest.mark.parametrize(("bits", "alpha"), GAUSS.items())
def test_mse_finds_the_optimal_gaussian_clip(bits, alpha, observe):
    fmt = FORMATS[f"int{bits}"]
    assert clip(mse(observe(gaussian()), fmt), fmt) == pytest.approx(alpha, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mse_finds_the_optimal_laplacian_clip(bits):
    """The optimum of the mid-tread quantizer by numeric integration of the density."""
    fmt = FORMATS[f"int{bits}"]
    uniform = torch.rand(2**19, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    centred = uniform - 0.5
    x = (-centred.sign() * torch.log1p(-2 * centred.abs())).float()
    best = optimal_laplacian_clip(fmt.quant_max)
    assert clip(mse(Exact(x[None]), fmt), fmt) == pytest.approx(best, rel=0.03)


def optimal_laplacian_clip(top):
    grid = np.linspace(0, 40, 40_001)
    density = np.exp(-grid)

    def loss(alpha):
        step = alpha / top
        error = grid - np.clip(np.rint(grid / step), 0, top) * step
        return float((error**2 * density).sum())

    return min(np.linspace(0.5, 14, 400), key=loss)


def test_laplacian_oracle_agrees_with_the_published_mid_rise_optimum():
    """Mid-rise and mid-tread optima meet as the levels grow: 9.928 b at 8 bits."""
    assert optimal_laplacian_clip(127) == pytest.approx(9.928, rel=0.01)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("unsigned", [False, True])
def test_entropy_equals_the_slow_reference(seed, unsigned):
    generator = np.random.default_rng(seed)
    shapes = [
        lambda: np.abs(generator.normal(size=4000)),
        lambda: generator.exponential(size=3000),
        lambda: np.abs(np.append(generator.normal(size=2000), 25.0)),
        lambda: generator.integers(0, 17, size=3000) / 16,
        lambda: generator.uniform(size=500),
        lambda: generator.lognormal(sigma=1.5, size=5000),
    ]
    values = shapes[seed]()
    histogram = np.histogram(values, bins=2048, range=(0, values.max()))[0].astype(float)
    fmt = FORMATS["uint8" if unsigned else "int8"]
    edges = fmt.positive_edges(unsigned=unsigned).numpy()
    assert entropy_candidate(histogram, edges) == reference.entropy_bins(histogram, len(edges) - 1)


def test_entropy_leaves_its_histogram_alone():
    histogram = np.random.default_rng(0).integers(0, 9, 2048).astype(float)
    before = histogram.copy()
    entropy_candidate(histogram, FORMATS["int8"].positive_edges(unsigned=False).numpy())
    assert np.array_equal(histogram, before)


def test_entropy_from_a_sketch_is_near_the_best_of_the_exact_histogram():
    x = gaussian(2**19, seed=2)
    chosen = CALIBRATORS["entropy"](Sketched(Sketch.of(x)), FORMATS["int8"])
    exact = CALIBRATORS["entropy"](Exact(x[None]), FORMATS["int8"])
    assert clip(chosen, FORMATS["int8"]) == pytest.approx(clip(exact, FORMATS["int8"]), rel=0.05)


def test_entropy_does_not_collapse_on_pixels():
    """Values of few levels: keeping one filled bin has divergence zero from itself."""
    pixels = torch.randint(0, 17, (5000,), generator=torch.Generator().manual_seed(0)) / 16
    for observed in (Exact(pixels[None]), Sketched(Sketch.of(pixels))):
        chosen = CALIBRATORS["entropy"](observed, FORMATS["int8"])
        assert float(chosen.hi) == 1.0
        assert "entropy equals minmax" in chosen.notes[0]


@pytest.mark.parametrize("name", ["int4", "int8_asym", "fp8_e4m3"])
def test_mse_equals_the_slow_reference(name):
    fmt = FORMATS[name]
    x = gaussian(3000, seed=4)
    x[0] = 30.0
    ours = mse(Exact(x[None]), fmt)
    low, high = reference.mse_range(x, torch.ones_like(x), float(x.min()), float(x.max()), fmt)
    assert (float(ours.lo), float(ours.hi)) == pytest.approx((low, high), rel=1e-12)


def test_mse_treats_each_block_by_itself():
    blocks = torch.stack([gaussian(500, seed=s) * 10.0**s for s in range(3)])
    fmt = FORMATS["int4"]
    together = mse(Exact(blocks), fmt)
    for i, block in enumerate(blocks):
        alone = mse(Exact(block[None]), fmt)
        assert (together.lo[i], together.hi[i]) == (alone.lo[0], alone.hi[0])


@pytest.mark.parametrize("share", [0.99, 0.999, 0.9999])
def test_percentile_matches_numpy(share):
    x = gaussian(100_000)
    expected = np.quantile(x.abs().numpy(), share, method="inverted_cdf")
    exact = percentile(Exact(x[None]), FORMATS["int8"], share=share)
    sketched = percentile(Sketched(Sketch.of(x)), FORMATS["int8"], share=share)
    assert float(exact.hi) == pytest.approx(expected, rel=1e-7)
    assert float(sketched.hi) == pytest.approx(expected, rel=0.01)


def test_percentile_of_asymmetric_formats_is_a_pair():
    x = gaussian(100_000).exp()
    chosen = percentile(Sketched(Sketch.of(x)), FORMATS["uint8"], share=0.999)
    low, high = np.quantile(x.numpy(), [0.001, 0.999])
    assert (float(chosen.lo), float(chosen.hi)) == pytest.approx((low, high), rel=0.01)


def test_percentile_that_vanishes_falls_back_to_minmax_and_says_so():
    x = torch.zeros(1, 10_000)
    x[0, 0] = 1.0
    chosen = percentile(Exact(x), FORMATS["int8"], share=0.99)
    assert float(chosen.hi) == 1.0
    assert "minmax used" in chosen.notes[0]


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("observe", [lambda x: Exact(x[None]), lambda x: Sketched(Sketch.of(x))])
def test_no_range_exceeds_what_was_observed(name, observe):
    x = gaussian(5000, seed=9).exp()
    for fmt in (FORMATS["int8"], FORMATS["uint8"], FORMATS["fp8_e4m3"]):
        chosen = CALIBRATORS[name](observe(x), fmt)
        assert max(abs(float(chosen.lo)), abs(float(chosen.hi))) <= float(x.max()) * (1 + 1e-12)
        assert math.isfinite(float(chosen.hi))


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_constant_values_give_a_usable_range(name, value):
    x = torch.full((2000,), value)
    for observed in (Exact(x[None]), Sketched(Sketch.of(x))):
        chosen = CALIBRATORS[name](observed, FORMATS["int8"])
        qparams = choose_qparams(FORMATS["int8"], chosen.lo, chosen.hi)
        assert torch.isfinite(qparams.scale).all()
        assert qparams.degenerate == (value == 0.0)


def test_minmax_is_exact_through_a_sketch():
    x = gaussian(1000)
    chosen = minmax(Sketched(Sketch.of(x)), FORMATS["int8"])
    assert (float(chosen.lo), float(chosen.hi)) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("text", ["percentile(99.9)", "percentile(100)", *CALIBRATORS])
def test_known_calibrators_parse(text):
    assert callable(parse_calibrator(text))


@pytest.mark.parametrize("text", ["entropie", "percentile(101)", "percentile(50)", ""])
def test_unknown_calibrators_are_refused(text):
    with pytest.raises(UserError, match=r"percentile|allowed"):
        parse_calibrator(text)
