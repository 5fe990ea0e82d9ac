"""How routes differ: block by block, input by input, source by source, and whether it is the input at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from layerroute.report.charts.forest import Estimate, forest
from layerroute.report.charts.heatmap import heatmap
from layerroute.report.charts.histogram import histogram
from layerroute.report.content import Figure, Item, Table
from layerroute.report.load import Evaluation
from layerroute.report.wording import (
    DASH,
    cell,
    count,
    in_runs,
    interval,
    number,
    p_value,
    percent,
    points,
    signed,
    type_name,
)

__all__ = ["block_items", "dependence_items", "differential_items", "distribution_items"]


def block_items(evaluation: Evaluation) -> list[Item]:
    """The heat map of blocks by step type."""
    summary = evaluation.summary
    rates = {type_name(kind): figures for kind, figures in summary["per_block"].items() if figures}
    if not rates:
        return []
    blocks = len(next(iter(rates.values())))
    routable = summary["provenance"]["routers"]["routable"]
    fixed = frozenset(range(blocks)) - frozenset(routable)
    moved = (summary["dependence"].get("gate_movement") or {}).get("per_block") or [None] * blocks
    rows = [
        (str(block), *(points(figures[block]) for figures in rates.values()), number(moved[block], 3))
        for block in range(blocks)
    ]
    used = [block for block in range(blocks) if any(figures[block] > 0 for figures in rates.values())]
    never = "No block is ever skipped." if not used else f"Ever skipped: {in_runs(used)}."
    figure = Figure(
        "How often each block is skipped",
        f"Per cent of the steps of each type. {never} Always run, by design: {in_runs(sorted(fixed)) or 'none'}.",
        heatmap(rates, fixed),
        Table(
            "Steps that skip each block, per cent; and how far its gate moved in training",
            ("block", *rates, "mean change of gate probability"),
            rows,
        ),
    )
    return [figure]


def distribution_items(evaluation: Evaluation) -> list[Item]:
    """Histograms of blocks skipped per input."""
    summary = evaluation.summary
    counts = {kind: n for kind, n in summary["dependence"]["distribution"].items() if sum(n)}
    if not counts:
        return []
    blocks = len(next(iter(counts.values()))) - 1
    names = {
        kind: f"{type_name(kind)}, {count(sum(n))} steps, mean {points(summary['skip_rate'][kind]['mean'])} points"
        for kind, n in counts.items()
    }
    rows = [
        (str(skipped), points(100 * skipped / blocks), *(count(n[skipped]) for n in counts.values()))
        for skipped in range(blocks + 1)
        if any(n[skipped] for n in counts.values())
    ]
    spread = Table(
        "Skip rate by step type, points of blocks",
        ("step type", "mean (95% interval)", "standard deviation", "steps", "groups"),
        [
            (type_name(kind), cell(part), points(part.get("std")), count(part["n"]), count(part.get("groups")))
            for kind, part in summary["skip_rate"].items()
            if part["n"]
        ],
    )
    figure = Figure(
        "Blocks skipped per input",
        "Share of the steps of each type that skip so many blocks. One bar alone: all of them skip the same number.",
        histogram(counts, names, blocks),
        Table("Steps by number of blocks skipped", ("blocks", "points", *map(type_name, counts)), rows),
    )
    return [figure, spread]


def differential_items(evaluation: Evaluation) -> list[Item]:
    """Forest plot and table of tool calls minus planning: paired sources, then others, pooled and length-matched."""
    effects = evaluation.summary["differential"]
    named = list(_named(effects))
    rows = [
        (
            label,
            signed(effect["mean"]),
            interval(effect["ci95"]) if effect.get("ci95") else DASH,
            p_value(effect.get("p_value")),
            *(count(effect.get(key)) for key in ("n_tool_call", "n_planning", "groups")),
            effect.get("reason", ""),
        )
        for label, effect, _ in named
    ]
    head = ("source", "points", "95% interval", "p", "tool calls", "planning", "groups", "note")
    table = Table("Differential: tool calls' skip rate minus planning's", head, rows)
    shown = [part for part in named if part[1].get("mean") is not None]
    if not shown:
        return [table]
    estimates, headed = [], ""
    for label, effect, heading in shown:
        if heading != headed:
            estimates.append(Estimate(heading, None))
            headed = heading
        ends = effect.get("ci95")
        words = signed(effect["mean"]) + (f" ({interval(ends)})" if ends else ", no interval")
        estimates.append(Estimate(label, effect["mean"], tuple(ends) if ends else None, words, "routed"))
    description = (
        "Points of blocks that tool calls skip more than planning steps; bars are 95% intervals, hollow without."
    )
    draw = forest(estimates, "points more on tool calls", signed)
    return [Figure("Differential by source", description, draw, table)]


def _named(effects: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Label, effect and heading of each row, in order."""
    paired, rest = "Same conversations (paired)", "Sources without pairs"
    for source, effect in effects["by_source"].items():
        if effect.get("paired"):
            yield source, effect, paired
    if sum(bool(effect.get("paired")) for effect in effects["by_source"].values()) > 1:
        yield "all paired sources", effects["paired"], paired
    if effects["paired_length_matched"]["mean"] is not None:
        yield "of like prompt length", effects["paired_length_matched"], paired
    for source, effect in effects["by_source"].items():
        if not effect.get("paired"):
            yield source, effect, rest
    yield "all data", effects["pooled"], "All sources together"
    yield "at like prompt length", effects["length_matched"], "All sources together"


def dependence_items(evaluation: Evaluation) -> list[Item]:
    """What else the route could follow."""
    summary = evaluation.summary
    head = ("question", "figure", "value", "95% interval or test")
    rows = [*_variety(summary), *_information(summary["dependence"]), *_prediction(summary["dependence"])]
    return [Table("Is it the input, and what about it?", head, rows, wordy=True)]


Row = tuple[str, str, str, str]


def _variety(summary: Mapping[str, Any]) -> Iterator[Row]:
    routes, found = summary["routes"], summary["dependence"]
    expected = f"; {number(routes['per_1000'], 0)} expected in 1,000 steps" if routes.get("per_1000") else ""
    yield (
        "Do inputs take different routes?",
        "distinct routes",
        count(routes["distinct"]),
        f"{DASH}{expected}".lstrip(DASH + "; ") or DASH,
    )
    yield "How evenly?", "entropy of routes", f"{number(routes['entropy'])} bits", DASH
    flips = found["flip_rate"]
    kinds = ", ".join(
        f"{type_name(kind)} {percent(value)}" for kind, value in flips.items() if kind != "all" and value is not None
    )
    yield (
        "Does the input change gates that bias alone would set?",
        "gates that it turns",
        percent(flips.get("all")),
        kinds or DASH,
    )
    moved = found["gate_movement"]
    yield "Did training move the gates?", "mean change of gate probability", number(moved["mean"], 3), DASH
    if stable := found.get("stability"):
        same = f"{percent(stable['flips'])} of gates turn; {count(stable['n'])} steps"
        yield (
            "Does the route stay when older context is reworded?",
            "steps with the same route",
            percent(stable["same_route"]),
            same,
        )


def _information(found: Mapping[str, Any]) -> Iterator[Row]:
    names = {"step_type": "step type", "source": "source", "length": "prompt length"}
    for key, part in found["mutual_information"].items():
        tested = p_value(part.get("p_value")) if part.get("p_value") is not None else part.get("reason", DASH)
        value = f"{number(part['bits'], 3)} bits, {number(part['corrected_bits'], 3)} beyond chance"
        yield f"How much does the route tell of the {names.get(key, key)}?", "mutual information", value, tested


def _prediction(found: Mapping[str, Any]) -> Iterator[Row]:
    part = found["partial_correlation"]
    tested = (
        f"{interval(part['ci95'], number)}, {p_value(part['p_value'])}"
        if part.get("ci95")
        else part.get("reason", DASH)
    )
    yield "Does step type matter at a given prompt length?", "partial correlation", number(part["r"]), tested
    part = found["auc"]
    tested = interval(part["ci95"], number) if part.get("ci95") else part.get("reason", DASH)
    yield (
        "Does the skip rate alone tell a tool call from planning?",
        "AUC, 0.5 is chance",
        number(part["value"]),
        tested,
    )
