"""Single steps with their routes, and where every figure comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from layerroute.report.content import Example, Item, Table
from layerroute.report.load import Evaluation
from layerroute.report.wording import count, in_runs, points

__all__ = ["ablation_origin", "example_items", "origin_items"]


def example_items(evaluation: Evaluation) -> list[Item]:
    """Per step type the typical step, and those that skip most and least."""
    return [_example(row) for row in evaluation.examples]


def _example(row: Mapping[str, Any]) -> Example:
    text, tokens = row.get("text") or {}, row.get("prompt_tokens")
    facts = f"skips {points(row['skip_rate'])}% of the blocks"
    facts += f"; {count(tokens)} prompt tokens" if tokens else ""
    segments = row.get("segments") or []
    facts += f"; its last route, of {len(segments)} in this step" if len(segments) > 1 else ""
    facts += f"; source {row['source']}" if row.get("source") else ""
    return Example(
        role=row["role"],
        step_type=row["step_type"],
        id=str(row["id"]),
        route=row["route"],
        facts=facts,
        prompt_end=text.get("prompt_end") or "",
        target=text.get("target") or "",
    )


def origin_items(evaluation: Evaluation) -> list[Item]:
    """Adapter, backbone, data, versions, machine, seed and command, with digests in full."""
    return [
        Table("Where the figures come from", ("what", "value"), list(_flat(evaluation.summary["provenance"])), True)
    ]


def ablation_origin(ablation: Mapping[str, Any] | None) -> list[Item]:
    """The same of an ablation."""
    known = (ablation or {}).get("provenance")
    return (
        [Table("Where the ablation's figures come from", ("what", "value"), list(_flat(known)), True)] if known else []
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = prefix + (key if "." in key else key.replace("_", " "))  # a file's name stays as it is
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}, ")
        elif value not in (None, {}, [], ""):
            yield name, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        if all(isinstance(part, int) for part in value):
            return in_runs(value)
        runs = [(part, len(list(run))) for part, run in groupby(value)]
        return ", ".join(_plain(part) + (f" ({length} times)" if length > 1 else "") for part, length in runs)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return count(value)
    return value if isinstance(value, str) else json.dumps(value)
