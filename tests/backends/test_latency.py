"""Timing: what is told of times is what order statistics and counts support."""

import math

import numpy as np
import pytest
from scipy import stats

from backends import energy, latency
from backends.cost import MILLION, Prices, cost
from backends.latency import (
    Timed,
    change_point,
    mean_interval,
    notes,
    percentile_interval,
    queries_needed,
    ratio_interval,
    time_in_turns,
    time_steadily,
    timed,
    warm_up,
)
from halfstep.interval import Interval


def test_how_many_queries_a_percentile_needs():
    """64 for p90, 662 for p99, 6,636 for p99.9: one event over the bound, 99 % confidence."""
    assert [queries_needed(q) for q in (0.9, 0.99, 0.999)] == [64, 662, 6636]
    for q in (0.9, 0.99):
        n = queries_needed(q)
        assert stats.binom.cdf(1, n, 1 - q) <= 0.01 < stats.binom.cdf(1, n - 1, 1 - q)


@pytest.mark.parametrize(
    ("n", "told"),
    [
        (63, ["p50"]),
        (64, ["p50", "p90"]),
        (661, ["p50", "p90"]),
        (662, ["p50", "p90", "p99"]),
    ],
)
def test_percentiles_that_the_count_does_not_support_are_not_told(n, told):
    times = np.random.default_rng(0).lognormal(size=n)
    assert list(Timed(1, times, 0, None).percentiles()) == told


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_the_bounds_of_a_percentile_hold_as_often_as_they_say(q):
    rng, truth = np.random.default_rng(1), stats.lognorm(1.0).ppf(q)
    found = [percentile_interval(rng.lognormal(size=700), q) for _ in range(600)]
    above = np.mean([i.high >= truth for i in found])
    below = np.mean([i.low <= truth for i in found])
    # Three standard errors below 95 %.
    assert min(above, below) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 600)
    assert all(i.low <= i.value <= i.high for i in found)


def test_the_bounds_of_a_mean_hold_for_times_that_hang_together():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(300):
        noise = np.empty(2000)
        noise[0] = rng.normal()
        for i in range(1, 2000):
            noise[i] = 0.5 * noise[i - 1] + rng.normal()
        found = mean_interval(10 + noise)
        hits += found.high >= 10
    assert hits / 300 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300)


def test_one_long_pause_leaves_finite_bounds():
    times = np.full(64, 0.001)
    times[60] = 5.0
    found = Timed(4, times, 0, None).throughput
    assert math.isfinite(found.high)
    assert found.low <= found.value <= found.high == 4000.0


def test_warm_up_is_cut_and_a_steady_run_is_not():
    rng = np.random.default_rng(3)
    steady = rng.normal(1.0, 0.05, 500)
    warming = steady + 4 * np.exp(-np.arange(500) / 12)
    assert 20 <= warm_up(warming) <= 120
    assert warming[warm_up(warming) :].mean() == pytest.approx(1.0, abs=0.02)
    assert warm_up(steady) <= 250
    assert warm_up(np.ones(8)) == 0  # too few to say
    paused = steady.copy()
    paused[300] = 50.0
    assert warm_up(paused) < 300


def test_a_change_of_level_is_found_where_it_is():
    rng = np.random.default_rng(4)
    times = rng.normal(1.0, 0.05, 400)
    assert change_point(times) is None
    times[250:] *= 1.3
    found = change_point(times)
    assert found is not None
    assert abs(found.at - 250) <= 5
    assert found.share == pytest.approx(0.3, abs=0.03)
    assert found.p_value < 1e-6
    assert change_point(times[:10]) is None


def test_change_points_are_seldom_seen_where_there_are_none():
    rng = np.random.default_rng(5)
    alarms = sum(change_point(rng.lognormal(0, 0.5, 200)) is not None for _ in range(500))
    assert alarms <= 12  # 1 % of 500, and three standard errors


def test_candidates_take_turns_in_an_order_that_rotates():
    order = []
    asked = {name: lambda query, name=name: order.append((name, query)) for name in "abc"}
    times = time_in_turns(asked, 3)
    assert "".join(name for name, _ in order) == "abc" + "bca" + "cab"
    assert [query for _, query in order] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", 3)


def test_queries_lost_to_warming_up_are_made_up_for(monkeypatch):
    """A candidate that is slower at first: as many steady ones are left as were asked for."""
    now, asked, rng = [0.0], [], np.random.default_rng(10)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def warming(query):
        asked.append(query)
        now[0] += 0.004 if len(asked) <= 30 else rng.normal(0.0005, 0.00001)

    times = time_steadily({"a": warming}, 100)["a"]
    assert len(times) == len(asked) > 100
    assert len(times) - warm_up(times) >= 100
    found = timed({"a": times}, 1)["a"]
    assert list(found.percentiles()) == ["p50", "p90"]
    short = Timed(1, np.ones(650), 0, None)
    assert notes({"x": [short]}, 700) == [
        "x: 650 steady queries are too few for a p99, which takes 662"
    ]
    assert notes({"x": [short]}, 100) == []


def test_what_moves_with_the_machine_is_told_once():
    rng = np.random.default_rng(9)
    drift = np.where(np.arange(700) < 400, 1.0, 1.4)
    times = {name: rng.normal(level, 0.02, 700) * drift for name, level in (("a", 1), ("b", 3))}
    found = {name: [Timed(1, own, 0, change_point(own))] for name, own in times.items()}
    (note,) = notes(found, 700)
    assert note.startswith("no steady state at batch 1: the median of 2 of 2 contenders moves by")
    assert "+40% to +4" in note or "+39% to +40%" in note


def test_a_machine_that_slows_down_does_not_move_the_ratio():
    rng = np.random.default_rng(6)
    drift = np.linspace(1, 3, 700)
    reference = 10 * drift * rng.lognormal(0, 0.02, 700)
    twice = 5 * drift * rng.lognormal(0, 0.02, 700)
    ratio = ratio_interval(twice, reference)
    assert ratio.low <= 2.0 <= ratio.high
    assert ratio.high - ratio.low < 0.05


def test_cost_is_of_the_best_batch_within_the_objective():
    rng = np.random.default_rng(7)
    small = Timed(1, rng.normal(0.010, 1e-4, 700), 0, None)
    large = Timed(32, rng.normal(0.160, 1e-3, 700), 0, None)
    prices = Prices(per_hour=3.6, watts=100, per_kwh=0.5)
    assert prices.hourly == pytest.approx(3.65)
    found = cost([small, large], prices, within_ms=50)
    assert found.batch_size == 1
    assert found.amount.value == pytest.approx(3.65 / 3600 * MILLION / 100, rel=0.01)
    assert found.amount.low < found.amount.value < found.amount.high
    assert cost([small, large], prices, within_ms=None).batch_size == 32
    assert cost([small, large], prices, within_ms=5) is None


def test_every_candidate_drops_the_same_warm_up():
    rng = np.random.default_rng(8)
    cold = rng.normal(1, 0.02, 300) + 5 * np.exp(-np.arange(300) / 10)
    found = timed({"a": cold, "b": rng.normal(1, 0.02, 300)}, 4)
    assert found["a"].dropped == found["b"].dropped > 0
    assert found["a"].throughput.value == pytest.approx(4, rel=0.03)


def test_energy_is_read_from_the_counters_or_not_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert energy.read().joules is None
    assert "no RAPL counters" in energy.read().reason
    for name, micro in (("intel-rapl:0", 2_000_000), ("intel-rapl:1", 500_000),
                        ("intel-rapl:0:0", 9_000_000)):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{micro}\n")
    before = energy.read()
    assert before.joules == 2.5  # a part of a package is not counted twice
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("3000000\n")
    assert energy.between(before, energy.read()).joules == 1.0
    wrapped = energy.between(energy.read(), before)
    assert wrapped.joules is None
    assert "wrapped" in wrapped.reason


def test_an_interval_as_json():
    found = Interval(2.0, 1.0, 3.0)
    assert Interval.from_json(found.to_json()) == found
