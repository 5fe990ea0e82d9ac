"""What an ablation adds: sensitivity to a setting, every seed's figure, and the arms over seeds with paired tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layerroute.report.charts.curve import Curve, curves
from layerroute.report.charts.forest import Estimate, forest
from layerroute.report.content import Figure, Hint, Item, Paragraph, Table
from layerroute.report.sections.cost import ARM_MARKS
from layerroute.report.wording import DASH, arm_name, cell, in_runs, interval, number, p_value, points, share, signed

__all__ = ["seed_items", "sensitivity_items"]

_ABLATE = "layerroute ablate --model MODEL --data DATA --eval-data HELD_OUT --seeds 5 --output grid"

_METRICS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "skip_tool_call": ("tool call skip rate, points", points),
    "skip_planning": ("planning skip rate, points", points),
    "differential": ("differential, points", signed),
    "paired_differential": ("paired differential, points", signed),
    "perplexity_tool_call": ("perplexity, tool call", number),
    "perplexity_planning": ("perplexity, planning", number),
    "perplexity_all": ("perplexity, all", number),
    "token_accuracy_all": ("token accuracy", share),
    "flops_share": ("FLOPs executed", share),
}
_CURVES = {"paired_differential": 1.0, "differential": 1.0, "perplexity_all": 1.0, "flops_share": 100.0}
"""Metrics that are drawn against a setting, and what they are multiplied with."""


def sensitivity_items(ablation: Mapping[str, Any] | None) -> list[Item]:
    """A chart and a table for each setting that was varied."""
    varied = (ablation or {}).get("sensitivity") or {}
    if not varied:
        command = f"{_ABLATE} --sensitivity budgets.tool_call=0.2,0.3,0.4"
        return [Hint("How the figures move with a setting of the recipe is measured with", command)]
    return [_curve(key, rows) for key, rows in varied.items() if rows]


def _curve(key: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    values = [str(row["value"]) for row in rows]
    lines = []
    for metric, scale in _CURVES.items():
        parts = [row.get(metric) or {} for row in rows]
        if any(part.get("mean") is not None for part in parts):
            name = _METRICS[metric][0] + (", %" if scale != 1 else "")
            means, ends = [part.get("mean") for part in parts], [part.get("ci95") for part in parts]
            lines.append(Curve(name, means, ends, scale))
    metrics = [metric for metric in _METRICS if any(row.get(metric) for row in rows)]
    table = Table(
        f"Figures by {key}, mean (95% interval over seeds)",
        (key, *(_METRICS[metric][0] for metric in metrics)),
        [(str(row["value"]), *(cell(row.get(metric), _METRICS[metric][1]) for metric in metrics)) for row in rows],
    )
    return Figure(f"Sensitivity to {key}", "Means with 95% intervals over seeds.", curves(lines, values, key), table)


def seed_items(ablation: Mapping[str, Any] | None) -> list[Item]:
    """Each seed's differential, the arms over seeds, and the tests of routed against every other arm."""
    if ablation is None:
        return [Hint("Whether the figures hold when training starts from other seeds is measured with", _ABLATE)]
    said = (
        f"Trained with seed {in_runs(ablation['seeds'])}; intervals are Student's over seeds, tests are paired by seed."
    )
    items: list[Item] = [Paragraph(said)]
    items += [figure for metric in ("paired_differential", "differential") if (figure := _spread(ablation, metric))]
    items.append(_arms(ablation))
    if ablation.get("tests"):
        items.append(_tests(ablation))
    return items


def _spread(ablation: Mapping[str, Any], metric: str) -> Figure | None:
    estimates, rows = [], []
    for arm, figures in ablation["arms"].items():
        part = figures.get(metric) or {}
        if part.get("mean") is None or arm in ("base", "lora_only", "trained_lora_only"):
            continue  # where nothing is skipped there is no differential
        shape, style = ARM_MARKS.get(arm, ("bar", "told"))
        ends = part.get("ci95")
        words = signed(part["mean"]) + (f" ({interval(ends)})" if ends else "")
        whole = tuple(ends) if ends else None
        estimates.append(Estimate(arm_name(arm), part["mean"], whole, words, style, shape, part["values"]))
        rows.append((arm_name(arm), *map(signed, part["values"])))
    if not estimates:
        return None
    name = _METRICS[metric][0].removesuffix(", points")
    heads = tuple(f"seed {seed}" for seed in ablation["seeds"])
    return Figure(
        f"{name.capitalize()} over seeds",
        "Mean with 95% interval over seeds; small strokes are single seeds.",
        forest(estimates, "points more on tool calls", signed),
        Table(f"{name.capitalize()} of each seed, points", ("arm", *heads), rows),
    )


def _arms(ablation: Mapping[str, Any]) -> Table:
    metrics = [metric for metric in ablation["metrics"] if metric in _METRICS]
    rows = [
        (arm_name(arm), *(cell(figures.get(metric), _METRICS[metric][1]) for metric in metrics))
        for arm, figures in ablation["arms"].items()
    ]
    head = ("arm", *(_METRICS[metric][0] for metric in metrics))
    return Table("Arms over seeds: mean (95% interval)", head, rows)


def _tests(ablation: Mapping[str, Any]) -> Table:
    tests = ablation["tests"]
    metrics = [metric for metric in ablation["metrics"] if metric in _METRICS]
    rows = [
        (arm_name(arm), *(_tested(parts.get(metric), metric) for metric in metrics)) for arm, parts in tests.items()
    ]
    head = ("routed against", *(_METRICS[metric][0] for metric in metrics))
    return Table("Routed minus each arm, paired by seed: mean difference (p of paired t, p of Wilcoxon)", head, rows)


def _tested(test: Mapping[str, Any] | None, metric: str) -> str:
    if not test or test.get("mean_difference") is None:
        return DASH
    both = (p_value(test.get(name)).removeprefix("p ").removeprefix("= ") for name in ("t_p_value", "wilcoxon_p_value"))
    return f"{_METRICS[metric][1](test['mean_difference'])} ({', '.join(both)})"
