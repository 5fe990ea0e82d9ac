"""The dial: which threshold over all routers gives which average skip rate.

A gate is open where its probability exceeds a threshold, so one threshold moves the skip rate of a trained adapter from
none to all that its routers may close. A `Calibration` is the measured table of the two, `calibration.json` in the
adapter folder. Boundary: knows probabilities, not models; `runtime/calibrate.py` measures them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from layerroute.config import Settings, nearest
from layerroute.data.steps import STEP_TYPES, digest
from layerroute.errors import AdapterError, ConfigError

__all__ = [
    "CALIBRATION_FILE",
    "Calibration",
    "by_type",
    "calibrate",
    "read_calibration",
    "routers_digest",
    "skip_rate",
    "write_calibration",
]

CALIBRATION_FILE = "calibration.json"
_ROUTER_FILE = "router_model.safetensors"

_ALL_OPEN = -1.0
"""Below every probability, one that underflowed to 0 too."""
_ALL_CLOSED = 1.0
"""No probability exceeds it."""


class Calibration(Settings):
    """Thresholds by average skip rate, measured on held-out steps."""

    routers: str
    """SHA-256 of the `router_model.safetensors` that was measured; the table fits no other."""

    budgets: tuple[float, ...]
    """Skip rates 0, 0.01, ... up to the largest that the routers can reach, which is the last one."""

    thresholds: dict[str, tuple[float, ...]]
    """The threshold of each budget: averaged over `all` rows, and over the rows of each step type that has some."""

    rows: dict[str, int]
    """How many rows each curve was measured on."""

    data: dict[str, str]
    """Data source to SHA-256."""

    @model_validator(mode="after")
    def _consistent(self) -> Calibration:
        curves = self.thresholds
        if "all" not in curves or curves.keys() != self.rows.keys() or not curves.keys() <= {"all", *STEP_TYPES}:
            raise ValueError("thresholds and rows are for 'all' and for step types")
        for values in (self.budgets, *curves.values()):
            ascends = all(low <= high for low, high in itertools.pairwise(values))
            if len(values) != len(self.budgets) or len(values) < 2 or not ascends:
                raise ValueError("budgets and thresholds are ascending lists of one length")
        return self

    def to_json(self) -> str:
        """The text of `calibration.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    def threshold(self, skip_budget: float | Mapping[str, float]) -> float:
        """Return the threshold that skips this share of all blocks on average.

        Args:
            skip_budget: a number, averaged over steps of every type as they were measured; or `{step type: share}` with
                one step type, averaged over steps of that type.

        Raises:
            ConfigError: not a share, more than the routers can reach, or a step type that was not measured.
        """
        curve, share = self._curve(skip_budget) if isinstance(skip_budget, Mapping) else ("all", skip_budget)
        largest = self.budgets[-1]
        said = math.floor(largest * 10_000) / 10_000  # rounded up it would be refused in its turn
        if isinstance(share, bool) or not isinstance(share, int | float | np.number) or not 0 <= share <= 1:
            raise ConfigError(
                f"skip_budget={skip_budget!r}: expected a share of all blocks from 0 to {said}, or one step type's, "
                "such as {'tool_call': 0.2}"
            )
        if share > largest:
            raise ConfigError(
                f"skip_budget={skip_budget!r}: the blocks that this adapter can close are at most {said} of all"
            )
        return float(np.interp(share, self.budgets, self.thresholds[curve]))

    def _curve(self, skip_budget: Mapping[str, float]) -> tuple[str, Any]:
        if len(skip_budget) != 1:
            raise ConfigError(
                f"skip_budget={dict(skip_budget)!r}: one threshold serves one step type; give one, such as "
                "{'tool_call': 0.2}, or a number for all"
            )
        ((name, share),) = skip_budget.items()
        measured = [kind for kind in STEP_TYPES if kind in self.thresholds]
        if name not in STEP_TYPES:
            hint = nearest(str(name), list(STEP_TYPES))
            raise ConfigError(f"skip_budget: unknown step type {name!r}{hint}; measured: {', '.join(measured)}")
        if name not in measured:
            raise ConfigError(
                f"skip_budget: the adapter was calibrated without a {name} step; measured: {', '.join(measured)}; run "
                "`layerroute calibrate` on data that holds some"
            )
        return name, share


def calibrate(
    probs: Tensor, step_types: Sequence[str], blocks: int, *, routers: str, data: Mapping[str, str]
) -> Calibration:
    """Read the table off measured gates.

    Args:
        probs: float32 `[n, routable]`, the gate probabilities of n > 0 steps.
        step_types: each step's type.
        blocks: how many blocks the backbone has, those without a router included.
        routers: SHA-256 of the routers' file.
        data: source to SHA-256, to be recorded.
    """
    # a gate of probability 1 closes at no threshold: it is a block that training never left out
    most = float((probs < 1).sum()) / (len(probs) * blocks)
    budgets = (*(percent / 100 for percent in range(max(1, math.ceil(100 * most - 1e-9)))), most)
    curves = by_type(probs, step_types)
    return Calibration(
        routers=routers,
        budgets=budgets,
        thresholds={name: _thresholds(rows, blocks, budgets) for name, rows in curves.items()},
        rows={name: len(rows) for name, rows in curves.items()},
        data=dict(data),
    )


def by_type(probs: Tensor, step_types: Sequence[str]) -> dict[str, Tensor]:
    """Rows `[n, routable]` as they are (`all`), and those of each step type that has some."""
    present = [name for name in STEP_TYPES if name in step_types]
    return {"all": probs} | {name: probs[torch.tensor([kind == name for kind in step_types])] for name in present}


def _thresholds(probs: Tensor, blocks: int, budgets: Sequence[float]) -> tuple[float, ...]:
    """For each budget the threshold whose skip rate on `probs` comes nearest; equal probabilities close together."""
    values, counts = torch.unique(probs.float().cpu(), return_counts=True)
    middles = (values[:-1] + values[1:]) / 2
    # between neighbouring floats there is nothing in the middle
    middles = torch.where(middles < values[1:], middles, values[:-1])
    edges = np.array([_ALL_OPEN, *middles.tolist(), _ALL_CLOSED])
    if values[-1] == 1:
        edges, counts = edges[:-1], counts[:-1]
    rates = np.concatenate([[0], np.cumsum(counts.numpy())]) / (len(probs) * blocks)
    chosen = np.searchsorted((rates[:-1] + rates[1:]) / 2, budgets)
    return tuple(edges[chosen].tolist())


def skip_rate(probs: Tensor, threshold: float, blocks: int) -> float:
    """Share of all `blocks` that gates with probabilities `[n, routable]` close at `threshold`, averaged over rows."""
    return float((probs <= threshold).sum()) / (len(probs) * blocks)


def routers_digest(folder: Path) -> str:
    """SHA-256 of the routers in an adapter folder, in hex."""
    return digest(folder / _ROUTER_FILE)


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration in an adapter folder, or None where there is none.

    Raises:
        AdapterError: the file cannot be read, or was measured on other routers than the folder's.
    """
    path = folder / CALIBRATION_FILE
    try:
        if not path.exists():
            return None
        calibration = Calibration(**json.loads(path.read_text(encoding="utf-8")))
        found = routers_digest(folder)
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(f"{path} cannot be read: {error}; run `layerroute calibrate` again") from None
    if found != calibration.routers:
        raise AdapterError(f"{path} belongs to other routers than those beside it; run `layerroute calibrate` again")
    return calibration


def write_calibration(folder: Path, calibration: Calibration) -> Path:
    """Write `calibration.json` beside its place in `folder`, rename it into it, and return its path.

    Raises:
        AdapterError: the folder cannot be written; what stood there stays.
    """
    path = folder / CALIBRATION_FILE
    staged = folder / f".{CALIBRATION_FILE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staged.open("w", encoding="utf-8") as file:
            file.write(calibration.to_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except OSError as error:
        raise AdapterError(f"could not write {path}: {error}; name a folder that can be written") from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()
    return path
