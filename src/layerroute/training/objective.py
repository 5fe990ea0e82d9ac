"""What training minimises, as pure functions of tensors.

    loss = cross_entropy + router_loss_weight * penalty + distillation_weight * distillation

Shapes: B rows, N blocks, K step types, n loss tokens, V words. Gates are 1 where a block runs. Knows nothing of models,
trainers or recipes; steps are optimiser updates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "budget_at",
    "budget_penalty",
    "cross_entropy_sum",
    "distillation_loss",
    "gate_cost",
    "gate_movement",
    "learning_rate_at",
    "loss_tokens",
    "noise_at",
    "running_rates",
    "skip_sums",
    "soft_mean_penalty",
]


def soft_mean_penalty(gate_probs: Tensor) -> Tensor:
    """The publication's penalty: the mean gate probability over rows and all blocks, `sum(p) / (B * N)`.

    Args:
        gate_probs: float `[B, N]`; blocks without a router count as 1.
    """
    return gate_probs.float().mean()


def skip_sums(gates: Tensor, step_types: Tensor, types: int) -> tuple[Tensor, Tensor]:
    """Skip rates of a batch, added up per step type.

    Args:
        gates: float `[B, N]`, hard; its (straight-through) gradient is kept.
        step_types: int64 `[B]`, in `0..types-1`.
        types: K.

    Returns:
        float32 `[K]`: sum over the type's rows of the share of blocks not executed; float32 `[K]`: its rows.
    """
    member = functional.one_hot(step_types, types).float()
    return member.T @ (1 - gates.float()).mean(1), member.sum(0)


def running_rates(running: Tensor, rates: Tensor, counts: Tensor, decay: float) -> Tensor:
    """Exponential mean of the skip rates per step type, of the micro-batches that hold the type.

    `running' = decay * running + (1 - decay) * rates` where `counts > 0`; the first rate seen stands as it is.

    Args:
        running: float `[K]`, NaN where no row of the type was seen yet.
        rates: float `[K]`, this micro-batch's mean per type.
        counts: float `[K]`, this micro-batch's rows per type.
        decay: in `[0, 1)`.
    """
    mixed = torch.where(running.isnan(), rates, decay * running + (1 - decay) * rates)
    return torch.where(counts > 0, mixed, running)


def budget_penalty(rates: Tensor, statistic: Tensor, budgets: Tensor, counts: Tensor) -> Tensor:
    """Squared distance of the skip rate from its budget, summed over the step types present.

    `sum over k with counts_k > 0 of (s_k - budget_k)^2`, where `s = statistic` in value and `rates` in gradient: one
    micro-batch holds too few rows to say by itself on which side of the budget the routers are (the square of its mean
    would also punish rows for differing), so the running mean gives the error and the batch gives the direction:
    `d/d rates_k = 2 * (statistic_k - budget_k)`.

    Two-sided, because the first-order gradient of the cross-entropy closes blocks as readily as it opens them: a budget
    of 0 keeps planning steps whole, and no type drifts beyond what it was granted. Summed, so that a type's pull does
    not depend on which other types happen to share its batch.

    Args:
        rates: float `[K]` with gradient, this micro-batch's skip rate per type.
        statistic: float `[K]`, the running skip rate (see `running_rates`).
        budgets: float `[K]`.
        counts: float `[K]`, rows per type in this micro-batch; a type without rows adds nothing.
    """
    value = statistic.detach() + (rates - rates.detach())
    present = counts > 0
    error = torch.where(present, value - budgets, torch.zeros_like(value))
    return error.square().sum()


def gate_cost(gates: Tensor, costs: Tensor, step_types: Tensor) -> Tensor:
    """What the closed gates cost by the measure of single removals: mean over rows of `sum of cost[type, block]`.

    Args:
        gates: float `[B, N]`, hard; its (straight-through) gradient is kept.
        costs: float `[K, N]`, nats per loss token (see `removal_costs`).
        step_types: int64 `[B]`.
    """
    return ((1 - gates.float()) * costs[step_types]).sum(1).mean()


def budget_at(step: int, budget: float, ramp_steps: float) -> float:
    """The budget at update `step` (from 0): `budget * min(1, step / ramp_steps)`."""
    return budget if step >= ramp_steps else budget * step / ramp_steps


def noise_at(step: int, noise: float, steps: float) -> float:
    """The scale of the logit noise at update `step` (from 0): `noise * max(0, 1 - step / steps)`."""
    return noise * (1 - step / steps) if step < steps else 0.0


def learning_rate_at(step: int, peak: float, lowest: float | None, warmup: float, steps: int) -> float:
    """The learning rate of update `step` (from 0) of `steps`.

    `peak * (step + 1) / (warmup + 1)` before `warmup`; then, with `p = (step - warmup) / (steps - warmup)`,
    `lowest + (peak - lowest) * (1 + cos(pi * p)) / 2`, or `peak` throughout if `lowest` is None.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if lowest is None:
        return peak
    progress = min(1.0, (step - warmup) / max(steps - warmup, 1))
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2


def loss_tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where logits are needed, so that the others are never computed.

    Args:
        labels: int64 `[B, T]`, -100 outside the loss, not shifted.

    Returns:
        int64 `[P]`: positions that predict a loss token in at least one row (for `logits_to_keep`);
        int64 `[B, P]`: the labels of the tokens after them.
    """
    positions = (labels[:, 1:] != -100).any(0).nonzero().squeeze(1)
    return positions, labels[:, positions + 1]


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """`-sum log softmax(logits)[target]` over the targets that are not -100, in float32.

    Args:
        logits: float `[n, V]`.
        targets: int64 `[n]`.
    """
    return functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """`sum over loss tokens of KL(teacher || student)`, in float32; no gradient reaches the teacher.

    Args:
        student_logits: float `[..., V]`.
        teacher_logits: float `[..., V]`.
        labels: int64 `[...]`; tokens at -100 add nothing, and their logits are dropped before any softmax.
    """
    wanted = labels != -100
    student = functional.log_softmax(student_logits[wanted].float(), dim=-1)
    teacher = functional.log_softmax(teacher_logits[wanted].detach().float(), dim=-1)
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)


def gate_movement(gate_probs: Tensor, initial_logit: Tensor, routable: list[int]) -> Tensor:
    """How far the gates are from where they started: mean `|p - sigmoid(initial)|` over rows and routable blocks.

    Args:
        gate_probs: float `[B, N]`.
        initial_logit: float `[R]`, the routers' logits before training.
        routable: the R block indices that carry a router.
    """
    initial = torch.sigmoid(initial_logit).to(gate_probs.device)
    return (gate_probs[:, routable].detach().float() - initial).abs().mean()
