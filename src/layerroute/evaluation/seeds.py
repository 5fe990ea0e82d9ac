"""Statistics over training seeds: means with intervals, and paired tests of two arms.

Boundary: numbers in, JSON-able objects out; never imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special
from scipy import stats as sps

__all__ = ["over_seeds", "paired_tests"]

_EQUAL = 1e-9  # differences that vary by less than this share of their size are rounding


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """`{"mean", "ci95", "values"}` over training seeds; the 95% interval is Student's, from two seeds on.

    One seed without a figure (None) leaves none for all: leaving it out would hide a run that went wrong.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "ci95": None, "values": list(values)}
    mean, interval = float(np.mean(known)), None
    if len(known) > 1:
        margin = float(special.stdtrit(len(known) - 1, 0.975) * sps.sem(known))
        interval = [mean - margin, mean + margin]
    return {"mean": mean, "ci95": interval, "values": known}


def paired_tests(first: Sequence[float | None], second: Sequence[float | None]) -> dict[str, float | None]:
    """`{"mean_difference", "t_p_value", "wilcoxon_p_value"}` of `first` minus `second`, paired by seed.

    Two-sided. All null where a seed lacks a figure; p-values need two seeds, and Student's needs differences that vary.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not pairs or len(pairs) < len(first):
        return {"mean_difference": None, "t_p_value": None, "wilcoxon_p_value": None}
    differences = np.subtract(*np.array(pairs, dtype=float).T)
    vary = len(pairs) > 1 and np.ptp(differences) > _EQUAL * abs(differences).max()
    return {
        "mean_difference": float(differences.mean()),
        "t_p_value": float(sps.ttest_1samp(differences, 0).pvalue) if vary else None,
        "wilcoxon_p_value": float(sps.wilcoxon(differences).pvalue) if len(pairs) > 1 and differences.any() else None,
    }
