"""What an ablation adds: sensitivity to a setting, every seed's figure, and the arms over seeds with paired tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layerroute.report.charts.curve import Curve, curves
from layerroute.report.charts.forest import Estimate, forest
from layerroute.report.content import Figure, Hint, Item, Paragraph, Table
from layerroute.report.sections.cost import ARM_MARKS
from layerroute.report.wording import arm_name, cell, interval, number, p_value, points, share, signed

__all__ = ["ABLATE", "seed_items", "sensitivity_items"]

ABLATE = "layerroute ablate --recipe default --seeds 5 --output ablation"

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
_CURVES = (
    ("paired_differential", "routed", "circle", 1.0),
    ("differential", "static", "square", 1.0),
    ("perplexity_all", "reference", "diamond", 1.0),
    ("flops_share", "told", "up", 100.0),
)


def sensitivity_items(ablation: Mapping[str, Any] | None) -> list[Item]:
    """A chart and a table for each setting that was varied."""
    varied = (ablation or {}).get("sensitivity") or {}
    if not varied:
        command = f"{ABLATE} --sensitivity router_loss_weight=0.1,1,10"
        return [Hint("How the figures move with a setting of the recipe is measured with", command)]
    return [_curve(key, rows) for key, rows in varied.items() if rows]


def _curve(key: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    values = [str(row["value"]) for row in rows]
    lines = []
    for metric, style, shape, scale in _CURVES:
        parts = [row.get(metric) or {} for row in rows]
        if any(part.get("mean") is not None for part in parts):
            name = _METRICS[metric][0] + (", %" if scale != 1 else "")
            means, ends = [part.get("mean") for part in parts], [part.get("ci95") for part in parts]
            lines.append(Curve(name, means, ends, style, shape, scale))
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
        return [Hint("Whether the figures hold when training starts from other seeds is measured with", ABLATE)]
    seeds = ablation["seeds"]
    said = f"Seeds {', '.join(map(str, seeds))}; intervals are Student's over seeds, tests are paired by seed."
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
        forest(estimates, "points more on tool calls", lambda tick: signed(tick, 0)),
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
    rows = []
    for arm, tests in ablation["tests"].items():
        for metric, test in tests.items():
            if metric in _METRICS and test.get("mean_difference") is not None:
                name, write = _METRICS[metric]
                both = p_value(test.get("t_p_value")), p_value(test.get("wilcoxon_p_value"))
                rows.append((f"{arm_name(arm)}: {name}", write(test["mean_difference"]), *both))
    head = ("routed against", "mean difference", "paired t", "Wilcoxon")
    return Table("Routed minus each arm, paired by seed", head, rows)
