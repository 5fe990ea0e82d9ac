"""Statistics of counts: shares, tests of paired yes and no, and how much one labelling tells of another.

Boundary: numbers in, numbers out; never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special
from scipy import stats as sps

from layerroute.evaluation.permutation import Shuffle, p_value_of
from layerroute.evaluation.stats import Array, Interval, chunks

__all__ = [
    "MutualInformation",
    "entropy",
    "expected_distinct",
    "information_p_value",
    "mcnemar",
    "mutual_information",
    "wilson",
]


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
    """Minus its mean over 2,000 free permutations of the rows: what chance gives is taken off."""


def mutual_information(first: Array, second: Array, *, seed: int = 0) -> MutualInformation:
    """Mutual information of two labellings `[n]`."""
    table = sps.contingency.crosstab(first, second).count
    plogp = _terms(int(table.sum()))
    margins = np.log2(table.sum()) - plogp[table.sum(1)].sum() - plogp[table.sum(0)].sum()
    rng = np.random.default_rng(seed)
    # Boyett's method shuffles; the other one, scipy's choice for many rows, is wrong for tables of one row or column
    null = sps.random_table(table.sum(1), table.sum(0), seed=rng)
    drawn = (null.rvs(size, method="boyett") for size in chunks(table.size))
    permuted = np.concatenate([plogp[tables].sum((1, 2)) for tables in drawn]) + margins
    bits = max(0.0, float(plogp[table].sum() + margins))
    return MutualInformation(bits, bits - float(permuted.mean()))


def information_p_value(first: Array, second: Array, groups: Array, strata: Array, *, seed: int = 0) -> float | None:
    """Permutation p-value of the mutual information: `second` is permuted as `permutation.Shuffle` does.

    Args:
        first, second: int `[n]`, both counted from 0.
        groups, strata: int `[n]`.
        seed: of the permutations.

    Returns:
        None where nothing can be exchanged.
    """
    shuffle = Shuffle(second, groups, strata, seed=seed)
    if not shuffle.possible:
        return None
    width = int(second.max()) + 1
    size = (int(first.max()) + 1) * width

    plogp = _terms(len(first))

    def bits(labels: Array) -> float:
        table = np.bincount(first * width + labels, minlength=size).reshape(-1, width)
        return float(plogp[table].sum() - plogp[table.sum(1)].sum() - plogp[table.sum(0)].sum())

    permuted = np.array([bits(labels) for drawn in shuffle.draws() for labels in drawn])
    return p_value_of(permuted, bits(second))


def _terms(n: int) -> Array:
    """`c/n log2 c` for every count c up to n."""
    counts = np.arange(n + 1)
    return special.xlogy(counts, counts) / (n * np.log(2))


def wilson(successes: int, n: int) -> Interval:
    """Wilson's 95% interval of a share."""
    interval = sps.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test, from the two discordant counts; 1 where both are zero."""
    discordant = only_first + only_second
    return float(sps.binomtest(only_first, discordant).pvalue) if discordant else 1.0
