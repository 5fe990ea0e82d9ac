"""A report as Markdown: the same words and tables; charts are the tables that they are drawn from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from layerroute.report.content import Document, Example, Figure, Hint, Item, Paragraph, Table, Verdict
from layerroute.report.wording import SEPARATOR, type_name

__all__ = ["to_markdown"]


def to_markdown(document: Document) -> str:
    """Render a report; what could be read as markup in cells and texts is escaped."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: Document) -> Iterator[str]:
    yield f"# LayerRoute report: {_escaped(document.title)}"
    if document.facts:
        yield f"\n{_escaped(SEPARATOR.join(document.facts))}"
    yield "\n## Verdict"
    if document.comparison:
        yield from _table(document.comparison)
    for verdict in document.verdicts:
        yield from _verdict(verdict)
    for section in document.sections:
        yield f"\n## {section.title}\n\n{section.lead}"
        for panel in section.panels:
            if panel.name is not None:
                yield f"\n### {_escaped(panel.name)}"
            for item in panel.items:
                yield from _item(item)


def _verdict(verdict: Verdict) -> Iterator[str]:
    if verdict.name is not None:
        yield f"\n### {_escaped(verdict.name)}"
    for warning in verdict.warnings:
        yield f"\n> **Warning:** {_escaped(warning)}"
    for finding in verdict.findings:
        question, answer = _escaped(finding.question), _escaped(finding.answer)
        yield f"\n**{question} {finding.status.upper()}.** {answer}. {_escaped(finding.sentence)}"


def _item(item: Item) -> Iterator[str]:
    if isinstance(item, Paragraph):
        yield f"\n{_escaped(item.text)}"
    elif isinstance(item, Hint):
        yield f"\n{_escaped(item.text)}:\n\n    {item.command}"
    elif isinstance(item, Table):
        yield from _table(item)
    elif isinstance(item, Figure):
        yield f"\n**{_escaped(item.title)}.** {_escaped(item.description)}"
        yield from _table(item.table)
    else:
        yield from _example(item)


def _table(table: Table) -> Iterator[str]:
    yield f"\n{_escaped(table.caption)}:\n"
    yield _row(table.head)
    yield "|" + "|".join([" --- ", *(" --- " if table.wordy else " ---: " for _ in table.head[1:])]) + "|"
    for row in table.rows:
        yield _row(row)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _example(example: Example) -> Iterator[str]:
    drawn = example.route.replace("1", "█").replace("0", "·")
    yield f"\n**{type_name(example.step_type)}, {example.role}** ({_escaped(example.id)}): {_escaped(example.facts)}"
    yield f"\n    {drawn}"
    for name, text in (("prompt ends", example.prompt_end), ("target", example.target)):
        if text:
            longest = max(map(len, re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            yield f"\n{name}:\n\n{fence}text\n{text}\n{fence}"


def _escaped(text: str) -> str:
    """One line without anything that Markdown or HTML would act on."""
    return re.sub(r"([\\`*_<>\[\]#])", r"\\\1", " ".join(text.split()))
