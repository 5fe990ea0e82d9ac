"""Statistics of counts and over seeds, against scipy, an enumeration or a closed form."""

from itertools import product

import numpy as np
import pytest
from scipy import stats as sps

from layerroute.evaluation import counts, seeds


def test_mutual_information_is_the_divergence_from_independence():
    rng = np.random.default_rng(0)
    first = rng.integers(5, size=300)
    second = np.where(rng.random(300) < 0.3, first % 3, rng.integers(3, size=300))
    joint = sps.contingency.crosstab(first, second).count / 300
    outer = np.outer(joint.sum(1), joint.sum(0))
    found = counts.mutual_information(first, second)
    assert found.bits == pytest.approx(sps.entropy(joint.ravel(), outer.ravel(), base=2))
    assert counts.information_p_value(first, second, np.arange(300), np.zeros(300)) == pytest.approx(1 / 2001)
    shuffled = [counts.mutual_information(first, rng.permutation(second)).bits for _ in range(60)]
    assert found.bits - found.corrected_bits == pytest.approx(np.mean(shuffled), rel=0.2)


def test_mutual_information_at_its_ends():
    labels = np.arange(400) % 4
    same = counts.mutual_information(labels, labels * 7)
    assert same.bits == pytest.approx(2)
    none = counts.mutual_information(np.repeat(np.arange(4), 100), labels)
    assert none.bits == pytest.approx(0, abs=1e-12) and none.corrected_bits < 0
    constant = counts.mutual_information(np.zeros(400), labels)
    assert (constant.bits, constant.corrected_bits) == pytest.approx((0, 0), abs=1e-12)
    assert counts.information_p_value(labels, np.zeros(400, int), labels, labels) is None


def test_chance_alone_is_corrected_away():
    """Labels that nearly all differ tell much of anything, by the plain estimate."""
    rng = np.random.default_rng(0)
    found = [
        counts.mutual_information(rng.integers(100, size=200), rng.integers(3, size=200), seed=i) for i in range(40)
    ]
    assert np.mean([each.bits for each in found]) > 0.5
    assert abs(np.mean([each.corrected_bits for each in found])) < 0.02


def test_entropy_and_distinct_routes():
    assert counts.entropy(np.array([1, 1, 2])) == pytest.approx(1.5)
    assert counts.entropy(np.array([9])) == 0
    frequencies = np.array([900, 90, 9, 1])
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(50, frequencies / 1000, size=4000)
    assert counts.expected_distinct(frequencies, 50) == pytest.approx((drawn > 0).sum(1).mean(), abs=0.03)
    assert counts.expected_distinct(np.array([7]), 1000) == 1


@pytest.mark.parametrize(("right", "n"), [(0, 5), (3, 7), (50, 80), (12, 12)])
def test_wilson(right, n):
    z, share = sps.norm.ppf(0.975), right / n
    centre, margin = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    expected = [(centre - margin) / (1 + z**2 / n), (centre + margin) / (1 + z**2 / n)]
    np.testing.assert_allclose(counts.wilson(right, n), expected, atol=1e-12)


@pytest.mark.parametrize(("b", "c"), [(1, 8), (8, 1), (4, 4), (0, 0), (0, 3)])
def test_mcnemar(b, c):
    """Twice the binomial tail, at most 1."""
    assert counts.mcnemar(b, c) == pytest.approx(min(1, 2 * sps.binom.cdf(min(b, c), b + c, 0.5)))


def test_seeds_have_students_interval():
    values = [3.0, 4.5, 2.0, 3.5]
    found = seeds.over_seeds(values)
    reference = sps.ttest_1samp(values, 0).confidence_interval()
    assert found["mean"] == 3.25 and found["ci95"] == pytest.approx(list(reference)) and found["values"] == values
    assert seeds.over_seeds([3.0]) == {"mean": 3.0, "ci95": None, "values": [3.0]}
    assert seeds.over_seeds([3.0, None]) == {"mean": None, "ci95": None, "values": [3.0, None]}


def test_seeds_are_paired():
    first, second = [3.0, 4.5, 2.0, 3.5, 9.0], [1.0, 4.0, 2.5, 1.5, 5.0]
    found = seeds.paired_tests(first, second)
    assert found["mean_difference"] == pytest.approx(np.mean(first) - np.mean(second))
    assert found["t_p_value"] == pytest.approx(sps.ttest_rel(first, second).pvalue)
    # exact by enumeration of signs: ranks of |2, .5, -.5, 2, 4|, ties sharing theirs
    ranks, signs = sps.rankdata([2, 0.5, 0.5, 2, 4]), np.array(list(product([0, 1], repeat=5)))
    sums = signs @ ranks
    observed = ranks @ [1, 1, 0, 1, 1]
    exact = np.mean(abs(sums - ranks.sum() / 2) >= abs(observed - ranks.sum() / 2))
    assert found["wilcoxon_p_value"] == pytest.approx(exact, abs=0.05)


def test_seeds_that_give_no_test():
    assert seeds.paired_tests([1.0], [2.0]) == {"mean_difference": -1.0, "t_p_value": None, "wilcoxon_p_value": None}
    assert set(seeds.paired_tests([1.0, None], [2.0, 3.0]).values()) == {None}
    assert seeds.paired_tests([1.0, 2.0], [1.0, 2.0])["wilcoxon_p_value"] is None
    steady = seeds.paired_tests([1.0, 2.0, 3.0], [0.9, 1.9, 2.9])
    assert steady["t_p_value"] is None and steady["wilcoxon_p_value"] == pytest.approx(0.25)
