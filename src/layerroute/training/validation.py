"""The validation split as inference sees it: blocks skipped, no noise, no dropout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layerroute.data.steps import STEP_TYPES
from layerroute.model.routed import RoutedModel
from layerroute.training import objective
from layerroute.training.loss import MODEL_INPUTS
from layerroute.training.meter import Means

__all__ = ["measure_batch"]


@torch.no_grad()
def measure_batch(model: RoutedModel, inputs: Mapping[str, Tensor], means: Means) -> None:
    """Add a batch's figures to `means`, over all rows and with the step type as suffix.

    `loss`: cross-entropy per loss token; `full_loss`: the same with every block running, so that the difference is the
    price of routing; `skip_rate`: share of blocks not executed under the route that ends the row, its target's;
    `first_segment_skip_rate`: of rows with several segments, the same under the route that starts the turn, by that
    segment's own type.

    Args:
        model: in evaluation mode.
        inputs: a batch of `StepCollator`.
        means: collects.
    """
    positions, targets = objective.loss_tokens(inputs["labels"])
    batch = {name: inputs[name] for name in MODEL_INPUTS}
    out = model(**batch, logits_to_keep=positions)
    full = out
    if not bool(out.routes.all()):
        with model.disable_routing():
            full = model(**batch, logits_to_keep=positions, use_cache=False)
    losses = {"loss": _row_losses(out.logits, targets), "full_loss": _row_losses(full.logits, targets)}
    tokens = (targets != -100).sum(1)
    skipped = (~out.routes).float().mean(-1)  # [B, segments]; segments that a row lacks repeat its last
    for suffix, rows in _members(inputs["step_types"]).items():
        for kind, loss in losses.items():
            means.add(kind + suffix, loss[rows].sum(), tokens[rows].sum())
        means.add("skip_rate" + suffix, skipped[rows, -1].sum(), rows.sum())
    segment_types = inputs["segment_types"]
    parted = (segment_types >= 0).sum(1) > 1
    for suffix, rows in _members(segment_types[:, 0]).items():
        means.add("first_segment_skip_rate" + suffix, skipped[rows & parted, 0].sum(), (rows & parted).sum())


def _members(step_types: Tensor) -> dict[str, Tensor]:
    """Which rows a suffix stands for, bool `[B]`: all of them for none, those of a step type for its name."""
    by_type = {f"_{name}": step_types == index for index, name in enumerate(STEP_TYPES)}
    return {"": torch.ones_like(step_types, dtype=torch.bool)} | by_type


def _row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy summed over each row's loss tokens, float32 `[B]`."""
    rows = zip(logits, targets, strict=True)
    return torch.stack([objective.cross_entropy_sum(row, wanted) for row, wanted in rows])
