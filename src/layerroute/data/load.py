"""From what a user names on the command line to steps and their digests.

A spec is a file in the row format (`.jsonl`, `.jsonl.gz`), `builtin` or `builtin:COUNT`, a hub dataset by name, or
`FORMAT:FILE` for raw logs. Contract: the same specs and seed give the same steps in the same order. Boundary: what a
source looks like is known to `steps`, `sources`, `hub` and `builtin`; this file only chooses among them.
A file of steps is read twice, and never held: once to look it over, and then row by row.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerroute.data.builtin import builtin_steps
from layerroute.data.hub import HUB, hub_steps
from layerroute.data.sources import CONVERTERS, DIRTY
from layerroute.data.steps import Step, digest, digest_steps, mark_open_turn, open_turns, read_json_rows, read_steps
from layerroute.errors import DataError

__all__ = ["BUILTIN_COUNT", "Loaded", "StepStream", "load_steps", "open_steps"]

BUILTIN_COUNT = 600


@dataclass(frozen=True)
class Loaded:
    """Steps and where they came from."""

    steps: list[Step]
    digests: dict[str, str]
    """Spec to SHA-256: of the file's bytes, or of the rows where there is no file."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Spec to the number of raw rows that could not be converted (public datasets only)."""


@dataclass(frozen=True)
class StepStream:
    """Steps that can be iterated over, again and again, and where they come from."""

    digests: dict[str, str]
    """As `Loaded.digests`."""
    skipped: dict[str, int]
    """As `Loaded.skipped`."""
    count: int
    """How many steps an iteration gives."""
    _sources: Sequence[tuple[Callable[[], Iterable[Step]], set[bytes], dict[str, int] | None]]
    """Per spec: its steps, its open turns, and how many steps of each group are taken, where not all are."""

    def __iter__(self) -> Iterator[Step]:
        for steps, opened, room in self._sources:
            left = None if room is None else dict(room)
            for step in steps():
                if left is not None:
                    if not left[step.group]:
                        continue
                    left[step.group] -= 1
                yield mark_open_turn(step, opened)


def load_steps(specs: Sequence[str], seed: int = 0, limit_per_source: int | None = None) -> Loaded:
    """Load every spec, in order; see `open_steps`."""
    stream = open_steps(specs, seed, limit_per_source)
    return Loaded(list(stream), stream.digests, stream.skipped)


def open_steps(specs: Sequence[str], seed: int = 0, limit_per_source: int | None = None) -> StepStream:
    """Look every spec over, so that its steps can be read one by one, in order.

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
    sources = []
    digests: dict[str, str] = {}
    skipped: dict[str, int] = {}
    count = 0
    for spec in map(str, specs):
        if spec in digests:
            raise DataError(f"data {spec!r} is given twice")
        counter: Counter[str] = Counter()
        steps, file = _source(spec, seed, limit_per_source, counter)
        sizes: Counter[str] = Counter()
        opened = open_turns(_counted(steps(), sizes))
        if not sizes:
            raise DataError(f"data {spec!r} gives no step; rows left out: {dict(counter.most_common(3))}")
        room = _room(sizes, limit_per_source, seed)
        sources.append((steps, opened, room))
        count += sum((sizes if room is None else room).values())
        digests[spec] = digest(file) if file else digest_steps(steps())
        if counter:
            skipped[spec] = counter.total()
    return StepStream(digests, skipped, count, sources)


def _counted(steps: Iterable[Step], sizes: Counter[str]) -> Iterator[Step]:
    for step in steps:
        sizes[step.group] += 1
        yield step


def _source(
    spec: str, seed: int, limit: int | None, skipped: Counter[str]
) -> tuple[Callable[[], Iterable[Step]], Path | None]:
    """What gives the steps of one spec, and the file they stand in if there is one."""
    name, _, rest = spec.partition(":")
    file: Path | None = None
    if name == "builtin":
        held = builtin_steps(_count(spec, rest), seed)
    elif spec in HUB:
        held = _first(hub_steps(spec, skipped, streaming=limit is not None), limit)
    elif name in CONVERTERS and rest:
        held, file = _converted(name, rest, skipped if name in DIRTY else None), Path(rest)
    elif Path(spec).is_file() or (spec.endswith((".jsonl", ".jsonl.gz")) and not rest):
        return lambda: read_steps(spec), Path(spec)
    else:
        raise DataError(f"unknown data {spec!r}; use {_known()}")
    return lambda: held, file


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


def _room(sizes: Counter[str], limit: int | None, seed: int) -> dict[str, int] | None:
    """How many steps of each group a limit leaves, groups drawn at random; None where it leaves all."""
    if limit is None or sizes.total() <= limit:
        return None
    groups = sorted(sizes)
    random.Random(seed).shuffle(groups)
    room = {}
    left = limit
    for group in groups:
        room[group] = min(left, sizes[group])
        left -= room[group]
    return room
