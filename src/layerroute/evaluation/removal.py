"""Which blocks a static route leaves out first: those that change their input least, or that the loss needs least.

Contract: LoRA is on, nothing is trained, and only routable blocks are ever left out by loss. Boundary: knows batches
and models, not rates or rows; `baselines.py` decides how many blocks go.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerroute.data.collate import StepCollator
from layerroute.data.render import Sample
from layerroute.evaluation.measure import batches
from layerroute.model.routed import RoutedModel
from layerroute.training.objective import cross_entropy_sum, loss_tokens

__all__ = ["block_influence", "greedy_order", "losses_without"]

_CANDIDATES = 8
"""Blocks tried at each step of a greedy search: enough that the best is rarely missed, few enough for a CPU."""


@torch.no_grad()
def block_influence(model: RoutedModel, samples: Sequence[Sample], collator: StepCollator) -> Tensor:
    """Measure what each block does to its input at full depth: ShortGPT's block influence (arXiv:2403.03853).

    `1 - mean over tokens of cos(x, y)`, x entering the block and y leaving it; every token of prompt and target counts.

    Args:
        model: in evaluation mode, LoRA on.
        samples: any number.
        collator: makes batches of them.

    Returns:
        float64 `[blocks]`, on the CPU.
    """
    cosines = _Cosines(model.routers.blocks)
    for group in batches(samples):
        batch = {name: tensor.to(model.device) for name, tensor in collator(group).items()}
        cosines.mask = batch["attention_mask"].bool()
        _through_blocks(model, batch, cosines)
    return 1 - cosines.total / cosines.tokens


@torch.no_grad()
def losses_without(
    model: RoutedModel, part: Sequence[Mapping[str, Tensor]], removed: Collection[int], candidates: Sequence[int]
) -> Tensor:
    """Measure the loss without the blocks `removed` and one candidate, for each candidate.

    What lies below a candidate is run once for all of them.

    Args:
        model: in evaluation mode, LoRA on.
        part: batches of `StepCollator` on the model's device; of one row each, nothing is padded.
        removed: blocks that are left out already.
        candidates: blocks that are not.

    Returns:
        float64 `[candidates]`, on the CPU: nats per target token of all batches.
    """
    total, tokens = torch.zeros(len(candidates), dtype=torch.float64), 0
    for batch in part:
        below = _Below(removed, candidates)
        _through_blocks(model, batch, below)
        positions, targets = loss_tokens(batch["labels"])
        wanted = targets != -100
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        tokens += int(wanted.sum())
        for place, candidate in enumerate(candidates):
            above = _Above(removed, candidate, below.entering[candidate])
            logits = model.backbone(**inputs, logits_to_keep=positions, use_cache=False, routing=above).logits
            total[place] += float(cross_entropy_sum(logits[wanted], targets[wanted]))
    return total / tokens


def greedy_order(
    model: RoutedModel, parts: Sequence[Sequence[Mapping[str, Tensor]]], alone: Tensor, depth: int
) -> list[int]:
    """Take blocks out one by one, each time the one whose absence raises the loss least, given those that are out.

    Tried at each step are the 8 blocks still in that were cheapest to leave out alone.

    Args:
        model: in evaluation mode, LoRA on.
        parts: each as in `losses_without`, and of equal weight: the loss is the mean of theirs.
        alone: float64 `[routable]`: that loss without each routable block alone (see `losses_without`).
        depth: how many blocks to take out, at most all that are routable.

    Returns:
        `depth` blocks in the order in which they go: every beginning of it is the choice for a lower rate.
    """
    ranked = [model.routable[position] for position in _sortable(alone).argsort(stable=True).tolist()]
    order = ranked[: min(depth, 1)]
    while len(order) < depth:
        candidates = [block for block in ranked if block not in order][:_CANDIDATES]
        losses = torch.stack([losses_without(model, part, order, candidates) for part in parts]).mean(0)
        order.append(candidates[int(_sortable(losses).argmin())])
    return order


def _sortable(losses: Tensor) -> Tensor:
    """Losses with those that are no number last."""
    return losses.nan_to_num(nan=float("inf"))


def _through_blocks(model: RoutedModel, batch: Mapping[str, Tensor], routing: Any) -> None:
    """Run the decoder without its head."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model.structure.decoder(**inputs, use_cache=False, routing=routing)


class _Cosines:
    """A pass at full depth that adds up the cosine of what enters and what leaves each block, over attended tokens."""

    def __init__(self, blocks: int) -> None:
        self.total = torch.zeros(blocks, dtype=torch.float64)
        self.tokens = torch.zeros(blocks, dtype=torch.float64)
        self.mask = torch.empty(0)

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        output: Tensor = block(hidden, **kwargs)
        cosine = functional.cosine_similarity(hidden.float(), output.float(), dim=-1)[self.mask]
        self.total[index] += cosine.double().sum().cpu()
        self.tokens[index] += len(cosine)
        return output


class _Below:
    """A pass without some blocks that keeps what enters each candidate, and ends at the highest of them."""

    def __init__(self, removed: Collection[int], candidates: Collection[int]) -> None:
        self.removed = removed
        self.last = max(candidates)
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

    def __init__(self, removed: Collection[int], candidate: int, entering: Tensor) -> None:
        self.removed = removed
        self.candidate = candidate
        self.entering = entering

    def run(self, index: int, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if index <= self.candidate:
            return self.entering
        if index in self.removed:
            return hidden
        output: Tensor = block(hidden, **kwargs)
        return output
