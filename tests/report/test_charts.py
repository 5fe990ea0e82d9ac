"""Figures in words, ticks on axes, and what a Pareto chart calls its frontier."""

from itertools import pairwise

import pytest

from layerroute.report.charts.drawing import linear_ticks, tick_digits
from layerroute.report.charts.scatter import Point, frontier
from layerroute.report.wording import in_runs, number, p_value, share, signed


def test_figures_are_written_plainly():
    assert (
        number(-0.004) == "0.00"
        and number(1234.5, 1) == "1,234.5"
        and number(2e6) == "2e+06"
        and number(None) == "\u2013"
    )
    assert (
        signed(0.04) == "0.0" and signed(2.04) == "+2.0" and signed(-2.04) == "\u22122.0" and share(0.1234) == "12.3%"
    )
    assert p_value(0.0004) == "p < 0.001" and p_value(0.049) == "p = 0.049" and p_value(0.5) == "p = 0.50"
    assert in_runs([2, 3, 4, 7, 9, 10]) == "2 to 4, 7, 9, 10" and in_runs([]) == ""


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-3.2, 21.4), (0.7601, 0.7604), (5, 5), (0, 0), (71.0, 101.0), (3e4, 9e5)]
)
def test_ticks_are_round_and_cover(low, high):
    ticks = linear_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 6
    steps = {round(b - a, 9) for a, b in pairwise(ticks)}
    assert len(steps) == 1 and len({number(tick, tick_digits(ticks)) for tick in ticks}) == len(ticks)


def test_the_frontier_is_what_nothing_beats():
    points = [Point(name, cost, quality, "circle", "") for name, cost, quality in
              (("a", 1, 5), ("b", 2, 3), ("c", 2, 4), ("d", 3, 3), ("e", 4, 1))]  # fmt: skip
    assert [point.label for point in frontier(points, low_is_good=True)] == ["a", "b", "e"]
    assert [point.label for point in frontier(points, low_is_good=False)] == ["a"]
