"""Measured steps as columns: what the statistics need of samples.jsonl and baselines.jsonl, in compact arrays.

Rows are read once and not kept; texts and segments are left where they are. Never imports torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerroute.data.steps import STEP_TYPES
from layerroute.errors import DataError
from layerroute.evaluation.stats import MIN_GROUPS, Array

__all__ = ["ARMS", "ArmColumns", "Columns", "skip_rate"]

ARMS = ("base", "lora_only", "routed")
_NUMBERS = ("kind", "source", "group", "prompt_tokens", "target_tokens")
_KINDS = {name: code for code, name in enumerate(STEP_TYPES)}
_COMPARED = {name: _KINDS[name] for name in ("tool_call", "planning")}


def skip_rate(route: str) -> float:
    """Points of blocks that a route, as bits, does not execute."""
    return 100 * route.count("0") / len(route)


class _Codes(dict[Any, int]):
    """Numbers keys in the order in which they come."""

    def __missing__(self, key: Any) -> int:
        self[key] = code = len(self)
        return code


@dataclass(frozen=True)
class Columns:
    """The n rows of samples.jsonl."""

    ids: dict[str, int]
    """Row number of each id."""
    sources: list[str]
    kind: Array
    """int `[n]`: index in `STEP_TYPES`."""
    source: Array
    """int `[n]`: index in `sources`."""
    group: Array
    """int `[n]`: groups of the same name in two sources are two."""
    prompt_tokens: Array
    target_tokens: Array
    routes: Array
    """bool `[n, blocks]`, True where executed."""
    gate_probs: Array
    """float32 `[n, blocks]`."""
    nll: Array
    """float `[n, 3]`: nats over the target, by arm as in `ARMS`; NaN where there is none."""
    accuracy: Array
    """float `[n, 3]`: share of the target's tokens."""
    starts: Array
    """float `[n, 3]`: 1 where the target's first token is the model's first choice, else 0."""
    flops: Array
    """float `[n, 3, 2]`: prefill, decode."""
    stability: Array
    """float `[n, 2]`: points of flipped gates, and whether the route stayed; NaN where not measured."""

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Columns:
        """Read rows of samples.jsonl.

        Raises:
            DataError: no rows, or routes of different lengths.
        """
        ids: dict[str, int] = {}
        sources, groups = _Codes(), _Codes()
        codes, floats = array("q"), array("d")
        routes, probs = bytearray(), array("f")
        for number, row in enumerate(rows):
            ids[row["id"]] = number
            source, group = sources[row["source"]], groups[row["source"], row["group"]]
            codes.extend([_KINDS[row["step_type"]], source, group, row["prompt_tokens"], row["target_tokens"]])
            floats.extend(_number(row[field][arm]) for field in ("nll", "accuracy", "starts") for arm in ARMS)
            floats.extend(row["flops"][arm][part] for arm in ARMS for part in ("prefill", "decode"))
            stability = row["stability"] or {"flips": np.nan, "same_route": np.nan}
            floats.extend([stability["flips"], stability["same_route"]])
            routes.extend(row["route"].encode())
            probs.extend(map(_number, row["gate_probs"]))
            blocks = len(row["route"])
            if not len(probs) == len(routes) == (number + 1) * blocks:
                raise DataError(
                    f"sample {row['id']!r}: 'route' and 'gate_probs' of {blocks} blocks are unlike the rest"
                )
        if not codes:
            raise DataError("samples.jsonl holds no rows: no step was measured; give data whose steps fit max_length")
        n = len(codes) // 5
        numbers, figures = np.frombuffer(codes, dtype=np.int64).reshape(n, 5), np.frombuffer(floats).reshape(n, 17)
        return cls(
            ids=ids,
            sources=list(sources),
            **dict(zip(_NUMBERS, numbers.T, strict=True)),
            routes=np.frombuffer(routes, dtype=np.uint8).reshape(n, -1) == ord("1"),
            gate_probs=np.frombuffer(probs, dtype=np.float32).reshape(n, -1),
            nll=figures[:, :3],
            accuracy=figures[:, 3:6],
            starts=figures[:, 6:9],
            flops=figures[:, 9:15].reshape(n, 3, 2),
            stability=figures[:, 15:],
        )

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def skip_rate(self) -> Array:
        """float `[n]`: points of blocks that the routes do not execute."""
        return 100 * (~self.routes).sum(1) / self.routes.shape[1]

    @property
    def tool_call(self) -> Array:
        """bool `[n]`."""
        return self.kind == _COMPARED["tool_call"]

    @property
    def compared(self) -> Array:
        """bool `[n]`: rows of the two step types that a differential compares."""
        return np.isin(self.kind, list(_COMPARED.values()))

    @property
    def mixed(self) -> Array:
        """bool `[n]`: rows of groups that hold both of the compared step types."""
        groups = self.group
        tool_call = np.unique(groups[self.compared & self.tool_call])
        planning = np.unique(groups[self.compared & ~self.tool_call])
        return np.isin(groups, np.intersect1d(tool_call, planning))

    @property
    def has_loss(self) -> Array:
        """bool `[n]`: rows whose loss is a number under every arm."""
        return ~np.isnan(self.nll.sum(1))

    def selections(self) -> dict[str, Array]:
        """bool `[n]` for each step type, and for `all`."""
        return {**{name: self.kind == code for name, code in _KINDS.items()}, "all": np.full(len(self), True)}

    def group_count(self, rows: Array) -> int:
        """Number of groups of the rows that a bool `[n]` selects."""
        return len(np.unique(self.group[rows]))

    def incomparable(self, rows: Array) -> str | None:
        """Why these rows (bool `[n]`) give no figure that compares the two step types, or None if they do."""
        missing = [name for name, code in _COMPARED.items() if not (self.kind[rows] == code).any()]
        return f"no {' and no '.join(missing)} rows" if missing else None

    def too_few(self, rows: Array) -> str | None:
        """Why a comparison of these rows (bool `[n]`) gets neither interval nor p-value, or None if it does.

        Each of the two step types needs `MIN_GROUPS` groups: of fewer, a resample shows too little of their spread.
        """
        counts = {name: self.group_count(rows & (self.kind == code)) for name, code in _COMPARED.items()}
        short = [
            f"{name} rows of {count} group{'s' if count > 1 else ''}"
            for name, count in counts.items()
            if count < MIN_GROUPS
        ]
        return f"{' and '.join(short)}; intervals and p-values need {MIN_GROUPS}" if short else None


@dataclass(frozen=True)
class ArmColumns:
    """One arm on some of the samples."""

    rows: Array
    """int `[m]`: which samples."""
    skip_rate: Array
    """float `[m]`, points."""
    nll: Array
    accuracy: Array
    flops: Array
    """float `[m]`: prefill and decode."""

    @classmethod
    def measured(cls, columns: Columns, rows: Array) -> dict[str, ArmColumns]:
        """The arms that every sample holds, on these rows (int `[m]`)."""
        nll = np.where(columns.has_loss[:, None], columns.nll, np.nan)
        rates = {"routed": columns.skip_rate[rows]}
        closed = np.zeros(len(rows))
        return {
            arm: cls(
                rows, rates.get(arm, closed), nll[rows, i], columns.accuracy[rows, i], columns.flops[rows, i].sum(1)
            )
            for i, arm in enumerate(ARMS)
        }

    @classmethod
    def of(cls, columns: Columns, rows: Iterable[Mapping[str, Any]]) -> dict[str, ArmColumns]:
        """Read rows of baselines.jsonl.

        Raises:
            DataError: a row whose id no sample has.
        """
        figures: dict[str, array[float]] = {}
        for row in rows:
            if row["id"] not in columns.ids:
                raise DataError(
                    f"baselines.jsonl: no sample has the id {row['id']!r}; remove the file and evaluate again"
                )
            for name, arm in row["arms"].items():
                flops = arm["flops"]["prefill"] + arm["flops"]["decode"]
                figures.setdefault(name, array("d")).extend(
                    [
                        columns.ids[row["id"]],
                        skip_rate(arm["route"]),
                        _number(arm["nll"]),
                        _number(arm["accuracy"]),
                        flops,
                    ]
                )
        return {name: cls._from(np.frombuffer(floats).reshape(-1, 5)) for name, floats in figures.items()}

    @classmethod
    def _from(cls, table: Array) -> ArmColumns:
        numbers, *figures = table.T
        return cls(numbers.astype(int), *figures)


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
