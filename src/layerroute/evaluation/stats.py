"""Statistics of rows that come in groups, with intervals by resampling groups; p-values are `permutation.py`'s.

Rows of one conversation resemble each other, so every interval here draws whole groups, never rows, within each
stratum (a source). All statistics that are resampled are functions of sums over rows, so that a resample is one
product of how often each group was drawn with the groups' sums. Boundary: arrays in, numbers out; never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse, special

__all__ = [
    "MIN_GROUPS",
    "Array",
    "Interval",
    "PartialCorrelation",
    "auc",
    "auc_interval",
    "chunks",
    "difference",
    "difference_interval",
    "difference_of",
    "group_interval",
    "length_bins",
    "partial_correlation",
    "resampled_sums",
]

MIN_GROUPS = 10
"""Fewest groups that an interval or a p-value is given for."""
_RESAMPLES = 2000
_CELLS = 1 << 22  # numbers drawn at once: bounds the memory, whatever the number of rows
_TIE = 1e-9  # relative to the whole variance: what is left of it is rounding

Array = npt.NDArray[Any]
Interval = tuple[float, float]


def chunks(width: int) -> Iterator[int]:
    """Sizes that add up to 2,000 resamples of `width` numbers each, so that a part of them fits in memory."""
    step = max(1, min(_RESAMPLES, _CELLS // max(width, 1)))
    for start in range(0, _RESAMPLES, step):
        yield min(step, _RESAMPLES - start)


def resampled_sums(columns: Array, groups: Array, strata: Array, *, seed: int = 0) -> Array:
    """Sum columns over bootstrap resamples of the groups, drawn within each stratum.

    Args:
        columns: float `[n, k]`, dense or sparse.
        groups: int `[n]`; a group lies in one stratum.
        strata: int `[n]`; those with fewer than `MIN_GROUPS` groups are drawn from together, for alone they would
            hardly vary.
        seed: the same seed and groups give the same resamples, whatever the columns.

    Returns:
        float64 `[2000, k]`.
    """
    rng = np.random.default_rng(seed)
    _, first, codes = np.unique(groups, return_index=True, return_inverse=True)
    membership = sparse.csr_array((np.ones(len(codes)), (codes, np.arange(len(codes)))))
    sums, homes = membership @ columns, _merged(strata[first])
    total = np.zeros((_RESAMPLES, sums.shape[1]))
    for stratum in np.unique(homes):
        members = sums[homes == stratum]
        number = members.shape[0]
        done = 0
        for size in chunks(number):
            picks = rng.integers(number, size=(size, number)) + number * np.arange(size)[:, None]
            drawn = np.bincount(picks.ravel(), minlength=picks.size).reshape(picks.shape)
            total[done : done + size] += drawn.astype(float) @ members
            done += size
    return total


def _merged(homes: Array) -> Array:
    """The stratum of every group, small ones taken together."""
    _, codes, counts = np.unique(homes, return_inverse=True, return_counts=True)
    return np.where(counts[codes] < MIN_GROUPS, -1, codes)


def group_interval(
    columns: Array, statistic: Callable[[Array], Array], groups: Array, strata: Array, *, seed: int = 0
) -> Interval | None:
    """95% percentile interval of a statistic of sums, by bootstrap over groups within strata.

    Args:
        columns: float `[n, k]`, dense or sparse.
        statistic: from sums `[..., k]` to figures `[...]`; NaN where a resample has none.
        groups, strata, seed: as for `resampled_sums`.

    Returns:
        None where no resample has a figure.
    """
    figures = statistic(resampled_sums(columns, groups, strata, seed=seed))
    figures = figures[np.isfinite(figures)]
    if not len(figures):
        return None
    low, high = np.quantile(figures, [0.025, 0.975]).tolist()
    return low, high


def length_bins(tokens: Array) -> Array:
    """int `[n]`: the bin of each length; lengths of a bin differ by less than 10%."""
    return np.floor(np.log(tokens) / np.log(1.1)).astype(int)


def difference(values: Array, first: Array, bins: Array | None = None) -> float:
    """Mean of the rows in `first` minus mean of the others, matched by bin.

    Within each bin the means are compared; bins are weighted by the smaller of their two counts, so that a bin with
    one kind of row does not count. Without bins it is the plain difference of means.

    Args:
        values: float `[n]`.
        first: bool `[n]`.
        bins: int `[n]`.

    Returns:
        NaN where no bin holds both kinds.
    """
    codes = np.zeros(len(values), dtype=int) if bins is None else np.unique(bins, return_inverse=True)[1]
    size = int(codes.max(initial=0)) + 1
    kinds = (first, ~first)
    sums = [np.bincount(codes[kind], part[kind], size) for kind in kinds for part in (values, np.ones(len(values)))]
    return float(difference_of(np.concatenate(sums)))


def difference_interval(
    values: Array, first: Array, groups: Array, strata: Array, bins: Array | None = None, *, seed: int = 0
) -> Interval | None:
    """95% interval of `difference`, by bootstrap over groups; the weights are those of each resample."""
    if bins is not None and len(np.unique(np.stack([bins, groups]), axis=1).T) == len(np.unique(bins)):
        return _nested_interval(values, first, groups, strata, bins, seed=seed)
    return group_interval(_two_sided(values, first, bins), difference_of, groups, strata, seed=seed)


def _nested_interval(
    values: Array, first: Array, groups: Array, strata: Array, bins: Array, *, seed: int
) -> Interval | None:
    """The same where each bin lies within a group: a resample only weighs it, so that two numbers a bin are enough."""
    _, start, codes = np.unique(bins, return_index=True, return_inverse=True)
    n, n_first = np.bincount(codes), np.bincount(codes, first)
    of_all, of_first = np.bincount(codes, values), np.bincount(codes, values * first)
    weights = np.minimum(n_first, n - n_first)
    each = of_first / np.maximum(n_first, 1) - (of_all - of_first) / np.maximum(n - n_first, 1)
    columns = np.stack([weights * each, weights], 1)
    return group_interval(
        columns, lambda sums: _ratio(sums[..., 0], sums[..., 1]), groups[start], strata[start], seed=seed
    )


def _two_sided(values: Array, first: Array, bins: Array | None) -> Any:
    """Sparse `[n, 4 * bins]`: sum and count of the first kind's rows, then of the others', in their bin's column."""
    n = len(values)
    codes = np.zeros(n, dtype=int) if bins is None else np.unique(bins, return_inverse=True)[1]
    size = int(codes.max(initial=0)) + 1
    side = np.where(first, 0, 2 * size)
    entries = np.concatenate([np.asarray(values, dtype=float), np.ones(n)])
    places = np.concatenate([side + codes, side + size + codes])
    return sparse.csr_array((entries, (np.tile(np.arange(n), 2), places)), shape=(n, 4 * size))


def difference_of(sums: Array) -> Array:
    """`difference` from `[..., 4 * bins]`: per bin sum and count of the first kind's rows, then of the others'."""
    first, n_first, other, n_other = np.moveaxis(sums.reshape(*sums.shape[:-1], 4, -1), -2, 0)
    weights = np.minimum(n_first, n_other)
    each = np.where(weights > 0, first / np.maximum(n_first, 1) - other / np.maximum(n_other, 1), 0)
    return _ratio((weights * each).sum(-1), weights.sum(-1))


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Division that gives NaN for a zero denominator, silently."""
    return numerator / np.where(denominator == 0, np.nan, denominator)


def auc(values: Array, positive: Array) -> float:
    """Area under the ROC curve: how often a positive row's value exceeds another's, ties counting half.

    It is Mann and Whitney's U over the number of pairs; NaN where one kind is absent.
    """
    return float(_auc(_histograms(values, positive).sum(0)))


def auc_interval(values: Array, positive: Array, groups: Array, strata: Array, *, seed: int = 0) -> Interval | None:
    """95% interval of `auc`, by bootstrap over groups; meant for values that repeat, as skip rates do."""
    return group_interval(_histograms(values, positive), _auc, groups, strata, seed=seed)


def _histograms(values: Array, positive: Array) -> Array:
    levels, codes = np.unique(values, return_inverse=True)
    columns = np.zeros((len(values), 2, len(levels)))
    columns[np.arange(len(values)), np.where(positive, 0, 1), codes] = 1
    return columns.reshape(len(values), -1)


def _auc(sums: Array) -> Array:
    positive, negative = np.moveaxis(sums.reshape(*sums.shape[:-1], 2, -1), -2, 0)
    below = negative.cumsum(-1) - negative / 2
    return _ratio((positive * below).sum(-1), positive.sum(-1) * negative.sum(-1))


@dataclass(frozen=True)
class PartialCorrelation:
    """Pearson's correlation of what a control leaves unexplained."""

    r: float
    """NaN where one of the two does not vary beyond the control."""
    interval: Interval | None
    p_value: float | None


def partial_correlation(
    x: Array, y: Array, control: Array, groups: Array, strata: Array, *, seed: int = 0
) -> PartialCorrelation:
    """Correlate x with y, given one control.

    Interval and two-sided p-value are Fisher's (normal in `atanh r`), with the standard error taken from the bootstrap
    over groups in place of `1 / sqrt(n - 4)`, which holds for independent rows only.

    Args:
        x, y, control: float `[n]`.
        groups, strata, seed: as for `resampled_sums`.
    """
    x, y, control = (np.asarray(part, dtype=float) - np.mean(part) for part in (x, y, control))
    parts = [np.ones(len(x)), x, y, control, x * x, y * y, control * control, x * y, x * control, y * control]
    moments = np.stack(parts, 1)
    r = float(_partial(moments.sum(0)))
    if not np.isfinite(r):
        return PartialCorrelation(np.nan, None, None)
    resampled = _fisher(_partial(resampled_sums(moments, groups, strata, seed=seed)))
    z, error = _fisher(r), np.nanstd(resampled, ddof=1)
    low, high = np.tanh([z - 1.96 * error, z + 1.96 * error]).tolist()
    p_value = float(2 * special.ndtr(-abs(z) / error)) if error > 0 else 0.0
    return PartialCorrelation(r, (low, high), p_value)


def _fisher(r: Any) -> Any:
    return np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))


def _partial(sums: Array) -> Array:
    n, x, y, c, xx, yy, cc, xy, xc, yc = np.moveaxis(sums, -1, 0)
    xx, yy, cc, xy, xc, yc = (
        xx - x * x / n,
        yy - y * y / n,
        cc - c * c / n,
        xy - x * y / n,
        xc - x * c / n,
        yc - y * c / n,
    )
    slope = np.where(cc > 0, 1 / np.where(cc > 0, cc, 1), 0)  # a control that does not vary explains nothing
    left_x, left_y = xx - xc * xc * slope, yy - yc * yc * slope
    product = np.where((left_x > _TIE * xx) & (left_y > _TIE * yy), left_x * left_y, np.nan)
    return (xy - xc * yc * slope) / np.sqrt(product)
