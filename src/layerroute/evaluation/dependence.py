"""Is it the input? How far routes depend on the row, on its step type, source and length, or on nothing but the bias.

Makes the `dependence` section of summary.json. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from layerroute.evaluation import stats
from layerroute.evaluation.columns import Columns
from layerroute.evaluation.counts import information_p_value, mutual_information
from layerroute.evaluation.stats import MIN_GROUPS

__all__ = ["dependence"]


def dependence(columns: Columns, routers: Mapping[str, Any], *, seed: int = 0) -> dict[str, Any]:
    """Make the section.

    Args:
        columns: the measured rows.
        routers: provenance's `routers`: `routable`, `bias_route`, `initial_probs`.
        seed: of the resamples and permutations.
    """
    types = {name: rows for name, rows in columns.selections().items() if name != "all"}
    blocks = columns.routes.shape[1]
    closed = (~columns.routes).sum(1)
    return {
        "distribution": {name: np.bincount(closed[rows], minlength=blocks + 1) for name, rows in types.items()},
        "flip_rate": _flip_rate(columns, routers),
        "mutual_information": _mutual_information(columns, seed),
        "partial_correlation": _partial_correlation(columns, seed),
        "auc": _auc(columns, seed),
        "gate_movement": _gate_movement(columns, routers),
        "stability": _stability(columns),
    }


def _flip_rate(columns: Columns, routers: Mapping[str, Any]) -> dict[str, float | None]:
    routable = list(routers["routable"])
    bias = np.array([bit == "1" for bit in routers["bias_route"]])
    flipped = (columns.routes != bias)[:, routable]
    return {name: 100 * flipped[rows].mean() if rows.any() else None for name, rows in columns.selections().items()}


def _mutual_information(columns: Columns, seed: int) -> dict[str, Any]:
    """Of the route with each labelling, over all rows; lengths are taken as quarters of the prompts.

    The step type alone gets a p-value: a conversation's rows share their source, and nearly their length.
    """
    _, routes = np.unique(np.packbits(columns.routes, axis=1), axis=0, return_inverse=True)
    routes = routes.ravel()
    quarters = np.searchsorted(np.quantile(columns.prompt_tokens, [0.25, 0.5, 0.75]), columns.prompt_tokens)
    section: dict[str, Any] = {}
    for name, labels in {"step_type": columns.kind, "source": columns.source, "length": quarters}.items():
        found = mutual_information(routes, labels, seed=seed)
        section[name] = {"bits": found.bits, "corrected_bits": found.corrected_bits, "p_value": None}
        if routes.max() + 1 == len(routes):  # permuting changes nothing
            section[name] |= {"corrected_bits": None, "reason": "every row has a route of its own"}
        elif name != "step_type":
            section[name]["reason"] = "rows of a conversation share it, so that they cannot be permuted"
    groups = columns.group_count(np.full(len(columns), True))
    if groups < MIN_GROUPS:
        section["step_type"].setdefault("reason", f"{groups} groups; p-values need {MIN_GROUPS}")
    elif "reason" not in section["step_type"]:
        p_value = information_p_value(routes, columns.kind, columns.group, columns.source, seed=seed)
        section["step_type"]["p_value"] = p_value
        if p_value is None:
            section["step_type"]["reason"] = "no source holds several step types"
    return section


def _partial_correlation(columns: Columns, seed: int) -> dict[str, Any]:
    rows = columns.compared
    section: dict[str, Any] = {"r": None, "ci95": None, "p_value": None, "n": int(rows.sum())}
    if reason := columns.incomparable(rows):
        return section | {"reason": reason}
    tool_call, control = columns.tool_call[rows], np.log(columns.prompt_tokens[rows])
    groups, sources = columns.group[rows], columns.source[rows]
    found = stats.partial_correlation(columns.skip_rate[rows], tool_call, control, groups, sources, seed=seed)
    if not np.isfinite(found.r):
        return section | {"reason": "skip rate or step type does not vary beyond what the prompt's length tells"}
    if reason := columns.too_few(rows):
        return section | {"r": found.r, "reason": reason}
    return section | {"r": found.r, "ci95": found.interval, "p_value": found.p_value}


def _auc(columns: Columns, seed: int) -> dict[str, Any]:
    rows = columns.compared
    section: dict[str, Any] = {"value": None, "ci95": None, "n": int(rows.sum())}
    if reason := columns.incomparable(rows):
        return section | {"reason": reason}
    rates, tool_call = columns.skip_rate[rows], columns.tool_call[rows]
    section["value"] = stats.auc(rates, tool_call)
    if reason := columns.too_few(rows):
        return section | {"reason": reason}
    groups, sources = columns.group[rows], columns.source[rows]
    return section | {"ci95": stats.auc_interval(rates, tool_call, groups, sources, seed=seed)}


def _gate_movement(columns: Columns, routers: Mapping[str, Any]) -> dict[str, Any]:
    moved = abs(columns.gate_probs - np.asarray(routers["initial_probs"], dtype=np.float32)).mean(0, dtype=float)
    return {"mean": moved[list(routers["routable"])].mean(), "per_block": moved}


def _stability(columns: Columns) -> dict[str, Any] | None:
    measured = columns.stability[np.isfinite(columns.stability[:, 0])]
    if not len(measured):
        return None
    flips, same = measured.mean(0)
    return {"same_route": 100 * same, "flips": flips, "n": len(measured)}
