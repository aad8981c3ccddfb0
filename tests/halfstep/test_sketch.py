"""Sketches: bounded, order-invariant, exactly mergeable, and sharp beside an outlier."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.observation import Observation
from halfstep.observed import Sketched
from halfstep.sketch import BINS, Sketch

values = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1)


def sketched(x):
    return Sketched(Observation(Sketch.of(x), np.array([[float(x.min()), float(x.max())]])))


def same(one, other):
    return np.array_equal(one.counts, other.counts) and (one.lo, one.hi) == (other.lo, other.hi)


@given(values, st.randoms(), st.integers(1, 5))
def test_any_order_and_any_split_give_the_same_bits(numbers, random, parts):
    whole = Sketch.of(torch.tensor(numbers))
    random.shuffle(numbers)
    merged = Sketch()
    for chunk in np.array_split(np.array(numbers, dtype=np.float32), parts):
        if len(chunk):
            merged = Sketch.of(torch.from_numpy(chunk)) + merged
    assert same(whole, merged)
    assert whole.total == len(numbers)


@given(values)
def test_every_value_lies_in_its_bin(numbers):
    x = torch.tensor(numbers)
    lower, upper, counts = Sketch.of(x).bins
    assert counts.sum() == len(numbers)
    normal = x[x.abs() >= 2.0**-126].double().numpy()
    inside = (lower <= normal[:, None]) & (normal[:, None] <= upper)
    assert inside.any(axis=1).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_bulk_stays_resolved_beside_an_outlier_ten_thousand_times_larger(sign):
    bulk = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([bulk, torch.tensor([sign * 10_000 * float(bulk.abs().max())])])
    found = float(sketched(x).quantile(0.999, magnitude=True))
    exact = float(np.quantile(x.abs().numpy(), 0.999))
    assert found == pytest.approx(exact, rel=0.01)


def test_counters_do_not_saturate_at_two_to_the_24():
    one = Sketch.of(torch.ones(4096))
    many = one
    for _ in range(13):  # doubling: 4096 * 2**13 values
        many = many + many
    assert (many + one).total == 2**25 + 4096


def test_memory_does_not_grow_with_the_data():
    sketch = Sketch()
    for seed in range(5):
        sketch = sketch + Sketch.of(
            torch.randn(100_000, generator=torch.Generator().manual_seed(seed))
        )
    assert sketch.counts.nbytes == BINS * 8


def test_nan_and_infinity_are_counted():
    x = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), -0.0])
    assert Sketch.of(x).nonfinite == 3


def test_tensors_round_trip():
    sketch = Sketch.of(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert same(Sketch.from_tensors(sketch.tensors()), sketch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_counted_as_float32(dtype):
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert same(Sketch.of(x), Sketch.of(x.float()))


def test_the_histogram_keeps_all_mass_and_nearly_its_place():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    ours = sketched(x).histogram(2048)[0]
    exact = np.histogram(x.abs().numpy(), bins=2048, range=(0, float(x.abs().max())))[0]
    assert ours.sum() == pytest.approx(200_000)
    assert np.abs(np.cumsum(ours) - np.cumsum(exact)).max() < 0.002 * 200_000
