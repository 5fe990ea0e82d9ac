"""Quality against compute: the chart with every baseline, what routing costs per step type, and free running."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerroute.report.charts.forest import Estimate, forest
from layerroute.report.charts.scatter import Point, frontier, scatter
from layerroute.report.content import Figure, Hint, Item, Table
from layerroute.report.load import Evaluation
from layerroute.report.wording import (
    DASH,
    arm_name,
    cell,
    count,
    interval,
    joined,
    number,
    p_value,
    percent,
    points,
    share,
    signed,
    task_name,
    type_name,
)

__all__ = ["ARM_MARKS", "compute_items", "free_running_items"]

ARM_MARKS = {
    "base": ("square", "reference"),
    "lora_only": ("diamond", "reference"),
    "routed": ("circle", "routed"),
    "static": ("up", "static"),
    "static_influence": ("up", "static"),
    "static_greedy": ("down", "static"),
    "random": ("cross", "chance"),
    "oracle": ("hexagon", "told"),
    "labels": ("plus", "told"),
    "length": ("bar", "told"),
    "trained_lora_only": ("diamond", "reference"),
    "routers_only": ("square", "routed"),
}
"""Shape and style of each arm."""


def compute_items(evaluation: Evaluation) -> list[Item]:
    """The Pareto chart, or the command that gives it, and the tables of cost and saving."""
    summary = evaluation.summary
    table = summary.get("baselines")
    items: list[Item] = [_pareto(table)] if table else []
    if not items:
        command = _again(evaluation, "--baselines --calibration DATA")
        items.append(Hint("The chart against static, random, oracle and length baselines needs a run with", command))
    items += [_graded(task, figures) for task, figures in (summary.get("quality") or {}).items()]
    items += [*_costs(summary), _savings(summary)]
    return items


def _again(evaluation: Evaluation, option: str) -> str:
    """The evaluation's command with what it lacked; the files that are there are kept."""
    command = evaluation.summary["provenance"].get("command") or "layerroute evaluate --adapter A --data F --output DIR"
    return f"{command} {option}"


def _pareto(arms: Mapping[str, Any]) -> Figure:
    known = {name: arm for name, arm in arms.items() if None not in (arm["flops"]["all"], arm["perplexity"]["all"])}
    drawn = [
        Point(
            arm_name(name), 100 * arm["flops"]["all"], arm["perplexity"]["all"], *ARM_MARKS.get(name, ("bar", "told"))
        )
        for name, arm in known.items()
    ]
    best = joined([point.label for point in frontier(drawn, low_is_good=True)])
    rows = [
        (
            arm_name(name),
            points(arm["skip_rate"]["all"]),
            signed(arm["differential"]),
            share(arm["flops"]["all"]),
            number(arm["perplexity"]["all"]),
            share(arm["token_accuracy"]["all"]),
        )
        for name, arm in arms.items()
    ]
    head = ("arm", "skip rate, points", "differential, points", "FLOPs executed", "perplexity", "token accuracy")
    return Figure(
        "Perplexity against executed FLOPs",
        f"Each arm on the same steps. Not beaten on both by any other: {best}.",
        scatter(drawn, "FLOPs executed, of the backbone's", "perplexity, all steps", low_is_good=True),
        Table("Every arm on the same steps, all step types together", head, rows),
    )


def _graded(task: str, figures: Mapping[str, Any]) -> Figure:
    """Of free running the share of blocks is known, not one of FLOPs: texts differ in length."""
    drawn = [
        Point(arm_name(arm), 100 - part["skip_rate"], 100 * part["accuracy"], *ARM_MARKS.get(arm, ("bar", "told")))
        for arm, part in figures["arms"].items()
    ]
    name = task_name(task)
    rows = [(point.label, percent(point.cost), percent(point.quality)) for point in drawn]
    return Figure(
        f"Right answers against executed blocks, {name}",
        f"Graded answers that the model wrote on its own; up and to the left is better. {count(figures['n'])} {name}.",
        scatter(drawn, "blocks executed", "per cent right", low_is_good=False),
        Table(f"Blocks executed and answers right, {name}", ("arm", "blocks executed", "right"), rows),
    )


def _costs(summary: Mapping[str, Any]) -> list[Item]:
    """Perplexity, token accuracy and right starts per step type and arm."""
    kinds = [kind for kind, n in summary["rows"].items() if n]
    perplexity, accuracy, starts = (summary[name] for name in ("perplexity", "token_accuracy", "start_accuracy"))
    losses = [
        (
            type_name(kind),
            *(number(perplexity[arm].get(kind)) for arm in perplexity),
            cell(summary["perplexity_ratio"].get(kind), lambda value: number(value, 3)),
        )
        for kind in kinds
    ]
    hits = [(type_name(kind), *(share(accuracy[arm].get(kind)) for arm in accuracy)) for kind in kinds]
    begun = [(type_name(kind), *(share(starts[arm].get(kind)) for arm in starts)) for kind in kinds]
    head = ("step type", *map(arm_name, perplexity))
    return [
        Table("What it costs: perplexity of the target", (*head, "routed over LoRA only (95% interval)"), losses),
        Table("What it costs: tokens of the target predicted right", head, hits),
        Table("What it costs: steps whose first token is predicted right (a call begun, or an answer)", head, begun),
    ]


def _savings(summary: Mapping[str, Any]) -> Table:
    rows = []
    for kind, shares in summary["flops"].items():
        if kind == "all" or summary["rows"].get(kind):
            executed = (share(shares[f"{part}_share"]) for part in ("prefill", "decode", "total"))
            steps = sum(summary["rows"].values()) if kind == "all" else summary["rows"][kind]
            rows.append((type_name(kind), count(steps), *executed))
    head = ("step type", "steps", "prefill", "decode", "both")
    return Table("What it saves: FLOPs executed, of the backbone's", head, rows)


def free_running_items(evaluation: Evaluation) -> list[Item]:
    """Graded answers per task, with Wilson intervals and McNemar's tests; or the command that gives them."""
    quality = evaluation.summary.get("quality")
    if not quality:
        command = _again(evaluation, "--generate 100")
        return [Hint("Answers that the model writes on its own are generated and graded with", command)]
    items: list[Item] = []
    for task, figures in quality.items():
        items += [_accuracies(task, figures), _tests(task, figures["tests"])]
    return items


_CHECKS = {
    "valid_json": "valid JSON",
    "schema_valid": "fits the schema",
    "last_number": "last number right",
    "unfinished": "cut off",
}


def _accuracies(task: str, figures: Mapping[str, Any]) -> Figure:
    estimates, rows = [], []
    checks = [name for name in _CHECKS if any(part.get(name) is not None for part in figures["arms"].values())]
    for arm, part in figures["arms"].items():
        shape, style = ARM_MARKS.get(arm, ("bar", "told"))
        ends = part.get("ci95")
        words = share(part["accuracy"]) + (f" ({interval(ends, share)})" if ends else "")
        scaled = (100 * ends[0], 100 * ends[1]) if ends else None
        estimates.append(Estimate(arm_name(arm), 100 * part["accuracy"], scaled, words, style, shape))
        checked = (share(part.get(name)) for name in checks)
        rows.append((arm_name(arm), count(part["n"]), words, *checked, percent(part.get("skip_rate"))))
    head = ("arm", "answers", "right (95% Wilson)", *(_CHECKS[name] for name in checks), "blocks skipped")
    name = task_name(task)
    rows = [tuple(DASH if value == "" else value for value in row) for row in rows]
    return Figure(
        f"Free running: {name} that are right",
        f"{count(figures['n'])} {name}, greedy, with 95% Wilson intervals.",
        forest(estimates, "answers that are right", lambda tick, digits: f"{number(tick, digits)}%", zero=None),
        Table(f"Free running: {name}", head, rows),
    )


def _tests(task: str, tests: Mapping[str, Any]) -> Table:
    rows = [
        (
            " against ".join(arm_name(arm) for arm in name.split("_vs_")),
            count(test["n"]),
            count(test["only_first"]),
            count(test["only_second"]),
            p_value(test["p_value"]) if test.get("p_value") is not None else test.get("reason", DASH),
        )
        for name, test in tests.items()
    ]
    head = ("compared", "answers", "right in the first only", "right in the second only", "McNemar, exact")
    return Table(f"Paired tests: {task_name(task)}", head, rows)
