"""The `quality` section of summary.json: how often each arm's free-running generations are right.

Shares come with Wilson intervals; arms are compared by McNemar's exact test on the steps that both hold. Both take
steps for independent, which those of one conversation are not. Never imports torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from layerroute.evaluation.counts import mcnemar, wilson
from layerroute.evaluation.stats import MIN_GROUPS

__all__ = ["quality"]

_ARMS = ("base", "lora_only", "routed", "static")


class _Result(NamedTuple):
    group: tuple[str, str]
    correct: bool
    valid_json: bool | None
    schema_valid: bool | None
    last_number: bool | None
    unfinished: bool
    skip_rate: float


_Arm = dict[str, _Result]
"""By id."""


def quality(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Make the section out of rows of generations.jsonl; None without rows.

    Shares (accuracy, valid_json, schema_valid, last_number, unfinished) are of 1, each over the rows that have it; null
    where none does.
    """
    tasks: dict[str, dict[str, _Arm]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        tasks[row["task"]][row["arm"]][row["id"]] = _Result(
            group=(row["source"], row["group"]),
            correct=row["correct"],
            valid_json=row["valid_json"],
            schema_valid=row["schema_valid"],
            last_number=row.get("last_number"),  # folders made before there was one go on
            unfinished=not row["finished"],
            skip_rate=row["skip_rate"],
        )
    return {task: _task(arms) for task, arms in sorted(tasks.items())} or None


def _task(arms: Mapping[str, _Arm]) -> dict[str, Any]:
    others = [name for name in _ARMS if name in arms and name != "routed" and "routed" in arms]
    return {
        "n": len(set().union(*arms.values())),
        "arms": {name: _figures(arms[name]) for name in _ARMS if name in arms},
        "tests": {f"routed_vs_{name}": _test(arms["routed"], arms[name]) for name in others},
    }


def _figures(arm: _Arm) -> dict[str, Any]:
    results = list(arm.values())
    n, right = len(results), sum(result.correct for result in results)
    groups = len({result.group for result in results})
    figures = {"accuracy": right / n, "ci95": wilson(right, n) if groups >= MIN_GROUPS else None, "n": n}
    for name in ("valid_json", "schema_valid", "last_number", "unfinished", "skip_rate"):
        known = [value for result in results if (value := getattr(result, name)) is not None]
        figures[name] = sum(known) / len(known) if known else None
    return figures


def _test(first: _Arm, second: _Arm) -> dict[str, Any]:
    both = first.keys() & second.keys()
    only_first = sum(first[id_].correct and not second[id_].correct for id_ in both)
    only_second = sum(second[id_].correct and not first[id_].correct for id_ in both)
    counts = {"only_first": only_first, "only_second": only_second, "n": len(both)}
    groups = len({first[id_].group for id_ in both})
    if groups < MIN_GROUPS:
        return {"p_value": None, **counts, "reason": f"{groups} groups; p-values need {MIN_GROUPS}"}
    return {"p_value": mcnemar(only_first, only_second), **counts}
