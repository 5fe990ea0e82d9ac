"""Measured figures as text: spreads, ratios with their intervals, and goals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["goal_line", "machine_lines", "ratio_text", "spread_text"]


def machine_lines(what: str, machine: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, on what, with which versions."""
    yield f"{what}, {machine['dtype']}, on {machine['device']} ({machine['cpu']}, {machine['threads']} threads)"
    yield f"torch {machine['torch']}, transformers {machine['transformers']}"


def spread_text(spread: Mapping[str, float]) -> str:
    """Median, and in brackets minimum and maximum."""
    return f"{spread['median']:.2f} ({spread['min']:.2f}..{spread['max']:.2f})"


def ratio_text(ratio: Mapping[str, Any]) -> str:
    """The ratio, where it stands out of the noise, and its interval."""
    low, high = ratio["interval"]
    value = f"{ratio['ratio']:.3f}" if ratio["resolved"] else "within noise"
    return f"{value}, 95% interval {low:.3f}..{high:.3f}"


def goal_line(goal: Mapping[str, Any]) -> str:
    """A goal, whether it is met, and the interval that says so."""
    verdict = {True: "met", False: "missed", None: "within noise"}[goal["met"]]
    low, high = goal["interval"]
    return f"  {goal['goal']:<62}{verdict:<14}{low:.3f}..{high:.3f}"
