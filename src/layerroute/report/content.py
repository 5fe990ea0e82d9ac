"""What a report holds, before it is HTML or Markdown: a verdict, then sections of paragraphs, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from markupsafe import Markup

from layerroute.report.charts.drawing import Draw

__all__ = [
    "Document",
    "Example",
    "Figure",
    "Finding",
    "Hint",
    "Item",
    "Panel",
    "Paragraph",
    "Section",
    "Status",
    "Table",
    "Verdict",
]

Status = Literal["yes", "no", "unclear"]


@dataclass(frozen=True)
class Finding:
    """One question that a reader has, and what the figures say."""

    key: str
    status: Status
    question: str
    answer: str
    """A few words."""
    sentence: str
    """The same with figure, interval and how it was found."""


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Hint:
    """Stands where figures are missing, and names the command that gives them."""

    kind: ClassVar[str] = "hint"
    text: str
    command: str


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    wordy: bool = False
    """Cells are words that may break, not figures."""


@dataclass(frozen=True)
class Figure:
    """A chart, the same in words, and its figures as a table."""

    kind: ClassVar[str] = "figure"
    title: str
    description: str
    draw: Draw
    table: Table

    def svg(self, width: int, ident: str) -> Markup:
        """The chart for so many pixels, with an id that is unique on the page."""
        return self.draw(width, self.title, self.description, ident)


@dataclass(frozen=True)
class Example:
    """A step, and the route that it took."""

    kind: ClassVar[str] = "example"
    role: str
    step_type: str
    id: str
    route: str
    """Bits, `1` executed."""
    facts: str
    prompt_end: str
    target: str


Item = Paragraph | Hint | Table | Figure | Example


@dataclass(frozen=True)
class Panel:
    """What one evaluation has to say in a section."""

    name: str | None
    """None where there is nothing to tell it from."""
    items: Sequence[Item]


@dataclass(frozen=True)
class Section:
    """A heading, what is to be seen, and a panel for each evaluation."""

    key: str
    title: str
    lead: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Verdict:
    """Warnings and findings of one evaluation or ablation."""

    name: str | None
    warnings: Sequence[str]
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    facts: Sequence[str]
    verdicts: Sequence[Verdict]
    comparison: Table | None
    sections: Sequence[Section] = field(default_factory=list)
