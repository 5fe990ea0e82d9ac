"""A recipe's objective applied to a model: one micro-batch in, its loss out, what it consisted of kept for the log.

Owns the only state that the objective has, the running skip rates. Knows nothing of the training loop; steps are
optimiser updates, counted by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerroute.data.steps import STEP_TYPES
from layerroute.model.routed import RoutedModel, RoutedOutput
from layerroute.training import objective
from layerroute.training.collapse import Collapse
from layerroute.training.meter import Means
from layerroute.training.recipe import Recipe

__all__ = ["MODEL_INPUTS", "RoutedLoss", "full_depth_divergence"]

MODEL_INPUTS = ("input_ids", "attention_mask", "context_mask", "segment_ids")
"""The keys of a batch that the model takes; labels and step types stay with the loss."""


class RoutedLoss:
    """Cross-entropy, penalty and distillation of a `RoutedModel`.

    The penalty, the gates' cost and every figure of the gates count decisions: one for each segment of a row's turn,
    each under its own step type.

    Args:
        recipe: every weight and schedule.
        measure_costs: measures what each block is worth to each step type, on so many rows (see `removal_costs`).
        reduce: adds a tensor up over all processes.
        processes: how many there are; gradients are averaged over them.
        device: the model's.
    """

    def __init__(
        self,
        recipe: Recipe,
        measure_costs: Callable[[int], Tensor],
        reduce: Callable[[Tensor], Tensor],
        processes: int,
        device: torch.device,
    ) -> None:
        assert recipe.gates is not None
        self.settings = recipe.objective
        self.gates = recipe.gates
        self.updates = recipe.training.updates
        self.measure_costs = measure_costs
        self.reduce = reduce
        self.processes = processes
        self.trained = bool(recipe.optimizer.router_lr)
        self.collapse = Collapse()
        self.means = Means()
        self.running = torch.full((len(STEP_TYPES),), float("nan"), device=device)
        """float32 `[K]`: running skip rate per step type, NaN where none was seen."""
        self.costs: Tensor | None = None
        """float32 `[K, blocks]`: see `removal_costs`; measured before the first batch with `gate_signal="measured"`."""

    def budgets(self, step: int) -> dict[str, float]:
        """Skip budget per step type at update `step`; empty without budgets."""
        goals = self.settings.budgets.model_dump(include=set(STEP_TYPES)) if self.settings.budgets else {}
        ramp = self.settings.ramp_share * self.updates
        return {name: objective.budget_at(step, goal, ramp) for name, goal in goals.items()}

    def figures(self, step: int) -> dict[str, float]:
        """What the log says of update `step` beside the means: budgets and noise."""
        budgets = {f"budget_{name}": budget for name, budget in self.budgets(step).items()}
        return {**budgets, "logit_noise": self.noise(step)}

    def noise(self, step: int) -> float:
        """Scale of the logit noise at update `step`."""
        return objective.noise_at(step, self.gates.logit_noise, self.gates.noise_share * self.updates)

    def __call__(
        self,
        model: nn.Module,
        routed: RoutedModel,
        inputs: Mapping[str, Tensor],
        step: int,
        tokens: Tensor | int | None,
        micro_batches: int,
    ) -> tuple[Tensor, RoutedOutput]:
        """Loss of one micro-batch, so scaled that the micro-batches of an update add up to the update's loss.

        Cross-entropy and distillation are means over the update's loss tokens; the penalty and the gates' measured cost
        are means over its micro-batches.

        Args:
            model: `routed`, or the distributed wrapper around it.
            routed: the model itself, in training mode.
            inputs: a batch of `StepCollator`.
            step: update, from 0.
            tokens: loss tokens of the whole update, over all processes; None counts this micro-batch's.
            micro_batches: of the update.
        """
        settings = self.settings
        positions, targets = objective.loss_tokens(inputs["labels"])
        batch = {name: inputs[name] for name in MODEL_INPUTS}
        measured = self.gates.gate_signal == "measured"
        if measured and self.costs is None:
            assert self.gates.cost_rows is not None
            self.costs = self.measure_costs(self.gates.cost_rows)
        out = model(**batch, logit_noise=self.noise(step), gate_gradient=not measured, logits_to_keep=positions)
        wanted = targets != -100
        cross_entropy = objective.cross_entropy_sum(out.logits[wanted], targets[wanted])
        distillation = torch.zeros_like(cross_entropy)
        if settings.distillation_weight:
            distillation = full_depth_divergence(routed, batch, positions, targets, out).sum()
        present = inputs["segment_types"] >= 0
        gates, gate_probs, types = out.gates[present], out.gate_probs[present], inputs["segment_types"][present]
        self._watch(routed, gate_probs, step)
        share = self._share(len(types), gates.device)
        penalty = self._penalty(gates, gate_probs, types, share, step)
        gate_cost = share * self._gate_cost(gates, types) if measured else torch.zeros_like(penalty)
        own_tokens = wanted.sum()
        update_tokens = own_tokens if tokens is None else tokens
        lm_loss = (cross_entropy + settings.distillation_weight * distillation) / update_tokens
        # gradients are averaged over processes, where the sum is meant
        routing_loss = self.gates.router_loss_weight * penalty + gate_cost
        loss = self.processes * lm_loss + routing_loss / micro_batches
        self.means.add("cross_entropy", cross_entropy, own_tokens)
        self.means.add("distillation", distillation, own_tokens)
        self.means.add("penalty", penalty, torch.ones_like(penalty))
        self.means.add("gate_cost", gate_cost, torch.ones_like(penalty))
        moved = objective.gate_movement(gate_probs, routed.routers.initial_logit, routed.routable)
        self.means.add("gate_movement", share * moved, torch.ones_like(moved))
        return loss, out

    def _watch(self, routed: RoutedModel, gate_probs: Tensor, step: int) -> None:
        """Have it said where gates no longer choose, exploration noise apart; routers that are not trained need not."""
        budgets = self.budgets(step)
        routable = (gate_probs.detach()[:, routed.routable] > routed.router_config.threshold).float()
        share, count = self.reduce(torch.stack([routable.sum(), torch.ones_like(routable).sum()])).tolist()
        if count:
            self.collapse.note(share / count, step, skipping=self.trained and (not budgets or any(budgets.values())))

    def _gate_cost(self, gates: Tensor, types: Tensor) -> Tensor:
        assert self.costs is not None
        return objective.gate_cost(gates, self.costs, types)

    def _share(self, decisions: int, device: torch.device) -> Tensor:
        """This process's share of all decisions times the processes: what turns its mean into its part of the mean."""
        own = torch.tensor(float(decisions), device=device)
        return self.processes * own / self.reduce(own)

    def _penalty(self, gates: Tensor, gate_probs: Tensor, types: Tensor, share: Tensor, step: int) -> Tensor:
        """The penalty of decisions: gates and their probabilities float32 `[n, blocks]`, step types int64 `[n]`."""
        sums, counts = objective.skip_sums(gates, types, len(STEP_TYPES))
        for index, name in enumerate(STEP_TYPES):
            self.means.add(f"skip_rate_{name}", sums[index], counts[index])
        if self.gates.penalty == "soft_mean":
            return share * objective.soft_mean_penalty(gate_probs)
        totals, rows = self.reduce(torch.stack([sums.detach(), counts]))
        shared = rows.clamp(min=1)
        self.running = objective.running_rates(self.running, totals / shared, rows, self.gates.statistic_decay)
        # the local part of the mean over all processes, times their number because gradients are averaged
        rates = sums * self.processes / shared
        budgets = torch.tensor([self.budgets(step)[name] for name in STEP_TYPES], device=rates.device)
        return objective.budget_penalty(rates, self.running, budgets, rows)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, JSON-able and exact."""
        rates = [None if rate != rate else rate for rate in self.running.tolist()]
        return {"running_skip_rates": rates, "removal_costs": None if self.costs is None else self.costs.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave."""
        rates = [float("nan") if rate is None else rate for rate in state["running_skip_rates"]]
        self.running = torch.tensor(rates, device=self.running.device)
        costs = state["removal_costs"]
        self.costs = None if costs is None else torch.tensor(costs, device=self.running.device)


def full_depth_divergence(
    routed: RoutedModel, batch: Mapping[str, Tensor], positions: Tensor, targets: Tensor, out: RoutedOutput
) -> Tensor:
    """Divergence of each row from the same weights' full-depth pass, summed over its loss tokens, float32 `[B]`.

    A row that skips in no segment has none, and costs no pass.

    Args:
        routed: in training mode.
        batch: what the model takes.
        positions: of the loss tokens, and `targets` there (see `objective.loss_tokens`).
        targets: int64 `[B, P]`.
        out: what the model gave for the batch under its routes.
    """
    assert out.routes is not None and out.logits is not None
    rows = (~out.routes).flatten(1).any(1).nonzero().squeeze(1)
    divergence = torch.zeros(len(out.routes), device=out.logits.device)
    if not len(rows):
        return divergence
    skipping = {name: value[rows] for name, value in batch.items()}
    routed.eval()  # the teacher has no dropout
    with torch.no_grad(), routed.disable_routing():
        teacher = routed(**skipping, logits_to_keep=positions, use_cache=False).logits
    routed.train()
    pairs = zip(out.logits[rows], teacher, targets[rows], strict=True)
    return divergence.index_copy(0, rows, torch.stack([objective.distillation_loss(*pair) for pair in pairs]))
