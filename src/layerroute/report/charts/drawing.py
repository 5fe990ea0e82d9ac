"""Marks on an SVG canvas, and scales with readable ticks.

Colours are classes, so that the page's light, dark and print styles apply; text is escaped. A chart is drawn for the
width that it is shown at, one unit a pixel, so that its text keeps its size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from markupsafe import Markup, escape

__all__ = ["Draw", "Drawing", "Scale", "cut", "linear_ticks", "log_ticks", "text_width"]

_LETTER = 6.9  # pixels of an average letter at 12 px, on the wide side
_SHAPES: dict[str, str] = {
    "square": "M-5-5H5V5H-5Z",
    "diamond": "M0-6.5L6.5 0L0 6.5L-6.5 0Z",
    "up": "M0-6.5L6 5H-6Z",
    "down": "M0 6.5L6-5H-6Z",
    "cross": "M-5-5L5 5M-5 5L5-5",
    "plus": "M-6 0H6M0-6V6",
    "bar": "M-6-2H6V2H-6Z",
    "hexagon": "M-6 0L-3-5.2H3L6 0L3 5.2H-3Z",
}


Draw = Callable[[int, str, str, str], Markup]
"""From width in pixels, title, description and an id that is unique on the page, an `<svg>` element."""


def text_width(words: str, size: float = 12) -> float:
    """Pixels that a text takes at most, roughly: fonts differ."""
    return len(words) * _LETTER * size / 12


def cut(words: str, width: float) -> str:
    """The text, shortened with an ellipsis where it would be wider than `width` pixels."""
    letters = max(2, int(width / _LETTER))
    return words if len(words) <= letters else words[: letters - 1].rstrip() + "…"


class Drawing:
    """An SVG picture that grows."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._parts: list[Markup] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self._add('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>', x1, y1, x2, y2, style)

    def rect(self, x: float, y: float, width: float, height: float, style: str, opacity: float = 1) -> None:
        self._add(
            '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="{}" fill-opacity="{:.2f}"/>',
            *(x, y, max(width, 0), max(height, 0), style, opacity),
        )

    def path(self, points: list[tuple[float, float]], style: str) -> None:
        """A line through the points."""
        self._add('<path d="{}" class="{}"/>', "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), style)

    def mark(self, shape: str, x: float, y: float, style: str) -> None:
        """A symbol around a point: `circle` or one of the shapes."""
        if shape == "circle":
            self._add('<circle cx="{:.1f}" cy="{:.1f}" r="5.5" class="{}"/>', x, y, style)
        else:
            self._add('<path d="{}" transform="translate({:.1f} {:.1f})" class="{}"/>', _SHAPES[shape], x, y, style)

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        """`y` is the base line; `anchor` is start, middle or end."""
        self._add('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>', x, y, style, anchor, words)

    def svg(self, title: str, description: str, ident: str) -> Markup:
        """The whole element, named and described for those who do not see it."""
        head = Markup(
            '<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-labelledby="{}-t {}-d" class="chart">'
            '<title id="{}-t">{}</title><desc id="{}-d">{}</desc>'
        ).format(self.width, self.height, ident, ident, ident, title, ident, description)
        return head + Markup("").join(self._parts) + Markup("</svg>")

    def _add(self, template: str, *values: object) -> None:
        self._parts.append(Markup(template).format(*(escape(v) if isinstance(v, str) else v for v in values)))


class Scale:
    """From figures `low..high` to pixels `start..end`, linearly or by logarithm."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self._into: Callable[[float], float] = math.log if log else float
        self._low, self._high = self._into(low), self._into(high)
        self._start, self._end = start, end
        if self._low == self._high:
            self._low, self._high = self._low - 1, self._high + 1

    def __call__(self, value: float) -> float:
        part = (self._into(value) - self._low) / (self._high - self._low)
        return self._start + part * (self._end - self._start)


def linear_ticks(low: float, high: float, at_most: int = 6) -> list[float]:
    """Round figures that cover `low..high`, the first at or below and the last at or above."""
    if low == high:
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    rough = (high - low) / max(at_most - 1, 1)
    power = 10 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first + 1 <= at_most:
            break
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... that cover `low..high`; powers of ten alone where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [factor * 10.0**power for power in powers for factor in ((1, 2, 5) if len(powers) <= 3 else (1,))]
    first = max([tick for tick in every if tick <= low] or every[:1])
    last = min([tick for tick in every if tick >= high] or every[-1:])
    return [tick for tick in every if first <= tick <= last]
