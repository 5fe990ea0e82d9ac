"""Puts a report together: verdicts, a comparison where there are several evaluations, then the sections in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layerroute.report.content import Document, Item, Panel, Section, Table, Verdict
from layerroute.report.load import Evaluation, Evidence
from layerroute.report.over_seeds import findings_over_seeds
from layerroute.report.sections.cost import compute_items, free_running_items
from layerroute.report.sections.origin import ablation_origin, example_items, origin_items
from layerroute.report.sections.routing import block_items, dependence_items, differential_items, distribution_items
from layerroute.report.sections.seeds import seed_items, sensitivity_items
from layerroute.report.verdict import findings, warnings
from layerroute.report.wording import SEPARATOR, cell, count, in_runs, number, points, share

__all__ = ["build"]

_Maker = Callable[[Evaluation], list[Item]]

_BEFORE_SEEDS: Sequence[tuple[str, str, str, _Maker]] = (
    (
        "compute",
        "Quality against compute",
        "Perplexity is better further down, right answers further up, and both further left. The dashed line joins "
        "what no other arm beats on both. Static arms skip the same blocks on every input; the oracle is told the step "
        "type.",
        compute_items,
    ),
    (
        "blocks",
        "Blocks by step type",
        "Blocks that are skipped on one step type and run on another are routing. What is skipped always or never, "
        "whatever the type, could be had without routers.",
        block_items,
    ),
    (
        "inputs",
        "Skip rate per input",
        "A mean hides whether inputs differ. Spread within a type is routing by more than the type.",
        distribution_items,
    ),
    (
        "differential",
        "Difference between step types, by source",
        "Paired sources come first: there a conversation holds both step types, so neither its tools nor its history "
        "give the type away. Differences between unlike sources can be anything.",
        differential_items,
    ),
    (
        "dependence",
        "Is it the input?",
        "Routes can follow the bias alone, the source, or the prompt's length, and look like routing by step type.",
        dependence_items,
    ),
    (
        "free-running",
        "Free-running quality",
        "Perplexity is measured on text that is given, which flatters. Here the model writes on its own and is graded.",
        free_running_items,
    ),
)
_AFTER_SEEDS: Sequence[tuple[str, str, str, _Maker]] = (
    (
        "examples",
        "Example steps",
        "For each step type the step nearest to its mean skip rate, and those that skip most and least where they "
        "differ. Full blocks run, hollow ones are skipped; the first block is on the left.",
        example_items,
    ),
    ("provenance", "Provenance", "What it takes to have the same figures again.", origin_items),
)


def build(evidence: Evidence) -> Document:
    """Make the report's content."""
    evaluations, ablation = evidence.evaluations, evidence.ablation
    several = len(evaluations) + (ablation is not None) > 1
    verdicts = [
        Verdict(each.name if several else None, warnings(each.summary), findings(each.summary)) for each in evaluations
    ]
    if ablation is not None:
        name = _many(len(ablation["seeds"]), "seed") if several else None
        verdicts.append(Verdict(name, ablation.get("warnings") or [], findings_over_seeds(ablation)))
    sections = [_section(*about, evaluations) for about in _BEFORE_SEEDS]
    sections += _seed_sections(ablation)
    sections += [_section(*about, evaluations) for about in _AFTER_SEEDS]
    if origin := ablation_origin(ablation):
        panels = [*sections[-1].panels, Panel("ablation" if evaluations else None, origin)]
        sections[-1] = Section("provenance", "Provenance", sections[-1].lead, panels)
    return Document(
        title=_title(evaluations, ablation),
        facts=_facts(evaluations, ablation),
        verdicts=verdicts,
        comparison=_comparison(evaluations) if len(evaluations) > 1 else None,
        sections=[section for section in sections if section.panels],
    )


def _section(key: str, title: str, lead: str, make: _Maker, evaluations: Sequence[Evaluation]) -> Section:
    name = {id(each): each.name if len(evaluations) > 1 else None for each in evaluations}
    panels = [Panel(name[id(each)], items) for each in evaluations if (items := make(each))]
    return Section(key, title, lead, panels)


def _seed_sections(ablation: Mapping[str, Any] | None) -> list[Section]:
    lead = "One curve per figure, trained again for each value of a setting."
    sensitivity = Section("sensitivity", "Sensitivity", lead, [Panel(None, sensitivity_items(ablation))])
    lead = "One training is one draw. What counts is what stays when it is drawn again."
    return [sensitivity, Section("seeds", "Seeds", lead, [Panel(None, seed_items(ablation))])]


def _title(evaluations: Sequence[Evaluation], ablation: Mapping[str, Any] | None) -> str:
    if len(evaluations) == 1:
        return str((evaluations[0].summary["provenance"].get("adapter") or {}).get("name") or evaluations[0].name)
    if evaluations:
        return f"{len(evaluations)} evaluations"
    assert ablation is not None
    return f"Recipe {ablation.get('recipe', '')}, {_many(len(ablation['seeds']), 'seed')}"


def _many(number: int, what: str) -> str:
    return f"{count(number)} {what}{'' if number == 1 else 's'}"


def _facts(evaluations: Sequence[Evaluation], ablation: Mapping[str, Any] | None) -> list[str]:
    facts = []
    for evaluation in evaluations[:1] if len(evaluations) == 1 else ():
        summary = evaluation.summary
        origin = summary["provenance"]
        facts.append(f"backbone {(origin.get('backbone') or {}).get('name', 'unknown')}")
        facts.append(f"{_many(sum(summary['rows'].values()), 'step')}, {_many(summary['groups'], 'group')}")
        facts.append(f"evaluation seed {origin.get('seed')}")
        facts.append(f"layerroute {(origin.get('versions') or {}).get('layerroute', 'unknown')}")
    if ablation is not None:
        facts.append(f"trained with seed {in_runs(ablation['seeds'])}")
    return facts


def _comparison(evaluations: Sequence[Evaluation]) -> Table:
    rows = []
    for evaluation in evaluations:
        summary = evaluation.summary
        effects, flops = summary["differential"], summary["flops"]["all"]
        worst = max(
            (ratio for ratio in summary["perplexity_ratio"].values() if ratio.get("mean") is not None),
            key=lambda ratio: ratio["mean"],
            default=None,
        )
        rows.append(
            (
                evaluation.name,
                findings(summary)[0].status,
                cell(effects["paired"]),
                cell(effects["length_matched"]),
                *(points(summary["skip_rate"][kind]["mean"]) for kind in ("tool_call", "planning")),
                cell(worst, lambda value: number(value, 3)),
                share(flops.get("total_share")),
            )
        )
    head = ["evaluation", "by step type?", "paired differential", "at like length", "tool call skip", "planning skip"]
    head += ["worst perplexity ratio", "FLOPs executed"]
    return Table(f"Evaluations compared{SEPARATOR}points with 95% intervals", head, rows)
