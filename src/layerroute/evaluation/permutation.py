"""p-values by permuting labels, in a way that respects conversations.

Rows of one conversation resemble each other, so single rows may not be exchanged freely. Where a conversation (a group)
holds several labels, they are shuffled within it; a conversation that holds one label keeps to itself and exchanges
that label, as a whole, with others of its kind in the same source. No label ever crosses a source. Boundary: arrays in,
numbers out; never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse

from layerroute.evaluation.stats import Array, chunks, difference, difference_of

__all__ = ["Shuffle", "difference_p_value", "p_value_of"]

_TIE = 1e-9  # a permutation that equals what was observed up to rounding counts as at least as extreme


class Shuffle:
    """Draws permutations of labels.

    Args:
        labels: int or bool `[n]`.
        groups: int `[n]`.
        strata: int `[n]`; a group lies in one stratum.
        seed: of the draws.
    """

    def __init__(self, labels: Array, groups: Array, strata: Array, *, seed: int = 0) -> None:
        self.labels = labels
        self._rng = np.random.default_rng(seed)
        _, first, self._codes = np.unique(groups, return_index=True, return_inverse=True)
        lowest, highest = labels[first].copy(), labels[first].copy()
        np.minimum.at(lowest, self._codes, labels)
        np.maximum.at(highest, self._codes, labels)
        pure = lowest == highest
        self._mixed_rows = np.flatnonzero(~pure[self._codes])
        self._mixed_homes = self._codes[self._mixed_rows]
        self._pure_groups = np.flatnonzero(pure)
        self._pure_homes = strata[first][self._pure_groups]
        self._group_labels = lowest
        by_home = {home: len(np.unique(lowest[pure & (strata[first] == home)])) for home in np.unique(self._pure_homes)}
        self.possible = bool(len(self._mixed_rows)) or any(kinds > 1 for kinds in by_home.values())
        """Whether there is anything to exchange."""

    def draws(self) -> Iterator[Array]:
        """2,000 permutations, `[b, n]` at a time, so many that they fit in memory."""
        for size in chunks(len(self.labels)):
            group_labels = np.tile(self._group_labels, (size, 1))
            pure, mixed = self._pure_groups, self._mixed_rows
            group_labels[:, pure] = self._within(self._group_labels[pure], self._pure_homes, size)
            drawn = group_labels[:, self._codes]
            drawn[:, mixed] = self._within(self.labels[mixed], self._mixed_homes, size)
            yield drawn

    def _within(self, labels: Array, homes: Array, size: int) -> Array:
        """Labels shuffled among those of the same home (int), `[size, m]`."""
        shuffled = np.empty((size, len(labels)), dtype=labels.dtype)
        keys = homes + self._rng.random((size, len(labels)))  # sorted by home first, then by chance
        shuffled[:, np.argsort(homes, kind="stable")] = labels[np.argsort(keys, axis=1)]
        return shuffled


def difference_p_value(
    values: Array, first: Array, groups: Array, strata: Array, bins: Array | None = None, *, seed: int = 0
) -> float | None:
    """Permutation p-value of `stats.difference`: which rows are `first` is permuted as the module says, 2,000 times.

    Two-sided: twice the share of permutations that lie as far on the figure's own side, `2 (1 + k) / (1 + 2000)`, at
    most 1. What strata of unlike level and unlike shares of `first` make by themselves, the permutations make too, so
    that it is no evidence.

    Args:
        values, first, bins: as for `stats.difference`.
        groups, strata: int `[n]`, as for `Shuffle`.
        seed: of the permutations.

    Returns:
        None where nothing can be exchanged.
    """
    shuffle = Shuffle(first, groups, strata, seed=seed)
    if not shuffle.possible:
        return None
    n = len(values)
    codes = np.zeros(n, dtype=int) if bins is None else np.unique(bins, return_inverse=True)[1]
    counts = sparse.csr_array((np.ones(n), (codes, np.arange(n))))
    sums = sparse.csr_array((np.asarray(values, dtype=float), (codes, np.arange(n))))
    whole, number = sums.sum(1), counts.sum(1)
    figures = []
    for drawn in shuffle.draws():
        chosen = drawn.T.astype(float)
        of_first, n_first = (sums @ chosen).T, (counts @ chosen).T
        parts = np.concatenate([of_first, n_first, whole - of_first, number - n_first], axis=1)
        figures.append(difference_of(parts))
    permuted = np.concatenate(figures)
    permuted = permuted[np.isfinite(permuted)]
    observed = difference(values, first, bins)
    if not len(permuted) or not np.isfinite(observed):
        return None
    side = 1.0 if observed >= 0 else -1.0
    return min(1.0, 2 * p_value_of(side * permuted, side * observed))


def p_value_of(permuted: Array, observed: float) -> float:
    """`(1 + k) / (1 + B)`, k of the B permuted figures being at least as large as the observed one, up to rounding."""
    return float((1 + np.sum(permuted >= observed - _TIE)) / (1 + len(permuted)))
