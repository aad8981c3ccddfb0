"""Calibrators: closed forms, published algorithms, and what must be named."""

import math

import numpy as np
import pytest
import slow_reference as reference
import torch
from torch.ao.quantization import MovingAverageMinMaxObserver

from halfstep.calibrators import (
    CALIBRATORS,
    FOR_ACTIVATIONS_ONLY,
    entropy_candidate,
    minmax,
    mse,
    parse_calibrator,
    percentile,
)
from halfstep.errors import UserError
from halfstep.formats import FORMATS
from halfstep.granularity import PerAxis
from halfstep.observation import Observation
from halfstep.observed import Exact, Sketched
from halfstep.qparams import choose_qparams
from halfstep.quantize import fake_quantize
from halfstep.scheme import Spec
from halfstep.sketch import Sketch

GAUSS = {2: 1.224, 3: 1.952, 4: 2.474, 6: 3.270, 8: 3.921}


def sketched(x):
    return Sketched(Observation(Sketch.of(x), np.array([[float(x.min()), float(x.max())]])))


def gaussian(n=2**20, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def clip(chosen, fmt):
    """The clip alpha that a range stands for."""
    return float(choose_qparams(fmt, chosen.lo, chosen.hi).scale * fmt.half_width)


@pytest.mark.parametrize("observe", [lambda x: Exact(x[None]), sketched])
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
    assert entropy_candidate(histogram, edges).bins == reference.entropy_bins(
        histogram, len(edges) - 1
    )


def test_entropy_leaves_its_histogram_alone():
    histogram = np.random.default_rng(0).integers(0, 9, 2048).astype(float)
    before = histogram.copy()
    entropy_candidate(histogram, FORMATS["int8"].positive_edges(unsigned=False).numpy())
    assert np.array_equal(histogram, before)


def test_entropy_from_a_sketch_is_near_the_best_of_the_exact_histogram():
    x = gaussian(2**19, seed=2)
    chosen = CALIBRATORS["entropy"](sketched(x), FORMATS["int8"])
    exact = CALIBRATORS["entropy"](Exact(x[None]), FORMATS["int8"])
    assert clip(chosen, FORMATS["int8"]) == pytest.approx(clip(exact, FORMATS["int8"]), rel=0.05)


def test_entropy_does_not_collapse_on_pixels():
    """Values of few levels: keeping one filled bin has divergence zero from itself."""
    pixels = torch.randint(0, 17, (5000,), generator=torch.Generator().manual_seed(0)) / 16
    for observed in (Exact(pixels[None]), sketched(pixels)):
        chosen = CALIBRATORS["entropy"](observed, FORMATS["int8"])
        assert float(chosen.hi) == 1.0
        assert "entropy equals minmax" in chosen.notes[0]


SHAPES = {
    "an outlier": lambda: torch.cat([gaussian(2000, seed=4), torch.tensor([30.0])]),
    "an outlier far out": lambda: torch.cat([gaussian(2000, seed=5), torch.tensor([-20_000.0])]),
    "skewed": lambda: gaussian(2000, seed=6).exp() - 0.2,
    "few levels": lambda: torch.arange(17).repeat(60) / 16,
    "one sign": lambda: gaussian(2000, seed=7).abs() + 1,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name",
    ["int1", "int2", "int4", "int4_full", "int8", "uint1", "uint2", "int4_asym", "int8_asym",
     "fp4_e2m1", "fp8_e4m3", "nf4"],
)  # fmt: skip
def test_mse_equals_the_slow_reference_that_tries_every_candidate(name, shape):
    fmt, x = FORMATS[name], SHAPES[shape]()
    ours = mse(Exact(x[None]), fmt)
    low, high = reference.mse_range(x, torch.ones_like(x), float(x.min()), float(x.max()), fmt)
    assert float(ours.lo) == pytest.approx(low, rel=1e-9)
    assert float(ours.hi) == pytest.approx(high, rel=1e-9)


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
    found = percentile(sketched(x), FORMATS["int8"], share=share)
    assert float(exact.hi) == pytest.approx(expected, rel=1e-7)
    assert float(found.hi) == pytest.approx(expected, rel=0.01)


def test_percentile_of_asymmetric_formats_is_a_pair():
    x = gaussian(100_000).exp()
    chosen = percentile(sketched(x), FORMATS["uint8"], share=0.999)
    low, high = np.quantile(x.numpy(), [0.001, 0.999])
    assert (float(chosen.lo), float(chosen.hi)) == pytest.approx((low, high), rel=0.01)


def test_percentile_that_vanishes_falls_back_to_minmax_and_says_so():
    x = torch.zeros(1, 10_000)
    x[0, 0] = 1.0
    chosen = percentile(Exact(x), FORMATS["int8"], share=0.99)
    assert float(chosen.hi) == 1.0
    assert "minmax used" in chosen.notes[0]


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("observe", [lambda x: Exact(x[None]), sketched])
def test_no_range_exceeds_what_was_observed(name, observe):
    if name in FOR_ACTIVATIONS_ONLY and observe is not sketched:
        pytest.skip("weights do not come in batches")
    x = gaussian(5000, seed=9).exp()
    for fmt in (FORMATS["int8"], FORMATS["uint8"], FORMATS["fp8_e4m3"]):
        chosen = CALIBRATORS[name](observe(x), fmt)
        assert max(abs(float(chosen.lo)), abs(float(chosen.hi))) <= float(x.max()) * (1 + 1e-12)
        assert math.isfinite(float(chosen.hi))


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_constant_values_give_a_usable_range(name, value):
    x = torch.full((2000,), value)
    ways = [sketched(x)] if name in FOR_ACTIVATIONS_ONLY else [Exact(x[None]), sketched(x)]
    for observed in ways:
        chosen = CALIBRATORS[name](observed, FORMATS["int8"])
        qparams = choose_qparams(FORMATS["int8"], chosen.lo, chosen.hi)
        assert torch.isfinite(qparams.scale).all()
        assert qparams.degenerate == (value == 0.0)


def test_minmax_is_exact_through_a_sketch():
    x = gaussian(1000)
    chosen = minmax(sketched(x), FORMATS["int8"])
    assert (float(chosen.lo), float(chosen.hi)) == (float(x.min()), float(x.max()))


def test_moving_average_equals_torch_aos_observer():
    batches = gaussian(4000, seed=2).reshape(8, 500).cumsum(0)
    observer = MovingAverageMinMaxObserver(averaging_constant=0.1)
    for batch in batches:
        observer(batch)
    ranges = np.array([[float(b.min()), float(b.max())] for b in batches])
    observed = Sketched(Observation(Sketch.of(batches), ranges))
    chosen = parse_calibrator("moving_average(0.1)")(observed, FORMATS["int8"])
    assert float(chosen.lo) == pytest.approx(float(observer.min_val), rel=1e-6)
    assert float(chosen.hi) == pytest.approx(float(observer.max_val), rel=1e-6)


def test_moving_average_of_one_batch_is_named():
    assert (
        "equals minmax"
        in CALIBRATORS["moving_average"](sketched(gaussian()), FORMATS["int8"]).notes[0]
    )


@pytest.mark.parametrize("observe", [lambda x: Exact(x[None]), sketched])
def test_a_percentile_pair_cuts_each_side_by_its_own_share(observe):
    x = gaussian(200_000, seed=5).exp()
    chosen = parse_calibrator("percentile(2, 99)")(observe(x), FORMATS["uint8"])
    assert float(chosen.lo) == pytest.approx(float(np.quantile(x, 0.02)), rel=0.01)
    assert float(chosen.hi) == pytest.approx(float(np.quantile(x, 0.99)), rel=0.01)


@pytest.mark.parametrize("power", [1.0, 2.0, 2.4, 4.0])
def test_lp_finds_what_a_dense_search_finds(power):
    x, fmt = gaussian(20_000, seed=8), FORMATS["int4"]
    chosen = parse_calibrator(f"lp({power})")(Exact(x[None]), fmt)

    def loss(share):
        amax = (x.abs().max() * share).double()[None]
        error = fake_quantize(x, choose_qparams(fmt, -amax, amax)) - x
        return float(error.double().abs().pow(power).sum())

    ours = (
        float(chosen.hi / x.abs().max())
        if chosen.hi > -chosen.lo
        else float(-chosen.lo / x.abs().max())
    )
    best = min(np.linspace(0.2, 1.0, 400), key=loss)
    assert loss(ours) <= 1.01 * loss(best)


def test_a_higher_power_clips_less():
    x = gaussian(20_000, seed=8)
    clips = [clip(parse_calibrator(f"lp({p})")(Exact(x[None]), FORMATS["int4"]), FORMATS["int4"])
             for p in (1, 2, 4)]  # fmt: skip
    assert clips == sorted(clips)
    assert len(set(clips)) == 3


def test_sqnr_and_mse_are_one_scheme():
    one, other = (Spec(FORMATS["int8"], PerAxis(), c) for c in ("sqnr", "mse"))
    assert one == other


def test_entropy_with_a_single_candidate_is_named():
    """One value and zeros: every smaller candidate keeps one filled bin at most."""
    x = torch.cat([torch.zeros(500), torch.full((500,), 3.0)])
    notes = CALIBRATORS["entropy"](sketched(x), FORMATS["int8"]).notes
    assert "entropy had one candidate in 1 of 1 block(s)" in notes
    assert "entropy equals minmax in 1 of 1 block(s)" in notes


@pytest.mark.parametrize("text", ["percentile(99.9)", "percentile(100)", "percentile(0.1, 99.9)",
                                  "lp(2.4)", "moving_average(0.5)", *CALIBRATORS])  # fmt: skip
def test_known_calibrators_parse(text):
    assert callable(parse_calibrator(text))


@pytest.mark.parametrize(
    "text",
    ["entropie", "percentile(101)", "percentile(50)", "", "percentile(60, 99)", "percentile(x)",
     "percentile(1, 2, 3)", "lp(0)", "moving_average(2)", "mse(3)"],
)  # fmt: skip
def test_unknown_calibrators_are_refused(text):
    with pytest.raises(UserError, match=r"calibrator"):
        parse_calibrator(text)
