"""How often each block is skipped, by step type: blocks across on a wide page, down on a narrow one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from layerroute.report.charts.drawing import Draw, Drawing

__all__ = ["heatmap"]

_NARROW = 500
_STYLES = ("tiny faint", "tiny", "tiny on-half", "tiny on-heat")  # of a cell's number, by how dark the cell is
_LEGIBLE = 17  # pixels of a cell that a number fits in


def heatmap(rates: Mapping[str, Sequence[float]], fixed: frozenset[int]) -> Draw:
    """Draw rates in points, one list per named type; `fixed` blocks always run and are drawn as such."""

    def draw(width: int, title: str, description: str, ident: str) -> Markup:
        blocks = len(next(iter(rates.values())))
        picture = _down(rates, fixed, blocks, width) if width < _NARROW else _across(rates, fixed, blocks, width)
        return picture.svg(title, description, ident)

    return draw


def _across(rates: Mapping[str, Sequence[float]], fixed: frozenset[int], blocks: int, width: int) -> Drawing:
    left, top, cell, height = 84, 6, (width - 84) / blocks, 34
    picture = Drawing(width, top + height * len(rates) + 40)
    for row, (name, figures) in enumerate(rates.items()):
        y = top + row * height
        picture.text(0, y + height / 2 + 4, name)
        for block, rate in enumerate(figures):
            _cell(picture, left + block * cell, y, cell, height, rate, block in fixed)
    bottom = top + height * len(rates)
    every = 1 if cell >= _LEGIBLE else 5
    for block in range(0, blocks, every):
        picture.text(left + (block + 0.5) * cell, bottom + 16, str(block), "small", "middle")
    picture.text(
        left + cell * blocks / 2,
        bottom + 34,
        "block; figures are the per cent of steps that skip it",
        "small",
        "middle",
    )
    return picture


def _down(rates: Mapping[str, Sequence[float]], fixed: frozenset[int], blocks: int, width: int) -> Drawing:
    left, top, height, cell = 44, 26, 18, (width - 44) / len(rates)
    picture = Drawing(width, top + height * blocks + 24)
    picture.text(left - 8, 16, "block", "small", "end")
    for column, (name, figures) in enumerate(rates.items()):
        picture.text(left + (column + 0.5) * cell, 16, name, "", "middle")
        for block, rate in enumerate(figures):
            _cell(picture, left + column * cell, top + block * height, cell, height, rate, block in fixed)
    for block in range(blocks):
        picture.text(left - 8, top + (block + 0.5) * height + 4, str(block), "small", "end")
    picture.text(left, top + height * blocks + 18, "figures are the per cent of steps that skip", "small")
    return picture


def _cell(picture: Drawing, x: float, y: float, width: float, height: float, rate: float, fixed: bool) -> None:
    middle = y + height / 2 + 4
    if fixed:
        picture.rect(x + 0.5, y + 0.5, width - 1, height - 1, "fixed")
        picture.line(x + width / 2 - 3, y + height / 2, x + width / 2 + 3, y + height / 2, "axis")
        return
    picture.rect(x + 0.5, y + 0.5, width - 1, height - 1, "heat-ground")
    picture.rect(x + 0.5, y + 0.5, width - 1, height - 1, "heat", rate / 100)
    if width >= _LEGIBLE:
        picture.text(x + width / 2, middle, f"{rate:.0f}", _STYLES[(rate >= 0.5) + (rate > 50) + (rate > 85)], "middle")
