"""A route as little blocks: full where executed, hollow where skipped."""

from __future__ import annotations

from markupsafe import Markup

from layerroute.report.charts.drawing import Drawing
from layerroute.report.wording import in_runs

__all__ = ["strip"]


def strip(route: str, kind: str, ident: str) -> Markup:
    """Draw a route of bits, `1` executed."""
    cell, height = 12, 20
    picture = Drawing(cell * len(route) + 2, height)
    for block, bit in enumerate(route):
        x = 1 + block * cell
        if bit == "1":
            picture.rect(x + 1, 2, cell - 2, height - 4, f"run {kind}")
        else:
            picture.rect(x + 1.5, 2.5, cell - 3, height - 5, "skipped")
    skipped = [block for block, bit in enumerate(route) if bit == "0"]
    words = f"skips {len(skipped)} of {len(route)} blocks" + (f": {in_runs(skipped)}" if skipped else "")
    return picture.svg("Route", words, ident)
