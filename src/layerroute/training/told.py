"""The loss of told routes: every decision of a row takes the route of its kind, and LoRA learns to live with it.

Owns the state of search, heal, route: the bank, which it has searched when a budget first asks for a block. Has the
surface of `RoutedLoss`; steps are optimiser updates, counted by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerroute.model.routed import RoutedModel, RoutedOutput
from layerroute.training import objective
from layerroute.training.bank import KINDS, Bank, decision_kinds, depths
from layerroute.training.loss import MODEL_INPUTS, full_depth_divergence
from layerroute.training.meter import Means
from layerroute.training.recipe import Recipe

__all__ = ["ToldLoss"]


class ToldLoss:
    """Cross-entropy and distillation of a `RoutedModel` under the routes of a bank.

    Args:
        recipe: weights and schedules.
        blocks: of the backbone.
        search: extends a bank to a depth by kind (see `extend_bank`).
        reduce: adds a tensor up over all processes.
        processes: how many there are; gradients are averaged over them.
    """

    def __init__(
        self,
        recipe: Recipe,
        blocks: int,
        search: Callable[[Bank, Mapping[str, int]], None],
        reduce: Callable[[Tensor], Tensor],
        processes: int,
    ) -> None:
        assert recipe.search is not None and recipe.objective.budgets is not None
        self.objective, self.settings = recipe.objective, recipe.search
        self.updates = recipe.training.updates
        self.search = search
        self.reduce = reduce
        self.processes = processes
        self.means = Means()
        self.bank = Bank(blocks)
        self.final = depths(recipe.objective.budgets, blocks)
        """Blocks that each kind leaves out in the end."""

    def depth(self, step: int) -> dict[str, int]:
        """Blocks that each kind leaves out at update `step`: none in the warm-up, then more and more along the ramp."""
        done = step - round(self.settings.warmup_share * self.updates)
        ramp = self.objective.ramp_share * self.updates
        return {kind: math.ceil(objective.budget_at(max(done, 0), goal, ramp)) for kind, goal in self.final.items()}

    def figures(self, step: int) -> dict[str, float]:
        """What the log says of update `step` beside the means: the share of blocks that each kind is to skip."""
        return {f"budget_{kind}": depth / self.bank.blocks for kind, depth in self.depth(step).items()}

    def __call__(
        self,
        model: nn.Module,
        routed: RoutedModel,
        inputs: Mapping[str, Tensor],
        step: int,
        tokens: Tensor | int | None,
        micro_batches: int,
    ) -> tuple[Tensor, RoutedOutput]:
        """Loss of one micro-batch; arguments and scale are those of `RoutedLoss`."""
        depth = self.depth(step)
        self._search(depth)
        positions, targets = objective.loss_tokens(inputs["labels"])
        batch = {name: inputs[name] for name in MODEL_INPUTS}
        kinds = decision_kinds(inputs["segment_types"])
        out = model(**batch, routes=self.bank.turn_routes(kinds, depth), logits_to_keep=positions)
        wanted = targets != -100
        cross_entropy = objective.cross_entropy_sum(out.logits[wanted], targets[wanted])
        divergence = torch.zeros_like(cross_entropy)
        if self.objective.distillation_weight:
            divergence = full_depth_divergence(routed, batch, positions, targets, out)
        own_tokens = wanted.sum()
        loss = cross_entropy + self.objective.distillation_weight * divergence
        self.means.add("cross_entropy", cross_entropy, own_tokens)
        self.means.add("distillation", divergence, own_tokens)
        skipped = (~out.routes).float().mean(-1)
        for index, kind in enumerate(KINDS):
            self.means.add(f"skip_rate_{kind}", skipped[kinds == index].sum(), (kinds == index).sum())
        # gradients are averaged over processes, where the sum is meant
        return self.processes * loss / (own_tokens if tokens is None else tokens), out

    def _search(self, depth: Mapping[str, int]) -> None:
        """Have the bank extended, a round at a time, where an order is shorter than its depth."""
        goals = {}
        for kind, final in self.final.items():
            part = max(math.ceil(final / self.settings.rounds), 1)
            goals[kind] = min(math.ceil(depth[kind] / part) * part, final)
        if any(goals[kind] > len(self.bank.orders[kind]) for kind in KINDS):
            self.search(self.bank, goals)
            for kind, order in self.bank.orders.items():
                self.final[kind] = self.final[kind] if len(order) >= goals[kind] else len(order)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, JSON-able and exact."""
        return {"orders": self.bank.orders, "final": self.final}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave."""
        self.bank = Bank(self.bank.blocks, state["orders"])
        self.final = dict(state["final"])
