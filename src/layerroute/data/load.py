"""From what a user names on the command line to steps and their digests.

A spec is a file in the row format (`.jsonl`, `.jsonl.gz`), `builtin` or `builtin:COUNT`, a hub dataset by name, or
`FORMAT:FILE` for raw logs. Contract: the same specs and seed give the same steps in the same order. Boundary: what a
source looks like is known to `steps`, `sources`, `hub` and `builtin`; this file only chooses among them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerroute.data.builtin import builtin_steps
from layerroute.data.hub import HUB, hub_steps
from layerroute.data.sources import CONVERTERS, DIRTY
from layerroute.data.steps import Step, digest, digest_steps, mark_open_turns, read_json_rows, read_steps
from layerroute.errors import DataError

__all__ = ["BUILTIN_COUNT", "Loaded", "load_steps"]

BUILTIN_COUNT = 600


@dataclass(frozen=True)
class Loaded:
    """Steps and where they came from."""

    steps: list[Step]
    digests: dict[str, str]
    """Spec to SHA-256: of the file's bytes, or of the rows where there is no file."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Spec to the number of raw rows that could not be converted (public datasets only)."""


def load_steps(specs: Sequence[str], seed: int = 0, limit_per_source: int | None = None) -> Loaded:
    """Load every spec, in order.

    Args:
        specs: what to load; see the module's docstring.
        seed: of the `builtin` generator, and of the choice that `limit_per_source` makes.
        limit_per_source: at most this many steps of a spec, chosen by whole groups (the last one may be parted); of a
            hub dataset the first ones, so that not all of it is downloaded.

    Raises:
        DataError: an unknown or repeated spec, a malformed file, a dataset out of reach, or nothing left to use.
    """
    if not specs:
        raise DataError(f"no data given; use {_known()}")
    steps: list[Step] = []
    digests: dict[str, str] = {}
    skipped: dict[str, int] = {}
    for spec in map(str, specs):
        if spec in digests:
            raise DataError(f"data {spec!r} is given twice")
        counter: Counter[str] = Counter()
        loaded, file = _load(spec, seed, limit_per_source, counter)
        if not loaded:
            raise DataError(f"data {spec!r} gives no step; rows left out: {dict(counter.most_common(3))}")
        digests[spec] = digest(file) if file else digest_steps(loaded)
        steps += _limited(mark_open_turns(loaded), limit_per_source, seed)
        if counter:
            skipped[spec] = counter.total()
    return Loaded(steps, digests, skipped)


def _load(spec: str, seed: int, limit: int | None, skipped: Counter[str]) -> tuple[list[Step], Path | None]:
    """The steps of one spec, and the file they stand in if there is one."""
    name, _, rest = spec.partition(":")
    if name == "builtin":
        return builtin_steps(_count(spec, rest), seed), None
    if spec in HUB:
        return _first(hub_steps(spec, skipped, streaming=limit is not None), limit), None
    if name in CONVERTERS and rest:
        return _converted(name, rest, skipped if name in DIRTY else None), Path(rest)
    if spec.endswith((".jsonl", ".jsonl.gz")) or Path(spec).is_file():
        return list(read_steps(spec)), Path(spec)
    raise DataError(f"unknown data {spec!r}; use {_known()}")


def _converted(form: str, path: str, skipped: Counter[str] | None) -> list[Step]:
    """The steps of a raw log; an error names file and line, for a converter takes rows one by one."""
    line = 0

    def rows() -> Iterator[Any]:
        nonlocal line
        for line, row in read_json_rows(path):  # noqa: B007
            yield row

    try:
        return list(CONVERTERS[form](rows(), source=form, skipped=skipped))
    except DataError as error:
        message = str(error)
        raise DataError(message if message.startswith(path) else f"{path}:{line}: {message}") from None


def _known() -> str:
    forms = "|".join(CONVERTERS)
    return f"a .jsonl or .jsonl.gz file of steps, builtin or builtin:COUNT, {', '.join(HUB)}, or {forms}:FILE"


def _count(spec: str, rest: str) -> int:
    if spec == "builtin":
        return BUILTIN_COUNT
    if not rest.isdecimal() or not int(rest):
        raise DataError(f"data {spec!r}: the count is a whole number above zero, such as builtin:{BUILTIN_COUNT}")
    return int(rest)


def _first(steps: Iterator[Step], limit: int | None) -> list[Step]:
    if limit is None:
        return list(steps)
    return [step for _, step in zip(range(limit), steps, strict=False)]


def _limited(steps: list[Step], limit: int | None, seed: int) -> list[Step]:
    if limit is None or len(steps) <= limit:
        return steps
    groups = sorted({step.group for step in steps})
    random.Random(seed).shuffle(groups)
    sizes, chosen, room = Counter(step.group for step in steps), {}, limit
    for group in groups:
        chosen[group] = min(room, sizes[group])
        room -= chosen[group]
    kept = []
    for step in steps:
        if chosen[step.group]:
            chosen[step.group] -= 1
            kept.append(step)
    return kept
