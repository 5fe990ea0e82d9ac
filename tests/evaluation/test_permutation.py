"""p-values by permutation, against enumerations, scipy and what chance gives where conversations are alike."""

from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats as sps

from layerroute.evaluation import stats
from layerroute.evaluation.counts import information_p_value
from layerroute.evaluation.permutation import Shuffle, difference_p_value


def test_permutation_is_that_of_an_enumeration_within_strata():
    """Two strata that differ in level and in the share of `first`, so that the permutations' mean is not zero."""
    values = np.array([1.0, 2, 2, 4, 9, 8, 12, 15])
    first = np.array([False, False, True, False, True, False, True, True])
    strata = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    figures = []
    for low, high in product(combinations(range(4), 1), combinations(range(4, 8), 3)):
        chosen = np.isin(np.arange(8), low + high)
        figures.append(values[chosen].mean() - values[~chosen].mean())
    assert np.mean(figures) > 3
    exact = 2 * np.mean(np.array(figures) >= stats.difference(values, first) - 1e-9)
    assert 0.2 < exact < 0.9
    assert difference_p_value(values, first, strata, strata) == pytest.approx(exact, abs=0.04)


def test_permutation_in_one_stratum_is_scipys(clustered):
    values, first, _, stratum = clustered(3, groups=12, effect=0.6)

    def statistic(a, b, axis):
        return a.mean(axis) - b.mean(axis)

    reference = sps.permutation_test(
        (values[first], values[~first]),
        statistic,
        n_resamples=4999,
        vectorized=True,
        random_state=np.random.default_rng(0),
    )
    assert 0.005 < reference.pvalue < 0.4
    assert difference_p_value(values, first, stratum, stratum) == pytest.approx(reference.pvalue, abs=0.03)


def test_permutation_within_bins_is_that_of_a_shuffle(clustered, matched_by_hand):
    values, first, _, _ = clustered(4, groups=20, effect=0.5)
    bins = np.random.default_rng(0).integers(8, size=len(values))
    rng = np.random.default_rng(1)
    figures = []
    for _ in range(1000):
        shuffled = first.copy()
        for b in range(8):
            shuffled[bins == b] = rng.permutation(first[bins == b])
        figures.append(matched_by_hand(values, shuffled, bins))
    observed = matched_by_hand(values, first, bins)
    reference = 2 * np.mean(np.array(figures) >= observed)
    assert observed > 0
    assert 0.01 < reference < 0.9
    assert difference_p_value(values, first, bins, bins, bins) == pytest.approx(reference, abs=0.05)


def test_permutation_needs_a_stratum_of_both_kinds():
    first = np.array([True, True, False, False])
    assert difference_p_value(np.arange(4.0), first, np.arange(4), np.array([0, 0, 1, 1])) is None
    assert difference_p_value(np.ones(4), first, np.zeros(4), np.zeros(4)) == 1.0


def test_false_positives_are_as_many_as_stated_within_groups():
    rng = np.random.default_rng(0)
    p_values = []
    for seed in range(300):
        values, first, strata = rng.integers(0, 10, 80), rng.random(80) < 0.4, rng.integers(3, size=80)
        p_values.append(difference_p_value(values + 5 * strata, first, strata, strata, seed=seed))
    assert np.mean(np.array(p_values) < 0.05) <= 0.08


def test_whole_conversations_are_exchanged_where_each_holds_one_kind():
    """Four conversations of two rows: the six ways to call two of them the first kind."""
    level = np.array([1.0, 2.0, 4.0, 9.0])
    values, groups, strata = np.repeat(level, 2), np.repeat(np.arange(4), 2), np.zeros(8)
    first = np.isin(groups, [2, 3])
    figures = []
    for chosen in combinations(range(4), 2):
        rest = [group for group in range(4) if group not in chosen]
        figures.append(level[list(chosen)].mean() - level[rest].mean())
    exact = 2 * np.mean(np.array(figures) >= stats.difference(values, first) - 1e-9)
    assert exact == pytest.approx(1 / 3)
    assert difference_p_value(values, first, groups, strata) == pytest.approx(exact, abs=0.04)


def test_rows_that_resemble_each_other_are_no_evidence():
    """Conversations of ten like rows, one kind each, no effect: exchanging rows would find one in half."""
    found, told = [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(30), 10)
        first = (rng.permutation(30) < 12)[groups]
        values = np.round(rng.normal(size=30)[groups] + 0.1 * rng.normal(size=300), 1)
        found.append(difference_p_value(values, first, groups, np.zeros(300), seed=seed) < 0.05)
        levels = np.unique(values.round(), return_inverse=True)[1]
        told.append(information_p_value(levels, first.astype(int), groups, np.zeros(300), seed=seed) < 0.05)
    assert np.mean(found) < 0.12 and np.mean(told) < 0.12


def test_what_sources_alone_make_is_no_evidence():
    """First rows are fewer where values are high, and within each source they are lower: the sum says otherwise."""
    strata = np.repeat([0, 1], 100)
    first = np.concatenate([np.arange(100) < 90, np.arange(100) < 10])
    values = np.where(strata == 0, 50.0, 10.0) - 10 * first
    assert stats.difference(values, first) > 10
    assert difference_p_value(values, first, np.arange(200), strata) == 1.0


def test_a_shuffle_keeps_what_it_should():
    rng = np.random.default_rng(0)
    groups = rng.integers(40, size=200)
    strata = groups % 3
    labels = np.where(groups % 2 == 0, groups % 4, rng.integers(3, size=200))
    shuffle = Shuffle(labels, groups, strata, seed=1)
    draws = np.concatenate(list(shuffle.draws()))
    assert draws.shape == (2000, 200) and (draws != labels).any(1).mean() > 0.9
    for drawn in draws[:20]:
        for group in np.unique(groups):
            before, after = labels[groups == group], drawn[groups == group]
            if len(np.unique(before)) > 1:
                assert sorted(before) == sorted(after)
            else:
                assert len(np.unique(after)) == 1
