"""Reads what evaluations and ablations left on disk. Samples are streamed: only a handful is kept, as examples."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerroute.errors import DataError
from layerroute.evaluation.samples import read_rows

__all__ = ["Evaluation", "Evidence", "load", "pick_examples"]

FORMAT_VERSION = 1

_EVALUATE = "layerroute evaluate --adapter ADAPTER --data DATA --output {folder}"
_ABLATE = "layerroute ablate --model MODEL --data DATA --eval-data HELD_OUT --output {folder}"
_SUMMARY_KEYS = (
    *("rows", "groups", "skip_rate", "differential", "perplexity", "perplexity_ratio", "token_accuracy"),
    *("start_accuracy", "flops"),
    *("routes", "per_block", "dependence", "provenance"),
    *(f"differential.{name}" for name in ("paired", "paired_length_matched", "by_source", "pooled", "length_matched")),
    *(f"perplexity.{arm}" for arm in ("base", "lora_only", "routed")),
    *(f"dependence.{name}" for name in ("distribution", "flip_rate", "mutual_information", "auc", "gate_movement")),
    *(f"provenance.{name}" for name in ("adapter", "backbone", "data", "versions", "seed", "command", "training")),
)
_ABLATION_KEYS = ("arms", "metrics", "seeds")
_SAMPLE_KEYS = ("id", "step_type", "route", "skip_rate")


@dataclass(frozen=True)
class Evaluation:
    """One adapter, measured on one set of steps."""

    name: str
    """The folder's, with as many of its parents as tell it from the others."""
    summary: dict[str, Any]
    examples: list[dict[str, Any]]
    """Rows of samples.jsonl, each with its `role`."""


@dataclass(frozen=True)
class Evidence:
    """All that one report is made from."""

    evaluations: list[Evaluation] = field(default_factory=list)
    ablation: dict[str, Any] | None = None


def load(folders: Sequence[str | Path], seed: int = 0) -> Evidence:
    """Read evaluations and at most one ablation; `seed` chooses between examples that are equally typical.

    Raises:
        DataError: a folder holds neither, a file is missing or damaged, or its format is not known.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not (path / "summary.json").is_file() and not (path / "ablation.json").is_file():
            raise DataError(_neither(path))
    ablations = [path for path in paths if (path / "ablation.json").is_file()]
    if len(ablations) > 1:
        named = " and ".join(map(str, ablations))
        raise DataError(f"{named} are both ablations; a report shows one, so give one of them")
    evaluations = [path for path in paths if (path / "summary.json").is_file()]
    return Evidence(
        [_evaluation(path, name, seed) for path, name in zip(evaluations, _names(evaluations), strict=True)],
        _document(ablations[0] / "ablation.json", _ABLATION_KEYS, _ABLATE) if ablations else None,
    )


def _neither(path: Path) -> str:
    if not path.is_dir():
        what = "is a file; give the folder that holds it" if path.exists() else "there is no such folder"
        return f"{path}: {what}"
    if (path / "samples.jsonl").is_file():
        return (
            f"{path}: holds samples.jsonl but no summary.json; the evaluation did not end, so run it again: it resumes"
        )
    makers = f"`{_EVALUATE.format(folder=path)}` or `{_ABLATE.format(folder=path)}`"
    return f"{path}: holds neither summary.json nor ablation.json; {makers} would write one"


def _evaluation(folder: Path, name: str, seed: int) -> Evaluation:
    summary = _document(folder / "summary.json", _SUMMARY_KEYS, _EVALUATE)
    means = {kind: figures.get("mean") for kind, figures in summary["skip_rate"].items()}
    return Evaluation(name, summary, pick_examples(_samples(folder / "samples.jsonl"), means, seed))


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other; numbered where the same folder is given twice."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder.name} ({i})" for i, folder in enumerate(folders, 1)]


def _document(path: Path, required: Sequence[str], maker: str) -> dict[str, Any]:
    remedy = f"write it again with `{maker.format(folder=path.parent)}`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON, probably cut off or edited ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold one JSON object; {remedy}")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version {version!r} is not known here, only {FORMAT_VERSION}; {remedy}")
    if missing := [key for key in required if not _holds(content, key)]:
        raise DataError(f"{path}: {', '.join(missing)} missing; {remedy}")
    return content


def _holds(content: dict[str, Any], path: str) -> bool:
    """Whether the keys of a dotted path lead somewhere."""
    inner: Any = content
    for key in path.split("."):
        if not isinstance(inner, dict) or key not in inner:
            return False
        inner = inner[key]
    return True


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a samples.jsonl, one at a time."""
    remedy = f"`{_EVALUATE.format(folder=path.parent)}` writes it"
    if not path.is_file():
        raise DataError(f"{path}: missing; {remedy}")
    for number, row in enumerate(read_rows(path), 1):
        if missing := [key for key in _SAMPLE_KEYS if key not in row]:
            raise DataError(f"{path}:{number}: {', '.join(missing)} missing; {remedy}")
        yield row


def pick_examples(
    rows: Iterable[Mapping[str, Any]], means: Mapping[str, float | None], seed: int
) -> list[dict[str, Any]]:
    """Per step type the step nearest to the type's mean skip rate, and those that skip the most and the least.

    Those that skip no more (or less) than the typical one are left out. Ties are broken by seeded draws, so that they
    do not always fall to the first row.
    """
    draw = random.Random(seed)
    best: dict[tuple[str, str], tuple[tuple[float, float], Mapping[str, Any]]] = {}
    for row in rows:
        tie, kind, skipped = draw.random(), row["step_type"], row["skip_rate"]
        mean = means.get(kind)
        distances = {"typical": abs(skipped - (mean or 0.0)), "skips most": -skipped, "skips least": skipped}
        for role, distance in distances.items():
            if (kind, role) not in best or (distance, tie) < best[kind, role][0]:
                best[kind, role] = (distance, tie), row
    picked = []
    for (kind, role), (_, row) in sorted(best.items(), key=lambda item: _order(item[0])):
        if role == "typical" or row["skip_rate"] != best[kind, "typical"][1]["skip_rate"]:
            picked.append({**row, "role": role})
    return picked


def _order(key: tuple[str, str]) -> tuple[int, int]:
    kind, role = key
    kinds, roles = ("tool_call", "planning", "answer"), ("typical", "skips most", "skips least")
    return kinds.index(kind) if kind in kinds else len(kinds), roles.index(role)
