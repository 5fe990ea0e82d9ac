"""One report in three forms: HTML to read, Markdown to paste, JSON for machines."""

from __future__ import annotations

import json
from dataclasses import asdict

from layerroute.report.document import build
from layerroute.report.load import Evidence
from layerroute.report.markdown import to_markdown
from layerroute.report.over_seeds import findings_over_seeds
from layerroute.report.page import to_html
from layerroute.report.verdict import findings, warnings

__all__ = ["FORMATS", "render"]

FORMATS = ("html", "md", "json")


def render(evidence: Evidence, kind: str) -> str:
    """The report as text that ends in a line end; `kind` is one of `FORMATS`."""
    if kind == "json":
        return _to_json(evidence)
    assert kind in FORMATS, kind
    document = build(evidence)
    return to_html(document) if kind == "html" else to_markdown(document)


def _to_json(evidence: Evidence) -> str:
    """Verdicts and the summaries that they rest on, one object on one line."""
    evaluations = [
        {
            "name": each.name,
            "findings": [asdict(finding) for finding in findings(each.summary)],
            "warnings": warnings(each.summary),
            "summary": each.summary,
        }
        for each in evidence.evaluations
    ]
    ablation = evidence.ablation and {
        "findings": [asdict(finding) for finding in findings_over_seeds(evidence.ablation)],
        "warnings": evidence.ablation.get("warnings") or [],
        "ablation": evidence.ablation,
    }
    content = {"format_version": 1, "evaluations": evaluations, "ablation": ablation}
    return json.dumps(content, ensure_ascii=False) + "\n"
