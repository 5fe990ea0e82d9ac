"""What it costs to leave out one block: the measured signal by which gates close, in place of a first-order one.

The straight-through gradient of a gate at full depth says how the loss changes when a block's output shrinks a little,
which tells little about leaving the block out; in short runs it closes the very block that is costliest to remove.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerroute.data.collate import StepCollator
from layerroute.data.render import Sample
from layerroute.data.steps import STEP_TYPES
from layerroute.model.routed import RoutedModel
from layerroute.training import objective

__all__ = ["choose_rows", "removal_costs"]


def choose_rows(samples: Sequence[Sample], rows: int, seed: int) -> dict[str, list[Sample]]:
    """Choose at most `rows` samples of each step type, at random."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: dict[str, list[Sample]] = {}
    for index in order:
        of_type = chosen.setdefault(samples[index].step_type, [])
        if len(of_type) < rows:
            of_type.append(samples[index])
    return chosen


@torch.no_grad()
def removal_costs(model: RoutedModel, rows: dict[str, list[Sample]], collator: StepCollator) -> Tensor:
    """Measure how much the loss of each step type rises when one block is left out and nothing is retrained.

    The blocks below the one left out see what they see at full depth, so one whole pass serves them all.

    Args:
        model: its LoRA on, its routers not asked.
        rows: samples by step type.
        collator: makes a batch of them.

    Returns:
        float32 `[K, blocks]`, nats per loss token, at least 0; 0 at blocks without a router and types without rows.
    """
    costs = torch.zeros(len(STEP_TYPES), model.routers.blocks)
    was_training = model.training
    model.eval()
    for name, samples in rows.items():
        batch = {key: value.to(model.device) for key, value in collator(samples).items()}
        whole = _Keep()
        full = _loss(model, batch, whole)
        for block in model.routable:
            costs[STEP_TYPES.index(name), block] = _loss(model, batch, _Without(block, whole.entering[block])) - full
    model.train(was_training)
    return costs.clamp(min=0).to(model.device)


def _loss(model: RoutedModel, batch: dict[str, Tensor], routing: Any) -> Tensor:
    positions, targets = objective.loss_tokens(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model.backbone(**inputs, logits_to_keep=positions, use_cache=False, routing=routing).logits
    wanted = targets != -100
    return (objective.cross_entropy_sum(logits[wanted], targets[wanted]) / wanted.sum()).cpu()


class _Keep:
    """A pass at full depth that keeps the hidden states as they enter each block."""

    def __init__(self) -> None:
        self.entering: list[Tensor] = []

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        self.entering.append(hidden)
        output: Tensor = block(hidden, **kwargs)
        return output


class _Without:
    """The pass above a block that is left out: it starts from what entered that block."""

    def __init__(self, removed: int, entering: Tensor) -> None:
        self.removed = removed
        self.entering = entering

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if index <= self.removed:
            return self.entering
        output: Tensor = block(hidden, **kwargs)
        return output
