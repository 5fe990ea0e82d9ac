"""Statistics of counts: shares, tests of paired yes and no, and how much one labelling tells of another.

Boundary: numbers in, numbers out; never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special
from scipy import stats as sps

from layerroute.evaluation.stats import Array, Interval, chunks, p_value_of

__all__ = ["MutualInformation", "entropy", "expected_distinct", "mcnemar", "mutual_information", "wilson"]


def entropy(counts: Array) -> float:
    """Entropy of the frequencies that counts give, in bits."""
    return float(sps.entropy(counts, base=2))


def expected_distinct(counts: Array, draws: int) -> float:
    """Number of distinct kinds expected in independent draws from the frequencies: the sum of `1 - (1 - p)^draws`."""
    return float(-special.expm1(draws * special.log1p(-(counts / counts.sum()))).sum())


@dataclass(frozen=True)
class MutualInformation:
    """How much one labelling tells of another, in bits."""

    bits: float
    """Plug-in estimate; never negative, and above zero by chance alone."""
    corrected_bits: float
    """Minus its mean over permutations."""
    p_value: float


def mutual_information(first: Array, second: Array, *, seed: int = 0) -> MutualInformation:
    """Mutual information of two labellings `[n]`, against 2,000 permutations of one of them.

    Permuting labels draws a random contingency table with the same margins; p is `(1 + k) / (1 + 2000)`, k being the
    permutations with at least as much information.
    """
    table = sps.contingency.crosstab(first, second).count
    rows, columns, n = table.sum(1), table.sum(0), table.sum()
    plogp = special.xlogy(np.arange(n + 1), np.arange(n + 1)) / (n * np.log(2))
    margins = np.log2(n) - plogp[rows].sum() - plogp[columns].sum()
    rng = np.random.default_rng(seed)
    # Boyett's method shuffles; the other one, scipy's choice for many rows, is wrong for tables of one row or column
    null = sps.random_table(rows, columns, seed=rng)
    drawn = (null.rvs(size, method="boyett") for size in chunks(table.size))
    permuted = np.concatenate([plogp[tables].sum((1, 2)) for tables in drawn]) + margins
    bits = max(0.0, float(plogp[table].sum() + margins))
    return MutualInformation(bits, bits - float(permuted.mean()), p_value_of(permuted, bits))


def wilson(successes: int, n: int) -> Interval:
    """Wilson's 95% interval of a share."""
    interval = sps.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test, from the two discordant counts; 1 where both are zero."""
    discordant = only_first + only_second
    return float(sps.binomtest(only_first, discordant).pvalue) if discordant else 1.0
