"""Statistics of timings against numpy and scipy, and the rule that refuses to state what is noise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from layerroute.runtime.timing import Goal, Line, Ratio, Spread

TIMES = st.lists(st.floats(0.1, 1000), min_size=2, max_size=12)


@given(TIMES)
def test_spread_is_numpys_quantiles(times):
    spread = Spread.of(times)
    assert spread.lower_quartile == pytest.approx(np.percentile(times, 25))
    assert spread.upper_quartile == pytest.approx(np.percentile(times, 75))
    assert (spread.min, spread.max) == (min(times), max(times))
    assert spread.median == pytest.approx(np.median(times))


def test_ratios_are_paired_by_repetition():
    """A machine that is twice as slow in every second repetition changes no ratio."""
    references = np.array([10.0, 20.0] * 4)
    ratio = Ratio.of(1.1 * references, references)
    assert ratio.median == pytest.approx(1.1)
    assert ratio.interval == pytest.approx((1.1, 1.1))
    assert ratio.resolved


@pytest.mark.parametrize("count", [9, 25])
def test_the_interval_is_scipys_bootstrap(count):
    generator = np.random.default_rng(3)
    references = generator.normal(10, 0.5, count)
    times = generator.normal(12, 0.5, count)
    expected = stats.bootstrap(
        (times / references,), np.median, n_resamples=20_000, method="percentile", rng=generator
    ).confidence_interval
    low, high = Ratio.of(times, references).interval
    assert low == pytest.approx(expected.low, abs=0.01)
    assert high == pytest.approx(expected.high, abs=0.01)


def test_the_same_seed_gives_the_same_interval():
    times, references = [3.0, 4.0, 5.0, 7.0, 8.0], [3.0, 5.0, 4.0, 6.0, 9.0]
    assert Ratio.of(times, references, seed=1) == Ratio.of(times, references, seed=1)


def test_a_ratio_within_its_spread_is_not_stated():
    noisy = Ratio.of([9.0, 10.0, 11.0, 12.0], [10.0] * 4)  # quartiles 0.975 and 1.125 around 1.05
    assert not noisy.resolved
    assert noisy.as_dict()["ratio"] is None
    assert noisy.as_dict()["interval"] == list(noisy.interval)


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_a_ratio_beyond_its_spread_is_stated(factor):
    clear = Ratio.of([factor * time for time in (9.9, 10.0, 10.1, 10.2)], [10.0] * 4)
    assert clear.resolved
    assert clear.as_dict()["ratio"] == clear.median == pytest.approx(factor * 1.005)


@pytest.mark.parametrize(("sign", "bound", "met"), [
    ("<=", 1.02, True), ("<=", 1.0, None), ("<=", 0.9, False), (">=", 0.9, True), (">=", 1.1, False), ("<", 1.01, None),
])  # fmt: skip
def test_a_goal_is_judged_by_the_whole_interval(sign, bound, met):
    assert Goal("speed", sign, bound).met((0.98, 1.01)) is met


def test_a_line_is_found_again():
    line = Line.through([30, 26, 22, 14], [3 + 0.5 * blocks for blocks in (30, 26, 22, 14)])
    assert (line.per_block, line.fixed) == (pytest.approx(0.5), pytest.approx(3))
