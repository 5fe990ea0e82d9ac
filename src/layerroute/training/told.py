"""The loss of told routes: LoRA learns to live with every route of the bank.

A call is told its own route from its boundary on. The prompt before it is told that of any kind, whatever comes next: a
prompt's route that gave the kind away would teach the model to read there, and not from the prompt, whether to call.
Owns the state of search, heal, route: the bank, which is searched when a depth first asks for a block. Has the surface
of `RoutedLoss`; steps are optimiser updates, counted by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerroute.model.routed import RoutedModel, RoutedOutput
from layerroute.training import objective
from layerroute.training.bank import DIRECT, KINDS, Bank, decision_kinds, prompt_kinds
from layerroute.training.depth import make_depth
from layerroute.training.loss import MODEL_INPUTS, full_depth_divergence
from layerroute.training.meter import Means
from layerroute.training.recipe import Recipe

__all__ = ["ToldLoss"]


class ToldLoss:
    """Cross-entropy and distillation of a `RoutedModel` under the routes of a bank.

    Args:
        recipe: weights and schedules.
        model: whose blocks are counted.
        search: extends a bank to a depth by kind (see `extend_bank`).
        reduce: adds a tensor up over all processes.
        processes: how many there are; gradients are averaged over them.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: RoutedModel,
        search: Callable[[Bank, Mapping[str, int]], None],
        reduce: Callable[[Tensor], Tensor],
        processes: int,
    ) -> None:
        assert recipe.search is not None
        self.objective = recipe.objective
        self.part = recipe.search.part
        self.search = search
        self.reduce = reduce
        self.processes = processes
        self.means = Means()
        self.bank = Bank(model.routers.blocks)
        self.depth = make_depth(recipe, model)
        self.prompt_kinds = prompt_kinds(bool(model.router_config.boundaries))

    def figures(self, step: int) -> dict[str, float]:
        """What the log says of update `step` beside the means: the share of blocks that each kind is to skip."""
        return {f"budget_{kind}": depth / self.bank.blocks for kind, depth in self.depth.at(step).items()}

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
        self._search(self.depth.at(step))
        depth = self.depth.at(step)  # the search may have found fewer blocks than that
        positions, targets = objective.loss_tokens(inputs["labels"])
        batch = {name: inputs[name] for name in MODEL_INPUTS}
        kinds = decision_kinds(inputs["segment_types"])
        told = self._told(kinds, inputs, step)
        out = model(**batch, routes=self.bank.turn_routes(told, depth), logits_to_keep=positions)
        wanted = targets != -100
        cross_entropy = objective.cross_entropy_sum(out.logits[wanted], targets[wanted])
        own_tokens = wanted.sum()
        divergence = torch.zeros_like(cross_entropy)
        if self.objective.distillation_weight:
            by_row = full_depth_divergence(routed, batch, positions, targets, out)
            divergence = by_row.sum()
            own = told[:, 0] == kinds[:, 0]
            self._note(by_row.detach() * own, wanted.sum(1) * own, kinds)
        self.means.add("cross_entropy", cross_entropy, own_tokens)
        self.means.add("distillation", divergence, own_tokens)
        skipped = (~out.routes).float().mean(-1)
        for index, kind in enumerate(KINDS):
            self.means.add(f"skip_rate_{kind}", skipped[kinds == index].sum(), (kinds == index).sum())
        loss = cross_entropy + self.objective.distillation_weight * divergence
        # gradients are averaged over processes, where the sum is meant
        return self.processes * loss / (own_tokens if tokens is None else tokens), out

    def _told(self, kinds: Tensor, inputs: Mapping[str, Tensor], step: int) -> Tensor:
        """The kinds whose routes are told, int64 `[B, S]`: any prompt's first, each later segment's own.

        Which one is a function of the update's number and of the prompt's tokens alone. So it tells the model nothing
        that the prompt does not, and is the same however rows are spread over processes.
        """
        read = inputs["context_mask"] & inputs["attention_mask"].bool()
        drawn = ((inputs["input_ids"] * read).sum(1) + step) % len(self.prompt_kinds)
        told = kinds.clone()
        told[:, 0] = torch.tensor(self.prompt_kinds, device=kinds.device)[drawn]
        return told

    def _note(self, divergence: Tensor, tokens: Tensor, kinds: Tensor) -> None:
        """Tell the depth what skipping cost, `[B]` each; a row counts for every kind that its target follows.

        Rows whose prompt was told the route of another kind are 0 in both.

        That of a thought before a call is not among them: its tokens are in the prompt.
        """
        last = kinds.gather(1, (kinds >= 0).sum(1, keepdim=True) - 1).squeeze(1)
        member = torch.nn.functional.one_hot(last, len(KINDS))
        member[:, DIRECT] = (kinds[:, 0] == DIRECT).long()
        member = member.to(divergence.dtype)
        sums = self.reduce(torch.stack([divergence @ member, tokens.to(divergence.dtype) @ member]))
        for index, kind in enumerate(KINDS):
            self.means.add(f"distillation_{kind}", sums[0, index], sums[1, index])
        self.depth.note({kind: (total, count) for kind, (total, count) in zip(KINDS, sums.T.tolist(), strict=True)})

    def _search(self, depth: Mapping[str, int]) -> None:
        """Have the bank extended, a part at a time, where an order is shorter than its depth."""
        orders = self.bank.orders
        if all(depth[kind] <= len(orders[kind]) for kind in KINDS):
            return
        most = self.depth.most
        goals = {kind: min(math.ceil(depth[kind] / self.part) * self.part, most[kind]) for kind in KINDS}
        self.search(self.bank, goals)
        short = [kind for kind in KINDS if len(orders[kind]) < goals[kind]]
        self.depth.limit({kind: len(orders[kind]) if kind in short else most[kind] for kind in KINDS})

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, JSON-able and exact."""
        return {"orders": self.bank.orders, "depth": self.depth.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave."""
        self.bank = Bank(self.bank.blocks, state["orders"])
        self.depth.load_state(state["depth"])
