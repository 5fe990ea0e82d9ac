"""Statistics of repeated timings: spreads, and ratios that are stated only where they stand out of the noise.

A ratio is paired: both times of a pair were taken in the same repetition, so that what slows a machine for a while
slows both. Boundary: numbers in, numbers out; knows neither torch nor clocks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Goal", "Line", "Ratio", "Spread"]

_RESAMPLES = 2000


@dataclass(frozen=True)
class Spread:
    """Five figures of repeated times, in the unit of the times."""

    median: float
    min: float
    max: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """Quantiles are interpolated linearly, as numpy's are."""
        low, lower, median, upper, high = np.quantile(times, [0, 0.25, 0.5, 0.75, 1]).tolist()
        return cls(median=median, min=low, max=high, lower_quartile=lower, upper_quartile=upper)


@dataclass(frozen=True)
class Ratio:
    """The paired ratio of two times over the repetitions."""

    median: float
    lower_quartile: float
    upper_quartile: float
    interval: tuple[float, float]
    """Bootstrap 95% interval of the median."""

    @classmethod
    def of(cls, times: Sequence[float], references: Sequence[float], seed: int = 0) -> Ratio:
        """Ratio of each time to the reference of the same repetition; two repetitions at least."""
        assert len(times) == len(references) > 1, "a spread needs repetitions"
        ratios = np.asarray(times, dtype=float) / np.asarray(references, dtype=float)
        lower, median, upper = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
        picks = np.random.default_rng(seed).integers(len(ratios), size=(_RESAMPLES, len(ratios)))
        low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975]).tolist()
        return cls(median=median, lower_quartile=lower, upper_quartile=upper, interval=(low, high))

    @property
    def resolved(self) -> bool:
        """Whether the difference from 1 is at least as large as the distance between the quartiles."""
        return self.upper_quartile - self.lower_quartile <= abs(self.median - 1)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `ratio` is null where it is not resolved."""
        return {
            "ratio": self.median if self.resolved else None,
            "quartiles": [self.lower_quartile, self.upper_quartile],
            "interval": list(self.interval),
            "resolved": self.resolved,
        }


_HOLDS: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Goal:
    """A bound that a figure should keep."""

    what: str
    sign: str
    """`<`, `<=` or `>=`."""
    bound: float

    def met(self, interval: tuple[float, float]) -> bool | None:
        """Whether the whole interval keeps the bound; None where only a part of it does."""
        low, high = (_HOLDS[self.sign](end, self.bound) for end in interval)
        return low if low == high else None

    def __str__(self) -> str:
        return f"{self.what} {self.sign} {self.bound:.3g}"


@dataclass(frozen=True)
class Line:
    """Time against executed blocks, by least squares."""

    per_block: float
    fixed: float

    @classmethod
    def through(cls, blocks: Sequence[int], times: Sequence[float]) -> Line:
        """Fit times at two or more different counts of blocks."""
        per_block, fixed = np.polyfit(blocks, times, 1).tolist()
        return cls(per_block=per_block, fixed=fixed)
