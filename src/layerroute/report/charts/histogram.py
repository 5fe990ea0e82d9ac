"""How many blocks each input skips: a row of bars per step type, on one axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from layerroute.report.charts.drawing import Draw, Drawing, linear_ticks

__all__ = ["histogram"]

_PANEL, _GAP = 64, 34


def histogram(counts: Mapping[str, Sequence[int]], names: Mapping[str, str], blocks: int) -> Draw:
    """Draw, per step type, the share of its rows that skip 0, 1, ... blocks; `names` says what stands above each."""
    last = max(i for figures in counts.values() for i, n in enumerate(figures) if n) + 1
    last = min(max(last, 6), blocks)

    def draw(width: int, title: str, description: str, ident: str) -> Markup:
        left, right = 40, width - 6
        step = (right - left) / (last + 1)
        picture = Drawing(width, len(counts) * (_PANEL + _GAP) + 38)
        highest = max(max(figures) / sum(figures) for figures in counts.values())
        for row, (kind, figures) in enumerate(counts.items()):
            base = (row + 1) * (_PANEL + _GAP)
            picture.text(left, base - _PANEL - 12, names[kind], "plate")
            for tick in (0.0, highest):
                y = base - _PANEL * tick / highest
                picture.line(left, y, right, y, "grid")
                picture.text(left - 6, y + 4, f"{100 * tick:.0f}%", "small", "end")
            for skipped, n in enumerate(figures[: last + 1]):
                tall = _PANEL * n / sum(figures) / highest
                picture.rect(left + skipped * step + 1, base - tall, step - 2, tall, f"bar {kind}")
            picture.line(left, base, right, base, "axis")
        base = len(counts) * (_PANEL + _GAP)
        for tick in linear_ticks(0, last, 8):
            if tick <= last and tick == int(tick):
                picture.text(left + (tick + 0.5) * step, base + 16, f"{tick:.0f}", "small", "middle")
        picture.text((left + right) / 2, base + 32, f"blocks skipped, of {blocks}", "small", "middle")
        return picture.svg(title, description, ident)

    return draw
