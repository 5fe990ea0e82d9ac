"""The table of an ablation: every arm's figures over seeds, made of the files that the grid left.

Reads grid.json and the evaluations; an evaluation that is missing leaves the figures of its arm without a mean, and a
warning. Never imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from layerroute.errors import DataError
from layerroute.evaluation.baseline_table import share_of, weighted_perplexity
from layerroute.evaluation.columns import ArmColumns, Columns
from layerroute.evaluation.grid import GRID_FILE, cell
from layerroute.evaluation.samples import read_rows
from layerroute.evaluation.seeds import over_seeds, paired_tests
from layerroute.evaluation.stats import Array, difference

__all__ = ["METRICS", "collect", "markdown"]

METRICS = {
    "skip_tool_call": "skip rate, tool calls",
    "skip_planning": "skip rate, planning",
    "differential": "differential",
    "paired_differential": "differential, paired",
    "perplexity_tool_call": "perplexity, tool calls",
    "perplexity_planning": "perplexity, planning",
    "perplexity_all": "perplexity",
    "token_accuracy_all": "token accuracy",
    "flops_share": "FLOPs",
}
"""Names, and headings. Skip rates and their difference in points of blocks; accuracy and FLOPs as shares."""

FORMAT_VERSION = 1
_TEST_SEEDS = 3
"""Fewest seeds that a p-value is given for."""

Figures = dict[str, dict[str, float | None]]
"""Of one run: arm to metric to value."""


def collect(folder: str | Path) -> dict[str, Any]:
    """Make ablation.json's object of a grid's folder, whether or not the grid is finished.

    Intervals are Student's over seeds, from two seeds on; p-values (paired by seed: t and Wilcoxon) from three on.

    Raises:
        DataError: the folder holds no grid, or a damaged file.
    """
    folder = Path(folder)
    grid = _read(folder / GRID_FILE)
    runs: dict[str, list[Figures]] = {}
    summaries, warnings = [], []
    for variant in grid["variants"]:
        runs[variant] = []
        for seed in grid["seeds"]:
            evaluation = cell(folder, variant, seed) / "evaluation"
            found = (evaluation / "summary.json").exists()
            summary = _read(evaluation / "summary.json") if found else None
            runs[variant].append(_figures(evaluation, summary) if summary else {})
            if summary is None:
                warnings.append(f"{variant}, seed {seed}: no evaluation; its training failed, or has yet to run.")
            elif variant == "recipe":
                summaries.append(summary)
                warnings += [f"seed {seed}: {warning}" for warning in summary["warnings"]]
    arms = _arms(runs)
    return {
        "format_version": FORMAT_VERSION,
        "seeds": grid["seeds"],
        "recipe": grid["recipe"],
        "metrics": list(METRICS),
        "arms": {arm: {metric: over_seeds(values[metric]) for metric in METRICS} for arm, values in arms.items()},
        "tests": {
            arm: {metric: _tests(arms["routed"][metric], values[metric]) for metric in METRICS}
            for arm, values in arms.items()
            if arm != "routed"
        },
        "sensitivity": {
            key: [{"value": point["value"], **_over_runs(runs[point["variant"]])} for point in points]
            for key, points in grid["sensitivity"].items()
        },
        "provenance": _provenance(grid, summaries),
        "warnings": warnings,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; run `layerroute ablate` with that --output first") from None
    assert isinstance(content, dict)
    return content


def _figures(evaluation: Path, summary: Mapping[str, Any]) -> Figures:
    columns = Columns.of(read_rows(evaluation / "samples.jsonl"))
    paired = [columns.sources.index(name) for name in summary["differential"]["paired"]["sources"]]
    in_paired = np.isin(columns.source, paired)
    arms = ArmColumns.measured(columns, np.arange(len(columns)))
    arms |= ArmColumns.of(columns, read_rows(evaluation / "baselines.jsonl"))
    return {name: _of_arm(columns, arm, in_paired[arm.rows]) for name, arm in arms.items()}


def _of_arm(columns: Columns, arm: ArmColumns, in_paired: Array) -> dict[str, float | None]:
    rows, tokens = arm.rows, columns.target_tokens[arm.rows]
    of_type = {name: chosen[rows] for name, chosen in columns.selections().items()}
    tool_call, compared = columns.tool_call[rows], columns.compared[rows]
    paired = compared & in_paired
    figures: dict[str, float | None] = {
        "differential": difference(arm.skip_rate[compared], tool_call[compared]),
        "paired_differential": difference(arm.skip_rate[paired], tool_call[paired]),
        "token_accuracy_all": share_of(arm.accuracy * tokens, tokens),
        "flops_share": share_of(arm.flops, columns.flops[rows, 0].sum(1)),
    }
    for name in ("tool_call", "planning", "all"):
        figures[f"perplexity_{name}"] = weighted_perplexity(arm.nll[of_type[name]], tokens[of_type[name]])
    for name in ("tool_call", "planning"):
        figures[f"skip_{name}"] = share_of(arm.skip_rate[of_type[name]], np.ones(int(of_type[name].sum())))
    return {name: value if value is not None and np.isfinite(value) else None for name, value in figures.items()}


def _arms(runs: Mapping[str, list[Figures]]) -> dict[str, dict[str, list[float | None]]]:
    """Arm to metric to the values of the seeds: the recipe's own arms, then what was trained otherwise."""
    own = runs["recipe"]
    names = ["base", "lora_only", "routed", *dict.fromkeys(arm for figures in own for arm in figures)]
    arms = {name: _by_metric(own, name) for name in dict.fromkeys(names)}
    trained = {"trained_lora_only": "lora_only", "routers_only": "routers_only"}
    return arms | {name: _by_metric(runs[variant], "routed") for name, variant in trained.items()}


def _by_metric(figures: list[Figures], arm: str) -> dict[str, list[float | None]]:
    return {metric: [run.get(arm, {}).get(metric) for run in figures] for metric in METRICS}


def _over_runs(figures: list[Figures]) -> dict[str, Any]:
    return {metric: over_seeds(values) for metric, values in _by_metric(figures, "routed").items()}


def _tests(routed: list[float | None], other: list[float | None]) -> dict[str, float | None]:
    tests = paired_tests(routed, other)
    if len(routed) < _TEST_SEEDS:
        tests |= {"t_p_value": None, "wilcoxon_p_value": None}
    return tests


def _provenance(grid: Mapping[str, Any], summaries: list[dict[str, Any]]) -> dict[str, Any]:
    first = summaries[0]["provenance"] if summaries else {}
    return {
        **{name: grid[name] for name in ("model", "data", "eval_data", "limit")},
        "recipe": grid["variants"]["recipe"],
        **{name: first.get(name) for name in ("backbone", "versions", "machine", "settings", "command")},
    }


def markdown(table: Mapping[str, Any]) -> str:
    """The table for people: arms by metric, and each sensitivity curve; mean and, after ±, half of the 95% interval."""
    seeds = table["seeds"]
    lines = [f"# Ablation of recipe `{table['recipe']}`, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}", ""]
    lines += [f"- {warning}" for warning in table["warnings"]] + [""] * bool(table["warnings"])
    lines += _rows("arm", [(f"`{arm}`", figures) for arm, figures in table["arms"].items()])
    for key, points in table["sensitivity"].items():
        lines += ["", f"## Sensitivity to `{key}`", ""]
        lines += _rows("value", [(json.dumps(point["value"]), point) for point in points])
    tests = [(arm, figures["paired_differential"]) for arm, figures in table["tests"].items()]
    lines += [
        "",
        "## Paired differential, routed minus arm",
        "",
        "| arm | difference | t | Wilcoxon |",
        "|---|---|---|---|",
    ]
    for arm, test in tests:
        cells = (_number(test[name]) for name in ("mean_difference", "t_p_value", "wilcoxon_p_value"))
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rows(head: str, rows: list[tuple[str, Mapping[str, Any]]]) -> list[str]:
    lines = [f"| {head} | {' | '.join(METRICS.values())} |", "|---" * (1 + len(METRICS)) + "|"]
    return lines + [
        f"| {name} | {' | '.join(_cell(figures[metric]) for metric in METRICS)} |" for name, figures in rows
    ]


def _cell(figure: Mapping[str, Any]) -> str:
    if figure["ci95"] is None:
        return _number(figure["mean"])
    return f"{_number(figure['mean'])} ± {_number((figure['ci95'][1] - figure['ci95'][0]) / 2)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
