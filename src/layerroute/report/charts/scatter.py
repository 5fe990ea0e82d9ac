"""Quality against cost: a point per arm, named where it stands, and the line of those that none beats on both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from layerroute.report.charts.drawing import Draw, Drawing, Scale, linear_ticks, text_width, tick_digits
from layerroute.report.wording import number

__all__ = ["Point", "frontier", "scatter"]

_FAR = 2.5  # times the median perplexity

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """An arm."""

    label: str
    cost: float
    quality: float
    shape: str
    style: str


def frontier(points: Sequence[Point], low_is_good: bool) -> list[Point]:
    """Those that no other point beats on cost and quality, by rising cost."""
    sign = 1 if low_is_good else -1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, sign * point.quality)):
        if not best or sign * point.quality < sign * best[-1].quality:
            best.append(point)
    return best


def scatter(points: Sequence[Point], across: str, up: str, low_is_good: bool) -> Draw:
    """Draw points; `across` and `up` name the axes."""

    def draw(width: int, title: str, description: str, ident: str) -> Markup:
        height = 340 if width < 500 else 380
        left, right, top, bottom = 46, width - 10, 30, height - 44
        picture = Drawing(width, height)
        columns = linear_ticks(min(point.cost for point in points), max(point.cost for point in points), 5)
        near = [point.quality for point in points if not (low_is_good and _is_far(point, points))]
        rows = linear_ticks(min(near), max(near))
        across_scale, up_scale = (
            Scale(columns[0], columns[-1], left + 14, right - 14),
            Scale(rows[0], rows[-1], bottom, top + 24),
        )
        for tick in columns:
            picture.line(across_scale(tick), top, across_scale(tick), bottom, "grid")
            picture.text(across_scale(tick), bottom + 16, f"{number(tick, tick_digits(columns))}%", "small", "middle")
        for tick in rows:
            picture.line(left, up_scale(tick), right, up_scale(tick), "grid")
            picture.text(left - 6, up_scale(tick) + 4, number(tick, tick_digits(rows)), "small", "end")
        picture.text(0, 14, f"{up}, {'low' if low_is_good else 'high'} is good", "small")
        picture.text((left + right) / 2, height - 6, across, "small", "middle")
        best = [(across_scale(point.cost), up_scale(point.quality)) for point in frontier(points, low_is_good)]
        if len(best) > 1:
            picture.path(best, "frontier")
        placed = [(across_scale(point.cost), max(up_scale(point.quality), top + 8)) for point in points]
        for point, (x, y) in zip(points, placed, strict=True):
            picture.mark(point.shape, x, y, f"mark {point.style}")
        far = {
            point.label: f"{point.label}, {number(point.quality)} \u2191"
            for point in points
            if point.quality > rows[-1]
        }
        names = [far.get(point.label, point.label) for point in points]
        styles = ["plate strong" if point.style == "routed" else "plate" for point in points]
        _label(picture, names, styles, placed, _along(best), (left, top, right, bottom))
        return picture.svg(title, description, ident)

    return draw


def _is_far(point: Point, points: Sequence[Point]) -> bool:
    """So bad that the others would lie on a line: it is put at the upper edge, with its figure."""
    return point.quality > _FAR * sorted(other.quality for other in points)[len(points) // 2]


def _label(
    picture: Drawing,
    names: Sequence[str],
    styles: Sequence[str],
    placed: Sequence[tuple[float, float]],
    line: list[Box],
    frame: Box,
) -> None:
    """Put each name where it covers least of what is there, with a line to its point if that is some way off."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in placed] + line
    for index in sorted(range(len(placed)), key=lambda index: (styles[index] == "plate", placed[index][1])):
        x, y = placed[index]
        options = list(_places(x, y, text_width(names[index])))
        costs = [_cost(box, taken, frame) + 0.02 * far for box, far in options]
        box, far = options[costs.index(min(costs))]
        taken.append(box)
        if far > 12:
            picture.line(x, y, min(max(x, box[0]), box[2]), (box[1] + box[3]) / 2, "leader")
        picture.text(box[0] + 2, box[3] - 4, names[index], styles[index])


def _along(line: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes on the way through the points."""
    boxes = []
    for (x, y), (to_x, to_y) in pairwise(line):
        steps = max(1, int(abs(to_x - x) / 6))
        for i in range(steps + 1):
            at_x, at_y = x + (to_x - x) * i / steps, y + (to_y - y) * i / steps
            boxes.append((at_x - 3, at_y - 2, at_x + 3, at_y + 2))
    return boxes


def _places(x: float, y: float, width: float) -> Iterator[tuple[Box, float]]:
    """Boxes for a text around a point, and how far off each is."""
    for far in (9, 20, 34, 50, 70, 92, 116):
        for across, down in ((1, 0), (-1, 0), (1, -1), (1, 1), (-1, -1), (-1, 1), (0, -1), (0, 1)):
            reach = far if far < 12 else 12
            left = x + reach if across > 0 else x - reach - width - 4 if across < 0 else x - width / 2 - 2
            middle = y + down * (far + 5 if across == 0 else far) if down else y
            yield (left, middle - 8, left + width + 4, middle + 8), far


def _cost(box: Box, taken: Sequence[Box], frame: Box) -> float:
    covered = sum(_overlap(box, other) for other in taken)
    outside = (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)
    return covered + 10 * outside


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
