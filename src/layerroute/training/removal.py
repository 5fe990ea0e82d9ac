"""What it costs to leave blocks out, measured: singly, and one after the other in the order that costs least.

The straight-through gradient of a gate at full depth says how the loss changes when a block's output shrinks a little,
which tells little about leaving the block out; in short runs it closes the very block that is costliest to remove.
Contract: LoRA is on, nothing is trained, the routers are not asked. Boundary: knows batches and models, not recipes.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerroute.data.collate import StepCollator
from layerroute.data.render import Sample
from layerroute.data.steps import STEP_TYPES
from layerroute.model.routed import RoutedModel
from layerroute.training import objective

__all__ = ["choose_rows", "greedy_order", "losses_without", "removal_costs"]

_CANDIDATES = 8
"""Blocks tried at each step of a greedy search: enough that the best is rarely missed, few enough for a CPU."""


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
        part = [{key: value.to(model.device) for key, value in collator(samples).items()}]
        full = losses_without(model, part, [], [None])
        costs[STEP_TYPES.index(name), model.routable] = (losses_without(model, part, [], model.routable) - full).float()
    model.train(was_training)
    return costs.clamp(min=0).to(model.device)


@torch.no_grad()
def losses_without(
    model: RoutedModel,
    part: Sequence[Mapping[str, Any]],
    removed: Collection[int],
    candidates: Sequence[int] | Sequence[None],
) -> Tensor:
    """Measure the loss without the blocks `removed` and one candidate, for each candidate.

    What lies below a candidate is run once for all of them.

    Args:
        model: in evaluation mode, LoRA on.
        part: batches of `StepCollator` on the model's device; of one row each, nothing is padded. A batch may hold
            `past_key_values` of tokens before its own, which were read with every block, and `position_ids`.
        removed: blocks that are left out already.
        candidates: blocks that are not; None for no further one.

    Returns:
        float64 `[candidates]`, on the CPU: nats per target token of all batches.
    """
    total, tokens = torch.zeros(len(candidates), dtype=torch.float64), 0
    for batch in part:
        positions, targets = objective.loss_tokens(batch["labels"])
        wanted = targets != -100
        tokens += int(wanted.sum())
        below = _Below(removed, [block for block in candidates if block is not None])
        if below.entering:
            model.structure.decoder(**_inputs(batch), routing=below)
        for place, candidate in enumerate(candidates):
            above = _Above(below, candidate)
            logits = model.backbone(**_inputs(batch), logits_to_keep=positions, routing=above).logits
            total[place] += float(objective.cross_entropy_sum(logits[wanted], targets[wanted]))
    return total / tokens


def greedy_order(
    model: RoutedModel,
    parts: Sequence[Sequence[Mapping[str, Any]]],
    alone: Mapping[int, float],
    depth: int,
    removed: Sequence[int] = (),
) -> list[int]:
    """Take blocks out one by one, each time the one whose absence raises the loss least, given those that are out.

    Tried at each step are the 8 blocks still in that were cheapest to leave out alone.

    Args:
        model: in evaluation mode, LoRA on.
        parts: each as in `losses_without`, and of equal weight: the loss is the mean of theirs.
        alone: the candidates, and that loss without each of them alone (see `losses_without`); NaN counts as the worst.
        depth: how many blocks to take out, at most all candidates.
        removed: blocks that are out already; none of the candidates.

    Returns:
        `depth` blocks in the order in which they go: every beginning of it is the choice for a lower rate.
    """
    ranked = sorted(alone, key=lambda block: _sortable(alone[block]))
    order = [] if removed else ranked[: min(depth, 1)]
    while len(order) < depth:
        candidates = [block for block in ranked if block not in order][:_CANDIDATES]
        losses = torch.stack([losses_without(model, part, [*removed, *order], candidates) for part in parts]).mean(0)
        order.append(min(zip(candidates, losses.tolist(), strict=True), key=lambda pair: _sortable(pair[1]))[0])
    return order


def _sortable(loss: float) -> float:
    return loss if loss == loss else float("inf")


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the backbone takes; a pass writes into its own copy of the keys and values before it."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    past = copy.deepcopy(batch.get("past_key_values"))
    return {**inputs, "past_key_values": past, "use_cache": past is not None}


class _Below:
    """A pass without some blocks that keeps what enters each candidate, and ends at the highest of them."""

    def __init__(self, removed: Collection[int], candidates: Collection[int]) -> None:
        self.removed = removed
        self.last = max(candidates, default=-1)
        self.entering: dict[int, Tensor] = dict.fromkeys(candidates, torch.empty(0))

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if index in self.entering:
            self.entering[index] = hidden
        if index in self.removed or index >= self.last:
            return hidden
        output: Tensor = block(hidden, **kwargs)
        return output


class _Above:
    """The rest of such a pass, without the candidate: it starts from what entered that."""

    def __init__(self, below: _Below, candidate: int | None) -> None:
        self.below = below
        self.candidate = candidate

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if self.candidate is not None and index <= self.candidate:
            return self.below.entering[self.candidate]
        if index in self.below.removed:
            return hidden
        output: Tensor = block(hidden, **kwargs)
        return output
