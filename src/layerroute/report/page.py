"""A report as one HTML file that loads nothing: style inside, charts as SVG, no script."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count

from jinja2 import Environment, PackageLoader, StrictUndefined

from layerroute.report.charts.strip import strip
from layerroute.report.content import Document
from layerroute.report.wording import type_name

__all__ = ["NARROW", "WIDE", "to_html"]

WIDE, NARROW = 720, 356
"""Each chart is drawn for both widths, in pixels; the page shows the one that its column has room for."""


def to_html(document: Document) -> str:
    """Render a report; everything from outside is escaped."""
    environment = Environment(
        loader=PackageLoader("layerroute.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    template = environment.get_template("report.html.jinja")
    return template.render(
        document=document, ident=_idents(), strip=strip, type_name=type_name, widths={"wide": WIDE, "narrow": NARROW}
    )


def _unbroken(text: str) -> str:
    """`p = 0.012` and `95% interval` stay on one line."""
    return re.sub(r"\b(p [<=] |95% )", lambda found: found[0].replace(" ", "\u00a0"), text)


def _idents() -> Callable[[], str]:
    numbers = count(1)
    return lambda: f"f{next(numbers)}"
