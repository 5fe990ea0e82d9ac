"""How figures and names are written in a report: numbers in, words out; a figure that is not there is a dash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = [
    "DASH",
    "SEPARATOR",
    "arm_name",
    "cell",
    "count",
    "in_runs",
    "interval",
    "joined",
    "number",
    "p_value",
    "percent",
    "points",
    "share",
    "signed",
    "task_name",
    "type_name",
]

DASH = "\u2013"
SEPARATOR = " · "

_ARMS = {
    "base": "backbone",
    "lora_only": "LoRA only",
    "routed": "routed",
    "static": "static pruning",
    "static_influence": "static, influence",
    "static_greedy": "static, greedy",
    "random": "random routes",
    "oracle": "oracle",
    "labels": "label routers",
    "length": "length gate",
    "trained_lora_only": "trained, no routing",
    "routers_only": "routers only",
}


def arm_name(arm: str) -> str:
    """The arm in words."""
    return _ARMS.get(arm, arm.replace("_", " "))


def type_name(step_type: str) -> str:
    """The step type in words."""
    return step_type.replace("_", " ")


def task_name(task: str) -> str:
    """What is graded, in words."""
    return {"tool_call": "tool calls", "gsm8k": "GSM8K problems"}.get(task, task.replace("_", " "))


def number(value: float | None, digits: int = 2) -> str:
    """Fixed digits, with a minus sign that is one; very large figures in three significant digits."""
    if value is None:
        return DASH
    rounded = round(value, digits) or 0.0  # no minus before a zero
    text = f"{value:.3g}" if abs(value) >= 1e5 else f"{rounded:,.{digits}f}"
    return text.replace("-", "\u2212")


def signed(value: float | None, digits: int = 1) -> str:
    """With a plus where it is above 0."""
    return f"+{number(value, digits)}" if value is not None and round(value, digits) > 0 else number(value, digits)


def points(value: float | None) -> str:
    """Points of blocks, 0 to 100."""
    return number(value, 1)


def share(value: float | None) -> str:
    """A share between 0 and 1, in per cent."""
    return DASH if value is None else f"{number(100 * value, 1)}%"


def percent(value: float | None) -> str:
    """A figure that is in points already, in per cent."""
    return DASH if value is None else f"{number(value, 1)}%"


def count(value: float | None) -> str:
    """A whole number, in thousands."""
    return DASH if value is None else f"{value:,.0f}"


def interval(ends: Sequence[float] | None, write: Callable[[float | None], str] = points) -> str:
    """`18.2 to 24.0`."""
    return DASH if ends is None else f"{write(ends[0])} to {write(ends[1])}"


def cell(figure: dict[str, Any] | None, write: Callable[[float | None], str] = points) -> str:
    """A mean with its interval: `21.3 (18.2 to 24.0)`."""
    if not figure or figure.get("mean") is None:
        return DASH
    ends = figure.get("ci95")
    return write(figure["mean"]) if ends is None else f"{write(figure['mean'])} ({interval(ends, write)})"


def p_value(value: float | None) -> str:
    """`p = 0.012`, and no more digits than permutations give."""
    if value is None:
        return DASH
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def joined(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def in_runs(indices: Sequence[int]) -> str:
    """Whole numbers with runs drawn together: `2 to 5, 9`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
