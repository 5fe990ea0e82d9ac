"""Measures an adapter's dial: gate probabilities on held-out steps, the table read off one half, checked on the other.

One pass over the blocks below the decision gives every threshold at once. Boundary: writes nothing; the table and its
place on disk are `model/calibration.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerroute.data.boundaries import boundary_tokens
from layerroute.data.collate import StepCollator, StepDataset, padding_id
from layerroute.data.load import Loaded
from layerroute.data.steps import STEP_TYPES, split_by_group
from layerroute.errors import ConfigError, DataError
from layerroute.model.calibration import Calibration, by_type, calibrate, skip_rate
from layerroute.model.routed import RoutedModel

__all__ = ["Check", "Report", "measure_gates", "run"]

_CHECKED = (0.1, 0.2, 0.3)
_BATCH_SIZE = 8
_TOLERANCE = 0.03

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """What a skip budget gave on steps that the table was not made from."""

    skip_budget: float | dict[str, float]
    threshold: float
    skip_rate: dict[str, float]
    """Share of blocks not executed, over `all` rows and over each step type's."""

    @property
    def met(self) -> bool:
        """Whether the rows that the budget speaks of skip what it asks for, within 3 points."""
        budget = self.skip_budget
        ((name, share),) = budget.items() if isinstance(budget, dict) else [("all", budget)]
        return abs(self.skip_rate[name] - share) <= _TOLERANCE

    def line(self, names: list[str]) -> str:
        """A row of the printed table, with a column for each of `names`."""
        budget = self.skip_budget
        asked = "".join(f"{k}={v}" for k, v in budget.items()) if isinstance(budget, dict) else str(budget)
        line = f"{asked:<16}{self.threshold:9.4f}" + "".join(f"{self.skip_rate[name]:>11.1%}" for name in names)
        return line if self.met else f"{line}  missed by more than {_TOLERANCE:.0%}"


@dataclass(frozen=True)
class Report:
    """A calibration, and what it is worth on the other half of the steps."""

    calibration: Calibration
    checked_rows: dict[str, int]
    dropped: int
    """Steps left out because target and tools alone do not fit."""
    checks: list[Check]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "largest_skip_budget": self.calibration.budgets[-1],
            "rows": self.calibration.rows,
            "checked_rows": self.checked_rows,
            "dropped": self.dropped,
            "checks": [{**vars(check), "met": check.met} for check in self.checks],
        }

    def table(self) -> str:
        """A few lines to print."""
        names = list(self.checked_rows)
        head = f"{'skip budget':<16}threshold" + "".join(f"{name:>11}" for name in names)
        counts = f"measured on {_counts(self.calibration.rows)}; checked on {_counts(self.checked_rows)}"
        counts += f"; {self.dropped} do not fit" if self.dropped else ""
        return "\n".join([counts, head, *(check.line(names) for check in self.checks)])


def _counts(rows: Mapping[str, int]) -> str:
    kinds = ", ".join(f"{count} {name}" for name, count in rows.items() if name != "all")
    return f"{rows['all']} steps ({kinds})"


@torch.no_grad()
def measure_gates(
    model: RoutedModel, dataset: StepDataset, collator: StepCollator, batch_size: int
) -> tuple[Tensor, list[str]]:
    """Measure the gate probabilities that govern each step's target.

    Args:
        model: in evaluation mode, with routers that decide early.
        dataset: tokenised steps.
        collator: makes batches of them.
        batch_size: rows per pass; rows are taken by length, to pad less.

    Returns:
        float32 `[n, routable]` on the CPU, and the step types, row by row in the same order.
    """
    samples = sorted(dataset.samples, key=lambda sample: len(sample.input_ids))
    parts = []
    for start in range(0, len(samples), batch_size):
        batch = {name: part.to(model.device) for name, part in collator(samples[start : start + batch_size]).items()}
        segment_ids = batch.get("segment_ids")
        probs = model.gate_probs(batch["input_ids"], batch["attention_mask"], batch["context_mask"], segment_ids)
        parts.append(_effective(probs, segment_ids)[:, model.routable].cpu())
    return torch.cat(parts), [sample.step_type for sample in samples]


def _effective(probs: Tensor, segment_ids: Tensor | None) -> Tensor:
    """`[batch, blocks]`: a block that an earlier segment closed stays closed, so the lowest probability decides."""
    if segment_ids is None:
        return probs
    last = segment_ids.amax(1, keepdim=True)
    absent = torch.arange(probs.shape[1], device=probs.device) > last
    return probs.masked_fill(absent.unsqueeze(-1), 1.0).amin(1)


def run(
    model: RoutedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: Loaded,
    *,
    routers: str,
    max_length: int,
    seed: int = 0,
) -> Report:
    """Calibrate a model on half of the steps' groups, and check what it reaches on the other half.

    Args:
        model: in evaluation mode.
        tokenizer: the backbone's.
        loaded: steps that the adapter was not trained on, as far as possible, and their digests.
        routers: SHA-256 of the routers' file in the adapter folder.
        max_length: tokens per step; older messages are cut to fit.
        seed: of the split.

    Raises:
        ConfigError: routers that sit at each block, or a length beyond the backbone's context.
        DataError: the steps cannot be halved or rendered, or none of a half fits.
    """
    _check(model, max_length)
    halves = split_by_group(loaded.steps, 0.5, seed)
    if not all(halves):
        raise DataError(
            f"all {len(loaded.steps)} steps are of one group; calibration measures on half of the groups and checks on "
            "the other, so give steps of two or more"
        )
    boundaries = boundary_tokens(tokenizer, model.router_config.boundaries)
    collator = StepCollator(padding_id(tokenizer))
    datasets = [StepDataset.from_steps(tokenizer, half, max_length, boundaries=boundaries) for half in halves]
    _LOG.info("measuring the gates of %d steps", sum(map(len, datasets)))
    measured, checked = (measure_gates(model, dataset, collator, _BATCH_SIZE) for dataset in datasets)
    blocks = model.routers.blocks
    calibration = calibrate(*measured, blocks, routers=routers, data=loaded.digests)
    held = by_type(*checked)
    return Report(
        calibration=calibration,
        checked_rows={name: len(probs) for name, probs in held.items()},
        dropped=sum(dataset.dropped for dataset in datasets),
        checks=_checks(calibration, held, blocks),
    )


def _check(model: RoutedModel, max_length: int) -> None:
    if model.router_config.position == "block":
        raise ConfigError(
            "position='block' cannot be calibrated: the gates of upper blocks depend on which lower ones ran, so one "
            "pass does not tell what another threshold gives; train with position='early'"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise ConfigError(f"max_length={max_length}: this backbone reads at most {context} tokens")


def _checks(calibration: Calibration, held: Mapping[str, Tensor], blocks: int) -> list[Check]:
    shares = [share for share in _CHECKED if share <= calibration.budgets[-1]]
    kinds = [name for name in STEP_TYPES if name in held and name in calibration.thresholds]
    budgets: list[float | dict[str, float]] = [*shares, *({kind: share} for kind in kinds for share in shares)]
    checks = []
    for budget in budgets:
        threshold = calibration.threshold(budget)
        rates = {name: skip_rate(probs, threshold, blocks) for name, probs in held.items()}
        checks.append(Check(skip_budget=budget, threshold=threshold, skip_rate=rates))
    return checks
