"""The `baselines` table of summary.json: every arm's skip rate, loss and cost on the same steps.

Never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from layerroute.evaluation.columns import ArmColumns, Columns
from layerroute.evaluation.stats import Array, difference

__all__ = ["baseline_table", "share_of", "weighted_perplexity"]


def share_of(numerator: Array, denominator: Array) -> float | None:
    """Sum over sum; None where the denominator's is zero."""
    below = float(np.sum(denominator))
    return float(np.sum(numerator)) / below if below else None


def weighted_perplexity(nll: Array, tokens: Array) -> float | None:
    """`exp(sum nll / sum tokens)` over the rows whose loss is a number; None without such rows."""
    known = np.isfinite(nll)
    mean = share_of(nll[known], tokens[known])
    with np.errstate(over="ignore"):
        return None if mean is None else float(np.exp(mean))


def baseline_table(columns: Columns, rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any] | None, list[str]]:
    """Make the table out of rows of baselines.jsonl.

    The arms that every sample holds are taken on the steps that have baselines.

    Returns:
        `{arm: {...}}` or None without rows, and warnings about losses that are no numbers.

    Raises:
        DataError: a row whose id no sample has.
    """
    arms = ArmColumns.of(columns, rows)
    if not arms:
        return None, []
    covered = np.unique(np.concatenate([arm.rows for arm in arms.values()]))
    missing = {name: int((~np.isfinite(arm.nll)).sum()) for name, arm in arms.items()}
    warnings = [
        f"Baseline {name}: {count} of {len(arms[name].rows)} losses are not numbers; its perplexity leaves them out."
        for name, count in missing.items()
        if count
    ]
    table = {**ArmColumns.measured(columns, covered), **arms}
    return {name: _figures(columns, arm) for name, arm in table.items()}, warnings


def _figures(columns: Columns, arm: ArmColumns) -> dict[str, Any]:
    tokens, base = columns.target_tokens[arm.rows], columns.flops[arm.rows, 0].sum(1)
    selections = {name: rows[arm.rows] for name, rows in columns.selections().items()}
    compared, tool_call = columns.compared[arm.rows], columns.tool_call[arm.rows]
    return {
        "skip_rate": {k: arm.skip_rate[rows].mean() if rows.any() else None for k, rows in selections.items()},
        "differential": difference(arm.skip_rate[compared], tool_call[compared]),
        "perplexity": {k: weighted_perplexity(arm.nll[rows], tokens[rows]) for k, rows in selections.items()},
        "token_accuracy": {k: share_of((arm.accuracy * tokens)[rows], tokens[rows]) for k, rows in selections.items()},
        "flops": {k: share_of(arm.flops[rows], base[rows]) for k, rows in selections.items()},
    }
