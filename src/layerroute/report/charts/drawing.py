"""Marks on an SVG canvas, and scales with readable ticks.

Colours are classes, so that the page's light, dark and print styles apply; text is escaped. A chart is drawn for the
width that it is shown at, one unit a pixel, so that its text keeps its size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from markupsafe import Markup, escape

__all__ = ["Draw", "Drawing", "Scale", "cut", "linear_ticks", "text_width", "tick_digits"]

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
    """From figures `low..high` to pixels `start..end`."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = low, start
        self._slope = (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) * self._slope


def linear_ticks(low: float, high: float, at_most: int = 6) -> list[float]:
    """Round figures that cover `low..high`, the first at or below and the last at or above."""
    if low == high:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / max(at_most - 1, 1)
    power = 10 ** math.floor(math.log10(rough))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first + 1 <= at_most:
            break
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_digits(ticks: Sequence[float]) -> int:
    """Decimals that tell evenly spaced ticks apart."""
    step = min(abs(b - a) for a, b in pairwise(ticks))
    return next((digits for digits in range(4) if abs(step * 10**digits - round(step * 10**digits)) < 1e-6), 4)
