"""A figure against a setting's values: points with intervals, joined; values stand evenly apart, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from layerroute.report.charts.drawing import Draw, Drawing, Scale, linear_ticks, tick_digits
from layerroute.report.wording import number

__all__ = ["Curve", "curves"]

_PANEL, _GAP = 120, 40


@dataclass(frozen=True)
class Curve:
    """One metric."""

    name: str
    means: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None]
    scale: float = 1.0
    """What figures are multiplied with before they are shown."""


def curves(lines: Sequence[Curve], values: Sequence[str], axis: str) -> Draw:
    """Draw a panel per metric over the same values."""

    def draw(width: int, title: str, description: str, ident: str) -> Markup:
        left, right = 52, width - 12
        step = (right - left) / len(values)
        picture = Drawing(width, len(lines) * (_PANEL + _GAP) + 38)
        for row, line in enumerate(lines):
            _panel(picture, line, row * (_PANEL + _GAP) + 26, left, right)
        bottom = len(lines) * (_PANEL + _GAP) - 8
        for i, value in enumerate(values):
            picture.text(left + (i + 0.5) * step, bottom + 14, value, "small", "middle")
        picture.text((left + right) / 2, bottom + 34, axis, "small", "middle")
        return picture.svg(title, description, ident)

    return draw


def _panel(picture: Drawing, line: Curve, top: float, left: float, right: float) -> None:
    picture.text(left, top - 10, line.name)
    known = [mean * line.scale for mean in line.means if mean is not None]
    known += [end * line.scale for ends in line.intervals if ends is not None for end in ends]
    ticks = linear_ticks(min(known), max(known), 4)
    scale = Scale(ticks[0], ticks[-1], top + _PANEL - 4, top + 4)
    for tick in ticks:
        picture.line(left, scale(tick), right, scale(tick), "axis" if tick == 0 else "grid")
        picture.text(left - 6, scale(tick) + 4, number(tick, tick_digits(ticks)), "small", "end")
    step = (right - left) / len(line.means)
    points = []
    for i, (mean, ends) in enumerate(zip(line.means, line.intervals, strict=True)):
        x = left + (i + 0.5) * step
        if ends is not None:
            low, high = (scale(end * line.scale) for end in ends)
            picture.line(x, low, x, high, "whisker routed")
            for end in (low, high):
                picture.line(x - 4, end, x + 4, end, "whisker routed")
        if mean is not None:
            points.append((x, scale(mean * line.scale)))
    if len(points) > 1:
        picture.path(points, "trace routed")
    for x, y in points:
        picture.mark("circle", x, y, "mark routed")
