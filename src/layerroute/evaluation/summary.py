"""Makes summary.json out of what was measured: every figure with its interval, or null and the reason.

Rows of samples.jsonl, baselines.jsonl and generations.jsonl are read once and not kept. Skip rates are in points of
blocks, 0 to 100. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from layerroute.evaluation import stats
from layerroute.evaluation.baseline_table import baseline_table, share_of, weighted_perplexity
from layerroute.evaluation.columns import ARMS, Columns
from layerroute.evaluation.counts import entropy, expected_distinct
from layerroute.evaluation.dependence import dependence
from layerroute.evaluation.permutation import difference_p_value
from layerroute.evaluation.quality import quality
from layerroute.evaluation.stats import MIN_GROUPS, Array

__all__ = ["FORMAT_VERSION", "summarize"]

FORMAT_VERSION = 1
_PER = 1000


def summarize(
    samples: Iterable[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    *,
    baselines: Iterable[Mapping[str, Any]] = (),
    generations: Iterable[Mapping[str, Any]] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Summarise one evaluation.

    Args:
        samples: rows of samples.jsonl.
        provenance: provenance.json.
        baselines: rows of baselines.jsonl; their ids are among the samples'.
        generations: rows of generations.jsonl.
        seed: of resamples and permutations.

    Returns:
        summary.json's object: plain Python numbers, all finite.

    Raises:
        DataError: no samples, routes of different lengths, or a baseline of no sample.
    """
    columns = Columns.of(samples)
    types = {name: rows for name, rows in columns.selections().items() if name != "all"}
    table, warnings = baseline_table(columns, baselines)
    summary = {
        "format_version": FORMAT_VERSION,
        "rows": {name: rows.sum() for name, rows in types.items()},
        "groups": columns.group_count(np.full(len(columns), True)),
        "min_groups": MIN_GROUPS,
        "skip_rate": {name: _skip_rate(columns, name, rows, seed) for name, rows in types.items()},
        "differential": _differentials(columns, seed),
        "perplexity": {arm: _perplexities(columns, types, i) for i, arm in enumerate(ARMS)},
        "perplexity_ratio": {name: _perplexity_ratio(columns, name, rows, seed) for name, rows in types.items()},
        "token_accuracy": {arm: _accuracies(columns, types, i) for i, arm in enumerate(ARMS)},
        "start_accuracy": {arm: _starts(columns, types, i) for i, arm in enumerate(ARMS)},
        "flops": {name: _flops(columns, name, rows) for name, rows in columns.selections().items()},
        "routes": _routes(columns),
        "per_block": {name: _per_block(columns, rows) for name, rows in types.items()},
        "dependence": dependence(columns, provenance["routers"], seed=seed),
        "quality": quality(generations),
        "baselines": table,
        "warnings": [*_warnings(columns, types, provenance), *warnings],
        "provenance": dict(provenance),
    }
    return {name: _jsonable(value) for name, value in summary.items()}


def _skip_rate(columns: Columns, name: str, rows: Array, seed: int) -> dict[str, Any]:
    rates, groups = columns.skip_rate[rows], columns.group_count(rows)
    figures: dict[str, Any] = {"mean": None, "std": None, "ci95": None, "n": len(rates), "groups": groups}
    if not len(rates):
        return figures | {"reason": f"no {name} rows"}
    figures |= {"mean": rates.mean(), "std": rates.std(ddof=1) if len(rates) > 1 else None}
    if groups < MIN_GROUPS:
        return figures | {"reason": _few(groups)}
    parts = np.stack([rates, np.ones(len(rates))], 1)
    interval = stats.group_interval(parts, _mean, columns.group[rows], columns.source[rows], seed=seed)
    return figures | {"ci95": interval}


def _few(groups: int) -> str:
    return f"{groups} group{'s' if groups > 1 else ''}; intervals need {MIN_GROUPS}"


def _mean(sums: Array) -> Array:
    return sums[..., 0] / sums[..., 1]


def _differentials(columns: Columns, seed: int) -> dict[str, Any]:
    compared = columns.compared
    mixed = compared & columns.mixed
    paired = {columns.sources[code] for code in np.unique(columns.source[mixed])}
    in_source = {name: compared & (columns.source == code) for code, name in enumerate(columns.sources)}
    order = sorted(in_source, key=lambda name: (name not in paired, bool(columns.incomparable(in_source[name])), name))
    by_source = {}
    for name in order:
        rows = in_source[name]
        found = _paired(columns, rows & mixed, seed) if name in paired else _differential(columns, rows, seed)
        found.pop("sources")
        by_source[name] = found | {"paired": name in paired}
    lengths = stats.length_bins(columns.prompt_tokens)
    own_lengths = np.unique(np.stack([columns.source, lengths], 1), axis=0, return_inverse=True)[1].ravel()
    matched_pairs = _length_matched(columns, mixed, own_lengths, seed)
    return {
        "paired": _paired(columns, mixed, seed),
        "paired_length_matched": matched_pairs if paired else matched_pairs | {"reason": _UNPAIRED},
        "by_source": by_source,
        "pooled": _differential(columns, compared, seed),
        "length_matched": _length_matched(columns, compared, lengths, seed),
    }


_UNPAIRED = "no group holds both tool_call and planning rows"


def _paired(columns: Columns, rows: Array, seed: int) -> dict[str, Any]:
    """Differential within the groups that hold both types, each weighted by the smaller of its two counts."""
    if not rows.any():
        return _nothing(columns, rows) | {"reason": _UNPAIRED}
    return _differential(columns, rows, seed, columns.group)


def _nothing(columns: Columns, rows: Array) -> dict[str, Any]:
    tool_call = columns.tool_call[rows]
    return {
        "mean": None,
        "ci95": None,
        "p_value": None,
        "n_tool_call": tool_call.sum(),
        "n_planning": (~tool_call).sum(),
        "groups": columns.group_count(rows),
        "sources": sorted(columns.sources[code] for code in np.unique(columns.source[rows])),
    }


def _differential(columns: Columns, rows: Array, seed: int, bins: Array | None = None) -> dict[str, Any]:
    """Differential of the rows (bool `[n]`), matched by bin (int `[n]`) if there are bins."""
    section = _nothing(columns, rows)
    if reason := columns.incomparable(rows):
        return section | {"reason": reason}
    tool_call, sources = columns.tool_call[rows], columns.source[rows]
    rates, groups = columns.skip_rate[rows], columns.group[rows]
    chosen = None if bins is None else bins[rows]
    section["mean"] = stats.difference(rates, tool_call, chosen)
    if reason := columns.too_few(rows):
        return section | {"reason": reason}
    section["ci95"] = stats.difference_interval(rates, tool_call, groups, sources, chosen, seed=seed)
    section["p_value"] = difference_p_value(rates, tool_call, groups, sources, chosen, seed=seed)
    if section["p_value"] is None:
        section["reason"] = "no source holds both step types, so that they cannot be permuted within one"
    return section


def _length_matched(columns: Columns, compared: Array, bins: Array, seed: int) -> dict[str, Any]:
    """Over the rows whose bin of prompt length (int `[n]`) holds both step types."""
    counts = np.zeros((2, bins.max() + 1), dtype=int)
    np.add.at(counts, (columns.tool_call[compared].astype(int), bins[compared]), 1)
    matched = counts.min(0)
    section = _differential(columns, compared & (matched[bins] > 0), seed, bins)
    section |= {"strata": (matched > 0).sum(), "matched": matched.sum()}
    if not matched.any():
        section["reason"] = columns.incomparable(compared) or "no tool_call and planning prompts within 10% of length"
    return section


def _perplexities(columns: Columns, types: Mapping[str, Array], arm: int) -> dict[str, float | None]:
    """Over the rows whose loss is a number under every arm."""
    chosen = {name: rows & columns.has_loss for name, rows in types.items()}
    tokens = columns.target_tokens
    return {name: weighted_perplexity(columns.nll[rows, arm], tokens[rows]) for name, rows in chosen.items()}


def _perplexity_ratio(columns: Columns, name: str, rows: Array, seed: int) -> dict[str, Any]:
    """Routed over LoRA-only, of the same rows."""
    rows = rows & columns.has_loss
    if not rows.any():
        return {"mean": None, "ci95": None, "reason": f"no {name} rows with a loss"}
    nll = columns.nll[rows]
    parts = np.stack([nll[:, ARMS.index("routed")] - nll[:, ARMS.index("lora_only")], columns.target_tokens[rows]], 1)
    figures = {"mean": _exp_mean(parts.sum(0)), "ci95": None}
    if (groups := columns.group_count(rows)) < MIN_GROUPS:
        return figures | {"reason": _few(groups)}
    interval = stats.group_interval(parts, _exp_mean, columns.group[rows], columns.source[rows], seed=seed)
    return figures | {"ci95": interval}


def _exp_mean(sums: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(_mean(sums))


def _accuracies(columns: Columns, types: Mapping[str, Array], arm: int) -> dict[str, float | None]:
    """Over the same rows as the perplexities."""
    right, tokens = columns.accuracy[:, arm] * columns.target_tokens, columns.target_tokens
    chosen = {name: rows & columns.has_loss for name, rows in types.items()}
    return {name: share_of(right[rows], tokens[rows]) for name, rows in chosen.items()}


def _starts(columns: Columns, types: Mapping[str, Array], arm: int) -> dict[str, float | None]:
    """Share of the same rows that start as their target does: summed losses hide one token, and it decides the most."""
    chosen = {name: rows & columns.has_loss for name, rows in types.items()}
    return {name: share_of(columns.starts[rows, arm], np.ones(rows.sum())) for name, rows in chosen.items()}


def _flops(columns: Columns, name: str, rows: Array) -> dict[str, Any]:
    """Executed by routed rows over the untouched backbone's."""
    base, routed = (columns.flops[rows, ARMS.index(arm)] for arm in ("base", "routed"))
    shares: dict[str, Any] = {
        "prefill_share": share_of(routed[:, 0], base[:, 0]),
        "decode_share": share_of(routed[:, 1], base[:, 1]),
        "total_share": share_of(routed, base),
    }
    return shares if rows.any() else shares | {"reason": f"no {name} rows"}


def _routes(columns: Columns) -> dict[str, Any]:
    """Fewer rows than 1,000 cannot tell how many routes 1,000 would take."""
    counts = np.unique(columns.routes, axis=0, return_counts=True)[1]
    per_1000 = expected_distinct(counts, _PER) if len(columns) >= _PER else None
    return {"distinct": len(counts), "entropy": entropy(counts), "per_1000": per_1000}


def _per_block(columns: Columns, rows: Array) -> Array | None:
    return 100 * (~columns.routes[rows]).mean(0) if rows.any() else None


def _warnings(columns: Columns, types: Mapping[str, Array], provenance: Mapping[str, Any]) -> list[str]:
    groups = columns.group_count(np.full(len(columns), True))
    lost = int((~columns.has_loss).sum())
    duplicates, overlap = provenance["rows"]["duplicate_ids"], provenance["training"]["overlap"]
    found = [f"No {name} rows: what needs them cannot be given." for name, rows in types.items() if not rows.any()]
    digests = set(provenance["training"].get("data", {}).values())
    known = [spec for spec in overlap if provenance["data"].get(spec) in digests]
    likely = [spec for spec in overlap if spec not in known]
    if likely:
        names = ", ".join(likely)
        found.insert(0, f"THE ADAPTER WAS TRAINED ON DATA OF THIS NAME ({names}): if on these steps, it is flattered.")
    if known:
        found.insert(0, f"THE ADAPTER WAS TRAINED ON THIS DATA ({', '.join(known)}): these figures flatter it.")
    if groups == 1:
        found.append(f"All rows are of one group: intervals and p-values need {MIN_GROUPS} groups and are not given.")
    elif groups < MIN_GROUPS:
        found.append(f"Only {groups} groups: intervals and p-values need {MIN_GROUPS} and are not given.")
    if (columns.routes == columns.routes[0]).all():
        found.append("All rows take the same route: routing does not depend on the input.")
    if lost:
        found.append(f"{lost} of {len(columns)} rows have a loss that is not a number; perplexity leaves them out.")
    if duplicates:
        found.append(f"{duplicates} rows repeat the id of another row and are left out.")
    if shared := provenance.get("calibration_shared"):
        found.append(f"{shared} calibration steps are evaluated too: the baselines chosen on them are flattered.")
    for name, why in _LEFT_OUT.items():
        if count := (provenance.get("generations") or {}).get(name):
            found.append(f"{count} steps are not graded in free running: {why}.")
    return found


_LEFT_OUT = {
    "unfinished_turns": "they go on from a thought, after which this adapter's route would be another",
    "too_long": "their prompts do not fit",
}


def _jsonable(value: Any) -> Any:
    """Plain lists and numbers of arrays and numpy's numbers; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {name: _jsonable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(part) for part in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _jsonable(value.tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value
