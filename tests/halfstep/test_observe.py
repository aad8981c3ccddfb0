"""Observing: the same bits whatever the order, the batch size and the process; growth; drift."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from halfstep.determinism import nondeterministic_operators
from halfstep.digest import digest_tensors
from halfstep.examples import Inputs
from halfstep.observation import Observation, bulk
from halfstep.observe import BATCH, calibrate, canonical, observing
from halfstep.operators import Operand
from halfstep.representativeness import drift, drifts, warning
from halfstep.sites import discover
from halfstep.sketch import Sketch
from halfstep.tally import Tally


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
    ).eval()


def data(n=300):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def in_order(x):
    """The calibration batches of a tensor."""
    inputs = Inputs.of(x)
    return [inputs.batch(rows) for rows in canonical(inputs)]


def observations_digest(x, threads=1):
    model = build()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sites = discover(model, x[:1]).activations
        batches = in_order(x)
        found = calibrate(model, sites, batches, positions=True, examples=len(x))
    finally:
        torch.set_num_threads(before)
    return digest_tensors({f"{n}/{k}": t for n, o in found.items() for k, t in o.tensors().items()})


def test_the_order_of_the_data_moves_no_bit():
    x = data()
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(3))]
    assert observations_digest(x) == observations_digest(shuffled)


def test_counting_beside_the_pass_or_in_it_gives_the_same_bits(monkeypatch):
    x = data()
    beside = observations_digest(x)
    for cores in (1, 64):
        monkeypatch.setattr("halfstep.observe.usable_cores", lambda cores=cores: cores)
        assert observations_digest(x) == beside


def test_another_process_gives_the_same_bits():
    code = (
        "import sys; sys.path.insert(0, 'tests/halfstep'); import test_observe as t; "
        "print(t.observations_digest(t.data()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == observations_digest(data())


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_batches_dealt_to_workers_merge_to_the_same_counts(workers):
    x = data()
    model = build()
    sites = discover(model, x[:1]).activations
    batches = in_order(x)
    whole = calibrate(model, sites, batches)
    parts = [calibrate(model, sites, batches[w::workers]) for w in range(workers)]
    for name, observation in whole.items():
        merged = sum((part[name].sketch for part in parts), Sketch())
        assert np.array_equal(merged.counts, observation.sketch.counts)
        assert (merged.lo, merged.hi) == (observation.sketch.lo, observation.sketch.hi)


def test_calibration_batches_have_one_size_and_every_example_once():
    x = data(100)
    batches = in_order(x)
    assert [len(b) for b in batches] == [BATCH, BATCH, BATCH, 4]
    assert torch.equal(torch.cat(batches).flatten(1).sum(1).sort().values,
                       x.flatten(1).sum(1).sort().values)  # fmt: skip


def test_observing_changes_no_output_bit():
    model, x = build(), data(20)
    with torch.no_grad():
        plain = model(x)
        with observing(model, discover(model, x[:1]).activations) as observer:
            seen = model(x)
    assert torch.equal(plain, seen)
    assert observer.tallies["0"].observation().sketch.total == x.numel()


def test_growth_is_the_range_after_each_part_of_the_data():
    x = data(256)
    model = nn.Sequential(nn.Conv2d(1, 2, 3)).eval()
    order = torch.cat(in_order(x))
    batches = order.split(BATCH)
    found = calibrate(model, discover(model, x[:1]).activations, batches, examples=256)["0"]
    assert [(s.share, s.examples) for s in found.growth] == [
        (0.125, 32),
        (0.25, 64),
        (0.5, 128),
        (1.0, 256),
    ]
    for stand in found.growth:
        part = order[: stand.examples]
        assert (stand.lo, stand.hi) == (float(part.min()), float(part.max()))
        assert stand.bulk == pytest.approx(float(part.abs().flatten().quantile(0.9999)), rel=0.05)
    half, whole = found.growth[-2:]
    assert found.moved == max((whole.amax - half.amax) / whole.amax,
                              abs(whole.bulk - half.bulk) / max(whole.bulk, half.bulk))  # fmt: skip


@pytest.mark.parametrize(("late", "settled"), [(1.0, True), (3.0, False)])
def test_a_range_that_still_moves_is_not_settled(late, settled):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(256, 1, 8, 8, generator=generator)
    x[200:] *= late
    model = nn.Sequential(nn.Conv2d(1, 2, 3)).eval()
    found = calibrate(model, discover(model, x[:1]).activations, x.split(32), examples=256)["0"]
    assert found.settled is settled


def test_an_observation_survives_its_tensors():
    x = data(64)
    model = build()
    sites = discover(model, x[:1]).activations
    found = calibrate(model, sites, x.split(32), positions=True, examples=64)
    for observation in found.values():
        again = Observation.from_tensors(observation.tensors())
        assert digest_tensors(again.tensors()) == digest_tensors(observation.tensors())


def test_bulk_is_a_quantile_of_the_magnitude():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 3 - 1
    exact = float(np.quantile(x.abs().numpy(), 0.9999))
    assert bulk(Sketch.of(x).counts) == pytest.approx(exact, rel=0.01)


def of(x, operand=None):
    tally = Tally()
    tally.add(Sketch.of(x), 0)
    if operand is not None:
        tally.add_channels(x, operand)
    return tally.observation()


def slow_psi(calibrated, other, groups=20):
    """From the raw values: borders at the calibrated quantiles."""
    edges = np.quantile(calibrated, np.linspace(0, 1, groups + 1))
    p = np.histogram(calibrated, edges)[0] / len(calibrated)
    clipped = np.clip(other, edges[0], edges[-1])
    q = np.maximum(np.histogram(clipped, edges)[0] / len(other), 1e-6)
    return float(((q - p) * np.log(q / p)).sum())


@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (0.3, 1), (0, 1.5), (1.0, 1)])
def test_psi_equals_that_of_the_raw_values(shift, scale):
    one = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    other = (np.random.default_rng(1).normal(size=200_000) * scale + shift).astype(np.float32)
    found = drift("site", *(of(torch.from_numpy(v)) for v in (one, other)))
    assert found.psi == pytest.approx(slow_psi(one, other), rel=0.1, abs=0.002)
    outside = ((other < one.min()) | (other > one.max())).mean()
    assert found.outside == pytest.approx(outside, abs=1e-3)
    assert found.shifted == (found.psi > 0.25 or found.outside > 0.001)


def test_data_that_looks_alike_gives_no_warning_and_shifted_data_names_the_worst():
    def sketch(seed, scale=1.0):
        return of(torch.randn(50_000, generator=torch.Generator().manual_seed(seed)) * scale)

    calibrated = {"a": sketch(0), "b": sketch(1), "c": sketch(2)}
    alike = drifts(calibrated, {"a": sketch(3), "b": sketch(4), "c": sketch(5)})
    assert warning(alike, "selection") is None
    other = drifts(calibrated, {"a": sketch(3), "b": sketch(4, 4.0), "c": sketch(5, 2.0)})
    told = warning(other, "selection")
    assert told.startswith(
        "calibration data does not represent selection: 2 of 3 sites are shifted"
    )
    assert told.index("b (") < told.index("c (")


@pytest.mark.parametrize("shape", [(400, 8), (400, 6, 8), (400, 8, 3, 3)])
def test_a_channel_that_only_some_examples_use_is_seen(shape):
    """The values taken together look alike: one channel rises where another one falls."""
    generator = torch.Generator().manual_seed(0)
    operand = Operand("input", -3 if len(shape) == 4 else -1, batch=-len(shape))
    one, alike, other = (torch.randn(shape, generator=generator) for _ in range(3))
    channels = other.movedim(1 if len(shape) == 4 else -1, 0)
    channels[2] += 1.0
    channels[3] -= 1.0
    calm, moved = (drift("site", of(one, operand), of(x, operand)) for x in (alike, other))
    assert not calm.shifted
    assert moved.shifted
    assert moved.psi < 0.25
    axis = 1 if len(shape) == 4 else len(shape) - 1
    means = [x.mean([a for a in range(1, x.dim()) if a != axis]) if x.dim() > 2 else x
             for x in (one, other)]  # fmt: skip
    spread = ((means[0].var(0, correction=0) + means[1].var(0, correction=0)) / 2).sqrt()
    expected = ((means[0].mean(0) - means[1].mean(0)).abs() / spread).max()
    assert moved.channel_shift == pytest.approx(float(expected), rel=1e-4)


def test_values_of_few_levels_have_a_stability_index_too():
    pixels = torch.arange(17).repeat(100) / 16
    same = drift("site", of(pixels), of(pixels))
    assert (same.psi, same.outside) == (0.0, 0.0)
    dark = drift("site", of(pixels), of(torch.zeros(1000)))
    assert dark.psi > 1


def test_an_operator_without_a_deterministic_implementation_is_named():
    class Histogram(nn.Module):
        def forward(self, x):
            return torch.empty(10).put_(x.long().flatten() % 10, x.flatten(), accumulate=False)

    assert nondeterministic_operators(build(), data(4)) == ()
    assert any("put_" in name for name in nondeterministic_operators(Histogram(), torch.rand(4, 5)))
    assert not torch.are_deterministic_algorithms_enabled()
