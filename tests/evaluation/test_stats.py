"""Statistics of rows in groups, against scipy, an enumeration or a closed form."""

import numpy as np
import pytest
from scipy import stats as sps

from layerroute.evaluation import counts, permutation, stats


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def with_ones(values):
    return np.stack([values, np.ones(len(values))], 1)


def scipy_group_interval(statistic, groups):
    """Percentile bootstrap of a statistic of group numbers drawn with replacement."""
    settings = {
        "method": "percentile",
        "n_resamples": 1500,
        "vectorized": False,
        "random_state": np.random.default_rng(1),
    }
    return list(sps.bootstrap((np.arange(groups),), statistic, **settings).confidence_interval)


def test_one_row_per_group_is_the_plain_bootstrap():
    values = np.random.default_rng(0).gamma(2, size=60)
    rows = np.arange(60)
    ours = stats.group_interval(with_ones(values), mean, rows, np.zeros(60))
    reference = sps.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=9999, random_state=np.random.default_rng(1)
    )
    np.testing.assert_allclose(ours, list(reference.confidence_interval), atol=0.1 * reference.standard_error)


@pytest.mark.parametrize("matched", [False, True])
def test_whole_groups_are_drawn(matched, clustered, matched_by_hand):
    """Differences and their length-matched form, on groups of several rows."""
    values, first, group, stratum = clustered(0, effect=1.0)
    bins = np.arange(len(values)) // 2 % 3 if matched else np.zeros(len(values), dtype=int)

    def statistic(picked):
        rows = np.concatenate([np.flatnonzero(group == g) for g in picked])
        return matched_by_hand(values[rows], first[rows], bins[rows])

    low, high = scipy_group_interval(statistic, 30)
    ours = stats.difference_interval(values, first, group, stratum, bins if matched else None)
    np.testing.assert_allclose(ours, [low, high], atol=0.06 * (high - low))


def test_intervals_cover_on_clustered_rows_where_a_bootstrap_of_rows_would_not(clustered):
    by_group = by_row = 0
    for seed in range(200):
        values, _, group, stratum = clustered(seed)
        for rows, name in ((group, "group"), (np.arange(len(group)), "row")):
            low, high = stats.group_interval(with_ones(values), mean, rows, stratum, seed=seed)
            by_group, by_row = (
                by_group + (name == "group" and low < 0 < high),
                by_row + (name == "row" and low < 0 < high),
            )
    assert 0.88 < by_group / 200 < 0.99 and by_row / 200 < 0.8


def test_groups_are_drawn_within_their_stratum():
    strata = np.array([0] * 10 + [1] * 17)
    sums = stats.resampled_sums(np.stack([strata == 0, strata == 1, np.arange(27)], 1), np.arange(27), strata)
    assert sums.shape == (2000, 3)
    assert (sums[:, 0] == 10).all() and (sums[:, 1] == 17).all() and len(np.unique(sums[:, 2])) > 10


def test_strata_of_few_groups_are_drawn_from_together():
    """A source of one conversation, drawn from alone, would not vary at all."""
    values, groups = np.arange(12.0), np.arange(12)
    low, high = stats.group_interval(with_ones(values), mean, groups, groups)
    reference = stats.group_interval(with_ones(values), mean, groups, np.zeros(12))
    assert (low, high) == reference and low < 4.5 and high > 6.5


def test_resamples_are_the_same_in_parts(monkeypatch, clustered):
    """What bounds the memory bounds nothing else."""
    values, _, group, stratum = clustered(0)
    monkeypatch.setattr(stats, "_CELLS", 400)
    parts = stats.resampled_sums(with_ones(values), group, stratum)
    assert (parts[:, 1] == len(values)).all()
    assert parts[:, 0].std() == pytest.approx(np.sqrt(30) * np.bincount(group, values).std(), rel=0.1)


def test_the_seed_fixes_everything(clustered):
    values, first, group, stratum = clustered(0, strata=3)
    for statistic in (
        lambda seed: stats.difference_interval(values, first, group, stratum, seed=seed),
        lambda seed: permutation.difference_p_value(values, first, group, stratum, seed=seed),
        lambda seed: counts.mutual_information(first, group, seed=seed).corrected_bits,
    ):
        assert statistic(1) == statistic(1) != statistic(2)


def test_a_bin_with_one_kind_does_not_count():
    values, bins = np.array([5.0, 1, 7, 4, 4, 100]), np.array([0, 0, 1, 1, 1, 2])
    first = np.array([True, False, True, False, False, True])
    assert stats.difference(values, first, bins) == pytest.approx((1 * (5 - 1) + 1 * (7 - 4)) / 2)
    assert np.isnan(stats.difference(values, first, np.arange(6)))
    assert stats.difference(values, first) == pytest.approx(values[first].mean() - values[~first].mean())


def test_lengths_of_a_bin_differ_by_less_than_a_tenth():
    tokens = np.arange(1, 5000)
    bins = stats.length_bins(tokens)
    assert (np.diff(bins) >= 0).all()
    for b in np.unique(bins):
        assert tokens[bins == b].max() < 1.1 * tokens[bins == b].min() + 1e-9


def test_auc_is_mann_and_whitneys_u():
    rng = np.random.default_rng(0)
    values, positive = rng.integers(0, 8, 200).astype(float), rng.random(200) < 0.3
    values += 2 * positive
    u = sps.mannwhitneyu(values[positive], values[~positive]).statistic
    assert stats.auc(values, positive) == pytest.approx(u / (positive.sum() * (~positive).sum()))
    assert stats.auc(np.ones(4), np.array([True, False, False, True])) == 0.5
    assert np.isnan(stats.auc(np.arange(3.0), np.full(3, True)))


def test_auc_interval_draws_groups(clustered):
    values, positive, group, stratum = clustered(5, groups=25, effect=1.0)
    values = values.round()

    def statistic(picked):
        rows = np.concatenate([np.flatnonzero(group == g) for g in picked])
        ones, others = values[rows][positive[rows]], values[rows][~positive[rows]]
        return np.mean(ones[:, None] > others) + np.mean(ones[:, None] == others) / 2

    low, high = scipy_group_interval(statistic, 25)
    np.testing.assert_allclose(
        stats.auc_interval(values, positive, group, stratum), [low, high], atol=0.07 * (high - low)
    )


def residuals(values, control):
    fit = sps.linregress(control, values)
    return values - fit.intercept - fit.slope * control


def test_partial_correlation_is_that_of_residuals():
    """Independent rows: r exactly, interval and p near the closed form of Fisher."""
    rng = np.random.default_rng(0)
    control = rng.normal(5, 1, 400)
    x = 3 * control + rng.normal(size=400)
    y = -2 * control + 0.15 * x + rng.normal(size=400)
    found = stats.partial_correlation(x, y, control, np.arange(400), np.zeros(400))
    reference = sps.pearsonr(residuals(x, control), residuals(y, control))
    assert found.r == pytest.approx(reference.statistic, abs=1e-12)
    np.testing.assert_allclose(found.interval, list(reference.confidence_interval()), atol=0.02)
    assert 1e-4 < reference.pvalue < 0.5 and np.log(found.p_value) == pytest.approx(np.log(reference.pvalue), rel=0.15)


def test_partial_correlation_knows_that_rows_come_in_groups():
    """Both variables vary by group alone: there is as much to know as there are groups."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(60), 20)
    x, y, control = (rng.normal(size=60)[group] for _ in range(3))
    found = stats.partial_correlation(x, y, control, group, np.zeros(1200))
    assert np.diff(np.arctanh(found.interval)) == pytest.approx(2 * 1.96 / np.sqrt(60 - 4), rel=0.2)


def test_partial_correlation_without_variation():
    x, ones, rows = np.array([1.0, 2, 3, 5]), np.ones(4), np.arange(4)
    assert np.isnan(stats.partial_correlation(x, ones, x**2, rows, rows * 0).r)
    assert np.isnan(stats.partial_correlation(x, x**2, x, rows, rows * 0).r)
    plain = stats.partial_correlation(x, x**2, ones, rows, rows * 0).r
    assert plain == pytest.approx(np.corrcoef(x, x**2)[0, 1])
    perfect = stats.partial_correlation(x, x, ones, rows, rows * 0)
    assert perfect.interval == pytest.approx((1, 1)) and perfect.p_value == pytest.approx(0, abs=1e-6)


def test_bins_within_groups_need_two_numbers_each(clustered):
    """The same resamples, by the way that holds for any bins and by the short one."""
    values, first, group, stratum = clustered(6, groups=30, size=7, strata=2)
    general = stats.group_interval(stats._two_sided(values, first, group), stats.difference_of, group, stratum, seed=3)
    assert stats.difference_interval(values, first, group, stratum, group, seed=3) == pytest.approx(general)
