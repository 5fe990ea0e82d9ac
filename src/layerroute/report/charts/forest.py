"""A forest plot: one row per estimate, its interval as a line, its figure in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from layerroute.report.charts.drawing import Draw, Drawing, Scale, cut, linear_ticks, tick_digits

__all__ = ["Estimate", "forest"]

_ROW, _AXIS, _HEADING = 26, 34, 24
_NARROW = 500


@dataclass(frozen=True)
class Estimate:
    """One row; `mean` None is a heading."""

    label: str
    mean: float | None
    interval: tuple[float, float] | None = None
    figure: str = ""
    """Mean and interval in words."""
    style: str = ""
    shape: str = "square"
    values: Sequence[float] = ()
    """Single observations, drawn behind."""


def forest(
    estimates: Sequence[Estimate], axis: str, write: Callable[[float, int], str], zero: float | None = 0.0
) -> Draw:
    """Draw estimates on one axis, with a line at `zero`; narrow charts put the words above each interval."""

    def draw(width: int, title: str, description: str, ident: str) -> Markup:
        narrow = width < _NARROW
        left, right = (8, width - 8) if narrow else (0.27 * width, 0.73 * width)
        row = _ROW + 16 if narrow else _ROW
        rows = [_HEADING if estimate.mean is None else row for estimate in estimates]
        picture = Drawing(width, sum(rows) + _AXIS + 8)
        ticks = linear_ticks(*_range(estimates, zero), 5 if narrow else 6)
        digits, scale = tick_digits(ticks), Scale(ticks[0], ticks[-1], left + 8, right - 8)
        bottom = sum(rows) + 4
        for tick in ticks:
            picture.line(scale(tick), 2, scale(tick), bottom, "axis" if tick == zero else "grid")
            picture.text(scale(tick), bottom + 15, write(tick, digits), "small", "middle")
        picture.text((left + right) / 2, bottom + 30, axis, "small", "middle")
        top = 0
        for estimate, height in zip(estimates, rows, strict=True):
            if estimate.mean is None:
                picture.text(0 if not narrow else left, top + 17, estimate.label, "strong")
            else:
                _row(picture, estimate, scale, top, narrow)
            top += height
        return picture.svg(title, description, ident)

    return draw


def _row(picture: Drawing, estimate: Estimate, scale: Scale, top: float, narrow: bool) -> None:
    y = top + (28 if narrow else _ROW / 2)
    if narrow:
        figure = estimate.figure
        picture.text(8, top + 14, cut(estimate.label, picture.width - 24 - 6.9 * len(figure)), "plate")
        picture.text(picture.width - 8, top + 14, figure, "figure plate", "end")
    else:
        picture.text(0, y + 4, cut(estimate.label, 0.27 * picture.width - 8))
        picture.text(picture.width, y + 4, estimate.figure, "figure", "end")
    for value in estimate.values:
        picture.line(scale(value), y - 7, scale(value), y + 7, f"observed {estimate.style}")
    assert estimate.mean is not None
    if estimate.interval is not None:
        low, high = (scale(end) for end in estimate.interval)
        picture.line(low, y, high, y, f"whisker {estimate.style}")
        for end in (low, high):
            picture.line(end, y - 4, end, y + 4, f"whisker {estimate.style}")
    hollow = "" if estimate.interval is not None else " hollow"
    picture.mark(estimate.shape, scale(estimate.mean), y, f"mark {estimate.style}{hollow}")


def _range(estimates: Sequence[Estimate], zero: float | None) -> tuple[float, float]:
    known = [end for estimate in estimates for end in (*(estimate.interval or ()), *estimate.values)]
    known += [estimate.mean for estimate in estimates if estimate.mean is not None]
    known += [] if zero is None else [zero]
    return min(known), max(known)
